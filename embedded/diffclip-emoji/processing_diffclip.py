"""DiffCLIP's processor, and CLIP's tokenizer with a limit that it keeps by itself."""

import copy
import difflib
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchEncoding, BatchFeature, CLIPTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER, TruncationStrategy
from transformers.utils import PaddingStrategy

from .image_reading_diffclip import NoFileError


if TYPE_CHECKING:
    # Makes Transformers copy the image processors beside this file when it saves a processor with its code.
    from .image_processing_diffclip import DiffCLIPImageProcessor, DiffCLIPImageProcessorPil

# CLIP's; the two tokens of start and end are among them.
CONTEXT_LENGTH = 77


# What a call can ask for beside the ids and the mask.
_RETURNED = (
    *("return_token_type_ids", "return_overflowing_tokens", "return_special_tokens_mask"),
    *("return_offsets_mapping", "return_length"),
)
# The options that `_encode` knows; with others Transformers' own encoding is used.
_ENCODING_OPTIONS = frozenset(
    {
        *("add_special_tokens", "padding", "truncation", "max_length", "pad_to_multiple_of", "padding_side"),
        *("return_tensors", "return_attention_mask", "verbose", "stride", *_RETURNED),
    }
)
# Those that Transformers sets on the Rust tokenizer.
_SHARED_OPTIONS = frozenset({"padding", "truncation", "max_length", "split_special_tokens"})
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(text: str) -> None:
    """Check that a text has whole characters: no lone half of a surrogate pair, as of an emoji cut in two.

    Raises:
        ValueError: It has one, which no tokenizer takes.
    """
    if found := _LONE_SURROGATE.search(text):
        raise ValueError(
            f"The text {text!r:.200} has half a character at place {found.start()}, as where an emoji was cut in two; "
            "mend it by text.encode(errors='replace').decode()."
        )


def _check_texts(text: Any) -> None:
    """Check a text or a nest of texts."""
    if isinstance(text, str):
        check_text(text)
    elif isinstance(text, (list, tuple)):
        if not text:
            raise ValueError("text is empty; there must be at least one text.")
        for single in text:
            _check_texts(single)
    else:
        raise ValueError(f"A text is of type {type(text).__name__}; it must be a string.")


