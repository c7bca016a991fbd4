"""Data sets by where they are stored, whose pictures stay as they are there."""

import json
import os
import zipfile
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from training_samples import encoded, pair_dataset, picture, rows, sample, tiny_processor, write_shards

from diffclip_hf.data import ImageTextCollator, ImageTextShards, load_image_label_dataset, load_image_text_dataset
from diffclip_hf.model.image_reading_diffclip import read_encoded


def check_pairs(dataset, count: int = 6) -> None:
    """The dataset must have the pictures' very bytes, in the file or in a file that it names."""
    assert dataset.column_names == ["image", "caption"]
    assert dataset["caption"][:] == [f"picture {number}" for number in range(count)]
    for number, row in enumerate(dataset):
        content = row["image"]["bytes"]
        if content is None:
            with open(row["image"]["path"], "rb") as file:
                content = file.read()
        assert content == sample(number)["jpg"]


@pytest.mark.parametrize(("image", "caption"), [("image", "caption"), ("jpg", "txt"), ("img", "sentence")])
def test_a_saved_dataset(tmp_path, image, caption):
    pair_dataset(image=image, caption=caption).save_to_disk(tmp_path)
    check_pairs(load_image_text_dataset(str(tmp_path)))


def test_parquet_files_of_nothing(tmp_path):
    datasets.Dataset.from_dict({"image": [], "caption": []}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet has no rows\.$"):
        load_image_text_dataset(str(tmp_path / "rows.parquet"))
    (tmp_path / "bytes.parquet").touch()
    with pytest.raises(ValueError, match=r"bytes\.parquet can't be read: ArrowInvalid"):
        load_image_text_dataset(str(tmp_path / "bytes.parquet"))


def test_a_saved_dataset_of_several_splits(tmp_path):
    datasets.DatasetDict(train=pair_dataset(2), test=pair_dataset(4)).save_to_disk(tmp_path)
    check_pairs(load_image_text_dataset(str(tmp_path), split="test"), 4)
    with pytest.raises(ValueError, match=r"split is 'validation'; .* has train, test"):
        load_image_text_dataset(str(tmp_path), split="validation")
    with pytest.raises(ValueError, match=r"split is 'test'; 'embedded/pictures' has train, so name one of these\.$"):
        load_image_text_dataset("embedded/pictures", split="test")
    with pytest.raises(ValueError, match="revision can't be used"):
        load_image_text_dataset(str(tmp_path), revision="main")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_parquet_files(tmp_path, split):
    whole = pair_dataset()
    for part in range(2):
        whole.select(range(part * 3, part * 3 + 3)).to_parquet(tmp_path / f"part-{part}.parquet")
    for source in ("part-*.parquet", "part-{0..1}.parquet"):
        loaded = load_image_text_dataset(f"{tmp_path}/{source}", split=split, cache_dir=str(tmp_path / "cache"))
        check_pairs(loaded)


def test_parquet_files_that_arent_there(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*b\*\.parquet"):
        load_image_text_dataset(str(tmp_path / "b*.parquet"))


def test_a_caption_that_isnt_utf8_is_named_before_the_training(tmp_path):
    texts = pyarrow.array([b"a picture", b"half \xc3"], pyarrow.binary())
    columns = {"jpg": [sample(0)["jpg"]] * 2, "txt": pyarrow.Array.from_buffers(pyarrow.string(), 2, texts.buffers())}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"Row 1 of the column caption isn't UTF-8: b'half \\xc3'"):
        load_image_text_dataset(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))


def test_parquet_with_plain_bytes(tmp_path):
    columns = {
        "jpg": [row["image"]["bytes"] for row in rows(range(3))],
        "text": ["picture 0", "picture 1", "picture 2"],
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "a.parquet")
    check_pairs(load_image_text_dataset(f"{tmp_path}/a.parquet", cache_dir=str(tmp_path / "cache")), 3)


