"""Data sets by where they are stored, and the collator: pictures, captions, damage, counts, and the Trainer."""

import io
import itertools
import json
import logging
import os
import pickle
import zipfile
import zlib
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader
from training_samples import encoded, picture, sample, tiny_pair_model, tiny_processor, write_shards, write_tar
from transformers import Trainer
from transformers.utils import is_torchvision_available

from diffclip_hf.data import (
    ImageLabelCollator,
    ImageTextCollator,
    ImageTextShards,
    load_image_label_dataset,
    load_image_text_dataset,
)
from diffclip_hf.data.crops import decode_crop, random_crop_box
from diffclip_hf.model import image_reading_diffclip
from diffclip_hf.model.image_reading_diffclip import open_image, read_encoded
from diffclip_hf.training import DiffCLIPTrainer, DiffCLIPTrainingArguments


needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision isn't installed")


@pytest.fixture(autouse=True)
def propagate_logs(monkeypatch):
    # Transformers' loggers don't pass on what caplog is to see.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)


def rows(numbers, captions=None) -> list[dict]:
    return [
        {"image": {"bytes": sample(number)["jpg"], "path": None}, "caption": caption}
        for number, caption in zip(numbers, captions or map("picture {}".format, numbers), strict=True)
    ]


def pair_dataset(count: int = 6, image: str = "image", caption: str = "caption") -> datasets.Dataset:
    columns = {
        image: [row["image"] for row in rows(range(count))],
        caption: [f"picture {number}" for number in range(count)],
        "width": [48] * count,
    }
    features = {image: datasets.Image(), caption: datasets.Value("string"), "width": datasets.Value("int32")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


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


# Where the data is.


@pytest.mark.parametrize(("image", "caption"), [("image", "caption"), ("jpg", "txt"), ("img", "sentence")])
def test_a_saved_dataset(tmp_path, image, caption):
    pair_dataset(image=image, caption=caption).save_to_disk(tmp_path)
    check_pairs(load_image_text_dataset(str(tmp_path)))


def test_a_saved_dataset_of_several_splits(tmp_path):
    datasets.DatasetDict(train=pair_dataset(2), test=pair_dataset(4)).save_to_disk(tmp_path)
    check_pairs(load_image_text_dataset(str(tmp_path), split="test"), 4)
    with pytest.raises(ValueError, match=r"split is 'validation'; .* has train, test"):
        load_image_text_dataset(str(tmp_path), split="validation")
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


def test_a_caption_that_isnt_utf8_is_named_before_the_training(tmp_path):
    texts = pyarrow.array([b"a picture", b"half \xc3"], pyarrow.binary())
    columns = {"jpg": [sample(0)["jpg"]] * 2, "txt": pyarrow.Array.from_buffers(pyarrow.string(), 2, texts.buffers())}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"Row 1 of the column caption isn't UTF-8: b'half \\xc3'"):
        load_image_text_dataset(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))


def test_parquet_files_that_arent_there(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*b\*\.parquet"):
        load_image_text_dataset(str(tmp_path / "b*.parquet"))


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


# The pictures.


def test_evaluation_is_the_processors():
    processor = tiny_processor()
    batch = ImageTextCollator(processor, train=False)(rows([3, 4], [["first", "second"], "other"]))
    images = [Image.open(io.BytesIO(sample(number)["jpg"])) for number in (3, 4)]
    expected = processor(images=images, text=["first", "other"], return_tensors="pt")
    assert batch.pop("return_loss") is True
    assert batch.keys() == {"pixel_values", "input_ids", "attention_mask"}
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


@needs_torchvision
@pytest.mark.parametrize("width", [40, 48, 90])
def test_a_crop_is_torchvisions_of_the_same_box(width):
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F

    image = picture(5, width, 50)
    content = encoded(image, "PNG")
    processor = tiny_processor()
    batch = ImageTextCollator(processor, train=True, seed=8)([{"image": content, "caption": "x"}])
    generator = np.random.default_rng((8, 0, zlib.crc32(content)))
    left, top, box_width, box_height = random_crop_box(width, 50, (0.5, 1.0), generator)
    cut = F.resized_crop(image, top, left, box_height, box_width, [32, 32], v2.InterpolationMode.BILINEAR)
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    expected = F.normalize(F.to_dtype(F.pil_to_tensor(cut), torch.float32, scale=True), mean, std)
    torch.testing.assert_close(batch["pixel_values"][0], expected, rtol=0, atol=1e-6)


def boxes(width, height, scale, count=4000):
    generator = np.random.default_rng(0)
    drawn = np.array([random_crop_box(width, height, scale, generator) for _ in range(count)])
    left, top, box_width, box_height = drawn.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + box_width <= width).all()
    assert (top + box_height <= height).all()
    return drawn


