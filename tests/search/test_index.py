"""`ImageIndex` against a comparison of everything with everything in numpy, and what it takes and refuses."""

import io
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from search_models import make_model
from training_samples import encoded, picture, tiny_processor

from diffclip_hf import DiffCLIPImageProcessorPil, DiffCLIPTokenizer, ImageIndex
from diffclip_hf.search import Match
from diffclip_hf.search.nearest import make_nearest, ranked


WIDTH = 24


def brute_force(embeds: np.ndarray, names: list[str], query: np.ndarray, count: int) -> list[tuple[float, str]]:
    """The cosine similarities by their definition, in float64."""
    rows, query = embeds.astype(np.float64), query.astype(np.float64)
    scores = (rows * query).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    return sorted(zip(scores.tolist(), names, strict=True), key=lambda one: (-one[0], one[1]))[:count]


def assert_found(found, wanted):
    assert [match.name for match in found] == [name for _, name in wanted]
    assert np.allclose([match.score for match in found], [score for score, _ in wanted], atol=1e-6)


@pytest.fixture
def random_rows():
    generator = np.random.default_rng(0)
    # Of any length, as what others computed may be.
    return generator.normal(size=(500, WIDTH)).astype(np.float32) * generator.uniform(0.1, 9, (500, 1)).astype("f4")


# What is found ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 10, 500, 1000])
def test_the_nearest_are_those_of_brute_force(top_k, index, random_rows, monkeypatch):
    # Fewer than there are queries at once, so that they're taken in parts.
    monkeypatch.setattr("diffclip_hf.search.nearest.MOST_SCORES", 1000)
    names = [f"{number:03}.jpg" for number in range(500)]
    index.add(random_rows[:300], names[:300])
    index.add(torch.from_numpy(random_rows[300:]), names[300:])
    queries = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    results = index.search(queries, top_k)
    assert len(results) == 5
    for query, found in zip(queries, results, strict=True):
        assert_found(found, brute_force(random_rows, names, query, top_k))
    assert index.search(queries[3], top_k) == results[3]
    assert index.search([torch.from_numpy(queries[3])], top_k) == [results[3]]


def test_what_is_equally_near_comes_by_name(index, random_rows):
    rows = np.repeat(random_rows[:2], 101, axis=0)
    names = [f"{number:03}" for number in reversed(range(202))]
    index.add(rows, names)
    # Those of the first row are called 202 down to 101.
    assert [name for _, name in index.search(random_rows[0], 7)] == [f"{number:03}" for number in range(101, 108)]
    assert len({score for score, _ in index.search(random_rows[0], 101)}) == 1


def test_nearly_equal_scores_are_told_apart_in_float64():
    """By less than a float32 product's rounding: a hand-worked case."""
    embeds = torch.tensor([[0.6, 0.8], [0.6, 0.8 + 6e-8], [1.0, 0.0]])
    assert embeds[1, 1] > embeds[0, 1]
    found = ranked(embeds, ["a", "b", "c"], torch.tensor([0.6, 0.8]), torch.tensor([0, 1]), 2)
    assert [name for _, name in found] == ["b", "a"]


