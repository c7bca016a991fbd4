"""What DiffCLIP's models take: checks of their arguments, each with one line that names the mend."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils.generic import TransformersKwargs


# What Transformers, and models that hold a tower of ours, pass on to every model.
TRANSFORMERS_KWARGS = frozenset(TransformersKwargs.__annotations__) | {"return_dict", "use_cache"}


def check_keyword_arguments(method: Callable, kwargs: dict[str, Any]) -> None:
    """Raise a TypeError for a keyword argument that neither the method nor Transformers knows.

    `inputs_embeds` is unknown too, since a text is pooled where its end-of-text id stands; None is dropped, as PEFT
    gives it.
    """
    if kwargs.get("inputs_embeds") is None:
        kwargs.pop("inputs_embeds", None)
    unknown = [name for name in kwargs if name not in TRANSFORMERS_KWARGS]
    if unknown:
        raise TypeError(_unknown_argument(method, unknown[0]))


def _unknown_argument(method: Callable, name: str) -> str:
    if name == "inputs_embeds":
        return f"{method.__qualname__} takes no inputs_embeds; give input_ids, whose end-of-text token is pooled."
    own = [key for key, value in inspect.signature(method).parameters.items() if value.kind != value.VAR_KEYWORD]
    known = [key for key in own if key != "self"]
    close = difflib.get_close_matches(name, [*known, *sorted(TRANSFORMERS_KWARGS)], n=1)
    hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}."
    return f"{method.__qualname__} takes no {name}; {hint}"


def _check_is_tensor(name: str, value: Any, mend: str) -> None:
    if isinstance(value, torch.Tensor):
        return
    if hasattr(value, "keys"):
        mend = "call model(**inputs) rather than model(inputs)"
    raise TypeError(f"{name} is of type {type(value).__name__}; it must be a tensor: {mend}.")


def check_input_ids(input_ids: Any, max_length: int) -> torch.Tensor:
    """Return `input_ids`, or raise an error with one plain line where they can't be token ids, (batch, tokens).

    Args:
        input_ids: What was given.
        max_length: The most tokens that the model takes.

    Raises:
        TypeError: It isn't a tensor.
        ValueError: It is None, not of integers, empty, or too long.
    """
    if input_ids is None:
        raise ValueError("input_ids is None; it must hold token ids, (batch, tokens).")
    _check_is_tensor("input_ids", input_ids, "for texts, processor(text=[...], return_tensors='pt').input_ids")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids is {input_ids.dtype}, of shape {tuple(input_ids.shape)}; it must hold token ids, torch.int64: "
            "images are given by name, pixel_values=..."
        )
    if input_ids.ndim == 0 or input_ids.shape[-1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, tokens), with at least one token."
        )
    if input_ids.shape[-1] > max_length:
        raise ValueError(
            f"input_ids has {input_ids.shape[-1]} tokens a row; it must have at most {max_length} "
            "(config.max_position_embeddings). Tokenize with truncation=True."
        )
    return input_ids


def check_text_companion(name: str, value: Any, input_ids: torch.Tensor, largest: int | None = None) -> None:
    """Raise an error with one plain line where a mask or positions don't go with `input_ids`.

    Args:
        name: The argument's name.
        value: What was given: None, or a tensor of the shape of `input_ids`, or of four dimensions.
        input_ids: Token ids, (batch, tokens).
        largest: The largest value allowed, of whole numbers from 0.

    Raises:
        TypeError: It isn't a tensor.
        ValueError: It is of another shape, or holds a value that isn't allowed.
    """
    # What the values are can't be asked in a graph, nor of a meta tensor.
    if value is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    _check_is_tensor(name, value, "processor(text=[...], return_tensors='pt') gives it with the input_ids")
    broadcasts = value.shape[-1:] == input_ids.shape[-1:] and (
        value.ndim < 2 or value.shape[0] in (1, *input_ids.shape[:-1])
    )
    if value.ndim < 4 and not broadcasts:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; it must have that of input_ids, {tuple(input_ids.shape)}."
        )
    if largest is None:
        return
    if value.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} is {value.dtype}; it must hold whole numbers, torch.int64.")
    # On a CUDA device the embedding asserts it, without waiting.
    if value.is_meta or value.is_cuda or value.numel() == 0:
        return
    least, most = (bound.item() for bound in value.aminmax())
    if least < 0 or most > largest:
        raise ValueError(f"{name} holds {least if least < 0 else most}; it must hold numbers from 0 to {largest}.")


def check_token_rows(
    input_ids: torch.Tensor, has_end: torch.Tensor, eos_token_id: int | list[int], vocab_size: int
) -> None:
    """Raise a ValueError for ids outside the vocabulary, and for rows without an end-of-text token.

    Args:
        input_ids: Token ids, (batch, tokens).
        has_end: Which rows have an end-of-text token, bool, (batch,).
        eos_token_id: That token's id, or several.
        vocab_size: The number of ids.
    """
    is_known = (input_ids >= 0) & (input_ids < vocab_size)
    if (is_known.all(-1) & has_end).all():
        return
    if not is_known.all():
        raise ValueError(
            f"input_ids holds {input_ids[~is_known][0].item()}; an id must be from 0 to {vocab_size - 1} "
            "(config.vocab_size - 1). Take the tokenizer saved with this model."
        )
    rows = (~has_end).nonzero().flatten().tolist()
    raise ValueError(
        f"input_ids has no end-of-text token in rows {rows}; each row must hold {eos_token_id} "
        "(config.eos_token_id), whose position is pooled. Tokenize with truncation=True, which keeps it."
    )


def check_pixel_values(pixel_values: Any, num_channels: int) -> torch.Tensor:
    """Return `pixel_values`, or raise an error with one plain line where they can't be images, (batch, channels, …).

    Args:
        pixel_values: What was given.
        num_channels: How many channels the model takes.

    Raises:
        TypeError: It isn't a tensor.
        ValueError: It is None, not of floating-point numbers, or of another number of dimensions or channels.
    """
    if pixel_values is None:
        raise ValueError("pixel_values is None; it must hold images, (batch, channels, height, width).")
    mend = "for pictures, processor(images=..., return_tensors='pt').pixel_values"
    _check_is_tensor("pixel_values", pixel_values, mend)
    shape = tuple(pixel_values.shape)
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values is {pixel_values.dtype}, of shape {shape}; it must hold the image processor's "
            f"floating-point numbers: {mend}."
        )
    if pixel_values.ndim != 4:
        one = ": give one image as pixel_values[None]" if pixel_values.ndim == 3 else ""
        raise ValueError(f"pixel_values has shape {shape}; it must be (batch, channels, height, width){one}.")
    if shape[1] != num_channels:
        raise ValueError(
            f"pixel_values has shape {shape}, with {shape[1]} channels; it must be (batch, channels, height, width), "
            f"with {num_channels} channels (config.num_channels)."
        )
    return pixel_values


def check_labels(labels: Any, batch_size: int, num_labels: int) -> None:
    """Raise an error with one plain line where labels can't be those of a batch's images.

    Raises:
        TypeError: They aren't a tensor.
        ValueError: There are no classes, there is another number of images, or a class isn't among the model's; -100,
            which counts for nothing in the loss, may stand for one.
    """
    _check_is_tensor("labels", labels, "torch.tensor([...]), a class's index for each image")
    if num_labels == 0:
        raise ValueError("labels are given, but the model has no classes; load it with num_labels=...")
    if labels.ndim == 0 or len(labels) != batch_size:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; it must have a row for each of {batch_size} images."
        )
    is_classes = labels.ndim == 1 and num_labels > 1 and not labels.is_floating_point()
    if not is_classes or labels.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    # On a GPU the loss would end the process.
    wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != -100)]
    if len(wrong):
        raise ValueError(
            f"labels holds {wrong[0].item()}; a class must be from 0 to {num_labels - 1} (num_labels - 1)."
        )


__all__ = [
    "check_input_ids",
    "check_keyword_arguments",
    "check_labels",
    "check_pixel_values",
    "check_text_companion",
    "check_token_rows",
]
