"""DiffCLIP's image processors, on torchvision and on Pillow, and what they share."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.utils import is_torchvision_available, logging, requires_backends

from .image_reading_diffclip import MAX_PIXELS, SIXTEEN_BIT_STEP, as_rgb, check_size, read_image


if is_torchvision_available():
    from torchvision.transforms.v2 import functional as tv_functional  # type: ignore[import-untyped]

logger = logging.get_logger(__name__)

# One class a backend, for `AutoImageProcessor` with `trust_remote_code=True`.
AUTO_MAP = {
    "torchvision": "image_processing_diffclip.DiffCLIPImageProcessor",
    "pil": "image_processing_diffclip.DiffCLIPImageProcessorPil",
}
CHANNELS = (1, 3, 4)
# Of what is made of a picture, whose own pixels `check_size` limits.
MAX_SIDE = math.isqrt(MAX_PIXELS)


def _channels_last(image: np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None) -> bool:
    """Say whether a 3-D image's channels are its last dimension rather than its first."""
    if input_data_format is not None:
        return ChannelDimension(input_data_format) == ChannelDimension.LAST
    first, last = image.shape[0] in CHANNELS, image.shape[2] in CHANNELS
    if not first and not last:
        raise ValueError(
            f"An image has shape {tuple(image.shape)}; its first or last dimension must be its channels, which are "
            f"{', '.join(map(str, CHANNELS))} in number."
        )
    if first and last:
        is_array = isinstance(image, np.ndarray)
        logger.warning_once(
            f"An image of shape {tuple(image.shape)} may have its channels first or last; taking the "
            f"{'last, as is usual for arrays' if is_array else 'first, as is usual for tensors'}. Pass "
            "input_data_format to choose."
        )
        return is_array
    return last