def test_crops_are_distributed_as_they_should_be():
    # A box of less than 0.28 of a square fits at any ratio up to 4/3 (a side is at most sqrt(0.28·4/3) = 0.61).
    left, top, box_width, box_height = boxes(1000, 1000, (0.08, 0.28)).T
    share = box_width * box_height / 1e6
    # Uniform: its mean is 0.18 and its deviation 0.2/√12 = 0.0577; of 4,000 draws the mean deviates by 0.0009.
    assert abs(share.mean() - 0.18) < 0.004
    assert abs(share.std() - 0.0577) < 0.002
    ratio = np.log(box_width / box_height)
    # Uniform between ±ln(4/3) = ±0.2877: deviation 0.2877/√3 = 0.1661.
    assert abs(ratio.mean()) < 0.011
    assert abs(ratio.std() - 0.1661) < 0.005
    assert np.abs(ratio).max() < np.log(4 / 3) + 0.01
    for start, side in ((left, box_width), (top, box_height)):
        assert abs((start / (1000 - side)).mean() - 0.5) < 0.02


@needs_torchvision
@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 800), (64, 64)])
def test_crops_are_distributed_as_torchvisions(width, height):
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    blank = torch.empty(1, height, width, device="meta")
    theirs = [RandomResizedCrop.get_params(blank, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = np.array(theirs)[:, [1, 0, 3, 2]] / [width, height, width, height]
    ours = boxes(width, height, (0.5, 1.0)) / [width, height, width, height]
    # Of 4,000 draws, whose deviation is at most 0.3, a mean deviates by 0.005.
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.02)
    np.testing.assert_allclose(ours.std(0), theirs.std(0), atol=0.02)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (90, 10, (38, 0, 13, 10)),
        (10, 90, (0, 38, 10, 13)),
        (1, 1, (0, 0, 1, 1)),
        (1, 9, (0, 4, 1, 1)),
        (9, 1, (4, 0, 1, 1)),
    ],
)
def test_crops_of_narrow_pictures_are_in_the_middle(width, height, box):
    # A crop of nearly the whole area of these would be too long, so after ten attempts it's 4/3 or 3/4.
    assert random_crop_box(width, height, (0.99, 1.0), np.random.default_rng(0)) == box


def decode(content: bytes, size: tuple[int, int] = (32, 32), scale=(0.5, 1.0)) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        cut = decode_crop(image, size, scale, Image.Resampling.BILINEAR, np.random.default_rng(1))
    assert (cut.mode, cut.size) == ("RGB", size)
    return np.asarray(cut).astype(int)


def test_large_jpegs_are_decoded_smaller_without_a_visible_difference(monkeypatch):
    image = picture(6, 640, 480)
    asked = []
    load = Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: asked.append(self.size) or load(self, box))
    lossless = decode(encoded(image, "PNG"))
    # The crop's shorter side is at least sqrt(640·480·0.5·3/4) = 339 pixels, more than 8 times 32.
    reduced = decode(encoded(image, quality=95))
    assert asked == [(640, 480), (80, 60)]
    assert np.abs(reduced - lossless).mean() < 2
    # With the same picture at 2 times 32 or a little more it's half, and below that whole.
    for side, scale, decoded in ((64, 1.0, 32), (80, 1.0, 40), (63, 1.0, 63)):
        asked.clear()
        decode(encoded(picture(6, side, side), quality=95), scale=(scale, scale))
        assert asked == [(decoded, decoded)]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_picture_is_cut_upright(image_format, orientation):
    image = picture(7, 200, 80)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(image, image_format, exif=exif))))
    turned = decode(encoded(image, image_format, exif=exif))
    assert np.abs(turned - decode(encoded(upright, "PNG"))).mean() < (0.01 if image_format == "PNG" else 3)


