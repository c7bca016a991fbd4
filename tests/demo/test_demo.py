"""The web demo: what it computes, what it refuses, and the page in a real browser."""

import asyncio
import re
import runpy
import shutil
import signal
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from PIL import Image
from tiny import TOWER
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, pipeline

from diffclip_hf.visualization import (
    against_others,
    image_occlusion,
    image_relevance,
    overlay,
    value_similarity,
)


pytest.importorskip("gradio", reason="the demo needs Gradio, which the extra `dev` has")
pytest.importorskip("selenium", reason="it drives the browser, and the extra `dev` has it")

from demo_browser import CHROMIUM, DRIVER, LABELS, DemoPage, chromium, served

from diffclip_hf import DiffCLIPForImageClassification, add_remote_code
from diffclip_hf.common.remote_code import CODE_FILES
from diffclip_hf.demo import page as demo
from diffclip_hf.demo.scores import (
    MAPS,
    MAX_LABEL_CHARACTERS,
    MAX_LABELS,
    check_template,
    classify,
    default_map,
    draw_overlay,
    load_pair,
    parse_labels,
    read_picture,
)
from diffclip_hf.model.image_reading_diffclip import MAX_ASPECT, MAX_PIXELS


ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "embedded" / "diffclip-emoji")
PICTURES = ROOT / "embedded" / "pictures"
NAMES = LABELS.split(", ")
# Scores in 0..1, under eager here and sdpa there.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """The folder of a CLIP of Transformers with random weights, and the embedded model's processor."""
    folder = tmp_path_factory.mktemp("models") / "clip-random"
    processor = AutoProcessor.from_pretrained(MODEL)
    text = {**TOWER, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 32}
    tokenizer = processor.tokenizer
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config={**TOWER, "image_size": 48, "patch_size": 8}, projection_dim=24
    )
    CLIPModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stock() -> dict[str, float]:
    """The scores of Transformers' own pipeline for the pizza."""
    classifier = pipeline("zero-shot-image-classification", model=MODEL, dtype=torch.float32)
    # Opaque, for the pipeline lays nothing over white.
    image = Image.open(PICTURES / "pizza.png")
    white = Image.new("RGBA", image.size, "white")
    opaque = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    found = classifier(opaque, candidate_labels=NAMES, hypothesis_template="a drawing of {}")
    return {entry["label"]: entry["score"] for entry in found}


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """A folder of files that can't be used."""
    folder = tmp_path_factory.mktemp("bad")
    whole = (PICTURES / "pizza.png").read_bytes()
    (folder / "text.png").write_text("This is a text.")
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "heavy.png").write_bytes(whole + bytes(21 << 20))
    # Headers alone, of PNGs that would be so large.
    for name, size in {"large": (10_000, 9_000), "bomb": (60_000, 60_000), "long": (201, 1)}.items():
        chunks = [b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0), b"IDAT"]
        packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
        (folder / f"{name}.png").write_bytes(whole[:8] + b"".join(packed))
    return folder


def test_scores_are_the_stock_pipelines(stock):
    found = classify(str(PICTURES / "pizza.png"), LABELS, "a drawing of {}", MODEL)
    assert list(found.scores) == list(stock)
    assert found.scores == pytest.approx(stock, abs=CLOSE)
    assert found.cut == ()


@pytest.mark.parametrize("kind", ["occlusion", "values", "relevance"])
def test_overlay_is_a_map_over_the_part_that_the_model_sees(tmp_path, kind):
    """480×480 is the overlay's size, so that there the part that is seen is the picture's own pixels."""
    square = np.random.default_rng(0).integers(0, 256, (480, 480, 3), dtype=np.uint8)
    wide = np.pad(square, [(0, 0), (100, 100), (0, 0)])
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = classify(str(tmp_path / "wide.png"), "dog face, pizza", "a {}", MODEL)
    np.testing.assert_array_equal(found.picture, square)

    model = AutoModel.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(MODEL)
    texts = ["a pizza", "a dog face"]
    inputs = processor(text=texts, images=Image.fromarray(wide), padding=True, return_tensors="pt")
    function = {"occlusion": image_occlusion, "values": value_similarity, "relevance": image_relevance}[kind]
    maps = function(model, **inputs)
    expected = overlay(square, (maps if kind == "relevance" else against_others(maps))[0, 0])
    drawn = draw_overlay(found, "pizza", kind=kind)
    # A level apart where rounding falls the other way.
    assert np.abs(drawn.astype(int) - expected).max() <= 1
    assert np.abs(draw_overlay(found, "dog face", kind=kind).astype(int) - expected).max() > 20


