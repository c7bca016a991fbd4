"""Where a model looks: relevance of patches and tokens for a score, attention maps, and pictures of both."""

from .attention import attention_maps, class_attention, lambda_values
from .pictures import draw_grid, draw_lambdas, draw_maps, draw_words, overlay, shown_images
from .relevance import image_relevance, text_relevance, word_relevance
from .towers import check_model


__all__ = [
    "attention_maps",
    "check_model",
    "class_attention",
    "draw_grid",
    "draw_lambdas",
    "draw_maps",
    "draw_words",
    "image_relevance",
    "lambda_values",
    "overlay",
    "shown_images",
    "text_relevance",
    "word_relevance",
]
