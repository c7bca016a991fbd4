"""Pictures with captions or labels: where they come from, how they become batches, and what is counted."""

from .shards import ImageTextShards
from .sources import ImageLabelCollator, ImageTextCollator, load_image_label_dataset, load_image_text_dataset


__all__ = [
    "ImageLabelCollator",
    "ImageTextCollator",
    "ImageTextShards",
    "load_image_label_dataset",
    "load_image_text_dataset",
]