def test_a_label_alone_is_against_no_other():
    found = classify(str(PICTURES / "pizza.png"), "pizza", "{}", MODEL)
    for kind in MAPS:
        assert np.ptp(draw_overlay(found, "pizza", kind=kind)) > 100


def test_large_models_on_a_cpu_begin_with_the_map_of_one_run(monkeypatch):
    assert default_map(MODEL) == "occlusion"
    monkeypatch.setattr("diffclip_hf.demo.scores.MANY_PARAMETERS", 10**6)
    assert default_map(MODEL) == "values"


def test_clip_works_too(clip):
    found = classify(str(PICTURES / "pizza.png"), LABELS, "{}", clip)
    processor = AutoProcessor.from_pretrained(clip)
    inputs = processor(text=NAMES, images=str(PICTURES / "pizza.png"), padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = CLIPModel.from_pretrained(clip)(**inputs).logits_per_image.softmax(-1)[0].tolist()
    assert found.scores == pytest.approx(dict(zip(NAMES, scores, strict=True)), abs=CLOSE)
    assert draw_overlay(found, "pizza").shape == (480, 480, 3)


def test_pictures_of_every_kind_are_read_as_elsewhere(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(path)
    assert read_picture(str(path)).getpixel((0, 0)) == (255, 255, 255)
    Image.new("L", (2, 1), 7).save(path)
    assert read_picture(str(path)).getpixel((1, 0)) == (7, 7, 7)
    Image.new("RGB", (2, 1), (9, 8, 7)).quantize(2).save(path)
    assert read_picture(str(path)).getpixel((1, 0)) == (9, 8, 7)
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (2, 1)).save(path, exif=turned)
    assert read_picture(str(path)).size == (1, 2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, ["no picture"]),
        ("text.png", ["The picture isn't a picture"]),
        ("truncated.png", ["The picture is damaged"]),
        ("large.png", ["The picture can't be read", f"{MAX_PIXELS:,}"]),
        ("bomb.png", ["The picture can't be read"]),
        ("long.png", ["201×1", f"{MAX_ASPECT} times"]),
    ],
)
def test_a_picture_that_cannot_be_used(bad, name, words):
    with pytest.raises(ValueError, match=words[0]) as raised:
        classify(name and str(bad / name), LABELS, "{}", MODEL)
    assert all(word in str(raised.value) for word in words)
    assert str(bad) not in str(raised.value)


def test_labels():
    assert parse_labels(" a  cat,dog\n\ndog, ,a cat,\r\nDog") == ["a cat", "dog", "Dog"]
    assert len(parse_labels(",".join(map(str, range(MAX_LABELS))))) == MAX_LABELS
    for text, words in {
        " ,\n, ": "no labels",
        ",".join(map(str, range(MAX_LABELS + 1))): f"{MAX_LABELS + 1} labels; .* up to {MAX_LABELS}",
        "a" * (MAX_LABEL_CHARACTERS + 1): "characters",
        "dog \ud83d": "half a character",
    }.items():
        with pytest.raises(ValueError, match=words):
            parse_labels(text)


def test_templates():
    assert [check_template(text) for text in (None, "  ", "{}", " a {} and {}. ")] == [
        "{}",
        "{}",
        "{}",
        "a {} and {}.",
    ]
    for text in ("a photo", "{0}", "{} {:>1000000000}", "{} {0.__class__}", "}{}{"):
        with pytest.raises(ValueError, match="template is"):
            check_template(text)
    with pytest.raises(ValueError, match="up to 200"):
        check_template("{}" + "a" * 200)