def test_texts_pictures_and_embeddings(index, model, processor, folder):
    index.add(folder)
    paths = [str(folder / name) for name in ("a.png", "b.PNG", "c.jpg", "d.webp", "sub/e.png")]
    assert index.names == tuple(paths)
    pixels = processor(images=paths, return_tensors="pt")["pixel_values"]
    tokens = processor(text=["dog", "a dog!", "dog?"], padding=True, return_tensors="pt")
    with torch.no_grad():
        images = model.get_image_features(pixel_values=pixels).pooler_output.numpy()
        texts = model.get_text_features(**tokens).pooler_output.numpy()
    assert np.allclose(index.embeds, images / np.linalg.norm(images, axis=1, keepdims=True), atol=1e-6)
    wanted = [brute_force(images, paths, query, 3) for query in (texts[0], images[2], texts[0])]
    results = index.search(["dog", folder / "c.jpg", "dog"], 3)
    for found, one in zip(results, wanted, strict=True):
        assert_found(found, one)
    assert results[0] == results[2]
    assert isinstance(results[0][0], Match)
    assert_found(index.search("dog", 3), wanted[0])
    for one in (picture(0), encoded(picture(0), "PNG"), io.BytesIO(encoded(picture(0), "PNG")), np.array(picture(0))):
        assert index.search(one, 1)[0].name == paths[0]
        assert index.search(one, 1)[0].score == pytest.approx(1, abs=1e-6)
    # Each template's embedding has length 1, and their mean is compared.
    mean = sum(text / np.linalg.norm(text) for text in texts[1:])
    assert_found(index.search("dog", 5, templates=["a {}!", "{}?"]), brute_force(images, paths, mean, 5))


def test_scores_dont_depend_on_the_precision_of_torchs_products(index, random_rows):
    index.add(random_rows, [f"{number:03}" for number in range(500)])
    found = index.search(random_rows[0])
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert index.search(random_rows[0]) == found
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        (np.float16, 2**-24),
        (np.float16, 1e4),
        (np.float32, 1e-44),
        (np.float32, 5e37),
        (np.float64, 5e-324),
        (np.float64, 1e200),
        (np.float64, 4e307),
        (np.int32, 5 * 10**8),
    ],
)
def test_the_length_of_embeddings_makes_no_difference(dtype, length, index):
    """Even where a dtype, or float64, can't hold its square; hand-worked, from a view that runs backwards."""
    rows = (np.array([[3, 4, 0], [4, 3, 0]]).astype(dtype) * np.asarray(length, dtype))[:, ::-1]
    index.add(rows, ["a", "b"])
    assert np.allclose(index.embeds, [[0, 0.8, 0.6], [0, 0.6, 0.8]], atol=1e-6)
    for query in (rows[0], index.embeds[0] * 1e30, index.embeds[0] * 1e-30):
        assert np.allclose([score for score, _ in index.search(query)], [1, 0.96], atol=1e-6)


def test_nothing_is_found_in_nothing(index, random_rows):
    assert index.search(random_rows[0]) == []
    assert index.search(["dog", "cat"]) == [[], []]
    assert index.search([]) == []
    assert len(index) == 0


@pytest.mark.parametrize("change", ["more", "fewer", "others"])
def test_a_search_sees_one_state(change, index, random_rows, monkeypatch):
    """Another thread changes the index and searches it, once the first of three queries has been ranked."""
    names = [f"{number:03}" for number in range(500)]
    index.add(random_rows[:300], names[:300])

    def other_thread():
        if change == "more":
            index.add(random_rows[300:], names[300:])
        else:
            index.remove(names[:299])
        if change == "others":
            index.add(random_rows[300:], names[300:])
        index.search(random_rows[0])

    def ranked_and_changed(*args):
        found = ranked(*args)
        if not others:
            others.append(threading.Thread(target=other_thread))
            others[0].start()
            others[0].join()
        return found

    others = []
    monkeypatch.setattr("diffclip_hf.search.nearest.MOST_SCORES", 1)
    monkeypatch.setattr("diffclip_hf.search.index.ranked", ranked_and_changed)
    queries = random_rows[[0, 400, 299]]
    for query, found in zip(queries, index.search(queries, 10), strict=True):
        assert_found(found, brute_force(random_rows[:300], names[:300], query, 10))
    assert len(index) == len(index.names) == len(index.embeds) == {"more": 500, "fewer": 1, "others": 201}[change]