def test_a_folder_with_metadata(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(sample(number)["jpg"])
        lines.append(json.dumps({"file_name": f"{number}.jpg", "text": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    loaded = load_image_text_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    check_pairs(loaded)
    batch = ImageTextCollator(tiny_processor(), train=False)([loaded[0], loaded[1]])
    assert torch.equal(
        batch["pixel_values"], ImageTextCollator(tiny_processor(), train=False)(rows([0, 1]))["pixel_values"]
    )


def test_tar_shards(tmp_path):
    write_shards(tmp_path, [4, 4])
    for source in (str(tmp_path), f"{tmp_path}/*.tar", f"{tmp_path}/0000{{0..1}}.tar"):
        shards = load_image_text_dataset(source, batch_size=2, seed=3, shuffle_buffer=7)
        assert isinstance(shards, ImageTextShards)
        assert (len(shards), shards.batch_size, shards.seed, shards.shuffle_buffer) == (8, 2, 3, 7)
    with pytest.raises(ValueError, match="batch_size is None"):
        load_image_text_dataset(str(tmp_path))
    with pytest.raises(ValueError, match="revision can't be used"):
        load_image_text_dataset(str(tmp_path), batch_size=2, revision="main")


def test_a_stream(tmp_path):
    pair_dataset().to_parquet(tmp_path / "a.parquet")
    stream = load_image_text_dataset(f"{tmp_path}/a.parquet", streaming=True)
    assert [row["caption"] for row in stream] == [f"picture {number}" for number in range(6)]
    assert next(iter(stream))["image"]["bytes"] == sample(0)["jpg"]
    with pytest.raises(ValueError, match="streaming is True; labels are numbered over the whole data set"):
        load_image_label_dataset(f"{tmp_path}/a.parquet", streaming=True)


def test_columns_can_be_told_and_are_named_if_not_found(tmp_path):
    dataset = pair_dataset(image="scan", caption="alt").add_column("text", ["x"] * 6).add_column("caption", ["y"] * 6)
    dataset.save_to_disk(tmp_path)
    check_pairs(load_image_text_dataset(str(tmp_path), image_column="scan", caption_column="alt"))
    listed = "columns scan, alt, width, text, caption"
    with pytest.raises(ValueError, match=f"{listed}; none of them could be it; pass image_column"):
        load_image_text_dataset(str(tmp_path))
    with pytest.raises(ValueError, match=f"{listed}; text, caption could be it; pass caption_column"):
        load_image_text_dataset(str(tmp_path), image_column="scan")
    with pytest.raises(ValueError, match=f"{listed}; image_column is 'photo', which isn't among them"):
        load_image_text_dataset(str(tmp_path), image_column="photo")
    with pytest.raises(ValueError, match=r"The column width is .*int32.*; captions must be strings"):
        load_image_text_dataset(str(tmp_path), image_column="scan", caption_column="width")


def test_lists_of_captions(tmp_path):
    dataset = pair_dataset(2).remove_columns("caption").add_column("captions", [["a", "b"], ["c"]])
    dataset.save_to_disk(tmp_path)
    assert load_image_text_dataset(str(tmp_path))["caption"][:] == [["a", "b"], ["c"]]


def flat(word: str) -> bytes:
    """A picture of one colour, whose file is as large whatever the colour."""
    return encoded(Image.new("RGB", (4, 4), word), "BMP")


def write_words(path: Path, words: list[str]) -> None:
    """Write pictures of colours that are captioned and labelled by their names: a table, an archive, or captions."""
    named = dict(zip(("a.bmp", "b.bmp"), words, strict=True))
    lines = "\n".join(json.dumps({"file_name": name, "text": word}) for name, word in named.items())
    if path.suffix == ".parquet":
        columns = {"image": [{"bytes": flat(word), "path": None} for word in words], "label": words, "text": words}
        pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="NONE")
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, word in named.items():
                file.writestr(zipfile.ZipInfo(name), flat(word))
            file.writestr(zipfile.ZipInfo("metadata.jsonl"), lines)
    else:
        path.write_text(lines)
        for picture_path in (path.with_name(name) for name in named):
            if not picture_path.exists():
                picture_path.write_bytes(flat("red"))


@pytest.mark.parametrize("kind", ["a.parquet", "**/*.parquet", "data_files", "labels", "a.zip", "metadata.jsonl"])
def test_files_that_changed_under_the_same_name_and_time_are_read_anew(kind, tmp_path, monkeypatch):
    """`datasets` takes them for what it has read before."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / (kind if kind in ("a.zip", "metadata.jsonl") else "a.parquet")

    def read() -> list[tuple[str, bytes]]:
        if kind == "labels":
            found, names = load_image_label_dataset(str(path))
            return [(names[row["label"]], read_encoded(row["image"])) for row in found]
        if kind == "data_files":
            found = load_image_text_dataset("parquet", data_files={"train": [str(path)]})
        else:
            found = load_image_text_dataset(str(folder / kind) if "parquet" in kind else str(folder))
        return [(row["caption"], read_encoded(row["image"])) for row in found]

    status = None
    for words in (["red", "tan"], ["tan", "red"]):
        write_words(path, words)
        if status is not None:
            assert path.stat().st_size == status.st_size, "else the size tells"
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        status = path.stat()
        assert read() == [(word, flat("red" if path.suffix == ".jsonl" else word)) for word in words]


def test_labelled_images_of_folders_and_of_strings(tmp_path):
    for name in ("cat", "ant", "bee"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        picture(len(name)).save(tmp_path / "folders" / name / "0.png")
    found, labels = load_image_label_dataset(str(tmp_path / "folders"))
    assert labels == ["ant", "bee", "cat"]
    assert {(row["image"]["path"].split("/")[-2], row["label"]) for row in found} == {
        ("ant", 0),
        ("bee", 1),
        ("cat", 2),
    }
    images = [{"bytes": encoded(picture(number)), "path": None} for number in range(3)]
    table = datasets.Dataset.from_dict({"img": images, "target": ["z", "a", "z"]})
    table.cast_column("img", datasets.Image()).to_parquet(tmp_path / "table.parquet")
    found, labels = load_image_label_dataset(str(tmp_path / "table.parquet"))
    assert (labels, found["label"][:]) == (["a", "z"], [1, 0, 1])
    numbers = datasets.Dataset.from_dict({"image": images, "label": [1, 2, 3]})
    numbers.save_to_disk(tmp_path / "numbers")
    with pytest.raises(ValueError, match=r"The column label is Value.*ClassLabel or strings"):
        load_image_label_dataset(str(tmp_path / "numbers"))
    with pytest.raises(ValueError, match="names tar shards"):
        load_image_label_dataset("x.tar")