def test_a_label_that_is_too_long_is_cut_as_elsewhere():
    long = "very " * 40 + "hot pizza"
    with pytest.warns(UserWarning, match="1 of 2 texts are cut"):
        found = classify(str(PICTURES / "pizza.png"), f"rocket, {long}", "{}", MODEL)
    assert found.cut == (long,)
    assert draw_overlay(found, long).shape == (480, 480, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "MODEL is missing"),
        (["no/such/folder"], "no/such/folder"),
        ([str(PICTURES)], "config.json"),
        ([MODEL, MODEL + "/"], "called 'diffclip-emoji' too"),
        ([MODEL, "--device", "abacus"], "device 'abacus'"),
        ([MODEL, "--examples", "nowhere"], "'nowhere' isn't a folder"),
        ([MODEL, "--write-space", str(PICTURES)], "not an empty folder"),
        ([MODEL, "--port", "70000"], "--port is 70000"),
        ([MODEL, "--host", "256.0.0.1"], "--host is '256.0.0.1'"),
        ([MODEL, "--allowed-host", "http://a"], "'http://a' is no host's name"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, words, caplog, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert demo.main(arguments) == 1
    assert words in caplog.text
    assert len(caplog.text.strip().splitlines()) == 1


@pytest.mark.parametrize("option", [["--port", "1"], ["--write-space", "space"]])
def test_a_model_that_lacks_a_part_is_refused_before_anything_is_served(tmp_path, option, caplog, monkeypatch):
    """A classifier's folder has no text tower."""
    monkeypatch.chdir(tmp_path)
    DiffCLIPForImageClassification.from_pretrained(MODEL, num_labels=3).save_pretrained("classifier")
    shutil.copytree(MODEL, "tokenless")
    Path("tokenless", "tokenizer.json").unlink()
    for name, words in {"classifier": "text_model", "tokenless": "tokenizer"}.items():
        caplog.clear()
        AutoProcessor.from_pretrained(MODEL).save_pretrained("classifier")
        assert demo.main([name, *option]) == 1
        assert words in caplog.text
        assert not Path("space").exists()


def test_the_command_runs_as_a_module_and_as_a_spaces_file(caplog, monkeypatch):
    """Both stop at a model that is missing, and without Gradio at the extra that has it."""
    monkeypatch.setattr(sys, "argv", ["demo"])
    ways = [lambda: runpy.run_module("diffclip_hf.demo", run_name="__main__")]
    ways.append(lambda: runpy.run_path(demo.__file__, run_name="__main__"))
    for run in ways:
        caplog.clear()
        with pytest.raises(SystemExit, match="1"):
            run()
        assert "MODEL is missing; name folders or ids on the Hub." in caplog.text
    caplog.clear()
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="1"):
        ways[1]()
    assert "diffclip-hf[demo]" in caplog.text


