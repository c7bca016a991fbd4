"""Pictures with captions or labels: where they come from, how they become batches, and what is counted."""

from .collators import ImageLabelCollator, ImageTextCollator, TeacherCollator
from .shards import ImageTextShards
from .sources import load_image_label_dataset, load_image_text_dataset


__all__ = [
    "ImageLabelCollator",
    "ImageTextCollator",
    "ImageTextShards",
    "TeacherCollator",
    "load_image_label_dataset",
    "load_image_text_dataset",
]
