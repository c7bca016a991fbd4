"""Configurations of DiffCLIP: CLIP's fields, plus what differential attention adds."""

import copy
import math
import sys
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


ATTENTION_TYPES = ("differential", "standard")
DEPTH_SCHEDULE = "depth"

_SMALLEST = sys.float_info.min
_COUNT, _POSITIVE, _NOT_NEGATIVE = (1, math.inf), (_SMALLEST, math.inf), (0, math.inf)
# Field of a tower → its least and largest value.
_TOWER_BOUNDS = {
    "vocab_size": _COUNT,
    "hidden_size": _COUNT,
    "intermediate_size": _COUNT,
    "projection_dim": _COUNT,
    "num_hidden_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "num_channels": _COUNT,
    # A text has a start and an end.
    "max_position_embeddings": (2, math.inf),
    "image_size": _COUNT,
    "layer_norm_eps": _POSITIVE,
    "diff_norm_eps": _POSITIVE,
    "attention_dropout": (0, 1),
    "initializer_range": _NOT_NEGATIVE,
    "initializer_factor": _NOT_NEGATIVE,
    "lambda_init_std": _NOT_NEGATIVE,
}
_MODEL_BOUNDS: dict[str, tuple[float, float]] = {
    "projection_dim": _COUNT,
    # Its exponential is finite and not 0 in float32.
    "logit_scale_init_value": (-87, 88),
    "initializer_factor": _NOT_NEGATIVE,
}


def depth_lambda_init(layer_idx: int) -> float:
    """Return λ_init of a layer under DiffCLIP*'s schedule, 0.8 − 0.6·exp(−0.3·l).

    Args:
        layer_idx: The layer l, counted from 0 (so that the first layer has 0.2).

    Source: paper arXiv 2503.06626, section 4.5; the count from 0 is that of the Differential Transformer's code.
    """
    return 0.8 - 0.6 * math.exp(-0.3 * layer_idx)


def _check_numbers(config: PreTrainedConfig, bounds: dict[str, tuple[float, float]]) -> None:
    """Raise a ValueError that names the field, its value and what is allowed, for a number outside its bounds.

    Args:
        config: Any configuration; a field that it hasn't is passed over.
        bounds: Field → its least and its largest allowed value, both finite but for the float's own infinity, which
            stands for any finite number.
    """
    for name, (least, largest) in bounds.items():
        value = getattr(config, name, None)
        if value is None or (math.isfinite(value) and least <= value <= largest):
            continue
        if largest != math.inf:
            allowed = f"from {least} to {largest}"
        elif least == _SMALLEST:
            allowed = "positive and finite"
        elif least == 0:
            allowed = "finite, and not negative"
        else:
            allowed = f"at least {least}"
        raise ValueError(f"{type(config).__name__}.{name} is {value}; it must be {allowed}.")


def _validate_tower(config: "DiffCLIPTextConfig | DiffCLIPVisionConfig") -> None:
    """Raise a ValueError that names the field, its value and what is allowed, for the fields of a tower."""
    owner = type(config).__name__
    _check_numbers(config, _TOWER_BOUNDS)
    heads, width = config.num_attention_heads, config.hidden_size
    if width % heads != 0:
        raise ValueError(
            f"{owner}.num_attention_heads is {heads}; it must divide hidden_size, which is {width}, without remainder."
        )
    if config.attention_type not in ATTENTION_TYPES:
        raise ValueError(
            f"{owner}.attention_type is {config.attention_type!r}; it must be one of {', '.join(ATTENTION_TYPES)}."
        )
    if config.attention_type == "differential" and heads % 2 != 0:
        raise ValueError(
            f"{owner}.num_attention_heads is {heads}; differential attention pairs its heads, so it must be even."
        )
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"{owner}.hidden_act is {config.hidden_act!r}; it must be one of {', '.join(ACT2FN)}.")
    _validate_lambda_init(config)