def test_a_page_that_is_told_to_end_leaves_no_pictures_behind(monkeypatch):
    """The server's own doors are in test_demo_guard.py; here it isn't opened."""
    before = signal.getsignal(signal.SIGTERM)
    opened = []

    def open_server(page, store, hosts, host, port):
        opened.extend((store, sorted(path.name for path in (store / "examples").iterdir()), host, port))
        (store / "upload.png").touch()

    event = SimpleNamespace(wait=lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(demo, "open_server", open_server)
    monkeypatch.setattr(demo, "threading", SimpleNamespace(Event=lambda: event))

    # Outside of a loop Gradio makes loops of its own, and doesn't close them.
    async def command() -> int:
        return demo.main([MODEL, "--examples", str(PICTURES), "--host", "localhost", "--port", "7999"])

    try:
        assert asyncio.run(command()) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    store, examples, host, port = opened
    assert examples[:2] == ["00-bicycle.png", "01-dog-face.png"]
    assert (host, port) == ("localhost", 7999)
    assert not store.exists()


def test_what_the_pages_events_answer(tmp_path):
    store = tmp_path.resolve()
    for name in ("pizza", "rocket"):
        shutil.copy(PICTURES / f"{name}.png", store)

    async def build() -> Any:
        return demo.build_page({"emoji": MODEL}, store, "cpu", [store / "rocket.png", store / "pizza.png"])

    page = asyncio.run(build())
    events = {event.fn.__name__: event.fn for event in page.fns.values() if event.fn is not None}
    inputs = ({"path": str(store / "pizza.png")}, "rocket, pizza", "{}", "emoji")
    result, bars, _, drawn = events["on_classify"](*inputs, "occlusion")
    expected = classify(str(PICTURES / "pizza.png"), "rocket, pizza", "{}", MODEL)
    assert bars["label"] == "pizza"
    assert {bar["label"]: bar["confidence"] for bar in bars["confidences"]} == pytest.approx(expected.scores)
    np.testing.assert_array_equal(drawn, draw_overlay(expected, "pizza"))

    other = draw_overlay(expected, "rocket")
    np.testing.assert_array_equal(events["on_choose"](result, "rocket", "occlusion"), other)
    label, shown = events["on_bar"](result, "occlusion", SimpleNamespace(value="rocket"))
    assert label == "rocket"
    np.testing.assert_array_equal(shown, other)
    assert events["on_choose"](result, "cat", "values") is events["on_choose"](None, "rocket", "values") is None
    assert events["on_choose"](result, "rocket", "magic") is events["on_choose"](result, "rocket", ["values"]) is None

    assert events["on_example"](1, " ") == (str(store / "pizza.png"), "rocket, pizza")
    assert events["on_example"](1, "cat") == (str(store / "pizza.png"), "cat")

    kept, gone = [demo.gr.skip()] * 4, {"value": None, "choices": []}
    assert events["after_result"](result, *inputs) == events["on_change"](result, *inputs) == kept
    assert events["on_change"](None, *inputs) == kept
    for name in ("after_result", "on_change"):
        first, second, labels, last = events[name](result, *inputs[:3], "another model")
        assert (first, second, last) == (None, None, None)
        assert {key: getattr(labels, key) for key in gone} == gone
    with pytest.raises(demo.gr.Error, match="There is no model 'other'; choose one of emoji"):
        events["on_classify"](*inputs[:3], "other", "values")


def test_what_a_model_knows(tmp_path):
    """By its card's first paragraph, as text."""
    cards = {
        "front": "---\na: b\n---\n\n# Title\n\n![a](b.png)\n\nKnows **cats** of\n[here](http://x), <b>.\n\nMore.",
        "long": "word " * 200,
        "none": None,
    }
    for name, text in cards.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "README.md").write_text(text, encoding="utf-8")
    assert demo.card_summary(tmp_path / "front") == "Knows cats of here, <b>."
    assert len(demo.card_summary(tmp_path / "long")) < 510
    said = demo.describe({"front": str(tmp_path / "front"), "none": str(tmp_path / "none"), "org/name": "org/name"})
    assert "<b>front</b>: Knows cats of here, &lt;b&gt;.<" in said
    assert "<b>none</b>: It has no model card" in said
    assert 'href="https://huggingface.co/org/name"' in said
    assert "emoji and nothing else" in demo.describe({"diffclip-emoji": MODEL})


def test_an_examples_name_is_its_label():
    names = {"03-dog-face.png": "dog face", "00-01-snow_man.png": "snow man", "a, b.png": "a b"}
    assert {name: demo.example_label(Path(name)) for name in names} == names


