"""Random crops of pictures: the box is drawn first, so that no more of the picture is decoded than the crop needs."""

import math

import numpy as np
from PIL import Image

from ..model.image_reading_diffclip import orientation, to_rgb


# Torchvision's, and so SLIP's.
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
# The EXIF orientations in which a picture lies on its side.
SIDEWAYS = (5, 6, 7, 8)


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a box as torchvision's RandomResizedCrop does: left, top, width and height in pixels.

    Its area is a uniform share of the image's, and the logarithm of its width over its height is uniform between
    those of 3/4 and 4/3. After ten boxes that don't fit, it's the largest in the middle whose shape is allowed.
    Torchvision's own draws from the generator that all of torch shares, which would make a sample's crop depend on
    what was drawn before it.

    Args:
        width: At least 1 pixel.
        height: Likewise.
        scale: The smallest and the largest share.
        generator: Where the numbers come from.
    """
    shortest, longest = np.log(CROP_RATIO)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * generator.uniform(*scale)
        ratio = np.exp(generator.uniform(shortest, longest))
        box_width, box_height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(generator.integers(width - box_width + 1))
            return left, int(generator.integers(height - box_height + 1)), box_width, box_height
    box_width = min(width, max(round(height * CROP_RATIO[1]), 1))
    box_height = min(height, max(round(width / CROP_RATIO[0]), 1))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def decode_crop(
    image: Image.Image,
    size: tuple[int, int],
    scale: tuple[float, float],
    resample: Image.Resampling,
    generator: np.random.Generator,
) -> Image.Image:
    """Decode a random crop of an image that Pillow has opened and resize it to a width and height.

    A JPEG is decoded at half, a quarter or an eighth of its size where the crop still has no fewer pixels than wanted.
    Any mode and orientation is allowed, as in `to_rgb`.

    Args:
        image: As `open_image` gives it.
        size: The result's width and height in pixels.
        scale: See `random_crop_box`.
        resample: Pillow's filter for resizing.
        generator: Where the box comes from.
    """
    width, height = image.size
    if orientation(image) in SIDEWAYS:
        width, height = height, width
    left, top, box_width, box_height = random_crop_box(width, height, scale, generator)
    shrinkage = min(box_width / size[0], box_height / size[1])
    # Of other formats than JPEG this changes nothing.
    image.draft(image.mode, (math.ceil(image.width / shrinkage), math.ceil(image.height / shrinkage)))
    rgb = to_rgb(image)
    across, down = rgb.width / width, rgb.height / height
    box = (left * across, top * down, (left + box_width) * across, (top + box_height) * down)
    return rgb.crop(tuple(round(side) for side in box)).resize(size, resample)  # type: ignore[arg-type]


__all__ = ["decode_crop", "random_crop_box"]