def _validate_lambda_init(config: "DiffCLIPTextConfig | DiffCLIPVisionConfig") -> None:
    owner, layers, value = type(config).__name__, config.num_hidden_layers, config.lambda_init
    if isinstance(value, str):
        if value != DEPTH_SCHEDULE:
            raise ValueError(
                f"{owner}.lambda_init is {value!r}; it must be a number, {DEPTH_SCHEDULE!r} or one number a layer."
            )
        return
    if isinstance(value, (list, tuple)) and len(value) != layers:
        raise ValueError(
            f"{owner}.lambda_init has {len(value)} values ({value}); a list must have one a layer, and "
            f"num_hidden_layers is {layers}."
        )
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{owner}.lambda_init is {value}; every value must be finite.")


class _MapsUnderAnyAttention:
    """`output_attentions` as every attention implementation here serves it; Transformers' own asks for `"eager"`."""

    @property
    def output_attentions(self) -> bool | None:
        """Whether a call returns the attention maps where it doesn't say."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Raise nothing, whatever the implementation; `strict` calls it."""


class _Tower(_MapsUnderAnyAttention):
    """What both towers' configurations do alike."""

    lambda_init: Any

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.validate_architecture()  # type: ignore[attr-defined]

    def get_lambda_init(self, layer_idx: int) -> float:
        """Return λ_init of layer `layer_idx` (from 0), from any of the three forms of `lambda_init`."""
        if self.lambda_init == DEPTH_SCHEDULE:
            return depth_lambda_init(layer_idx)
        per_layer = isinstance(self.lambda_init, (list, tuple))
        return float(self.lambda_init[layer_idx] if per_layer else self.lambda_init)


@strict
class DiffCLIPTextConfig(_Tower, PreTrainedConfig):
    """Configuration of DiffCLIP's text tower; the defaults are the released ViT-B/16 model's.

    The fields are those of `CLIPTextConfig`, and four more.

    Args:
        attention_type: `"differential"` or `"standard"`.
        lambda_init: λ_init of differential attention: one float for every layer; `"depth"` for
            0.8 − 0.6·exp(−0.3·l) with l from 0 (DiffCLIP*); or a list of one float a layer. It is a constant of the
            model and is not among the weights.
        lambda_init_std: Standard deviation with which the four λ vectors of a layer start.
        diff_norm_eps: Epsilon of the RMSNorm on each head pair.
        pad_token_id: 0, with which the original pads. Any id will do: padding never changes an embedding.
        eos_token_id: The id, or ids, of the end-of-text token, whose first occurrence is pooled.

    Raises:
        ValueError: A field has a value outside what is allowed; the message names all three.

    Source: paper arXiv 2503.06626, sections 3 and 4.5; the released code for the defaults.
    """

    model_type = "diffclip_text_model"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float | int = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    initializer_factor: float | int = 1.0
    attention_type: str = "differential"
    lambda_init: float | int | str | list[float | int] | tuple[float | int, ...] = 0.8
    lambda_init_std: float | int = 0.1
    diff_norm_eps: float | int = 1e-5
    pad_token_id: int | None = 0
    bos_token_id: int | None = 49406
    eos_token_id: int | list[int] = 49407

    def validate_architecture(self):
        """Raise a ValueError for a field whose value is not allowed; `strict` calls it too."""
        _validate_tower(self)
        eos_token_ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        if not eos_token_ids or min(eos_token_ids) < 0:
            raise ValueError(
                f"{type(self).__name__}.eos_token_id is {self.eos_token_id}; it must be a token's id, or a list of at "
                "least one."
            )