def _forget_last_call(tokenizer: Any) -> None:
    """Turn off the truncation and padding that a call, or a file, has left in the Rust tokenizer."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


def _is_plain(text: Any, options: dict[str, Any]) -> bool:
    """Say whether `_encode` can do it: a text or several, not pairs or words, and options that it knows."""
    texts = [text] if isinstance(text, str) else text
    return (
        isinstance(texts, (list, tuple))
        and len(texts) > 0
        and all(isinstance(single, str) for single in texts)
        and options.keys() <= _ENCODING_OPTIONS
        and options.get("truncation") != "only_second"
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    add_special_tokens: bool = True,
    padding: Any = False,
    truncation: Any = None,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: str | None = None,
    return_tensors: Any = None,
    return_attention_mask: bool | None = None,
    verbose: bool = True,
    stride: int = 0,
    **returned: Any,
) -> BatchEncoding:
    """Do what a fast tokenizer does, but cut and pad what it returns, so that threads share it.

    Transformers sets the truncation and the padding of a call on the one Rust tokenizer that all threads use.
    """
    pad, cut, limit, _ = tokenizer._get_padding_truncation_strategies(
        padding, truncation, max_length, pad_to_multiple_of, verbose
    )
    texts = [text] if isinstance(text, str) else list(text)
    encodings = tokenizer(texts, add_special_tokens=False, verbose=False).encodings
    if cut != TruncationStrategy.DO_NOT_TRUNCATE:
        added = tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
        if limit < added:
            raise ValueError(f"max_length is {limit}; it must be at least {added}, for the tokens of start and end.")
        for encoding in encodings:
            encoding.truncate(limit - added, stride=stride, direction=tokenizer.truncation_side)
    encodings = [tokenizer.backend_tokenizer.post_process(single, None, add_special_tokens) for single in encodings]
    if pad != PaddingStrategy.DO_NOT_PAD:
        length = limit if pad == PaddingStrategy.MAX_LENGTH else max(map(len, encodings))
        length += -length % (pad_to_multiple_of or 1)
        for encoding in encodings:
            encoding.pad(
                length,
                direction=padding_side or tokenizer.padding_side,
                pad_id=tokenizer.pad_token_id,
                pad_type_id=tokenizer.pad_token_type_id,
                pad_token=tokenizer.pad_token,
            )
    # Each text's columns and encodings, with those of what was cut off where they are asked for.
    found = [
        tokenizer._convert_encoding(encoding, return_attention_mask=return_attention_mask, **returned)
        for encoding in encodings
    ]
    columns = {name: [row for item, _ in found for row in item[name]] for name in found[0][0]}
    if returned.get("return_overflowing_tokens"):
        columns["overflow_to_sample_mapping"] = [i for i, (_, parts) in enumerate(found) for _ in parts]
    elif isinstance(text, str) and return_tensors is None:
        columns = {name: rows[0] if isinstance(rows[0], list) else rows for name, rows in columns.items()}
    return BatchEncoding(columns, [part for _, parts in found for part in parts], tensor_type=return_tensors)


def _encode_any(tokenizer: PreTrainedTokenizerBase, text: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
    """Do what a fast tokenizer does with any of its arguments, and leave the Rust tokenizer as it is."""
    if not args and _is_plain(text, kwargs):
        return _encode(tokenizer, text, **kwargs)
    if args or not _SHARED_OPTIONS.isdisjoint(kwargs):
        # Slow, and rare: of pairs, words and the like, which no CLIP has been trained on.
        tokenizer = copy.deepcopy(tokenizer)
    return PreTrainedTokenizerBase.__call__(tokenizer, text, *args, **kwargs)


def _warn_if_cut(encoded: BatchEncoding, limit: int) -> None:
    """Warn once a call if a text was longer than the tokenizer's limit."""
    longest = 0
    for encoding in encoded.encodings or []:
        # Each part of what was cut off has the tokens of start and end too.
        rest = sum(len(part) - sum(part.special_tokens_mask) for part in encoding.overflowing)
        longest = max(longest, sum(encoding.attention_mask) + rest if rest else 0)
    if longest:
        warnings.warn(
            f"A text has {longest} tokens and was cut to model_max_length={limit}, its end-of-text token kept. Pass "
            "truncation=True to cut without this warning.",
            stacklevel=3,
        )


class DiffCLIPTokenizer(CLIPTokenizer):
    """CLIP's tokenizer, except that where it makes tensors it cuts texts at 77 tokens unless told otherwise.

    The end-of-text token, which the model pools, is kept, and one `UserWarning` a call says that a text was cut;
    `truncation=True` cuts without it. Lists of ids, for which no model's limit matters, are cut only with
    `truncation=True`, as `CLIPTokenizer` cuts them. Transformers' zero-shot pipeline calls the tokenizer without
    `truncation` and has no working way to pass it, so with `CLIPTokenizer` itself a longer label fails in the model.

    Args:
        model_max_length: The most tokens of a text, 77 by default.
    """

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("model_max_length", CONTEXT_LENGTH)
        # Saving writes it again where the code travels, and only there should it be.
        kwargs.pop("auto_map", None)
        super().__init__(*args, **kwargs)
        _forget_last_call(self)

    def __call__(self, text=None, *args, **kwargs):
        for given in (text, *args[:1], kwargs.get("text_pair"), kwargs.get("text_target")):
            if given is not None:
                _check_texts(given)
        if text is None:
            return _encode_any(self, text, *args, **kwargs)
        told = args or not {"truncation", "max_length"}.isdisjoint(kwargs)
        cuts = not told and kwargs.get("return_tensors") is not None
        if cuts:
            kwargs["truncation"] = True
        if not args and _SHARED_OPTIONS.isdisjoint(kwargs):
            encoded = super().__call__(text, **kwargs)
        else:
            encoded = _encode_any(self, text, *args, **kwargs)
        if cuts:
            _warn_if_cut(encoded, self.model_max_length)
        return encoded

    def encode(
        self,
        text,
        text_pair=None,
        add_special_tokens=True,
        padding=False,
        truncation=None,
        max_length=None,
        **kwargs,
    ):
        """Return a text's ids, as `CLIPTokenizer` does."""
        options = {"add_special_tokens": add_special_tokens, "padding": padding, "max_length": max_length, **kwargs}
        if text_pair is not None:
            options["text_pair"] = text_pair
        return self(text, truncation=truncation, **options)["input_ids"]

    def tokenize(self, text, *args, **kwargs):
        """Return a text's tokens, as `CLIPTokenizer` does."""
        _check_texts(text)
        return super().tokenize(text, *args, **kwargs)


