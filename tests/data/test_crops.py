"""Random crops: where they are, and that no more is decoded than they need."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from training_samples import encoded, picture
from transformers.utils import is_torchvision_available

from diffclip_hf.data.crops import decode_crop, random_crop_box


needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision isn't installed")


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
