"""Where a model looks: what a score depends on, where attention goes, and pictures of both."""

from .attention import attention_maps, class_attention, lambda_values
from .occlusion import against_others, image_occlusion
from .pictures import draw_grid, draw_lambdas, draw_maps, draw_words, overlay, shown_images
from .relevance import image_relevance, text_relevance, word_relevance
from .towers import check_model
from .values import value_similarity


__all__ = [
    "against_others",
    "attention_maps",
    "check_model",
    "class_attention",
    "draw_grid",
    "draw_lambdas",
    "draw_maps",
    "draw_words",
    "image_occlusion",
    "image_relevance",
    "lambda_values",
    "overlay",
    "shown_images",
    "text_relevance",
    "value_similarity",
    "word_relevance",
]
