"""What DiffCLIP's towers are made of: embeddings, differential and standard attention, blocks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_diffclip import (
    FUSED_ATTENTION,
    check_flash_attention,
    compute_lambda,
    differential_attention_forward,
    eager_attention_forward,
)
from .calls_diffclip import attention_implementation
from .configuration_diffclip import DiffCLIPTextConfig, DiffCLIPVisionConfig
from .in_place_diffclip import activation_in_place, added, is_plain, may_overwrite
from .offloading_diffclip import weights_in_place
from .precision_diffclip import at_least_float32


class DiffCLIPVisionEmbeddings(nn.Module):
    """Patches, the class token and learned positions."""

    def __init__(self, config: DiffCLIPVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.grid_size = config.image_size // config.patch_size
        self.num_positions = self.grid_size**2 + 1

        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=config.patch_bias,
        )
        self.position_embedding = nn.Embedding(self.num_positions, config.hidden_size)

    def _positions(self, device: torch.device) -> torch.Tensor:
        # Through the module's forward, not its weight: an offloaded weight is only there during the forward.
        return self.position_embedding(torch.arange(self.num_positions, device=device)[None])

    def interpolate_pos_encoding(self, height: int, width: int, device: torch.device) -> torch.Tensor:
        """Return positions for an image of another size, by bicubic interpolation of the learned grid.

        Args:
            height, width: Of the image, in pixels.

        Returns:
            (1, 1 + patches, hidden_size); at the native size exactly the learned positions.
        """
        positions = self._positions(device)
        new_height, new_width = height // self.patch_size, width // self.patch_size
        if (new_height, new_width) == (self.grid_size, self.grid_size):
            return positions
        class_position, patch_positions = positions[:, :1], positions[:, 1:]
        grid = patch_positions.unflatten(1, (self.grid_size, self.grid_size)).permute(0, 3, 1, 2)
        # In float32 or better, since bicubic weights lose too much in half precision.
        grid = nn.functional.interpolate(
            grid.to(at_least_float32(grid.dtype)),
            size=(new_height, new_width),
            mode="bicubic",
            align_corners=False,
        ).to(positions.dtype)
        return torch.cat([class_position, grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Return (batch, 1 + patches, hidden_size); the arguments and errors of `DiffCLIPVisionModel.forward`."""
        batch_size, _, height, width = pixel_values.shape
        if not interpolate_pos_encoding and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values is {height}x{width} pixels; it must be {self.image_size}x{self.image_size} "
                "(config.image_size), or pass interpolate_pos_encoding=True."
            )
        if min(height, width) < self.patch_size:
            raise ValueError(f"pixel_values is {height}x{width} pixels; each side must be at least {self.patch_size}.")
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # (batch, patches, hidden_size)
        class_token = self.class_embedding.expand(batch_size, 1, -1)
        if interpolate_pos_encoding:
            positions = self.interpolate_pos_encoding(height, width, patches.device)
        else:
            positions = self._positions(patches.device)
        return torch.cat([class_token, patches], dim=1) + positions