def test_a_space_runs_without_the_package(tmp_path, stock):
    from gradio import __version__
    from gradio_client import Client, handle_file

    space = tmp_path / "space"
    assert demo.main([MODEL, "--write-space", str(space), "--examples", str(PICTURES)]) == 0
    left = shutil.copytree(MODEL, tmp_path / "with-secrets")
    add_remote_code(left)
    for name in ("training_args.bin", ".env", "optimizer.pt"):
        (left / name).write_text("hf_SECRET")
    (left / "notes.txt").symlink_to(left / ".env")
    assert demo.main([str(left), "--write-space", str(tmp_path / "other")]) == 0
    assert not [path for path in (tmp_path / "other").rglob("*") if path.is_file() and b"hf_S" in path.read_bytes()]
    files = {path.name for path in Path(MODEL).iterdir()} - set(CODE_FILES)
    assert {path.name for path in (tmp_path / "other" / "with-secrets").iterdir()} == files
    # Its configuration names code that isn't there, and isn't needed.
    load_pair(str(tmp_path / "other" / "with-secrets"), "cpu")
    front_matter = metadata_load(space / "README.md")
    assert (front_matter["sdk"], front_matter["sdk_version"]) == ("gradio", __version__)
    assert front_matter["models"] == ["diffclip-emoji"]
    assert {path.name for path in space.iterdir()} == {
        *("app.py", "README.md", "requirements.txt", "diffclip_hf", "diffclip-emoji", "examples")
    }
    assert len(list((space / "examples").iterdir())) == 8
    required = (space / "requirements.txt").read_text().split()
    assert {"torch>=2.13", "transformers<6,>=5.18", "matplotlib>=3.9"} <= set(required)
    assert not any("pytest" in line or "diffclip" in line for line in required)
    assert space.joinpath("diffclip_hf").stat().st_mode & 0o777 == 0o755

    # Which says what is imported from where.
    command = [sys.executable, "-v", str(space / front_matter["app_file"])]
    with served(command, tmp_path) as url:
        client = Client(url, verbose=False, analytics_enabled=False)
        try:
            picture = handle_file(str(PICTURES / "pizza.png"))
            bars, _, _ = client.predict(
                picture, LABELS, "a drawing of {}", "diffclip-emoji", "occlusion", api_name="/classify"
            )
        finally:
            client.close()
    # What was stored went when the process was told to end.
    assert not [path for path in (tmp_path / "uploads").rglob("*") if not path.is_dir()]
    assert bars["label"] == "pizza"
    found = {entry["label"]: entry["confidence"] for entry in bars["confidences"]}
    assert found == pytest.approx(stock, abs=CLOSE)
    imported = (tmp_path / "server.log").read_text(errors="replace")
    assert f"{space}/diffclip_hf/" in imported
    assert f"{ROOT}/src/diffclip_hf/" not in imported


def percents(scores: dict[str, float]) -> dict[str, str]:
    """What the page writes beside the bars."""
    return {label: f"{100 * score:.1f} %" for label, score in scores.items()}


