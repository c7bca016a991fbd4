"""The distributions that weights start from: those of the original."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .configuration_diffclip import DiffCLIPTextConfig, DiffCLIPVisionConfig
from .layers_diffclip import DiffCLIPRMSNorm


LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def initial_stds(config: Any) -> dict[str, float]:
    """Return the standard deviations of the weights that start from a normal distribution around 0.

    Args:
        config: A tower's, or the whole model's, which has what stands beside its towers.

    Returns:
        Role, the last part of a module's or a parameter's name, → standard deviation. Other weights start as
        `initialise` says.

    Source: the initialisation of the released code, which is that of SLIP's CLIP.
    """
    stds: dict[str, float]
    if config.model_type == DiffCLIPTextConfig.model_type:
        width, layers = config.hidden_size, config.num_hidden_layers
        # What reads a block's residual and what writes it.
        read, write = width**-0.5, (width * 2 * layers) ** -0.5
        stds = {
            "token_embedding": config.initializer_range,
            "position_embedding": config.initializer_range / 2,
            "q_proj": read,
            "k_proj": read,
            "v_proj": read,
            "out_proj": write,
            "fc1": read * 2**-0.5,
            "fc2": write,
            "text_projection": width**-0.5,
        }
    elif config.model_type == DiffCLIPVisionConfig.model_type:
        stds = {"class_embedding": 1e-6, "visual_projection": config.hidden_size**-0.5}
    else:
        text_width, vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
        stds = {
            "text_projection": text_width**-0.5,
            "visual_projection": vision_width**-0.5,
            "classifier": vision_width**-0.5,
        }
    return {role: std * config.initializer_factor for role, std in stds.items()}


def note_initial_stds(model: PreTrainedModel) -> None:
    """Note on a model's modules their standard deviation; `initialise` sees each module alone, without its name."""
    stds = initial_stds(model.config)
    for name, module in model.named_modules():
        role = name.rpartition(".")[2]
        if role in stds:
            module.initial_std = stds[role]


def _fill(fill: Callable, tensor: Any, *args: float, **kwargs: float) -> None:
    """Fill a tensor that is there; pruning and quantisers leave None."""
    if tensor is not None:
        fill(tensor, *args, **kwargs)


def initialise(module: nn.Module, config: Any) -> None:
    """Fill one module's own parameters from the original's distributions.

    Norms start as the identity, weights as `initial_stds` says or, where it doesn't, as PyTorch's or timm's default.
    Every write goes through `transformers.initialization`, which leaves alone what a checkpoint has filled.

    Args:
        module: One that owns parameters: Transformers passes over the others in code that isn't its own.
        config: A tower's for its modules, and the whole model's for what stands beside its towers.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
        _initialise_matrix(module, config)
    elif isinstance(module, (nn.LayerNorm, DiffCLIPRMSNorm)):
        _fill(init.ones_, module.weight)
        _fill(init.zeros_, getattr(module, "bias", None))
    else:
        stds = initial_stds(config)
        for name, parameter in module.named_parameters(recurse=False):
            if name in stds:
                init.normal_(parameter, std=stds[name])
            elif name in LAMBDAS:
                init.normal_(parameter, std=config.lambda_init_std)
            elif name == "logit_scale":
                init.constant_(parameter, config.logit_scale_init_value)


def _initialise_matrix(module: Any, config: PreTrainedConfig) -> None:
    """Fill a Linear, a convolution or an embedding."""
    weight, bias = module.weight, getattr(module, "bias", None)
    # A quantiser may have taken the weight away.
    if weight is None:
        return
    bound = config.initializer_factor / math.sqrt(weight[0].numel())
    std = getattr(module, "initial_std", None)
    # The image tower of SLIP's CLIP baseline has timm's defaults.
    is_timm = config.model_type == DiffCLIPVisionConfig.model_type and config.attention_type == "standard"
    is_timm_linear = isinstance(module, nn.Linear) and is_timm
    if std is not None:
        init.normal_(weight, std=std)
    elif isinstance(module, nn.Embedding) or is_timm_linear:
        # timm's default, which every image tower has for its positions.
        init.trunc_normal_(weight, std=config.get_text_config().initializer_range * config.initializer_factor)
    else:
        # PyTorch's default.
        init.uniform_(weight, -bound, bound)
    if is_timm_linear:
        _fill(init.zeros_, bias)
    else:
        _fill(init.uniform_, bias, -bound, bound)


__all__ = ["initial_stds", "initialise", "note_initial_stds"]
