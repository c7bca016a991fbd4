"""PyTorch DiffCLIP: CLIP with differential attention, with the API of Transformers' CLIP."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from .attention_diffclip import (
    FUSED_ATTENTION,
    check_flash_attention,
    compute_lambda,
    differential_attention_forward,
    eager_attention_forward,
)
from .configuration_diffclip import DiffCLIPConfig, DiffCLIPTextConfig, DiffCLIPVisionConfig
from .hub_cache_diffclip import checked_downloads
from .inputs_diffclip import (
    check_input_ids,
    check_keyword_arguments,
    check_labels,
    check_pixel_values,
    check_text_companion,
)
from .loss_diffclip import image_text_contrastive_loss
from .offloading_diffclip import check_four_bit_widths, check_has_weights, execution_device, weights_in_place


logger = logging.get_logger(__name__)


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


def is_text(config: DiffCLIPTextConfig | DiffCLIPVisionConfig) -> bool:
    """Say whether a configuration is the text tower's.

    By its model type, not its class: code that travels with a checkpoint may be loaded as two modules, one for the
    configuration and one for the model, whose classes differ.
    """
    return config.model_type == DiffCLIPTextConfig.model_type


def attention_implementation(config: PreTrainedConfig) -> str:
    """Return the name of the attention implementation that a configuration asks for."""
    return config._attn_implementation or "eager"


class _MaskConfig:
    """What Transformers' mask functions read of a configuration, for one call."""

    def __init__(self, attn_implementation: str, is_causal: bool):
        self._attn_implementation = attn_implementation
        self.is_causal = is_causal


def with_initial_std(module: nn.Module, std: float | None) -> nn.Module:
    """Note on a module the standard deviation with which `_init_weights` fills its weight; None for PyTorch's default.

    It is noted where the module's part in the model is known; `_init_weights` sees each module alone.
    """
    module.initial_std = std
    return module


def text_block_stds(config: DiffCLIPTextConfig | DiffCLIPVisionConfig) -> tuple[float | None, float | None]:
    """Return the initial standard deviations of what reads and what writes a text block's residual; None in vision."""
    if not is_text(config):
        return None, None
    return config.hidden_size**-0.5, (config.hidden_size * 2 * config.num_hidden_layers) ** -0.5


def projection(width: int, projection_dim: int) -> nn.Module:
    """Return a tower's projection into the shared space."""
    return with_initial_std(nn.Linear(width, projection_dim, bias=False), width**-0.5)