def _as_tensor(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Return an image as a tensor without gradient, of a type of numbers that can be compared."""
    if isinstance(image, np.ndarray):
        # A copy, for torch takes neither reversed nor read-only arrays, nor another machine's byte order.
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
    if image.is_complex():
        raise ValueError(f"An image is of {image.dtype}; its values must be real numbers.")
    if image.dtype == torch.uint64 and int(image.view(torch.int64).min()) < 0:
        raise ValueError("A torch.uint64 image has values above 2⁶³; they must be in 0..255.")
    return image.detach().to(torch.int64) if image.dtype in (torch.uint32, torch.uint64) else image.detach()


def array_to_rgb(
    image: np.ndarray | torch.Tensor,
    do_rescale: bool | None = True,
    input_data_format: str | ChannelDimension | None = None,
) -> torch.Tensor:
    """Turn an array or tensor into an RGB tensor, (3, height, width), on the device where it is.

    uint8 stays as it is; uint16 is divided by 257 and rounded; booleans are black and white; other integers must be
    in 0..255. These give uint8. Floats give float32 and must be in 0..255 where `do_rescale` divides them by 255, and
    in 0..1 where it's off. One channel is repeated, and a fourth is alpha: the image is laid over white.

    Args:
        image: (height, width), (height, width, channels) or (channels, height, width), with 1, 3 or 4 channels.
        do_rescale: Whether the image processor will divide by 255.
        input_data_format: `"channels_first"` or `"channels_last"`. By default the dimension that can be the channels;
            where both can, the last of an array and the first of a tensor, with a logged warning.

    Raises:
        ValueError: The shape isn't an image's; or a value is outside what is allowed, or a float image in 0..1 comes
            with `do_rescale`, which would make it black.
    """
    if image.ndim not in (2, 3):
        raise ValueError(f"An image has shape {tuple(image.shape)}; it must have 2 or 3 dimensions.")
    last = image.ndim == 3 and _channels_last(image, input_data_format)
    image = _as_tensor(image)
    image = image.movedim(-1, 0) if last else image.reshape(-1, *image.shape[-2:])
    channels, height, width = image.shape
    if channels not in CHANNELS:
        raise ValueError(f"An image has {channels} channels; it must have {', '.join(map(str, CHANNELS))}.")
    check_size(width, height)

    image = _checked_levels(image, do_rescale)
    if channels == 4:
        image = _over_white(image, 1.0 if image.is_floating_point() and not do_rescale else 255.0)
    return image.expand(3, -1, -1).contiguous()


def _checked_levels(image: torch.Tensor, do_rescale: bool | None) -> torch.Tensor:
    """Return an image's values as uint8 or float32, or raise as `array_to_rgb` says."""
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * 255
    if image.dtype == torch.uint16:
        return ((image.to(torch.int32) + SIXTEEN_BIT_STEP // 2) // SIXTEEN_BIT_STEP).to(torch.uint8)
    if not image.is_floating_point():
        least, most = int(image.min()), int(image.max())
        if least < 0 or most > 255:
            raise ValueError(f"A {image.dtype} image has values {least}..{most}; they must be in 0..255.")
        return image.to(torch.uint8)
    image = image.to(torch.float32)
    low, high = image.min().item(), image.max().item()
    white = 255.0 if do_rescale else 1.0
    if not (low >= 0 and high <= white):
        raise ValueError(
            f"A float image has values {low:g}..{high:g}; with do_rescale={bool(do_rescale)} they must be in "
            f"0..{white:g}. Pixel values that are already normalised go to the model as pixel_values=."
        )
    if do_rescale and 0 < high <= 1:
        raise ValueError(
            f"A float image has values {low:g}..{high:g} and do_rescale=True would divide them by 255 again; pass "
            "do_rescale=False for floats in 0..1."
        )
    return image


def _over_white(image: torch.Tensor, white: float) -> torch.Tensor:
    """Lay an RGBA image, whose largest value is `white`, over white."""
    colour, alpha = image[:3].to(torch.float32), image[3:].to(torch.float32)
    blended = (colour * alpha + white * (white - alpha)) / white
    return blended if image.is_floating_point() else blended.round().to(torch.uint8)


def _check_numbers(options: dict[str, Any]) -> None:
    """Raise a ValueError for sizes, means, deviations or a factor of which no pixel values could come."""
    for name in ("size", "crop_size"):
        for side in ("height", "width", "shortest_edge", "longest_edge"):
            pixels = (options.get(name) or {}).get(side)
            if pixels is not None and not 1 <= pixels <= MAX_SIDE:
                raise ValueError(f"{name} has {side} {pixels}; it must be from 1 to {MAX_SIDE} pixels.")
    for name in ("image_mean", "image_std", "rescale_factor"):
        given = options.get(name)
        numbers = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
        if not all(math.isfinite(number) for number in numbers) or (name != "image_mean" and 0 in numbers):
            allowed = "finite" if name == "image_mean" else "finite, and not 0"
            raise ValueError(f"{name} is {given}; it must be {allowed}.")


def fetch_images(images: Any) -> Any:
    """Read each image in a nest of lists that isn't decoded, by `read_image`, and leave others as they are.

    Raises:
        TypeError: Something is neither an image, an array, a tensor, nor one of these.
        ValueError: As `read_image` raises.
    """
    if isinstance(images, (list, tuple)):
        return [fetch_images(image) for image in images]
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Mapping)) or hasattr(images, "read"):
        return read_image(images)
    if isinstance(images, (Image.Image, np.ndarray, torch.Tensor)):
        return images
    raise TypeError(
        f"An image is of type {type(images).__name__}; it must be a Pillow image, an array, a tensor, a path or a URL."
    )


def flatten_images(images: Any) -> list[Any]:
    """List the single images of an image, a batch (4-D) or a nest of lists of either.

    Raises:
        ValueError: There's none.
    """
    if not isinstance(images, (list, tuple)) and getattr(images, "ndim", 0) != 4:
        return [images]
    if len(images) == 0:
        raise ValueError("images has a list or batch without any image; it must have at least one.")
    return [single for image in images for single in flatten_images(image)]


def with_both_backends(fields: dict[str, Any], auto_class: str | None) -> dict[str, Any]:
    """Name both backends' classes in a saved `auto_map`, or none where the code doesn't travel.

    Transformers itself writes only the class that is being saved, with which the other backend couldn't be loaded.
    """
    if auto_class is None:
        fields.pop("auto_map", None)
    elif "auto_map" in fields:
        fields["auto_map"] = {**fields["auto_map"], auto_class: dict(AUTO_MAP)}
    return fields


def _target_size(sides: Any, size: Any) -> tuple[int, int] | None:
    """Return the height and width that an image of such sides gets, None where `size` has neither usual form."""
    if size.shortest_edge and not size.longest_edge:
        # It takes an array, of which it uses the shape.
        blank = np.broadcast_to(np.uint8(0), (3, *sides))
        return get_resize_output_image_size(
            blank, size.shortest_edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
        )
    return (size.height, size.width) if size.height and size.width and not size.shortest_edge else None


def _check_crop(size: Any) -> None:
    """Raise a ValueError unless a crop's size has both sides."""
    if size.height is None or size.width is None:
        raise ValueError(f"crop_size is {size}; it must have height and width.")


class SLIPEvaluationTransform(BaseImageProcessor):
    """SLIP's evaluation transform, and what both backends do alike; stands before a backend among a class's bases."""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def fetch_images(self, image_url_or_urls):
        """Read what is given as a path or URL; see `fetch_images`."""
        return fetch_images(image_url_or_urls)

    def _prepare_images_structure(self, images, expected_ndims=3):
        # Transformers' own refuses 2-D greyscale images.
        return flatten_images(self.fetch_images(images))

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:  # type: ignore[override]
        super()._validate_preprocess_kwargs(**kwargs)
        _check_numbers(kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved."""
        return with_both_backends(super().to_dict(), self._auto_class)


class DiffCLIPImageProcessor(SLIPEvaluationTransform, TorchvisionBackend):
    """SLIP's evaluation transform on torchvision, in batches and on any device.

    The shorter edge is resized to 224 (bilinear, antialiased), the middle 224×224 is cut out, and the values are
    scaled to 0..1 and normalised with ImageNet's mean and standard deviation. Pixel values equal those of
    torchvision's `v2.Resize`, `v2.CenterCrop` and `v2.Normalize` on uint8 tensors, whose rounding differs from
    Pillow's, mostly by nothing, in under 1% of the values by one of 255 levels, and rarely by two; on machines and
    devices without torchvision's 8-bit resize, by one level in up to 20%. `DiffCLIPImageProcessorPil` equals Pillow's.

    Takes Pillow images (see `to_rgb` for what becomes of their mode, alpha and orientation), arrays and tensors (see
    `array_to_rgb`), paths and what else `read_image` reads, and lists and batches of them, of any sizes that
    `check_size` allows. As in torchvision's transform, the whole resized image is made before it is cut, 150 kB times
    its aspect ratio. Transformers' pipelines turn every image into RGB on their own before the image processor sees
    it, and drop alpha rather than lay it over white.

    Returns `pixel_values`, float32, (batch, 3, height, width).

    Raises:
        ImportError: torchvision isn't installed.
        ValueError: An image can't be read, or has a size, values or a shape that aren't allowed; the message says
            which.
        TypeError: Something isn't an image.

    Source: the evaluation transform of SLIP's code, on which DiffCLIP's (paper arXiv 2503.06626) is built.
    """

    def __init__(self, **kwargs):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)

    def process_image(
        self, image, do_convert_rgb=None, input_data_format=None, device=None, do_rescale=None, **kwargs
    ) -> torch.Tensor:
        """Turn any image into an RGB tensor, (3, height, width), on `device`."""
        if not do_convert_rgb:
            image = super().process_image(
                image, do_convert_rgb=False, input_data_format=input_data_format, device=device
            )
            check_size(image.shape[2], image.shape[1])
            return image
        if isinstance(image, Image.Image):
            image = tv_functional.pil_to_tensor(as_rgb(image))
        else:
            image = array_to_rgb(image, do_rescale, input_data_format)
        return image if device is None else image.to(device)

    def center_crop(self, image, size, **kwargs):  # type: ignore[override]
        # Transformers' own differs from torchvision's by a pixel where half the margin isn't a whole number.
        _check_crop(size)
        return tv_functional.center_crop(image, [size.height, size.width])


class DiffCLIPImageProcessorPil(SLIPEvaluationTransform, PilBackend):
    """SLIP's evaluation transform on Pillow: the twin of `DiffCLIPImageProcessor` that needs no torchvision.

    The shorter edge is resized to 224 (bilinear, antialiased), the middle 224×224 is cut out, and the values are
    scaled to 0..1 and normalised with ImageNet's mean and standard deviation. Pixel values equal those of
    torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize` on Pillow images.

    Takes Pillow images (see `to_rgb` for what becomes of their mode, alpha and orientation), arrays and tensors (see
    `array_to_rgb`), paths and what else `read_image` reads, and lists and batches of them, of any sizes that
    `check_size` allows. As in torchvision's transform, the whole resized image is made before it is cut, 150 kB times
    its aspect ratio. Transformers' pipelines turn every image into RGB on their own before the image processor sees
    it, and drop alpha rather than lay it over white.

    Returns `pixel_values`, float32, (batch, 3, height, width).

    Raises:
        ValueError: An image can't be read, or has a size, values or a shape that aren't allowed; the message says
            which.
        TypeError: Something isn't an image.

    Source: the evaluation transform of SLIP's code, on which DiffCLIP's (paper arXiv 2503.06626) is built.
    """

    def process_image(
        self, image, do_convert_rgb=None, input_data_format=None, do_rescale=None, do_resize=None, **kwargs
    ):
        """Turn any image into an RGB array, (3, height, width); a Pillow image that's resized next stays one."""
        if not do_convert_rgb:
            image = super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format)
            check_size(image.shape[2], image.shape[1])
            return image
        if isinstance(image, Image.Image):
            image = as_rgb(image)
            return image if do_resize else np.moveaxis(np.array(image), -1, 0)
        return array_to_rgb(image, do_rescale, input_data_format).cpu().numpy()

    def resize(self, image, size, resample=None, reducing_gap=None, **kwargs):
        """Resize a Pillow image or (channels, height, width) to an array; floats too, without rounding."""
        resample = PILImageResampling.BILINEAR if resample is None else resample
        if isinstance(image, Image.Image):
            sides = _target_size(image.size[::-1], size)
            if sides and isinstance(resample, int):
                return np.moveaxis(np.array(image.resize(sides[::-1], resample, reducing_gap=reducing_gap)), -1, 0)
            image = np.moveaxis(np.array(image), -1, 0)
        if not np.issubdtype(image.dtype, np.floating):
            return super().resize(image, size, resample=resample, reducing_gap=reducing_gap, **kwargs)
        # Transformers' own would round floats to 8 bits.
        sides = _target_size(image.shape[1:], size)
        if sides is None:
            raise ValueError(f"size is {size}; for float images it must have shortest_edge, or height and width.")
        height, width = sides
        return np.stack([np.asarray(Image.fromarray(plane).resize((width, height), resample)) for plane in image])

    def center_crop(self, image, size, **kwargs):  # type: ignore[override]
        # Transformers' own differs from torchvision's by a pixel where half the margin isn't a whole number.
        _check_crop(size)
        missing = [
            max(target - side, 0) for target, side in zip((size.height, size.width), image.shape[1:], strict=True)
        ]
        if any(missing):
            image = np.pad(image, [(0, 0), *((pad // 2, pad - pad // 2) for pad in missing)])
        top, left = (round((image.shape[1] - size.height) / 2), round((image.shape[2] - size.width) / 2))
        return image[:, top : top + size.height, left : left + size.width]


__all__ = ["DiffCLIPImageProcessor", "DiffCLIPImageProcessorPil"]
