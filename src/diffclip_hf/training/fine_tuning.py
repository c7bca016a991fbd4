"""What keeps a fine-tuned model near to where it started: a locked tower, and lower learning rates further down."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from .weights import contrastive_model


logger = logging.getLogger(__name__)
TOWERS = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}
# A tower's layer by its number, or what comes before the first: the embeddings, and a norm between them and it.
_PLACE = re.compile(r"(.*?(?:text|vision)_model\.)(?:encoder\.layers\.(\d+)|embeddings|pre_)")


def _parts(model: nn.Module, tower: str) -> list[nn.Module]:
    core = contrastive_model(model)
    return [getattr(core, name) for name in TOWERS[tower]]


def lock_tower(model: nn.Module, tower: str) -> None:
    """Have a contrastive model's tower, with its projection, train no more; the logit scale still does.

    Args:
        model: A `DiffCLIPModel`, or what PEFT made of it, whose adapters in this tower are locked too.
        tower: `"image"` or `"text"`.

    Source: Zhai et al. 2022 (LiT); open_clip, whose locked towers include the projection.
    """
    for part in _parts(model, tower):
        part.requires_grad_(False)


def hold_still(model: nn.Module, tower: str) -> None:
    """Put a locked tower into evaluation mode, since `model.train()` lets dropout change what it says."""
    for part in _parts(model, tower):
        part.eval()


# Learning rates by depth --------------------------------------------------------------------------------------------


def parameter_levels(names: Iterable[str]) -> dict[str, int]:
    """Return how far each parameter is below the top: name → level.

    What comes after a tower's layers is at level 0, such as its last norm, its projection or a classifier; so is the
    logit scale. The last layer is at 1, the first at its tower's number of layers, with all that it has, λ's vectors
    among it; and the embeddings are one below that.

    Args:
        names: Of all the model's parameters.
    """
    places = {name: _PLACE.match(name) for name in names}
    layers: dict[str, int] = defaultdict(int)
    for place in places.values():
        if place and place[2]:
            layers[place[1]] = max(layers[place[1]], int(place[2]) + 1)
    # What comes before layer 0 counts as layer -1.
    return {name: layers[place[1]] - int(place[2] or -1) if place else 0 for name, place in places.items()}


def _part_of(name: str) -> str:
    """`vision_model.encoder.layers.3.mlp.fc1.bias` → `vision_model.encoder.layers.3`: what a table calls it."""
    place = _PLACE.match(name)
    if place and place[2]:
        return name[: place.end()]
    return ".".join(name.split(".")[: 2 if "_model." in name else 1])


def _log_table(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
    """Log each learning rate with what has it, the highest first."""
    parts: dict[float, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parts[group["lr"]][_part_of(names[id(parameter)])] += parameter.numel()
    lines = [f"  {rate:.3g}  {', '.join(found)}: {sum(found.values()):,}" for rate, found in parts.items()]
    logger.info("Learning rates by depth, and how many parameters have them:\n%s", "\n".join(lines))


def decay_by_depth(optimizer: torch.optim.Optimizer, model: nn.Module, factor: float, log: bool = True) -> None:
    """Multiply an optimizer's learning rates by `factor` to the power of each parameter's level, in place.

    Its groups are split by level, the top first, and keep their other settings.

    Args:
        optimizer: New, without a state.
        model: Has the parameters.
        factor: In 0..1, not 0.
        log: Whether to log the table.

    Raises:
        ValueError: A parameter that's trained isn't in the optimizer's groups.

    Source: Clark et al. 2020 (ELECTRA), section 3.1; Bao et al. 2022 (BEiT).
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    levels = parameter_levels(names.values())
    there = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if trained != there:
        raise ValueError(
            f"layer_decay is given, but {type(optimizer).__name__} doesn't take the model's parameters in groups; "
            "choose another optim."
        )
    groups = []
    for group in optimizer.param_groups:
        by_level = defaultdict(list)
        for parameter in group["params"]:
            by_level[levels[names[id(parameter)]]].append(parameter)
        groups += [(level, {**group, "params": found}) for level, found in by_level.items()]
    optimizer.param_groups.clear()
    for level, group in sorted(groups, key=lambda pair: pair[0]):
        optimizer.add_param_group({**group, "lr": group["lr"] * factor**level})
    if log:
        _log_table(optimizer, names)


__all__ = ["TOWERS", "decay_by_depth", "hold_still", "lock_tower", "parameter_levels"]
