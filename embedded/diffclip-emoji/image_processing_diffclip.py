"""DiffCLIP's image processor on torchvision."""

import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.utils import is_torchvision_available, requires_backends

from .image_processing_pil_diffclip import SLIPEvaluationTransform, array_to_rgb
from .image_reading import check_size, to_rgb


if is_torchvision_available():
    from torchvision.transforms.v2 import functional as tv_functional  # type: ignore[import-untyped]


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
    its aspect ratio. Transformers' pipelines turn every
    image into RGB on their own before the image processor sees it, and drop alpha rather than lay it over white.

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
            image = tv_functional.pil_to_tensor(to_rgb(image))
        else:
            image = array_to_rgb(image, do_rescale, input_data_format)
        return image if device is None else image.to(device)

    def center_crop(self, image, size, **kwargs):  # type: ignore[override]
        # Transformers' own differs from torchvision's by a pixel where half the margin isn't a whole number.
        if size.height is None or size.width is None:
            raise ValueError(f"crop_size is {size}; it must have height and width.")
        return tv_functional.center_crop(image, [size.height, size.width])


__all__ = ["DiffCLIPImageProcessor"]