class DiffCLIPProcessor(ProcessorMixin):
    """An image processor and CLIP's tokenizer in one.

    `processor(text=..., images=..., return_tensors="pt")` returns, of what it's given, `input_ids` and
    `attention_mask`, int64, (texts, length ≤ 77), and `pixel_values`, float32, (images, 3, height, width). Texts are
    padded to the longest (`padding=True`) and cut at the tokenizer's `model_max_length` (`truncation=True`) with the
    end-of-text token kept; unless `truncation` or `max_length` is passed, one `UserWarning` a call says so. Images are
    described in `DiffCLIPImageProcessor`.

    Args:
        image_processor: A `DiffCLIPImageProcessor` or `DiffCLIPImageProcessorPil`, or Transformers' own of a CLIP.
        tokenizer: A `DiffCLIPTokenizer` or `CLIPTokenizer`. One that has no `model_max_length` is given 77.

    Raises:
        ValueError: The image processor or the tokenizer is missing, neither text nor images are given to a call, or
            `check_text` refuses a text.
    """

    def __init__(
        self,
        image_processor: "DiffCLIPImageProcessor | DiffCLIPImageProcessorPil | None" = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        for name, part in (("image_processor", image_processor), ("tokenizer", tokenizer)):
            if part is None:
                raise ValueError(f"DiffCLIPProcessor's {name} is None; it must be given.")
        if tokenizer.model_max_length > LARGE_INTEGER:
            tokenizer.model_max_length = CONTEXT_LENGTH
        _forget_last_call(tokenizer)
        super().__init__(image_processor, tokenizer)

    def _check_options(self, given: dict[str, Any]) -> None:
        """Raise a TypeError for an option that neither the tokenizer nor the image processor knows."""
        kinds = self.valid_processor_kwargs.__annotations__
        parts = [*kinds.values(), getattr(self.image_processor, "valid_kwargs", None)]
        known = {*kinds, "common_kwargs"}.union(*(getattr(part, "__annotations__", {}) for part in parts))
        # Which Transformers passes on from there alone.
        texts = (given.get("text_kwargs") or {}).keys() - {"split_special_tokens"}
        for name in (*given, *texts, *(given.get("images_kwargs") or {})):
            if name not in known:
                near = difflib.get_close_matches(name, sorted(known), n=1)
                raise TypeError(
                    f"{type(self).__name__} takes no {name}{f'; did you mean {near[0]}?' if near else '.'}"
                )

    def __call__(self, images=None, text=None, **kwargs):
        self._check_options(kwargs)
        if text is None:
            try:
                return super().__call__(images=images, **kwargs)
            except NoFileError as error:
                raise ValueError(f"{error} A text is passed as text=.") from error
        if isinstance(text, (Image.Image, np.ndarray, torch.Tensor)):
            raise ValueError(f"text is of type {type(text).__name__}; pass images as images=, and a string as text=.")
        _check_texts(text)
        given = kwargs.keys() | (kwargs.get("text_kwargs") or {}).keys()
        for name in {"padding", "truncation"} - given:
            kwargs[name] = True
        # Its annotation says an instance, where Transformers itself passes the class.
        merge: Any = self._merge_kwargs
        options = merge(self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)[
            "text_kwargs"
        ]
        # Of Transformers' processors whose texts have places for images.
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            options.pop(name, None)
        encoded = _encode_any(self.tokenizer, text, **options)
        if given.isdisjoint({"truncation", "max_length"}):
            _warn_if_cut(encoded, self.tokenizer.model_max_length)
        pixels = {} if images is None else super().__call__(images=images, **kwargs)
        return BatchFeature({**encoded, **pixels})


__all__ = ["DiffCLIPProcessor", "DiffCLIPTokenizer", "check_text"]