@pytest.fixture(scope="module")
def server(clip, tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium or chromedriver is missing")
    command = [sys.executable, "-m", "diffclip_hf.demo", MODEL, clip, "--examples", str(PICTURES)]
    with served(command, tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def driver(server):
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(driver, server):
    """The page, opened anew; nothing it does is an error of its own or asks anyone else."""
    page = DemoPage(driver, server)
    yield page
    severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    # Gradio's bar of progress asks how far an upload is that may have come already, and logs the answer.
    assert [message for message in severe if not re.search(r"/upload_progress|\d Response$", message)] == []
    requests = page.requests()
    assert requests
    assert [url for url in requests if not url.startswith((server, "data:", "blob:"))] == []


@pytest.mark.slow
def test_a_picture_is_classified(page, stock):
    page.upload_and_see(PICTURES / "pizza.png")
    page.write(LABELS + ", pizza")
    page.template("a drawing of {}")
    bars = page.classify()
    assert list(bars) == list(stock)
    assert next(iter(bars)) == page.chosen() == "pizza"
    assert bars == percents(stock)

    found = classify(str(PICTURES / "pizza.png"), LABELS, "a drawing of {}", MODEL)
    first, address = page.overlay(), page.source("overlay")
    assert np.abs(first.astype(int) - draw_overlay(found, "pizza")).max() <= 1
    page.pick("chosen", "rocket")
    second, address = page.overlay(after=address), page.source("overlay")
    assert np.abs(second.astype(int) - draw_overlay(found, "rocket")).max() <= 1
    assert (first != second).any()
    page.find("#scores button.share")[list(bars).index("snowman")].click()
    third = page.overlay(after=address)
    page.wait(lambda: page.chosen() == "snowman")
    assert np.abs(third.astype(int) - draw_overlay(found, "snowman")).max() <= 1


@pytest.mark.slow
def test_an_example_is_classified(page):
    page.wait(lambda: len(page.find("#examples .gallery-item img")) == 8)
    names = sorted(path.stem for path in PICTURES.glob("*.png"))
    page.find("#examples .gallery-item")[names.index("rocket")].click()
    page.wait(page.bars)
    assert next(iter(page.bars())) == page.chosen() == "rocket"
    # The files' names are the labels, since none were written.
    assert set(page.bars()) == {name.replace("-", " ") for name in names}
    page.write("bicycle, violin")
    page.wait_until_empty()
    page.find("#examples .gallery-item")[names.index("bicycle")].click()
    page.wait(page.bars)
    assert list(page.bars()) == ["bicycle", "violin"]


@pytest.mark.slow
def test_what_isnt_shown_is_said_and_labels_are_text(page):
    page.upload_and_see(PICTURES / "pizza.png")
    odd = ["<img src=x onerror=hit=1>", "{{this}}", "${window.hit=1}"]
    page.write(", ".join([*odd, *(f"label {number}" for number in range(57))]))
    bars = page.classify()
    assert len(bars) == 10
    (said,) = page.read("#scores p", "element.textContent")
    shares = classify(
        str(PICTURES / "pizza.png"), page.read("#labels textarea", "element.value")[0], "{}", MODEL
    ).scores
    assert said == f"The 10 best of 60 labels; the others share {100 * sum(list(shares.values())[10:]):.1f} %."
    page.write(", ".join([*odd, "pizza"]))
    page.wait_until_empty()
    assert set(page.classify()) == {*odd, "pizza"}
    assert page.driver.execute_script("return window.hit") is None


@pytest.mark.slow
def test_on_a_phone_the_answer_comes_into_view(page):
    size = page.driver.get_window_size()
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        page.upload_and_see(PICTURES / "pizza.png")
        page.write(LABELS)
        place = "[element.getBoundingClientRect().top, window.innerHeight]"
        ((top, height),) = page.read("#scores", place)
        assert top > height
        page.classify()
        page.wait(lambda: abs(page.read("#scores", place)[0][0]) < height / 2)
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.set_window_size(size["width"], size["height"])


@pytest.mark.slow
def test_a_change_takes_the_old_answer_away(page, clip):
    page.upload_and_see(PICTURES / "pizza.png")
    page.write(LABELS)
    first = page.classify()
    page.pick("model", "clip-random")
    page.wait_until_empty()
    other = page.classify()
    assert other != first
    expected = classify(str(PICTURES / "pizza.png"), LABELS, "{}", clip).scores
    assert other == percents(expected)
    page.write("pizza, rocket")
    page.wait_until_empty()
    assert set(page.classify()) == {"pizza", "rocket"}
    page.upload_and_see(PICTURES / "rocket.png")
    page.wait_until_empty()
    page.pick("model", "diffclip-emoji")
    assert next(iter(page.classify())) == "rocket"


@pytest.mark.slow
def test_a_change_while_the_answer_is_under_way(page):
    page.upload_and_see(PICTURES / "rocket.png")
    page.write(LABELS)
    page.press_and_add(", guitar")
    # Whether the answer is still of the old labels is the browser's affair, but then it goes.
    page.wait(lambda: page.is_idle() and set(page.bars()) in (set(), {*NAMES, "guitar"}))
    assert set(page.classify()) == {*NAMES, "guitar"}


@pytest.mark.slow
def test_the_page_says_what_is_wrong_and_goes_on(page, bad):
    page.press()
    assert "no picture" in page.message()
    page.upload_and_see(PICTURES / "pizza.png")
    page.press()
    assert "no labels" in page.message()
    page.press()
    page.wait(lambda: page.find("[data-testid=toast-text]"))
    # It leaves with what was wrong.
    page.write(LABELS)
    page.wait(lambda: not page.find("[data-testid=toast-text]"))
    page.upload(bad / "heavy.png")
    assert "exceed the maximum allowed size of 20" in page.message()
    for name, words in {
        "text.png": "isn't a picture",
        "truncated.png": "is damaged",
        "large.png": f"{MAX_PIXELS:,}",
    }.items():
        page.upload_and_see(bad / name)
        page.press()
        assert words in page.message()
        assert page.bars() == {}
    page.upload_and_see(PICTURES / "rocket.png")
    assert next(iter(page.classify())) == "rocket"


@pytest.mark.slow
def test_a_larger_upload_is_refused_by_the_server_too(server, bad):
    from urllib.error import HTTPError
    from urllib.request import ProxyHandler, Request, build_opener

    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="heavy.png"\r\n\r\n'
    body += (bad / "heavy.png").read_bytes() + b"\r\n--x--\r\n"
    request = Request(f"{server}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})
    with pytest.raises(HTTPError) as raised:
        build_opener(ProxyHandler({})).open(request)
    assert raised.value.code == 413
    raised.value.close()