class DiffCLIPVisionEmbeddings(nn.Module):
    """Patches, the class token and learned positions; the patch convolution has a bias, unlike CLIP's."""

    def __init__(self, config: DiffCLIPVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.grid_size = config.image_size // config.patch_size
        self.num_positions = self.grid_size**2 + 1

        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
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
            grid.to(torch.promote_types(grid.dtype, torch.float32)),
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
        std = config.initializer_range
        self.token_embedding = with_initial_std(nn.Embedding(config.vocab_size, config.hidden_size), std)
        self.position_embedding = with_initial_std(
            nn.Embedding(config.max_position_embeddings, config.hidden_size), std / 2
        )

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Return (batch, tokens, hidden_size) of ids and positions, (batch, tokens)."""
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


class DiffCLIPRMSNorm(nn.Module):
    """RMSNorm on the last dimension, computed in float32 or better (`diff_norm` of the released code)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Return scale · weight · x / sqrt(mean(x²) + eps), of the input's shape and dtype."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        # By the vector's norm, and the scale on the weight: a pass over x fewer for each, and on a CPU half the time.
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1]
        normed = wide * torch.rsqrt(mean_square + self.eps)
        return (normed * (self.weight.to(wide.dtype) * scale)).to(hidden_states.dtype)

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
        self.is_causal = is_text(config)

        width = config.hidden_size
        input_std, output_std = text_block_stds(config)
        self.q_proj = with_initial_std(nn.Linear(width, width), input_std)
        self.k_proj = with_initial_std(nn.Linear(width, width), input_std)
        self.v_proj = with_initial_std(nn.Linear(width, width), input_std)
        self.out_proj = with_initial_std(nn.Linear(width, width), output_std)

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
        return states.unflatten(-1, (-1, width)).transpose(1, 2)

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
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.lambda_q1 = nn.Parameter(torch.empty(self.head_dim, dtype=wide))
        self.lambda_k1 = nn.Parameter(torch.empty(self.head_dim, dtype=wide))
        self.lambda_q2 = nn.Parameter(torch.empty(self.head_dim, dtype=wide))
        self.lambda_k2 = nn.Parameter(torch.empty(self.head_dim, dtype=wide))
        self.diff_norm = DiffCLIPRMSNorm(2 * self.head_dim, eps=config.diff_norm_eps)

    def get_lambda(self) -> torch.Tensor:
        """Return the layer's present λ, without dimensions, in float32 or better, differentiable in its vectors."""
        with weights_in_place(self):
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
            self.get_lambda(),
            scaling=self.scaling,
            dropout=dropout,
            attn_implementation=attn_implementation,
            is_causal=is_causal,
            **kwargs,
        )
        return self.diff_norm(output, scale=1 - self.lambda_init), maps

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
            self.get_lambda(),
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
        input_std, output_std = text_block_stds(config)
        self.fc1 = with_initial_std(
            nn.Linear(config.hidden_size, config.intermediate_size), input_std and input_std * 2**-0.5
        )
        self.fc2 = with_initial_std(nn.Linear(config.intermediate_size, config.hidden_size), output_std)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return (batch, tokens, hidden_size), of the same shape."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class DiffCLIPEncoderLayer(GradientCheckpointingLayer):
    """A pre-norm block: x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: DiffCLIPTextConfig | DiffCLIPVisionConfig, layer_idx: int):
        super().__init__()
        # CODEPATH: DiffCLIP and DiffCLIP* are differential in both towers, DiffCLIP† in vision, the CLIP baseline in
        # neither.
        if config.attention_type == "differential":
            self.self_attn = DiffCLIPDifferentialAttention(config, layer_idx)
        else:
            self.self_attn = DiffCLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = DiffCLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return the block's output, (batch, tokens, hidden_size)."""
        attention_output, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


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


_Model = TypeVar("_Model", bound="DiffCLIPPreTrainedModel")


def _initialise(fill: Callable, tensor: Any, *args: float, **kwargs: float) -> None:
    """Fill a tensor that is there; pruning and quantisers leave None."""
    if tensor is not None:
        fill(tensor, *args, **kwargs)


