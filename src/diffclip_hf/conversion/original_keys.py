"""Table of the original's parameter names beside this port's, read in either direction."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Layout:
    """How one original tensor and this port's tensors hold the same numbers.

    Args:
        to_port: One original tensor → this port's tensors, in order.
        to_original: The reverse; also gives an original's shape from this port's shapes, on meta tensors.
    """

    to_port: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    to_original: Callable[[Sequence[torch.Tensor]], torch.Tensor]


SAME = Layout(lambda tensor: [tensor], lambda tensors: tensors[0])
# A bare matrix that multiplies from the right, against the weight of a Linear.
TRANSPOSED = Layout(lambda tensor: [tensor.T.contiguous()], lambda tensors: tensors[0].T.contiguous())
# q, k and v stacked in one matrix; cloned, since safetensors doesn't store views of one storage.
STACKED = Layout(lambda tensor: [part.clone() for part in tensor.chunk(3)], lambda tensors: torch.cat(list(tensors)))
# (1, tokens, width) against (tokens, width).
BATCHED = Layout(lambda tensor: [tensor.squeeze(0)], lambda tensors: tensors[0].unsqueeze(0))
# (1, 1, width) against (width,).
BATCHED_TOKEN = Layout(lambda tensor: [tensor.flatten()], lambda tensors: tensors[0][None, None])


@dataclass(frozen=True)
class Entry:
    """One original parameter: its key, this port's keys for it, and the layout between them."""

    original: str
    port: tuple[str, ...]
    layout: Layout = SAME


_OUTSIDE_BLOCKS = (
    Entry("logit_scale", ("logit_scale",)),
    Entry("image_projection", ("visual_projection.weight",), TRANSPOSED),
    Entry("text_projection", ("text_projection.weight",), TRANSPOSED),
    Entry("visual.cls_token", ("vision_model.embeddings.class_embedding",), BATCHED_TOKEN),
    Entry("visual.pos_embed", ("vision_model.embeddings.position_embedding.weight",), BATCHED),
    Entry("visual.patch_embed.proj.weight", ("vision_model.embeddings.patch_embedding.weight",)),
    Entry("visual.patch_embed.proj.bias", ("vision_model.embeddings.patch_embedding.bias",)),
    Entry("visual.norm.weight", ("vision_model.post_layernorm.weight",)),
    Entry("visual.norm.bias", ("vision_model.post_layernorm.bias",)),
    Entry("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
    Entry("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
    Entry("ln_final.weight", ("text_model.final_layer_norm.weight",)),
    Entry("ln_final.bias", ("text_model.final_layer_norm.bias",)),
)
_VISION_BLOCK = (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
_TEXT_BLOCK = (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"))
_LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def _block(
    original: str, port: str, modules: Sequence[tuple[str, str]], differential: bool, stacked: tuple[str, str, str]
) -> Iterator[Entry]:
    """Yield one block's entries; `stacked` names a standard block's q-k-v weight, its bias, and its output module."""
    for original_module, port_module in modules:
        for parameter in ("weight", "bias"):
            yield Entry(f"{original}.{original_module}.{parameter}", (f"{port}.{port_module}.{parameter}",))
    original, port = f"{original}.attn", f"{port}.self_attn"
    if differential:
        for name in (*_LAMBDAS, "diff_norm.weight"):
            yield Entry(f"{original}.{name}", (f"{port}.{name}",))
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            for parameter in ("weight", "bias"):
                yield Entry(f"{original}.{projection}.{parameter}", (f"{port}.{projection}.{parameter}",))
        return
    *stacked_names, output = stacked
    for parameter, stacked_name in zip(("weight", "bias"), stacked_names, strict=True):
        parts = tuple(f"{port}.{projection}.{parameter}" for projection in ("q_proj", "k_proj", "v_proj"))
        yield Entry(f"{original}.{stacked_name}", parts, STACKED)
        yield Entry(f"{original}.{output}.{parameter}", (f"{port}.out_proj.{parameter}",))


def key_table_of(config: Any) -> list[Entry]:
    """Return an entry for every parameter of the model that a `DiffCLIPConfig` describes."""
    vision, text = config.vision_config, config.text_config
    return key_table(
        vision.num_hidden_layers,
        text.num_hidden_layers,
        vision.attention_type == "differential",
        text.attention_type == "differential",
    )


def key_table(vision_layers: int, text_layers: int, vision_differential: bool, text_differential: bool) -> list[Entry]:
    """Return an entry for every parameter of a model, by its depths and which towers are differential."""
    table = list(_OUTSIDE_BLOCKS)
    for layer in range(vision_layers):
        table += _block(
            f"visual.blocks.{layer}",
            f"vision_model.encoder.layers.{layer}",
            _VISION_BLOCK,
            vision_differential,
            ("qkv.weight", "qkv.bias", "proj"),
        )
    for layer in range(text_layers):
        table += _block(
            f"transformer.resblocks.{layer}",
            f"text_model.encoder.layers.{layer}",
            _TEXT_BLOCK,
            text_differential,
            ("in_proj_weight", "in_proj_bias", "out_proj"),
        )
    return table