def test_threads_add_and_remove(index, random_rows):
    """What one adds isn't lost while another removes, in a hundred rounds with as many switches as there can be."""
    index.add(random_rows, [f"{number:03}" for number in range(500)])

    def add_and_remove(own):
        for number in range(100):
            index.add(random_rows[:2], [f"{own} {number}", f"{own} goes"])
            index.remove(f"{own} goes")
            assert f"{own} {number}" in [name for _, name in index.search(random_rows[0], 1000)]

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(add_and_remove, "abcd"))
    finally:
        sys.setswitchinterval(switch)
    assert len(set(index.names)) == len(index.embeds) == 500 + 4 * 100


# What is added and removed ------------------------------------------------------------------------------------------


def test_a_name_that_is_there_is_replaced(index, random_rows):
    index.add(random_rows[:2], ["a", "b"])
    index.search(random_rows[0])
    index.add(random_rows[2], "a")
    assert index.names == ("a", "b")
    assert index.search(random_rows[2], 1)[0].name == "a"
    index.remove("a")
    assert [name for _, name in index.search(random_rows[2])] == ["b"]
    with pytest.raises(ValueError, match="The index has no 'a'"):
        index.remove(["a"])
    with pytest.raises(ValueError, match="names is 5; it must be a string or a path, or several"):
        index.remove(5)
    index.remove(Path("b"))
    assert index.names == ()


def test_pictures_in_memory_and_on_disk(index, folder):
    index.add([picture(0), str(folder / "b.PNG"), encoded(picture(4), "PNG")], ["first", "second", "third"])
    index.add(folder / "c.jpg")
    assert index.names == ("first", "second", "third", str(folder / "c.jpg"))
    assert index.search(folder / "sub" / "e.png", 1)[0].name == "third"


def test_what_cant_be_read_is_an_error_or_left_out(index, folder):
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png' can't be read: "):
        index.add(folder)
    assert len(index) == 0
    index.add(folder, skip_unreadable=True)
    assert len(index) == 5
    assert list(index.left_out) == [str(folder / "broken.png")]
    picture(7).save(folder / "broken.png")
    index.add(folder / "broken.png")
    assert len(index) == 6
    assert index.left_out == {}


@pytest.mark.parametrize(
    ("images", "names", "words"),
    [
        (np.ones((2, WIDTH)), None, "Embeddings need names"),
        (np.ones((2, WIDTH)), ["a"], "There are 1 names for 2 pictures"),
        (np.ones((2, WIDTH)), ["a", "a"], "'a' is given twice"),
        (np.ones((1, 7)), ["a"], "The embeddings have 7 numbers; the index has 24"),
        (np.zeros((1, WIDTH)), ["a"], "all zeros"),
        (np.full((1, WIDTH), np.nan), ["a"], "images has nan in its embedding 0; every number must be finite"),
        (np.ones((1, WIDTH), complex), ["a"], "images is an array of complex128; embeddings must be of real numbers"),
        (np.array(["x"]), ["a"], "images is an array of <U1; embeddings must be of real numbers"),
        (np.ones((1, 0)), ["a"], "all zeros"),
        (np.ones((1, WIDTH)), [3], "names has 3; each must be a string or a path"),
        (np.ones((1, WIDTH)), [b"abc"], "names has b'abc'; each must be a string or a path"),
        (np.ones((1, WIDTH)), 3, "names is 3; it must be a string or a path, or several of them"),
        (np.ones((1, WIDTH)), b"abc", "names is b'abc'; it must be a string"),
        ([picture(0)], None, "Picture 0 is of type Image, which has no path; pass names"),
        ([5], ["a"], "'a' can't be read: it is of type int"),
        (5, None, "images is of type int"),
    ],
)
def test_what_cant_be_added(images, names, words, index):
    index.add(np.ones((1, WIDTH)), ["there"])
    with pytest.raises(ValueError, match=words):
        index.add(images, names)
    assert index.names == ("there",)


