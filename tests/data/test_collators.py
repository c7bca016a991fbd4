"""The collators: pictures, captions and labels, damage, and counts."""

import io
import pickle
import zlib
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader
from training_samples import encoded, picture, rows, sample, tiny_pair_model, tiny_processor, write_shards
from transformers.utils import is_torchvision_available

from diffclip_hf.data import ImageLabelCollator, ImageTextCollator, ImageTextShards
from diffclip_hf.data.crops import decode_crop, random_crop_box
from diffclip_hf.model import image_reading_diffclip
from diffclip_hf.model.image_reading_diffclip import open_image


pytestmark = pytest.mark.usefixtures("propagate_logs")


needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision isn't installed")


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


def test_a_batch_of_labelled_images_without_those_that_have_none():
    collator = ImageLabelCollator(tiny_processor(), train=False, max_skipped_share=1)
    labels = [3, -1, None, 0]
    batch = collator([{"image": encoded(picture(number)), "label": label} for number, label in enumerate(labels)])
    assert batch["labels"].tolist() == [3, 0]
    assert batch.keys() == {"pixel_values", "labels"}
    assert collator.counts == {"seen": 4, "corrupt_images": 0, "missing_labels": 2}
    images = [Image.open(io.BytesIO(encoded(picture(number)))) for number in (0, 3)]
    assert torch.equal(batch["pixel_values"], tiny_processor()(images=images, return_tensors="pt")["pixel_values"])
