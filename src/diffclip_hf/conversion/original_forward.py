"""The original's forward pass, written straight from its keys: what a conversion is measured against.

Plain torch and none of the port's code, so that a fault of the port or of the key table shows as a difference. Source:
the authors' released code and SLIP's (github.com/hammoudhasan/DiffCLIP, github.com/facebookresearch/SLIP).
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F


Weights = Mapping[str, torch.Tensor]
Attention = Callable[[str, torch.Tensor, int], torch.Tensor]


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return x · weightᵀ + bias, in float32."""
    return F.linear(x, weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float())


def layer_norm(weights: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return LayerNorm over the last dimension, in float32."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float(), eps)


def layer_lambda_init(lambda_init: float | str, layer: int) -> float:
    """Return a layer's λ_init: the number given, or under "depth" 0.8 − 0.6·exp(−0.3·layer), from layer 0."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer) if lambda_init == "depth" else float(lambda_init)


def layer_lambda(weights: Weights, name: str, lambda_init: float) -> torch.Tensor:
    """Return λ = exp(λ_q1 · λ_k1) − exp(λ_q2 · λ_k2) + λ_init of the attention at `name`, without dimensions."""
    q1, k1, q2, k2 = (weights[f"{name}.lambda_{part}"].float() for part in ("q1", "k1", "q2", "k2"))
    return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + lambda_init


def differential_attention(
    weights: Weights, name: str, x: torch.Tensor, mask: torch.Tensor, lambda_init: float
) -> torch.Tensor:
    """Return differential attention's output.

    Args:
        weights: Original key → tensor.
        name: Of the attention, such as `visual.blocks.0.attn`.
        x: (batch, tokens, width).
        mask: Added to the scores, broadcastable to (tokens, tokens).
        lambda_init: The layer's constant.
    """
    head_dim = len(weights[f"{name}.lambda_q1"])
    query, key = (
        linear(weights, f"{name}.{part}", x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for part in ("q_proj", "k_proj")
    )
    value = linear(weights, f"{name}.v_proj", x).unflatten(-1, (-1, 2 * head_dim)).transpose(1, 2)
    maps = (query @ key.mT * head_dim**-0.5 + mask).softmax(-1)
    # Heads 2i and 2i+1 are pair i.
    out = (maps[:, 0::2] - layer_lambda(weights, name, lambda_init) * maps[:, 1::2]) @ value
    out = out * (out.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[f"{name}.diff_norm.weight"].float()
    out = out * (1 - lambda_init)
    return linear(weights, f"{name}.out_proj", out.transpose(1, 2).flatten(2))


def standard_attention(
    weights: Weights, name: str, x: torch.Tensor, mask: torch.Tensor, heads: int, stacked: str, output: str
) -> torch.Tensor:
    """Return softmax attention's output.

    Args:
        weights, name, x, mask: As in `differential_attention`.
        heads: Number of heads.
        stacked: What the q-k-v matrix is called, up to `weight` and `bias`: `qkv.` in timm, `in_proj_` in torch.
        output: What the output projection is called.
    """
    weight, bias = (weights[f"{name}.{stacked}{part}"].float() for part in ("weight", "bias"))
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in F.linear(x, weight, bias).chunk(3, dim=-1)
    )
    maps = (query @ key.mT * query.shape[-1] ** -0.5 + mask).softmax(-1)
    return linear(weights, f"{name}.{output}", (maps @ value).transpose(1, 2).flatten(2))


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Return x · sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def run_blocks(
    weights: Weights,
    blocks: str,
    x: torch.Tensor,
    attention: Attention,
    names: tuple[str, str, str, str],
    activation: Callable[[torch.Tensor], torch.Tensor],
    eps: float,
) -> list[torch.Tensor]:
    """Return every block's output; `names` are those of the two norms and the two layers of the MLP."""
    norm1, norm2, fc1, fc2 = names
    hidden: list[torch.Tensor] = []
    while f"{blocks}.{len(hidden)}.{norm1}.weight" in weights:
        block = f"{blocks}.{len(hidden)}"
        x = x + attention(f"{block}.attn", layer_norm(weights, f"{block}.{norm1}", x, eps), len(hidden))
        inner = activation(linear(weights, f"{block}.{fc1}", layer_norm(weights, f"{block}.{norm2}", x, eps)))
        x = x + linear(weights, f"{block}.{fc2}", inner)
        hidden.append(x)
    return hidden


def vision_tower(
    weights: Weights, pixel_values: torch.Tensor, lambda_init: float | str, heads: int | None
) -> list[torch.Tensor]:
    """Return every block's output, each (batch, 1 + patches, width), and last the unnormalised image embedding."""
    kernel, bias = (weights[f"visual.patch_embed.proj.{part}"].float() for part in ("weight", "bias"))
    patches = F.conv2d(pixel_values, kernel, bias, stride=kernel.shape[-1]).flatten(2).mT
    class_token = weights["visual.cls_token"].float().expand(len(patches), -1, -1)
    x = torch.cat([class_token, patches], dim=1) + weights["visual.pos_embed"].float()
    no_mask = torch.zeros(())
    differential = "visual.blocks.0.attn.lambda_q1" in weights
    # timm's own epsilon; the constructor of the differential tower swaps the norm class, and with it the epsilon.
    eps = 1e-5 if differential else 1e-6

    def attention(name: str, x: torch.Tensor, layer: int) -> torch.Tensor:
        if differential:
            return differential_attention(weights, name, x, no_mask, layer_lambda_init(lambda_init, layer))
        if heads is None:
            raise ValueError("vision_heads is None; a standard image tower needs its number of heads.")
        return standard_attention(weights, name, x, no_mask, heads, "qkv.", "proj")

    hidden = run_blocks(weights, "visual.blocks", x, attention, ("norm1", "norm2", "mlp.fc1", "mlp.fc2"), F.gelu, eps)
    pooled = layer_norm(weights, "visual.norm", hidden[-1], eps)[:, 0]
    return [*hidden, pooled @ weights["image_projection"].float()]


def text_tower(
    weights: Weights, input_ids: torch.Tensor, lambda_init: float | str, heads: int | None
) -> list[torch.Tensor]:
    """Return every block's output, each (batch, tokens, width), and last the unnormalised text embedding."""
    length = input_ids.shape[-1]
    x = weights["token_embedding.weight"][input_ids].float() + weights["positional_embedding"][:length].float()
    causal_mask = torch.full((length, length), -math.inf).triu(1)
    differential = "transformer.resblocks.0.attn.lambda_q1" in weights

    def attention(name: str, x: torch.Tensor, layer: int) -> torch.Tensor:
        if differential:
            return differential_attention(weights, name, x, causal_mask, layer_lambda_init(lambda_init, layer))
        if heads is None:
            raise ValueError("text_heads is None; a standard text tower needs its number of heads.")
        return standard_attention(weights, name, x, causal_mask, heads, "in_proj_", "out_proj")

    names = ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
    hidden = run_blocks(weights, "transformer.resblocks", x, attention, names, quick_gelu, 1e-5)
    # The end-of-text token has the largest id.
    pooled = layer_norm(weights, "ln_final", hidden[-1], 1e-5)[torch.arange(len(input_ids)), input_ids.argmax(-1)]
    return [*hidden, pooled @ weights["text_projection"].float()]


@torch.inference_mode()
def original_forward(
    weights: Weights,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    lambda_init: float | str = 0.8,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return what the original computes from images and texts, in float32 on the CPU.

    Args:
        weights: Original key, without `module.`, → tensor, of any floating dtype.
        pixel_values: Normalised images, (images, channels, side, side), float32.
        input_ids: Token ids, (texts, tokens); each row's largest id is its end-of-text token.
        lambda_init: λ_init of every layer, or "depth" for DiffCLIP*'s schedule.
        vision_heads, text_heads: Heads of a standard tower; a differential tower's follow from its λ vectors.

    Returns:
        `image_embed` (images, projection) and `text_embed` (texts, projection), not normalised; `logits_per_image`
        (images, texts); `vision_hidden` (layers, images, tokens, width) and `text_hidden` (layers, texts, tokens,
        width), each block's output.

    Raises:
        KeyError: A weight is missing.
        ValueError: The heads of a standard tower aren't given.
    """
    *vision_hidden, image_embed = vision_tower(weights, pixel_values, lambda_init, vision_heads)
    *text_hidden, text_embed = text_tower(weights, input_ids, lambda_init, text_heads)
    cosines = F.normalize(image_embed, dim=-1) @ F.normalize(text_embed, dim=-1).T
    return {
        "image_embed": image_embed,
        "text_embed": text_embed,
        "logits_per_image": weights["logit_scale"].float().exp() * cosines,
        "vision_hidden": torch.stack(vision_hidden),
        "text_hidden": torch.stack(text_hidden),
    }
