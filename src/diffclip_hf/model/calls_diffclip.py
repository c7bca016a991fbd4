"""What one call of a model works out before its blocks: how to attend, in which direction, and where texts lie."""

from functools import reduce
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

from .inputs_diffclip import check_token_rows


logger = logging.get_logger(__name__)


def attention_implementation(config: PreTrainedConfig) -> str:
    """Return the name of the attention implementation that a configuration asks for."""
    return config._attn_implementation or "eager"


def call_implementation(config: PreTrainedConfig, given: torch.Tensor, kwargs: dict[str, Any]) -> str:
    """Return the attention implementation of one call of a tower: the formula where maps are asked for.

    Args:
        config: The tower's.
        given: The call's `input_ids` or `pixel_values`.
        kwargs: The call's keyword arguments.
    """
    implementation = attention_implementation(config)
    maps_wanted = kwargs.get("output_attentions", config.output_attentions)
    if torch.compiler.is_compiling():
        return "eager" if maps_wanted else implementation
    # Transformers' SDPA takes no empty batch.
    if implementation == "eager" or given.numel() == 0:
        return "eager"
    if not maps_wanted:
        return implementation
    logger.warning_once(
        "output_attentions is True: calls that ask for maps compute attention by the formula, as under "
        f"attn_implementation='eager', which is slower than {implementation!r} and keeps every map in memory."
    )
    return "eager"


def take_is_causal(config: PreTrainedConfig, kwargs: dict[str, Any], default: bool) -> bool:
    """Take `is_causal` out of a call's keyword arguments, else from the configuration, else the tower's own."""
    given = kwargs.pop("is_causal", None)
    given = getattr(config, "is_causal", None) if given is None else given
    return default if given is None else bool(given)


def tower_kwargs(config: PreTrainedConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add what a whole model's configuration asks of its towers, which read their own configuration alone."""
    flags = ("output_attentions", "output_hidden_states")
    asked = {flag: getattr(config, flag) for flag in flags if getattr(config, flag)}
    return {**asked, **kwargs}


class _MaskConfig:
    """What Transformers' mask functions read of a configuration, for one call."""

    def __init__(self, attn_implementation: str, is_causal: bool):
        self._attn_implementation = attn_implementation
        self.is_causal = is_causal


def attention_mask_of(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, attn_implementation: str, is_causal: bool
) -> Any:
    """Return the mask of a tower's blocks in the implementation's form, None where it needs none.

    Args:
        hidden_states: (batch, tokens, hidden_size).
        attention_mask: 1 for tokens to attend to, (batch, tokens), a mask of four dimensions, or None.
        attn_implementation: The implementation's name.
        is_causal: Whether a token sees earlier tokens and itself alone.
    """
    return create_causal_mask(
        _MaskConfig(attn_implementation, is_causal),
        hidden_states,
        attention_mask,
        None,
        # Whether a mask can be left out is read off it: meta tensors don't allow that, and one would wait for a GPU.
        allow_is_causal_skip=hidden_states.device.type == "cpu",
    )


def _in_graph_or_on_gpu(tensor: torch.Tensor) -> bool:
    """Say whether a tensor's values can't be looked at: a graph holds none, and nothing waits for a CUDA device."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.is_cuda


def start_of_text(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, bos_token_id: int | None
) -> torch.Tensor | None:
    """Return the index of each text's first token, (batch, 1): what stands before it is left padding.

    None says that every text starts at its first token, which spares the operators for what is padded.
    """
    if attention_mask is not None and attention_mask.ndim == 2:
        start = (attention_mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    elif attention_mask is None and bos_token_id is not None:
        # Without a start token argmax gives 0, and the text starts at the first token.
        start = (input_ids == bos_token_id).int().argmax(-1, keepdim=True)
    else:
        return None
    return start if _in_graph_or_on_gpu(start) or start.is_meta or start.any() else None


def end_of_text(
    input_ids: torch.Tensor, start: torch.Tensor | None, eos_token_id: int | list[int], vocab_size: int
) -> torch.Tensor:
    """Return the index of each text's first end-of-text token, (batch, 1), or raise where there is none.

    In a graph and on a CUDA device, which nothing here waits for, this is asserted on the device; there the embedding
    asserts that the ids are in the vocabulary.

    Args:
        input_ids: Token ids, (batch, tokens).
        start: What `start_of_text` returns; end-of-text tokens before it are padding.
        eos_token_id: The id, or several.
        vocab_size: The number of ids.
    """
    eos_token_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    is_end = reduce(torch.logical_or, [input_ids == token_id for token_id in eos_token_ids])
    if start is not None:
        is_end = is_end & (torch.arange(input_ids.shape[-1], device=input_ids.device) >= start)
    has_end = is_end.any(-1)
    if _in_graph_or_on_gpu(input_ids):
        torch._assert_async(has_end.all(), "input_ids has a row without an end-of-text token")
    elif not input_ids.is_meta:
        check_token_rows(input_ids, has_end, eos_token_id, vocab_size)
    return is_end.int().argmax(-1, keepdim=True)


__all__ = [
    "attention_implementation",
    "attention_mask_of",
    "call_implementation",
    "end_of_text",
    "start_of_text",
    "take_is_causal",
    "tower_kwargs",
]
