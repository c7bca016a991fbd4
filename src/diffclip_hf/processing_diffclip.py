"""DiffCLIP's processor, and CLIP's tokenizer with a limit that it keeps by itself."""

import warnings
from typing import TYPE_CHECKING

from transformers import CLIPTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER


if TYPE_CHECKING:
    # Makes Transformers copy the image processors beside this file when it saves a processor with its code.
    from .image_processing_diffclip import DiffCLIPImageProcessor
    from .image_processing_pil_diffclip import DiffCLIPImageProcessorPil

# CLIP's; the two tokens of start and end are among them.
CONTEXT_LENGTH = 77


def _warn_if_cut(tokenizer: PreTrainedTokenizerBase, text: str | list[str]) -> None:
    """Warn once a call if a text is longer than the tokenizer's limit."""
    texts = [text] if isinstance(text, str) else text
    limit = tokenizer.model_max_length
    longest = max(map(len, tokenizer(texts, truncation=False, verbose=False)["input_ids"]), default=0)
    if longest > limit:
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

    def __call__(self, text=None, *args, **kwargs):
        told = not {"truncation", "max_length"}.isdisjoint(kwargs)
        if text is None or args or told or kwargs.get("return_tensors") is None:
            return super().__call__(text, *args, **kwargs)
        if isinstance(text, str) or all(isinstance(single, str) for single in text):
            _warn_if_cut(self, text)
        return super().__call__(text, truncation=True, **kwargs)


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
        ValueError: The image processor or the tokenizer is missing, or neither text nor images are given to a call.
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
        super().__init__(image_processor, tokenizer)

    def __call__(self, images=None, text=None, **kwargs):
        given = kwargs.keys() | (kwargs.get("text_kwargs") or {}).keys()
        if text is not None and given.isdisjoint({"truncation", "max_length"}):
            _warn_if_cut(self.tokenizer, text)
        for name in {"padding", "truncation"} - given:
            kwargs[name] = True
        return super().__call__(images=images, text=text, **kwargs)


__all__ = ["DiffCLIPProcessor", "DiffCLIPTokenizer"]
