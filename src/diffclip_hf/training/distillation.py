"""Distillation: a frozen model, the teacher, whose similarities a contrastive model is kept near to."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import kl_div, normalize

from ..common.loading import OLD_END
from ..model.loss_diffclip import gather_pairs
from ..model.precision_diffclip import at_least_float32


# What the names of a batch's inputs begin with that are for the teacher alone.
PREFIX = "teacher_"
# Of a batch's texts and images: their loss.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def distillation_loss(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    teacher_text_embeds: torch.Tensor,
    teacher_image_embeds: torch.Tensor,
    teacher_logit_scale: torch.Tensor,
    *,
    weight: float = 1.0,
    feature_weight: float | None = None,
) -> torch.Tensor:
    """Return how far a model's similarities, and its embeddings, are from a teacher's; 0 where they are equal.

    With p the softmax of exp(logit_scale) · cosine similarity of a text to the images of all processes, or of an image
    to their texts, the loss is

        weight · mean(KL(p_teacher ‖ p)) + feature_weight · mean(1 − cos(embedding, teacher's embedding)),

    each mean over all pairs and both directions. It is shared out among processes as `image_text_contrastive_loss`
    is, so that the mean over processes and each averaged gradient are those of one process with the whole batch;
    every process has to call it.

    Args:
        text_embeds, image_embeds: L2-normalised, (local pairs, projection_dim), any floating dtype.
        logit_scale: The logarithm of the scale, one number.
        teacher_text_embeds, teacher_image_embeds, teacher_logit_scale: Likewise, of any width; no gradient reaches
            them.
        weight: Of the softmaxes, at least 0.
        feature_weight: Of the cosines, at least 0; None for 1 where the teacher's embeddings are as wide, else 0.

    Returns:
        A tensor without dimensions, in nats, at least in float32.

    Raises:
        ValueError: `feature_weight` is more than 0, and the widths differ.

    Source: open_clip's distillation loss, whose cross-entropy has the same gradient as the KL divergence.
    """
    dtype = at_least_float32(text_embeds.dtype)
    device = text_embeds.device
    text, image = text_embeds.to(dtype), image_embeds.to(device, dtype)
    their_text, their_image = (part.detach().to(device, dtype) for part in (teacher_text_embeds, teacher_image_embeds))
    same_width = text.shape[1] == their_text.shape[1]
    if feature_weight is None:
        feature_weight = float(same_width)
    if feature_weight and not same_width:
        raise ValueError(
            f"feature_weight is {feature_weight}, but the model's embeddings have {text.shape[1]} numbers and the "
            f"teacher's {their_text.shape[1]}; it must be 0."
        )
    every = [text, image, their_text, their_image]
    if _processes() > 1:
        every = [*gather_pairs(text, image)[:2], *gather_pairs(their_text, their_image)[:2]]
    scale = logit_scale.to(device, dtype).exp()
    their_scale = teacher_logit_scale.detach().to(device, dtype).exp()
    loss = text.new_zeros(())
    for own, others, their_own, their_others in (
        (text, every[1], their_text, every[3]),
        (image, every[0], their_image, every[2]),
    ):
        log_shares = (scale * own @ others.t()).log_softmax(1)
        their_log_shares = (their_scale * their_own @ their_others.t()).log_softmax(1)
        loss = loss + weight * kl_div(log_shares, their_log_shares, reduction="sum", log_target=True) / 2
        if feature_weight:
            loss = loss + feature_weight * (1 - (own * their_own).sum(1)).sum() / 2
    return loss * _processes() / max(1, len(every[0]))


def without_teachers(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a batch's inputs without those that are for the teacher alone."""
    return {name: value for name, value in inputs.items() if not name.startswith(PREFIX)}


class Teacher:
    """A frozen model, with what is asked of a model that learns from it.

    Args:
        model: Any of Transformers' with `get_image_features`, `get_text_features` and `logit_scale`, such as
            `DiffCLIPModel` or `CLIPModel`. It's put into evaluation mode.
        student: The model that is trained.
        weight, feature_weight: As in `distillation_loss`.
        rows: The most rows that go through it at once.

    Raises:
        ValueError: It lacks one of these, is the student itself, or has embeddings of another width than
            `feature_weight` needs.
    """

    def __init__(self, model: Any, student: Any, weight: float, feature_weight: float | None, rows: int):
        needed = ("get_image_features", "get_text_features", "logit_scale")
        if missing := [name for name in needed if not hasattr(model, name)]:
            raise ValueError(f"The teacher is a {type(model).__name__}, which has no {' and no '.join(missing)}.")
        if {id(parameter) for parameter in model.parameters()} & {id(one) for one in student.parameters()}:
            raise ValueError("The teacher has the model's own weights; load it a second time, or pass a deep copy.")
        widths = [getattr(one.config, "projection_dim", None) for one in (student, model)]
        if feature_weight and None not in widths and widths[0] != widths[1]:
            raise ValueError(
                f"distill_feature_weight is {feature_weight}, but the model's projection_dim is {widths[0]} and the "
                f"teacher's {widths[1]}; it must be 0."
            )
        self.model, self.student_config = model.eval(), student.config
        self.weight, self.feature_weight, self.rows = weight, feature_weight, rows

    def _check_same_inputs(self) -> None:
        """Raise a ValueError where the model's own inputs can't be the teacher's."""
        fields = {
            "image_size": lambda config: getattr(getattr(config, "vision_config", None), "image_size", None),
            "vocab_size": lambda config: config.get_text_config().vocab_size,
            "eos_token_id": lambda config: config.get_text_config().eos_token_id,
        }
        for name, field in fields.items():
            own, theirs = field(self.student_config), field(self.model.config)
            # CLIP's first configurations name no end-of-text token.
            if own != theirs and not (name == "eos_token_id" and theirs == OLD_END):
                raise ValueError(
                    f"The teacher's {name} is {theirs}, and the model's {own}, so that they can't take the same "
                    "inputs; make the teacher's own with TeacherCollator."
                )

    def _inputs(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the teacher's texts and images of a batch: its own where the batch has them, else the model's."""
        own = {name.removeprefix(PREFIX): value for name, value in inputs.items() if name.startswith(PREFIX)}
        if not own:
            self._check_same_inputs()
            own = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in inputs}
        images = own.pop("pixel_values")
        return own, images

    @torch.no_grad()
    def embed(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the normalised embeddings of a batch's texts and images, in chunks."""
        texts, images = self._inputs(inputs)
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for start in range(0, max(1, len(images)), self.rows):
            chosen = slice(start, start + self.rows)
            features = (
                self.model.get_text_features(**{name: value[chosen] for name, value in texts.items()}),
                self.model.get_image_features(pixel_values=images[chosen]),
            )
            for part, output in zip(found, features, strict=True):
                embeds = output.pooler_output
                part.append(normalize(embeds.to(at_least_float32(embeds.dtype)), dim=-1))
        return torch.cat(found[0]), torch.cat(found[1])

    def loss_of(self, inputs: dict[str, Any]) -> Loss:
        """Return the loss of a batch as a function of the model's embeddings of it and its logit scale."""
        text_embeds, image_embeds = self.embed(inputs)
        return partial(
            distillation_loss,
            teacher_text_embeds=text_embeds,
            teacher_image_embeds=image_embeds,
            teacher_logit_scale=self.model.logit_scale,
            weight=self.weight,
            feature_weight=self.feature_weight,
        )


__all__ = ["Loss", "Teacher", "distillation_loss", "without_teachers"]