def in_mode(mode: str) -> bytes:
    image = picture(8)
    if mode == "I;16":
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        return encoded(Image.fromarray(grey), "PNG")
    if mode == "GIF":
        return encoded(image, "GIF")
    image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(128)
    return encoded(image, "JPEG" if mode == "CMYK" else "PNG")


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "GIF"])
def test_every_mode_is_read(mode, train):
    content = in_mode(mode)
    collator = ImageTextCollator(tiny_processor(), train=train, crop_scale=(1.0, 1.0))
    pixels = collator([{"image": content, "caption": "x"}])["pixel_values"][0]
    processed = tiny_processor()(images=Image.open(io.BytesIO(content)), return_tensors="pt")["pixel_values"][0]
    assert collator.counts == {"seen": 1, "corrupt_images": 0, "empty_captions": 0, "undecodable_captions": 0}
    # The same colours, though cut differently.
    torch.testing.assert_close(pixels.mean((1, 2)), processed.mean((1, 2)), rtol=0, atol=0.15)


def test_crops_depend_on_seed_epoch_and_picture_alone():
    def pixels(numbers, epoch=0, seed=0):
        collator = ImageTextCollator(tiny_processor(), train=True, seed=seed)
        collator.set_epoch(epoch)
        return collator(rows(numbers))["pixel_values"]

    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = pixels([0, 1, 2])
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    torch.manual_seed(5)
    assert torch.equal(pixels([2, 5, 0])[[2, 0]], first[[0, 2]])
    for other in (pixels([0, 1, 2], epoch=1), pixels([0, 1, 2], seed=1)):
        assert (other != first).flatten(1).any(1).all()


# The captions.


def test_captions_are_padded_and_cut():
    processor = tiny_processor()
    texts = ["ab", "word " * 60]
    batch = ImageTextCollator(processor, train=True)(rows([0, 1], texts))
    # A byte a token: start, a, b, end; and the long one is cut at 77 with its end token.
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 77)
    assert batch["attention_mask"].sum(1).tolist() == [4, 77]
    assert batch["input_ids"][:, 0].tolist() == [512, 512]
    assert [batch["input_ids"][0, 3].item(), batch["input_ids"][1, 76].item()] == [513, 513]
    assert ImageTextCollator(processor, train=True)(rows([0], ["ab"]))["input_ids"].shape == (1, 4)
    padded = ImageTextCollator(processor, train=True, pad_to_max_length=True)(rows([0], ["ab"]))
    assert padded["input_ids"].shape == (1, 77)
    assert padded["attention_mask"].sum().item() == 4


def test_one_of_several_captions_is_drawn_in_training():
    captions = [["a", "", "b", "c"]] * 60
    drawn = ImageTextCollator(tiny_processor(), train=True)(rows(range(60), captions))["input_ids"][:, 1]
    expected = [tiny_processor().tokenizer(text)["input_ids"][1] for text in "abc"]
    counts = [(drawn == token).sum().item() for token in expected]
    # 20 ± 3.7 each.
    assert sum(counts) == 60
    assert min(counts) > 8
    first = ImageTextCollator(tiny_processor(), train=False)(rows(range(60), captions))["input_ids"][:, 1]
    assert (first == expected[0]).all()


# Damage.