class DiffCLIPTextEmbeddings(nn.Module):
    """Token embeddings plus learned positions."""

    def __init__(self, config: DiffCLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Return (batch, tokens, hidden_size) of ids and positions, (batch, tokens)."""
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


class _RMSNormOnCPU(torch.autograd.Function):
    """weight · x / sqrt(Σx² + eps) with its gradients in few passes over x, of which each costs a CPU memory."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden_states, weight, eps):
        inverse = _inverse_norm(hidden_states, eps)
        return (hidden_states * inverse).mul_(weight), inverse

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        hidden_states, weight, inverse = ctx.saved_tensors
        products = grad * hidden_states
        # With r = 1/sqrt(Σx² + eps) and the gradient g: dx = r·(g·weight − x·r²·Σ(g·x·weight)).
        factor = torch.matmul(products, weight)[..., None] * inverse.square()
        # By PyTorch's sum, which rounds less than a product with a vector does.
        grad_weight = products.mul_(inverse).flatten(0, -2).sum(0)
        grad_hidden = torch.mul(grad, weight, out=products).addcmul_(hidden_states, factor, value=-1).mul_(inverse)
        return grad_hidden, grad_weight, None


def _inverse_norm(hidden_states: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(Σx² + eps) over the last dimension, which is kept."""
    # By the vector's norm: a pass over x fewer than by its squares.
    return torch.rsqrt(torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True).square() + eps)


class DiffCLIPRMSNorm(nn.Module):
    """RMSNorm on the last dimension, computed in float32 or better (`diff_norm` of the released code)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0, overwrite: bool = False) -> torch.Tensor:
        """Return scale · weight · x / sqrt(mean(x²) + eps), of the input's shape and dtype; over it, where asked for.

        Without gradients alone may the input be written over.
        """
        size = hidden_states.shape[-1]
        wide = hidden_states.to(at_least_float32(hidden_states.dtype))
        # The scale and the mean's divisor on the weight: passes over x fewer.
        weight, eps = self.weight.to(wide.dtype) * (scale * size**0.5), self.eps * size
        leaves_eager = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if torch.is_grad_enabled() and wide.device.type == "cpu" and not leaves_eager:
            return _RMSNormOnCPU.apply(wide, weight, eps)[0].to(hidden_states.dtype)
        inverse = _inverse_norm(wide, eps)
        if torch.is_grad_enabled():
            return (wide * inverse * weight).to(hidden_states.dtype)
        # Over what is there: new memory costs a CPU as much as the product.
        return (wide.mul_(inverse) if overwrite else wide * inverse).mul_(weight).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class DiffCLIPAttention(nn.Module):
    """Standard multi-head attention, softmax(q·kᵀ·head_dim^-0.5)·v.

    `forward` takes hidden states (batch, tokens, hidden_size) and returns the same shape, and the softmax maps
    (batch, num_heads, tokens, tokens) under `attn_implementation="eager"`, else None. It takes an implementation for
    one call too, since the configuration's is every thread's.
    """

    def __init__(self, config: DiffCLIPTextConfig | DiffCLIPVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        # Transformers' attention functions read this where no mask is given.
        self.is_causal = config.model_type == DiffCLIPTextConfig.model_type

        width = config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def _attend(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_implementation: str,
        is_causal: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the heads' outputs, (batch, tokens, num_heads, head_dim), and the maps."""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            attn_implementation, eager_attention_forward
        )
        query = self._split(self.q_proj(hidden_states), self.head_dim)
        check_flash_attention(query, attn_implementation)
        return attention_interface(
            self,
            query,
            self._split(self.k_proj(hidden_states), self.head_dim),
            self._split(self.v_proj(hidden_states), self.head_dim),
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            is_causal=is_causal,
            **kwargs,
        )

    @staticmethod
    def _split(states: torch.Tensor, width: int) -> torch.Tensor:
        """(batch, tokens, hidden_size) → (batch, hidden_size / width, tokens, width)."""
        return states.view(*states.shape[:2], states.shape[-1] // width, width).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_implementation: str | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output, (batch, tokens, hidden_size), and the softmax maps or None."""
        implementation = attn_implementation or attention_implementation(self.config)
        is_causal = self.is_causal if is_causal is None else is_causal
        output, maps = self._attend(hidden_states, attention_mask, implementation, is_causal, **kwargs)
        return self.out_proj(output.flatten(2)), maps


class DiffCLIPDifferentialAttention(DiffCLIPAttention):
    """Differential attention: for pair i, RMSNorm((A1 − λ·A2)·v) · (1 − λ_init).

    A1 and A2 are the softmax maps of heads 2i and 2i+1, v is as wide as both heads together, and one λ serves every
    pair of the layer. The maps that `forward` returns are those of the single heads, (batch, num_heads, tokens,
    tokens) with rows that sum to 1; `differential_attention_map(maps, attention.get_lambda())` combines them.

    Source: paper arXiv 2503.06626, section 3; the released code for the interleaved pairs.
    """

    def __init__(self, config: DiffCLIPTextConfig | DiffCLIPVisionConfig, layer_idx: int):
        super().__init__(config)
        # A Python float, not a buffer: models are built on the meta device, where a buffer's value would be lost.
        self.lambda_init = config.get_lambda_init(layer_idx)
        # In a model of half precision too, as in the original under autocast: exp magnifies rounding.
        wide = at_least_float32(torch.get_default_dtype())
        self.lambda_q1 = nn.Parameter(torch.empty(self.head_dim, dtype=wide))
        self.lambda_k1 = nn.Parameter(torch.empty(self.head_dim, dtype=wide))
        self.lambda_q2 = nn.Parameter(torch.empty(self.head_dim, dtype=wide))
        self.lambda_k2 = nn.Parameter(torch.empty(self.head_dim, dtype=wide))
        self.diff_norm = DiffCLIPRMSNorm(2 * self.head_dim, eps=config.diff_norm_eps)

    def get_lambda(self) -> torch.Tensor:
        """Return the layer's present λ, without dimensions, in float32 or better, differentiable in its vectors."""
        with weights_in_place(self):
            return self._lambda()

    def _lambda(self) -> torch.Tensor:
        return compute_lambda(self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2, self.lambda_init)

    def _attend(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_implementation: str,
        is_causal: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the pairs' outputs, (batch, tokens, num_heads / 2, 2 · head_dim), and the maps."""
        query = self._split(self.q_proj(hidden_states), self.head_dim)
        key = self._split(self.k_proj(hidden_states), self.head_dim)
        value = self._split(self.v_proj(hidden_states), 2 * self.head_dim)
        dropout = self.attention_dropout if self.training else 0.0
        if attn_implementation == FUSED_ATTENTION:
            return self._fused(query, key, value, attention_mask, dropout, is_causal), None
        output, maps = differential_attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            self._lambda(),
            scaling=self.scaling,
            dropout=dropout,
            attn_implementation=attn_implementation,
            is_causal=is_causal,
            **kwargs,
        )
        scale = 1 - self.lambda_init
        # The output is nobody else's.
        if may_overwrite() and is_plain(self.diff_norm, DiffCLIPRMSNorm):
            return self.diff_norm(output, scale, overwrite=True), maps
        return self.diff_norm(output, scale=scale), maps

    def _fused(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float,
        is_causal: bool,
    ) -> torch.Tensor:
        """Return the pairs' outputs from the kernels that compute all of it, norm and factor too."""
        # Here, since Triton takes time to import and few need it.
        from .kernels_diffclip import fused_differential_attention

        if dropout:
            raise ValueError(
                f"attention_dropout is {dropout}; under attn_implementation={FUSED_ATTENTION!r} it must be 0."
            )
        return fused_differential_attention(
            query,
            key,
            value,
            attention_mask,
            self._lambda(),
            self.diff_norm.weight,
            scaling=self.scaling,
            is_causal=is_causal,
            norm_eps=self.diff_norm.eps,
            output_scale=1 - self.lambda_init,
        )


class DiffCLIPMLP(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, config: DiffCLIPTextConfig | DiffCLIPVisionConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return (batch, tokens, hidden_size), of the same shape."""
        hidden_states = self.fc1(hidden_states)
        return self.fc2((activation_in_place(self.activation_fn, self.fc1) or self.activation_fn)(hidden_states))


class DiffCLIPEncoderLayer(GradientCheckpointingLayer):
    """A pre-norm block: x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: DiffCLIPTextConfig | DiffCLIPVisionConfig, layer_idx: int):
        super().__init__()
        # CODEPATH: DiffCLIP and DiffCLIP* are differential in both towers, DiffCLIP† in vision, the CLIP baseline in
        # neither.
        if config.attention_type == "differential":
            self.self_attn: DiffCLIPAttention = DiffCLIPDifferentialAttention(config, layer_idx)
        else:
            self.self_attn = DiffCLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = DiffCLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return the block's output, (batch, tokens, hidden_size)."""
        attention, mlp = self.self_attn, self.mlp
        attention_output, _ = attention(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        kinds = DiffCLIPDifferentialAttention, DiffCLIPAttention
        hidden_states = added(hidden_states, attention_output, attention, kinds, "out_proj")
        mlp_output = mlp(self.layer_norm2(hidden_states))
        return added(hidden_states, mlp_output, mlp, (DiffCLIPMLP,), "fc2")


class DiffCLIPEncoder(nn.Module):
    """The blocks of a tower, in order."""

    def __init__(self, config: DiffCLIPTextConfig | DiffCLIPVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            [DiffCLIPEncoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return the last block's output, (batch, tokens, hidden_size)."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states


__all__ = [
    "DiffCLIPAttention",
    "DiffCLIPDifferentialAttention",
    "DiffCLIPEncoder",
    "DiffCLIPEncoderLayer",
    "DiffCLIPMLP",
    "DiffCLIPRMSNorm",
    "DiffCLIPTextEmbeddings",
    "DiffCLIPVisionEmbeddings",
]