class DiffCLIPPreTrainedModel(PreTrainedModel):
    """Base of every DiffCLIP model: loading, saving and initialisation."""

    config: DiffCLIPConfig
    config_class = DiffCLIPConfig
    base_model_prefix = "diffclip"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # No loss here is divided by a `num_items_in_batch`, which Transformers' Trainer would else conclude from **kwargs.
    accepts_loss_kwargs = False
    _no_split_modules = ["DiffCLIPTextEmbeddings", "DiffCLIPVisionEmbeddings", "DiffCLIPEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # exp magnifies the rounding of λ's vectors, which the original keeps in float32 under autocast.
    _keep_in_fp32_modules_strict = ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"]
    _can_record_outputs = {"hidden_states": DiffCLIPEncoderLayer, "attentions": DiffCLIPAttention}

    @classmethod
    def _checked(cls, config: Any) -> Any:
        """Return the configuration that a model is made of, or raise a ValueError where it can't be.

        Its fields are looked at again, since they may have been set after it was made.
        """
        expected = cls.config_class
        given = getattr(config, "model_type", None)
        if given != expected.model_type:
            raise ValueError(
                f"{cls.__name__} is given a {type(config).__name__}, of a model of type {given!r}; it must be a "
                f"{expected.__name__}."
            )
        config.validate_architecture()
        return config

    @property
    def device(self) -> torch.device:
        """The device on which the model computes and takes inputs, also where its weights are offloaded."""
        return execution_device(self)

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        cache_dir: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> _Model:
        """Load a model as Transformers does, and check the weights that it fetches from the Hub against their hash.

        Raises:
            OSError: As Transformers does, and where fetched weights aren't those that the Hub announced; they are
                removed from the cache.
            ValueError: A quantised layer is of a size that its library can't compute.
        """
        with checked_downloads(str(pretrained_model_name_or_path), cache_dir):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, cache_dir=cache_dir, **kwargs)
        # With output_loading_info it is a pair.
        check_four_bit_widths(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def post_init(self) -> None:
        """Initialise the weights and what Transformers keeps of a model."""
        super().post_init()
        # Transformers adds each tower's patterns to the whole model's, where they would hide unexpected keys.
        self._keys_to_ignore_on_load_unexpected = set(type(self)._keys_to_ignore_on_load_unexpected or ())

    # trf-ignore: TRF018 (Transformers' defaults are other distributions, and every kind of module here is named)
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module from the original's distributions.

        Every write goes through `transformers.initialization`, which leaves alone what a checkpoint has filled. Only
        modules that own parameters come here: Transformers passes over the others in code that isn't its own.
        """
        # A tower initialises its own modules, so `config` is a tower's there and the whole model's elsewhere.
        config = self.config
        factor = config.initializer_factor
        plain_vision = config.model_type == DiffCLIPVisionConfig.model_type and config.attention_type == "standard"

        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            self._init_matrix(module, factor, plain_vision)
        elif isinstance(module, (nn.LayerNorm, DiffCLIPRMSNorm)):
            _initialise(init.ones_, module.weight)
            _initialise(init.zeros_, getattr(module, "bias", None))
        elif isinstance(module, DiffCLIPVisionEmbeddings):
            _initialise(init.normal_, module.class_embedding, std=1e-6 * factor)
        elif isinstance(module, DiffCLIPDifferentialAttention):
            for vector in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
                _initialise(init.normal_, vector, std=config.lambda_init_std)
        elif isinstance(module, DiffCLIPModel):
            _initialise(init.constant_, module.logit_scale, config.logit_scale_init_value)

    def _init_matrix(self, module: Any, factor: float, plain_vision: bool) -> None:
        """Initialise a Linear, a convolution or an embedding; `plain_vision` is the image tower of SLIP's CLIP."""
        weight, bias = module.weight, getattr(module, "bias", None)
        # A quantiser may have taken the weight away.
        if weight is None:
            return
        bound = factor / math.sqrt(weight[0].numel())
        std = getattr(module, "initial_std", None)
        if std is not None:
            init.normal_(weight, std=std * factor)
        elif isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and plain_vision):
            # timm's default for positions, and in the plain tower of SLIP's CLIP baseline for every Linear.
            init.trunc_normal_(weight, std=self.config.get_text_config().initializer_range * factor)
        else:
            # PyTorch's default.
            init.uniform_(weight, -bound, bound)
        if isinstance(module, nn.Linear) and plain_vision:
            _initialise(init.zeros_, bias)
        else:
            _initialise(init.uniform_, bias, -bound, bound)

    def _tower_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Add what the whole model's configuration asks of its towers, which read their own configuration alone."""
        flags = ("output_attentions", "output_hidden_states")
        asked = {flag: getattr(self.config, flag) for flag in flags if getattr(self.config, flag)}
        return {**asked, **kwargs}

    def _call_implementation(self, given: torch.Tensor, kwargs: dict[str, Any]) -> str:
        """Return the attention implementation of one call of a tower: the formula where maps are asked for."""
        implementation = attention_implementation(self.config)
        if torch.compiler.is_compiling():
            return "eager" if kwargs.get("output_attentions", self.config.output_attentions) else implementation
        # Transformers' SDPA takes no empty batch.
        if implementation == "eager" or given.numel() == 0:
            return "eager"
        if not kwargs.get("output_attentions", self.config.output_attentions):
            return implementation
        logger.warning_once(
            "output_attentions is True: calls that ask for maps compute attention by the formula, as under "
            f"attn_implementation='eager', which is slower than {implementation!r} and keeps every map in memory."
        )
        return "eager"

    def _check_has_values(self, given: torch.Tensor) -> None:
        """Raise a ValueError where a tower on the meta device is given numbers; hooks bring offloaded weights."""
        if not given.is_meta and self.get_input_embeddings().weight.is_meta:
            check_has_weights(self)

    def _is_causal(self, kwargs: dict[str, Any], default: bool) -> bool:
        """Take `is_causal` out of a call's keyword arguments, else from the configuration, else the tower's own."""
        given = kwargs.pop("is_causal", None)
        given = getattr(self.config, "is_causal", None) if given is None else given
        return default if given is None else bool(given)