WHOLE = sample(0)["jpg"]
DAMAGED = {
    "empty": b"",
    "text": b"<html>404</html>",
    "cut JPEG": WHOLE[: len(WHOLE) // 2],
    "JPEG's head": WHOLE[:20],
    "cut PNG": encoded(picture(0), "PNG")[:200],
    "floating point": encoded(Image.new("F", (40, 40), 0.5), "TIFF"),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_picture_is_dropped_and_counted(kind, train, caplog):
    collator = ImageTextCollator(tiny_processor(), train=train)
    damaged = {"image": {"bytes": DAMAGED[kind], "path": None}, "caption": "damaged", "key": "0.tar/17"}
    good = rows([1, 2])
    expected = ImageTextCollator(tiny_processor(), train=train)(good)
    for _ in range(2):
        batch = collator([good[0], damaged, good[1]])
        assert all(torch.equal(batch[name], expected[name]) for name in ("pixel_values", "input_ids"))
    assert collator.counts == {"seen": 6, "corrupt_images": 2, "empty_captions": 0, "undecodable_captions": 0}
    skipped = [record.message for record in caplog.records if "Skipped" in record.message]
    assert len(skipped) == 1
    assert "0.tar/17" in skipped[0]


def test_a_missing_file_is_dropped_by_its_name(tmp_path, caplog):
    row = {"image": {"bytes": None, "path": str(tmp_path / "gone.jpg")}, "caption": "x"}
    collator = ImageTextCollator(tiny_processor(), train=True)
    collator([row, *rows([1])])
    assert collator.counts["corrupt_images"] == 1
    assert f"Skipped {tmp_path / 'gone.jpg'}: There is no file " in caplog.text


def test_a_decompression_bomb_is_a_damaged_picture(monkeypatch, caplog):
    # Of 48·40 = 1,920 pixels.
    monkeypatch.setattr(image_reading_diffclip, "MAX_PIXELS", 1919)
    collator = ImageTextCollator(tiny_processor(), train=True)
    collator(rows([1]))
    assert collator.counts["corrupt_images"] == 1
    assert "48×40 pixels" in caplog.text


@pytest.mark.parametrize("caption", ["", " \n", [], ["", " "], None])
def test_a_row_without_a_caption_is_dropped_and_counted(caption):
    collator = ImageTextCollator(tiny_processor(), train=True)
    assert len(collator(rows([0, 1], [caption, "x"]))["input_ids"]) == 1
    assert collator.counts == {"seen": 2, "corrupt_images": 0, "empty_captions": 1, "undecodable_captions": 0}


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": None}, {"bytes": b""}, {}])
def test_a_row_without_an_image_is_dropped_and_counted(image):
    collator = ImageTextCollator(tiny_processor(), train=True)
    assert len(collator([{"image": image, "caption": "x"}, *rows([1])])["input_ids"]) == 1
    assert collator.counts["corrupt_images"] == 1


@pytest.mark.parametrize("caption", ["half \ud83c", 5, ["good", b"bytes"], [["nested"]], float("nan")])
def test_a_caption_that_isnt_text_is_dropped_and_counted(caption, caplog):
    collator = ImageTextCollator(tiny_processor(), train=True)
    batch = collator(rows([0, 1], [caption, "x"]))
    assert batch["input_ids"].tolist() == tiny_processor().tokenizer(["x"])["input_ids"]
    assert collator.counts == {"seen": 2, "corrupt_images": 0, "empty_captions": 0, "undecodable_captions": 1}
    assert "half a character" in caplog.text or "it must be text" in caplog.text


@pytest.mark.parametrize("train", [True, False])
def test_broken_metadata_doesnt_cost_the_picture(train):
    broken, info = PngImagePlugin.PngInfo(), b"Exif\0\0" + b"\xa8 not exif"
    broken.add_text("Raw profile type exif", "\nexif\n      20\nnothex\n")
    # JPEG is lossy, but the same picture coded without metadata has the same pixels.
    jpegs = [encoded(picture(3), quality=95, **options) for options in ({}, {"exif": info})]
    pngs = [encoded(picture(3), "PNG", **options) for options in ({}, {"pnginfo": broken})]
    for plain, damaged in (jpegs, pngs):
        images = []
        for content in (plain, damaged):
            # What is drawn depends on the bytes; a crop of everything doesn't.
            with open_image(content) as image:
                box = np.random.default_rng(0)
                images.append(np.asarray(decode_crop(image, (32, 32), (1.0, 1.0), Image.Resampling.BILINEAR, box)))
            collator = ImageTextCollator(tiny_processor(), train=train)
            assert len(collator([{"image": content, "caption": "x"}])["pixel_values"]) == 1
        assert np.array_equal(*images)


def test_too_many_dropped_stop_the_training():
    bad = {"image": b"", "caption": "damaged", "key": "0.tar/17"}
    collator = ImageTextCollator(tiny_processor(), train=True, max_skipped_share=0.01)
    good = rows([0])
    for _ in range(5):
        collator([*good * 98, bad, bad])
    collator([bad])
    with pytest.raises(
        ValueError, match=r"11 of 501 .*corrupt images: 11, empty captions: 0.*0\.01 allows; .*0\.tar/17"
    ):
        collator.check()
    # From the 1,000th on by itself.
    collator(good * 498)
    with pytest.raises(ValueError, match="12 of 1000 samples had to be skipped"):
        collator([bad])


def test_a_batch_of_which_nothing_is_left_goes_through_the_model():
    collator = ImageTextCollator(tiny_processor(), train=True)
    batch = collator([{"image": b"", "caption": "x"}])
    assert batch["pixel_values"].shape == (0, 3, 32, 32)
    assert batch["input_ids"].shape[0] == batch["attention_mask"].shape[0] == 0
    assert {batch["input_ids"].dtype, batch["attention_mask"].dtype} == {torch.int64}
    model = tiny_pair_model()
    output = model(
        pixel_values=batch["pixel_values"], input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    )
    assert output.image_embeds.shape == output.text_embeds.shape == (0, 24)
    (output.image_embeds.sum() + output.text_embeds.sum()).backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_what_a_source_must_not_give():
    collator = ImageTextCollator(tiny_processor(), train=True)
    assert collator([None, None]) == {}
    with pytest.raises(ValueError, match="1 of a batch's 2 rows are None"):
        collator([None, *rows([0])])
    with pytest.raises(TypeError, match=r"column image has a Image; .*Image\(decode=False\)"):
        collator([{"image": picture(0), "caption": "x"}])
    for scale in ((0.0, 1.0), (0.9, 0.5), (0.5, 1.5)):
        with pytest.raises(ValueError, match="crop_scale is"):
            ImageTextCollator(tiny_processor(), train=True, crop_scale=scale)
    with pytest.raises(ValueError, match="A row has image, text; caption_column is 'caption', which isn't there"):
        collator([{"image": WHOLE, "text": "x"}])
    with pytest.raises(TypeError, match="A row is of type tuple; it must have columns by name"):
        collator([(WHOLE, "x")])
    with pytest.raises(TypeError, match="train is missing; pass True"):
        ImageTextCollator(tiny_processor())
    with pytest.raises(TypeError, match="processor is of type CLIPTokenizer; it must be a DiffCLIPProcessor"):
        ImageTextCollator(tiny_processor().tokenizer, train=True)
    for label in (1.5, "cat", [1]):
        with pytest.raises(TypeError, match=r"The column label has .*; it must have indices"):
            ImageLabelCollator(tiny_processor(), train=True)([{"image": WHOLE, "label": label}])
    with pytest.raises(ValueError, match="seed is -1"):
        ImageTextCollator(tiny_processor(), train=True, seed=-1)


def test_other_column_names():
    collator = ImageTextCollator(tiny_processor(), train=True, image_column="jpg", caption_column="txt")
    assert len(collator([{"jpg": WHOLE, "txt": "x"}])["input_ids"]) == 1


def test_workers_count_for_the_main_process():
    data = [*rows(range(6)), {"image": b"", "caption": "x"}, {"image": WHOLE, "caption": ""}]
    collator = ImageTextCollator(tiny_processor(), train=True)
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=collator)
    assert [len(batch["input_ids"]) for batch in loader] == [2, 2, 2, 0]
    assert collator.counts == {"seen": 8, "corrupt_images": 1, "empty_captions": 1, "undecodable_captions": 0}


def test_what_is_sent_to_a_spawned_worker_counts_for_the_main_process_and_learns_of_the_epoch(tmp_path):
    write_shards(tmp_path, [4])
    collator, shards = ImageTextCollator(tiny_processor(), train=True), ImageTextShards(str(tmp_path), 2)
    sent, sent_shards = (pickle.loads(ForkingPickler.dumps(part)) for part in (collator, shards))
    collator.set_epoch(3)
    shards.set_position(3, 1)
    expected = ImageTextCollator(tiny_processor(), train=True)
    expected.set_epoch(3)
    assert torch.equal(sent(rows([0]))["pixel_values"], expected(rows([0]))["pixel_values"])
    assert [row is None for row in sent_shards] == [True, True, False, False]
    assert (collator.counts["seen"], shards.counts["seen"]) == (1, 4)


# Labels.


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


def test_a_batch_of_labelled_images_without_those_that_have_none():
    collator = ImageLabelCollator(tiny_processor(), train=False, max_skipped_share=1)
    labels = [3, -1, None, 0]
    batch = collator([{"image": encoded(picture(number)), "label": label} for number, label in enumerate(labels)])
    assert batch["labels"].tolist() == [3, 0]
    assert batch.keys() == {"pixel_values", "labels"}
    assert collator.counts == {"seen": 4, "corrupt_images": 0, "missing_labels": 2}
    images = [Image.open(io.BytesIO(encoded(picture(number)))) for number in (0, 3)]
    assert torch.equal(batch["pixel_values"], tiny_processor()(images=images, return_tensors="pt")["pixel_values"])


# The Trainer.


def train(
    folder, data, steps, resume=None, trainer_class=DiffCLIPTrainer, workers=0, batch_size=2, accumulated=1, seed=0
):
    """Train the tiny model and return the loss of every step."""
    torch.manual_seed(0)
    collator = ImageTextCollator(tiny_processor(), train=True, max_skipped_share=1)
    arguments = DiffCLIPTrainingArguments(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulated,
        max_steps=steps,
        logging_steps=1,
        save_steps=3,
        remove_unused_columns=False,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        dataloader_num_workers=workers,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=seed,
    )
    trainer = trainer_class(tiny_pair_model(), arguments, data_collator=collator, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], collator


def test_the_stock_trainer_trains_on_a_dataset_without_a_warning(tmp_path, caplog):
    pair_dataset(8).save_to_disk(tmp_path / "data")
    data = load_image_text_dataset(str(tmp_path / "data"))
    losses, collator = train(tmp_path / "out", data, 2, trainer_class=Trainer)
    assert np.isfinite(losses).all()
    assert len(losses) == 2
    assert collator.counts["seen"] >= 4
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["shards", "dataset"])
def test_a_resumed_training_has_the_losses_of_an_unbroken_one(tmp_path, kind, workers):
    if kind == "shards":
        (tmp_path / "data").mkdir()
        write_shards(tmp_path / "data", [5, 6, 5])

    def data():
        return ImageTextShards(str(tmp_path / "data"), 2) if kind == "shards" else load_saved()

    def load_saved():
        if not (tmp_path / "data").exists():
            pair_dataset(16).save_to_disk(tmp_path / "data")
        return load_image_text_dataset(str(tmp_path / "data"))

    # Epochs of 4 steps of 2 batches, so the resumed epochs begin at batch 6 of 8 and at batch 4.
    options = {"workers": workers, "accumulated": 2}
    whole, _ = train(tmp_path / "whole", data(), 10, **options)
    train(tmp_path / "cut", data(), 6, **options)
    for done in (3, 6):
        rest, collator = train(
            tmp_path / "cut", data(), 10, resume=str(tmp_path / f"cut/checkpoint-{done}"), **options
        )
        np.testing.assert_allclose(rest, whole, rtol=0, atol=1e-6)
        # Only what was trained on was decoded, but for what workers had fetched beforehand.
        assert collator.counts["seen"] <= (10 - done) * 4 + 4 * 2 * max(workers, 1)


