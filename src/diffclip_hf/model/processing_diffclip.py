"""DiffCLIP's processor, and CLIP's tokenizer with a limit that it keeps by itself."""

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


# The options that `_encode` knows; with others Transformers' own encoding is used.
_ENCODING_OPTIONS = frozenset(
    {
        *("add_special_tokens", "padding", "truncation", "max_length", "pad_to_multiple_of", "padding_side"),
        *("return_tensors", "return_attention_mask", "verbose"),
    }
)
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
            encoding.truncate(limit - added, direction=tokenizer.truncation_side)
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
    columns = {"input_ids": [encoding.ids for encoding in encodings]}
    if return_attention_mask or (return_attention_mask is None and "attention_mask" in tokenizer.model_input_names):
        columns["attention_mask"] = [encoding.attention_mask for encoding in encodings]
    if isinstance(text, str) and return_tensors is None:
        columns = {name: rows[0] for name, rows in columns.items()}
    return BatchEncoding(columns, encodings, tensor_type=return_tensors)


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
        if text is None:
            return super().__call__(text, *args, **kwargs)
        for given in (text, *args[:1], kwargs.get("text_pair")):
            if given is not None:
                _check_texts(given)
        told = args or not {"truncation", "max_length"}.isdisjoint(kwargs)
        cuts = not told and kwargs.get("return_tensors") is not None
        if cuts:
            kwargs["truncation"] = True
        if args or {"padding", "truncation", "max_length"}.isdisjoint(kwargs) or not _is_plain(text, kwargs):
            encoded = super().__call__(text, *args, **kwargs)
        else:
            encoded = _encode(self, text, **kwargs)
        if cuts:
            _warn_if_cut(encoded, self.model_max_length)
        return encoded

    def encode(self, text, *args, **kwargs):
        """Return a text's ids, as `CLIPTokenizer` does."""
        _check_texts(text)
        return super().encode(text, *args, **kwargs)

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
        image_processor: A `DiffCLIPImageProcessor` or `DiffCLIPImageProcessorPil`.
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

    def __call__(self, images=None, text=None, **kwargs):
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
        if _is_plain(text, options):
            encoded = _encode(self.tokenizer, text, **options)
        else:
            encoded = self.tokenizer(text, **options)
        if given.isdisjoint({"truncation", "max_length"}):
            _warn_if_cut(encoded, self.tokenizer.model_max_length)
        pixels = {} if images is None else super().__call__(images=images, **kwargs)
        return BatchFeature({**encoded, **pixels})


__all__ = ["DiffCLIPProcessor", "DiffCLIPTokenizer", "check_text"]