def test_what_cant_be_searched(index, folder, monkeypatch):
    index.add(np.ones((1, WIDTH)), ["there"])
    monkeypatch.chdir(folder)
    for query, words in (
        (" ", "A query is empty"),
        ("a.png", r"there is a file of that name; pass Path\('a.png'\)"),
        (folder / "none.png", r"none\.png' can't be read: There is no file"),
        (folder, "isn't a file but a folder"),
        (np.ones(7), "A query's embedding has 7 numbers; the index has 24"),
        ([np.ones((2, WIDTH))], r"A query is an array of shape \(2, 24\)"),
        ([np.ones(7), "dog"], "different widths: 7, 24"),
        ("half \ud83d", "has half a character"),
        (None, "queries is None; it must be a text, a picture, an embedding, or a list of them"),
        (5, "queries is 5; it must be a text"),
        ({"a": 1}, "queries is {'a': 1}; it must be a text"),
        (np.array(5.0), r"queries is array\(5\.\); it must be a text"),
        (["dog", 5], r"queries\[1\] can't be read: it is of type int"),
        (b"abc", r"queries\[0\] can't be read: What is given as bytes"),
        ([np.ones(WIDTH), np.full(WIDTH, -np.inf)], r"queries\[1\] has -inf in its embedding 0; every number must"),
    ):
        with pytest.raises(ValueError, match=words):
            index.search(query)
    for top_k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="top_k is"):
            index.search("dog", top_k)
    with pytest.raises(ValueError, match="templates has 'a dog'"):
        index.search("dog", templates="a dog")


# Files --------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(index, model, processor, random_rows, tmp_path):
    path = tmp_path / "new" / "index.safetensors"
    names = ["ä.png", "line\nbreak.png", "not utf-8 \udcff.png"]
    index.add(random_rows[:2], names[:2])
    index.save(path)
    index.add(random_rows[2], names[2])
    index.save(path)
    # One file that anyone can read, and nothing beside it.
    assert [one.name for one in path.parent.iterdir()] == ["index.safetensors"]
    assert torch.equal(load_file(path)["embeds"], index.embeds)
    assert json.loads(load_file(path)["rows"].numpy().tobytes()) == names
    again = ImageIndex.load(path, model, processor)
    assert again.names == tuple(names)
    assert again.search(random_rows) == index.search(random_rows)
    again.add(random_rows[3], "more")
    assert again.search(random_rows[3], 1)[0].name == "more"