class DiffCLIPTextModel(DiffCLIPPreTrainedModel):
    """DiffCLIP's text tower without the projection."""

    config: DiffCLIPTextConfig
    config_class = DiffCLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _input_embed_layer = "token_embedding"
    # What a whole model's folder holds besides this tower.
    _keys_to_ignore_on_load_unexpected = [
        r"^vision_model\.",
        r"^visual_projection\.",
        r"^text_projection\.",
        "^logit_scale$",
    ]

    def __init__(self, config: DiffCLIPTextConfig):
        super().__init__(self._checked(config))
        self.embeddings = DiffCLIPTextEmbeddings(config)
        self.encoder = DiffCLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _text_start(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return the index of each text's first token, (batch, 1): what stands before it is left padding."""
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        if attention_mask is None and self.config.bos_token_id is not None:
            is_start = input_ids == self.config.bos_token_id
            # Without a start token argmax gives 0, and the text starts at the first token.
            return is_start.int().argmax(-1, keepdim=True)
        return input_ids.new_zeros(input_ids.shape[0], 1)

    def _end_of_text(self, input_ids: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Return the index of each text's first end-of-text token, (batch, 1), or raise where there is none."""
        eos_token_id = self.config.eos_token_id
        eos_token_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
        is_end = torch.stack([input_ids == token_id for token_id in eos_token_ids]).any(0)
        is_end = is_end & (torch.arange(input_ids.shape[-1], device=input_ids.device) >= start)
        has_end = is_end.any(-1)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            torch._assert_async(has_end.all(), "input_ids has a row without an end-of-text token")
        elif not input_ids.is_meta:
            self._check_rows(input_ids, has_end)
        return is_end.int().argmax(-1, keepdim=True)

    def _check_rows(self, input_ids: torch.Tensor, has_end: torch.Tensor) -> None:
        """Raise a ValueError for ids outside the vocabulary, and for rows without an end-of-text token."""
        vocabulary = getattr(self.get_input_embeddings(), "num_embeddings", self.config.vocab_size)
        is_known = (input_ids >= 0) & (input_ids < vocabulary)
        # One wait for a GPU rather than two.
        if (is_known.all(-1) & has_end).all():
            return
        if not is_known.all():
            raise ValueError(
                f"input_ids holds {input_ids[~is_known][0].item()}; an id must be from 0 to {vocabulary - 1} "
                "(config.vocab_size - 1). Take the tokenizer saved with this model."
            )
        rows = (~has_end).nonzero().flatten().tolist()
        raise ValueError(
            f"input_ids has no end-of-text token in rows {rows}; each row must hold {self.config.eos_token_id} "
            "(config.eos_token_id), whose position is pooled. Tokenize with truncation=True, which keeps it."
        )

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode texts.

        Padding, left or right, changes no embedding: positions count from a text's first token, and the first
        end-of-text token is pooled.

        Args:
            input_ids: Token ids, (batch, tokens), at most `config.max_position_embeddings` tokens, each row with an
                end-of-text token.
            attention_mask: 1 for tokens to attend to, 0 for padding, (batch, tokens). Without one, what stands before
                a row's start token (`config.bos_token_id`) counts as padding.
            position_ids: Positions, (batch, tokens), if not counted from the first token.
            **kwargs: Transformers' own: `output_attentions`, which is slower; `output_hidden_states`, True or the
                indices of some; `return_dict`; `is_causal`, False for attention in both directions; and more.

        Returns:
            `last_hidden_state` (batch, tokens, hidden_size) after the final LayerNorm, and `pooler_output` (batch,
            hidden_size), its end-of-text token.

        Raises:
            ValueError: `input_ids` is missing, not of integers or too long, an id isn't in the vocabulary, or a row
                has no end-of-text token.
            TypeError: An argument isn't a tensor, or is unknown.
        """
        check_keyword_arguments(DiffCLIPTextModel.forward, kwargs)
        input_ids = check_input_ids(input_ids, self.config.max_position_embeddings)
        check_text_companion("attention_mask", attention_mask, input_ids)
        check_text_companion("position_ids", position_ids, input_ids, self.config.max_position_embeddings - 1)
        self._check_has_values(input_ids)
        implementation = self._call_implementation(input_ids, kwargs)
        is_causal = self._is_causal(kwargs, default=True)
        length = input_ids.shape[-1]
        input_ids = input_ids.view(-1, length)
        if attention_mask is not None and attention_mask.ndim < 4:
            attention_mask = attention_mask.view(-1, length)

        start = self._text_start(input_ids, attention_mask)
        end = self._end_of_text(input_ids, start)
        token_idx = torch.arange(length, device=input_ids.device)[None]
        if position_ids is None:
            position_ids = (token_idx - start).clamp(min=0)
        if attention_mask is None:
            attention_mask = (token_idx >= start).long()
        elif attention_mask.ndim == 2:
            # A mask made by `input_ids != pad_token_id` hides the end of text where both have one id.
            attention_mask = attention_mask.bool().logical_or(token_idx == end).long()

        hidden_states = self.embeddings(input_ids, position_ids)
        mask = create_causal_mask(
            _MaskConfig(implementation, is_causal),
            hidden_states,
            attention_mask,
            None,
            # Whether a mask can be left out is read off it, which meta tensors don't allow.
            allow_is_causal_skip=not hidden_states.is_meta,
        )
        hidden_states = self.encoder(
            hidden_states, mask, attn_implementation=implementation, is_causal=is_causal, **kwargs
        )

        last_hidden_state = self.final_layer_norm(hidden_states)
        batch_idx = torch.arange(input_ids.shape[0], device=last_hidden_state.device)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[batch_idx, end.flatten().to(last_hidden_state.device)],
        )


class DiffCLIPVisionModel(DiffCLIPPreTrainedModel):
    """DiffCLIP's image tower without the projection."""

    config: DiffCLIPVisionConfig
    config_class = DiffCLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    # What a whole model's folder holds besides this tower.
    _keys_to_ignore_on_load_unexpected = [
        r"^text_model\.",
        r"^visual_projection\.",
        r"^text_projection\.",
        "^logit_scale$",
    ]

    def __init__(self, config: DiffCLIPVisionConfig):
        super().__init__(self._checked(config))
        self.embeddings = DiffCLIPVisionEmbeddings(config)
        self.encoder = DiffCLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: Images as the image processor makes them, (batch, channels, height, width).
            interpolate_pos_encoding: Whether to accept another size than `config.image_size`, by interpolating the
                position embeddings.
            **kwargs: As in `DiffCLIPTextModel.forward`; `is_causal` is False here.

        Returns:
            `last_hidden_state` (batch, 1 + patches, hidden_size) after the final LayerNorm, and `pooler_output`
            (batch, hidden_size), its class token.

        Raises:
            ValueError: `pixel_values` is missing, not of floating-point numbers, not (batch, channels, height, width),
                or of another size or number of channels than the configuration's.
            TypeError: `pixel_values` isn't a tensor, or an argument is unknown.
        """
        check_keyword_arguments(DiffCLIPVisionModel.forward, kwargs)
        pixel_values = check_pixel_values(pixel_values, self.config.num_channels)
        self._check_has_values(pixel_values)
        implementation = self._call_implementation(pixel_values, kwargs)
        is_causal = self._is_causal(kwargs, default=False)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        mask = None
        if is_causal:
            mask = create_causal_mask(_MaskConfig(implementation, is_causal), hidden_states, None, None)
        hidden_states = self.encoder(
            hidden_states, mask, attn_implementation=implementation, is_causal=is_causal, **kwargs
        )
        last_hidden_state = self.post_layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=last_hidden_state[:, 0])


class DiffCLIPModel(DiffCLIPPreTrainedModel):
    """DiffCLIP: both towers, their projections and the logit scale.

    Source: paper arXiv 2503.06626; Radford et al. 2021 (CLIP).
    """

    def __init__(self, config: DiffCLIPConfig):
        super().__init__(self._checked(config))
        self.text_model = DiffCLIPTextModel._from_config(config.text_config)
        self.vision_model = DiffCLIPVisionModel._from_config(config.vision_config)
        self.visual_projection = projection(config.vision_config.hidden_size, config.projection_dim)
        self.text_projection = projection(config.text_config.hidden_size, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode texts into the shared space.

        The arguments and errors are those of `DiffCLIPTextModel.forward`.

        Returns:
            The text tower's output, with `pooler_output` the projected embedding, not normalised, (batch,
            projection_dim).
        """
        check_keyword_arguments(DiffCLIPModel.get_text_features, kwargs)
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **self._tower_kwargs(kwargs),
        )
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode images into the shared space.

        The arguments and errors are those of `DiffCLIPVisionModel.forward`.

        Returns:
            The image tower's output, with `pooler_output` the projected embedding, not normalised, (batch,
            projection_dim).
        """
        check_keyword_arguments(DiffCLIPModel.get_image_features, kwargs)
        outputs = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **self._tower_kwargs(kwargs),
        )
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    def encode_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return texts' L2-normalised embeddings, (batch, projection_dim); the arguments of `get_text_features`."""
        features = self.get_text_features(input_ids, attention_mask, position_ids, return_dict=True).pooler_output
        return nn.functional.normalize(features, dim=-1)

    def encode_image(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Return images' L2-normalised embeddings, (batch, projection_dim); the arguments of `get_image_features`."""
        features = self.get_image_features(pixel_values, interpolate_pos_encoding, return_dict=True).pooler_output
        return nn.functional.normalize(features, dim=-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> DiffCLIPOutput:
        """Compare images with texts.

        Args:
            input_ids: Token ids, (texts, tokens); left out, only the images are encoded.
            pixel_values: Images, (images, channels, height, width); left out, only the texts are encoded.
            attention_mask, position_ids: As in `DiffCLIPTextModel.forward`.
            return_loss: Whether to compute the contrastive loss, for which image i belongs to text i, and which every
                process of distributed training has to compute: its negatives come from all of them.
            interpolate_pos_encoding: As in `DiffCLIPVisionModel.forward`.

        Returns:
            A `DiffCLIPOutput`; without one of the modalities, its fields and the logits are None.

        Raises:
            ValueError: Both modalities are missing, or one is and a loss is asked for; and as the towers raise.
        """
        check_keyword_arguments(DiffCLIPModel.forward, kwargs)
        if input_ids is None and pixel_values is None:
            raise ValueError("input_ids and pixel_values are both None; at least one must be given.")
        if return_loss and (input_ids is None or pixel_values is None):
            missing = "input_ids" if input_ids is None else "pixel_values"
            raise ValueError(f"return_loss is True, but {missing} is None; the loss needs images and texts.")

        vision_outputs = text_outputs = image_embeds = text_embeds = None
        if pixel_values is not None:
            vision_outputs = self.get_image_features(
                pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
            )
            image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
        if input_ids is not None:
            text_outputs = self.get_text_features(
                input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
            )
            text_embeds = nn.functional.normalize(text_outputs.pooler_output, dim=-1)

        logits_per_text = logits_per_image = loss = None
        if image_embeds is not None and text_embeds is not None:
            # With device_map the towers may end on different devices.
            scale = self.logit_scale.exp().to(text_embeds.device)
            logits_per_text = scale * text_embeds @ image_embeds.t().to(text_embeds.device)
            logits_per_image = logits_per_text.t()
            if return_loss:
                loss = image_text_contrastive_loss(text_embeds, image_embeds, self.logit_scale)

        return DiffCLIPOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )


class DiffCLIPTextModelWithProjection(DiffCLIPPreTrainedModel):
    """DiffCLIP's text tower with the projection into the shared space."""

    config: DiffCLIPTextConfig
    config_class = DiffCLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", "^logit_scale$"]

    def __init__(self, config: DiffCLIPTextConfig):
        super().__init__(self._checked(config))
        self.text_model = DiffCLIPTextModel._from_config(config)
        self.text_projection = projection(config.hidden_size, config.projection_dim)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> DiffCLIPTextModelOutput:
        """Encode texts; the arguments and errors are those of `DiffCLIPTextModel.forward`.

        Returns:
            A `DiffCLIPTextModelOutput`, with `text_embeds` not normalised, (batch, projection_dim).
        """
        check_keyword_arguments(DiffCLIPTextModelWithProjection.forward, kwargs)
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )
        return DiffCLIPTextModelOutput(
            text_embeds=self.text_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class DiffCLIPVisionModelWithProjection(DiffCLIPPreTrainedModel):
    """DiffCLIP's image tower with the projection into the shared space."""

    config: DiffCLIPVisionConfig
    config_class = DiffCLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", "^logit_scale$"]

    def __init__(self, config: DiffCLIPVisionConfig):
        super().__init__(self._checked(config))
        self.vision_model = DiffCLIPVisionModel._from_config(config)
        self.visual_projection = projection(config.hidden_size, config.projection_dim)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> DiffCLIPVisionModelOutput:
        """Encode images; the arguments and errors are those of `DiffCLIPVisionModel.forward`.

        Returns:
            A `DiffCLIPVisionModelOutput`, with `image_embeds` not normalised, (batch, projection_dim).
        """
        check_keyword_arguments(DiffCLIPVisionModelWithProjection.forward, kwargs)
        outputs = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **kwargs,
        )
        return DiffCLIPVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class DiffCLIPForImageClassification(DiffCLIPPreTrainedModel):
    """DiffCLIP's image tower with a linear classifier on the mean of the patch tokens."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^(text|visual)_projection\.", "^logit_scale$"]

    def __init__(self, config: DiffCLIPConfig):
        super().__init__(self._checked(config))
        self.num_labels: int = config.num_labels or 0
        self.vision_model = DiffCLIPVisionModel._from_config(config.vision_config)
        width = config.vision_config.hidden_size
        self.classifier = (
            with_initial_std(nn.Linear(width, self.num_labels), width**-0.5) if self.num_labels else nn.Identity()
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch embedding."""
        return self.vision_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the patch embedding."""
        self.vision_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values, interpolate_pos_encoding: As in `DiffCLIPVisionModel.forward`.
            labels: Class indices, (batch,), or what `config.problem_type` asks for.

        Returns:
            An `ImageClassifierOutput`, with `logits` (batch, num_labels) and, with labels, the loss.
        """
        check_keyword_arguments(DiffCLIPForImageClassification.forward, kwargs)
        if labels is not None and isinstance(pixel_values, torch.Tensor):
            check_labels(labels, len(pixel_values), self.num_labels)
        outputs = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **self._tower_kwargs(kwargs),
        )
        logits = self.classifier(outputs.last_hidden_state[:, 1:].mean(dim=1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "DiffCLIPForImageClassification",
    "DiffCLIPModel",
    "DiffCLIPPreTrainedModel",
    "DiffCLIPTextModel",
    "DiffCLIPTextModelWithProjection",
    "DiffCLIPVisionModel",
    "DiffCLIPVisionModelWithProjection",
]