def test_every_epoch_has_crops_of_its_own(tmp_path):
    write_tar(tmp_path / "0.tar", map(sample, range(2)))
    seen = []
    collate = ImageTextCollator.__call__

    class Recording(ImageTextCollator):
        def __call__(self, rows):
            batch = collate(self, rows)
            seen.append(batch["pixel_values"].sort(0).values)
            return batch

    shards = ImageTextShards(str(tmp_path), 2)
    collator = Recording(tiny_processor(), train=True)
    arguments = DiffCLIPTrainingArguments(
        tmp_path / "out",
        per_device_train_batch_size=2,
        num_train_epochs=3,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    DiffCLIPTrainer(tiny_pair_model(), arguments, data_collator=collator, train_dataset=shards).train()
    assert len(seen) == 3
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(seen, 2))


def test_an_epochs_end_judges_what_was_dropped(tmp_path):
    data = [*rows(range(7)), {"image": b"", "caption": "x", "key": "a"}]
    collator = ImageTextCollator(tiny_processor(), train=True, max_skipped_share=0.1)
    arguments = DiffCLIPTrainingArguments(
        tmp_path / "out",
        per_device_train_batch_size=4,
        num_train_epochs=1,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DiffCLIPTrainer(tiny_pair_model(), arguments, data_collator=collator, train_dataset=data)
    with pytest.raises(ValueError, match=r"1 of 8 samples had to be skipped .*max_skipped_share=0\.1"):
        trainer.train()