@strict
class DiffCLIPVisionConfig(_Tower, PreTrainedConfig):
    """Configuration of DiffCLIP's image tower; the defaults are the released ViT-B/16 model's.

    The fields are those of `CLIPVisionConfig`, and six more.

    Args:
        image_size: Side of the square input, in pixels.
        patch_size: Side of a patch, in pixels.
        layer_norm_eps: 1e-5 in the differential tower; the plain tower of the paper's CLIP baseline has 1e-6.
        attention_type: `"differential"` or `"standard"`.
        lambda_init: λ_init of differential attention: one float for every layer; `"depth"` for
            0.8 − 0.6·exp(−0.3·l) with l from 0 (DiffCLIP*); or a list of one float a layer. It is a constant of the
            model and is not among the weights.
        lambda_init_std: Standard deviation with which the four λ vectors of a layer start.
        diff_norm_eps: Epsilon of the RMSNorm on each head pair.
        pre_layernorm: Whether a LayerNorm stands before the first block, as in OpenAI's CLIP.
        patch_bias: Whether the convolution of the patches has a bias; OpenAI's CLIP has none.

    Raises:
        ValueError: A field has a value outside what is allowed; the message names all three.

    Source: paper arXiv 2503.06626, sections 3 and 4.5; the released code for the defaults.
    """

    model_type = "diffclip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    initializer_factor: float | int = 1.0
    attention_type: str = "differential"
    lambda_init: float | int | str | list[float | int] | tuple[float | int, ...] = 0.8
    lambda_init_std: float | int = 0.1
    diff_norm_eps: float | int = 1e-5
    pre_layernorm: bool = False
    patch_bias: bool = True

    def validate_architecture(self):
        """Raise a ValueError for a field whose value is not allowed; `strict` calls it too."""
        _validate_tower(self)
        if not 1 <= self.patch_size <= self.image_size:
            raise ValueError(
                f"{type(self).__name__}.patch_size is {self.patch_size}; it must be from 1 to image_size, which is "
                f"{self.image_size}."
            )


@strict
class DiffCLIPConfig(_MapsUnderAnyAttention, PreTrainedConfig):
    """Configuration of a whole DiffCLIP model, of which the defaults give the released ViT-B/16.

    The paper's four models are four configurations: CLIP has `attention_type="standard"` in both towers (and
    `layer_norm_eps=1e-6` in vision), DiffCLIP `"differential"` in both, DiffCLIP* also `lambda_init="depth"`, and
    DiffCLIP† `"differential"` in vision alone.

    Args:
        text_config: A `DiffCLIPTextConfig`, or a dict of its fields.
        vision_config: A `DiffCLIPVisionConfig`, or a dict of its fields.
        projection_dim: Width of the shared embedding space. It is written into both towers' configurations, so that
            a single tower loads from a whole model's folder.
        logit_scale_init_value: Natural logarithm of the factor on the cosine similarities at the start, ln(1/0.07);
            from -87 to 88.
        initializer_factor: Multiplies every initial standard deviation of the two projections.

    Raises:
        ValueError: A field, of a tower too, has a value outside what is allowed.

    Source: paper arXiv 2503.06626, sections 3 and 4.5.
    """

    model_type = "diffclip"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": DiffCLIPTextConfig, "vision_config": DiffCLIPVisionConfig}
    # The newer releases' name, under which they read more than the classes; the older ones need the other.
    sub_configs_defaults: ClassVar[dict[str, Any]] = dict(sub_configs)

    text_config: dict | DiffCLIPTextConfig | None = None
    vision_config: dict | DiffCLIPVisionConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592
    initializer_factor: float | int = 1.0

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            given = getattr(self, name)
            is_config = given is not None and not isinstance(given, dict)
            # A copy, since projection_dim is written into it.
            setattr(self, name, copy.deepcopy(given) if is_config else config_class(**(given or {})))
            getattr(self, name).projection_dim = self.projection_dim
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self):
        """Raise a ValueError for a field whose value is not allowed, a tower's too; `strict` calls it too."""
        _check_numbers(self, _MODEL_BOUNDS)
        self.text_config.validate_architecture()
        self.vision_config.validate_architecture()


__all__ = ["DiffCLIPConfig", "DiffCLIPTextConfig", "DiffCLIPVisionConfig", "depth_lambda_init"]
