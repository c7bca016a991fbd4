"""What DiffCLIP's models return."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class DiffCLIPVisionModelOutput(ModelOutput):
    """Output of `DiffCLIPVisionModelWithProjection`.

    Args:
        image_embeds: Projected embeddings, not normalised, (batch, projection_dim).
        last_hidden_state: Every token after the final LayerNorm, (batch, tokens, hidden_size); token 0 is the class.
        hidden_states: The embeddings and each block's output before the final LayerNorm.
        attentions: Each layer's softmax maps, (batch, num_heads, tokens, tokens); see `DiffCLIPDifferentialAttention`.
    """

    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DiffCLIPTextModelOutput(ModelOutput):
    """Output of `DiffCLIPTextModelWithProjection`.

    Args:
        text_embeds: Projected embeddings, not normalised, (batch, projection_dim).
        last_hidden_state: Every token after the final LayerNorm, (batch, tokens, hidden_size).
        hidden_states: The embeddings and each block's output before the final LayerNorm.
        attentions: Each layer's softmax maps, (batch, num_heads, tokens, tokens); see `DiffCLIPDifferentialAttention`.
    """

    text_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DiffCLIPOutput(ModelOutput):
    """Output of `DiffCLIPModel`.

    Args:
        loss: With `return_loss=True`, the mean of the two cross-entropies, without dimensions; in distributed training
            this process's part of it, as `image_text_contrastive_loss` says. The other fields are local.
        logits_per_image: exp(logit_scale) · cosine similarity, (images, texts).
        logits_per_text: The transpose, (texts, images).
        text_embeds: L2-normalised, (texts, projection_dim).
        image_embeds: L2-normalised, (images, projection_dim).
        text_model_output: What `get_text_features` returned.
        vision_model_output: What `get_image_features` returned.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are set, with the towers' outputs as tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


__all__ = ["DiffCLIPOutput", "DiffCLIPTextModelOutput", "DiffCLIPVisionModelOutput"]