def test_an_index_of_another_model_is_refused(index, model, processor, random_rows, tmp_path):
    path = tmp_path / "index.safetensors"
    index.add(random_rows[0], "a")
    index.save(path)
    other = DiffCLIPImageProcessorPil(**{**processor.image_processor.to_dict(), "image_mean": [0.5] * 3})
    wrong = tiny_processor(DiffCLIPTokenizer)
    wrong.image_processor = other
    for parts, words in (
        ((make_model(1), processor), "its weights differ from this model's. Embed the pictures again"),
        ((model, wrong), "its preprocessing differs from"),
        ((make_model(1), wrong), "its weights and preprocessing differ from"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            ImageIndex.load(path, *parts)


def test_what_isnt_a_whole_index_is_refused(index, model, processor, random_rows, tmp_path):
    path = tmp_path / "index.safetensors"
    with pytest.raises(ValueError, match=r"There is no .*index\.safetensors"):
        ImageIndex.load(path, model, processor)
    index.add(random_rows[:9], list("abcdefghi"))
    index.save(path)
    data = path.read_bytes()
    # A name that was changed, a row that was, half a file, and no such file at all.
    swapped = data.replace(b'"c", "d"', b'"d", "c"')
    for wrong, words in (
        (swapped, "is damaged: its content"),
        (data[:-9] + bytes(9), "is damaged"),
        (data[: len(data) // 2], "isn't a safetensors file"),
        (b"", "isn't a safetensors file"),
    ):
        assert wrong != data
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=words):
            ImageIndex.load(path, model, processor)
    with pytest.raises(ValueError, match=f"path is {str(tmp_path)!r}, which isn't a file"):
        ImageIndex.load(tmp_path, model, processor)


# Other backends -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:builtin type :DeprecationWarning")
@pytest.mark.parametrize("backend", ["faiss", "faiss:IVF8,Flat", "faiss:Flat", "hnswlib"])
def test_other_backends(backend, model, processor, random_rows, tmp_path):
    pytest.importorskip(backend.split(":")[0], reason="a package that users install if they want it")
    names = [f"{number:03}" for number in range(500)]
    index = ImageIndex(model, processor, backend=backend)
    index.add(random_rows[:400], names[:400])
    index.search(random_rows[0])
    index.add(random_rows[400:], names[400:])
    index.remove(names[:50])
    path = tmp_path / "index.safetensors"
    index.save(path)
    again = ImageIndex.load(path, model, processor)
    assert again.backend == backend
    queries = np.random.default_rng(1).normal(size=(40, WIDTH)).astype(np.float32)
    for one in (index, again):
        hits = 0
        for query, found in zip(queries, one.search(queries), strict=True):
            wanted = dict(map(reversed, brute_force(random_rows[50:], names[50:], query, 450)))
            assert [score for score, _ in found] == sorted((score for score, _ in found), reverse=True)
            assert all(wanted[name] == pytest.approx(score, abs=1e-6) for score, name in found)
            hits += len({name for _, name in found} & set(list(wanted)[:10]))
        # IVF looks at one of eight cells.
        assert hits == 400 if backend == "faiss:Flat" else hits > (60 if "IVF" in backend else 380)
    assert len(index.search(queries[0], 1000)) == (450 if "IVF" not in backend else len(index.search(queries[0], 450)))
    exact = ImageIndex.load(path, model, processor, backend="exact")
    assert_found(exact.search(queries[0]), brute_force(random_rows[50:], names[50:], queries[0], 10))


@pytest.mark.filterwarnings("ignore:builtin type :DeprecationWarning")
@pytest.mark.parametrize("backend", ["faiss:Flat", "hnswlib"])
def test_a_search_that_began_before_more_were_added(backend, random_rows):
    """It finds as many as it asks for of the rows that it knows, though the library's index has nearer ones."""
    pytest.importorskip(backend.split(":")[0], reason="a package that users install if they want it")
    nearest, rows = make_nearest(backend), torch.nn.functional.normalize(torch.from_numpy(random_rows))
    list(nearest.candidates(rows, rows[:1], 1))
    (found,) = nearest.candidates(rows[:100], rows[400:401], 5)
    wanted = brute_force(random_rows[:100], list(range(100)), random_rows[400], 5)
    assert {row for _, row in wanted} <= set(found.tolist()) <= set(range(100))
    assert nearest.to_bytes(rows[:100]) is None


def test_a_backend_that_there_isnt(model, processor, random_rows, monkeypatch):
    for backend in ("annoy", "exact:flat", None):
        with pytest.raises(ValueError, match=r"backend is .*; it must be 'exact', 'faiss', 'hnswlib', or 'faiss:'"):
            ImageIndex(model, processor, backend=backend)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for backend in ("faiss", "hnswlib"):
        with pytest.raises(ImportError, match=rf"{backend} can't be imported; pip install 'diffclip-hf\[{backend}\]'"):
            ImageIndex(model, processor, backend=backend)


@pytest.mark.filterwarnings("ignore:builtin type :DeprecationWarning")
def test_a_kind_that_faiss_doesnt_know(model, processor, random_rows):
    pytest.importorskip("faiss", reason="a package that users install if they want it")
    index = ImageIndex(model, processor, backend="faiss:Nothing7")
    index.add(random_rows[:3], list("abc"))
    with pytest.raises(ValueError, match="FAISS can't make an index 'Nothing7'"):
        index.search(random_rows[0])
