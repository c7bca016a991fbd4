"""Whether two models' configurations, tokenizers and image processors are one, and where they differ."""

import json
from collections.abc import Mapping
from typing import Any


# Of a configuration, what says nothing of what the weights mean.
_INDIFFERENT = {
    *("_name_or_path", "_attn_implementation", "architectures", "auto_map", "dtype", "transformers_version"),
    *("attention_dropout", "dropout", "initializer_factor", "initializer_range", "logit_scale_init_value"),
}
# Of an image processor, what makes the pixels.
PIXELS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)
# Of a fast tokenizer, what each call sets.
_OF_A_CALL = ("truncation", "padding")


def _differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Return where two nests of mappings differ, as sentences' beginnings: `text_config.hidden_size is 8 and 16`."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return [] if first == second else [f"{name} is {first!r:.80} and {second!r:.80}"]
    found = []
    for key in dict.fromkeys((*first, *second)):
        if key not in _INDIFFERENT:
            found += _differences(first.get(key), second.get(key), f"{name}.{key}" if name else str(key))
    return found


def config_differences(first: Any, second: Any) -> list[str]:
    """Return where two models' configurations differ in what their weights mean; dropout, the dtype and what weights
    were initialised with don't count."""
    return _differences(first.to_dict(), second.to_dict())


def tokenizer_differences(first: Any, second: Any) -> list[str]:
    """Return where two tokenizers differ in the ids that they give."""
    own, theirs = first.get_vocab(), second.get_vocab()
    if own != theirs:
        token = min(token for token in {*own, *theirs} if own.get(token) != theirs.get(token))
        return [f"the id of the token {token!r} is {own.get(token)} and {theirs.get(token)}"]
    found = [
        f"{name} is {getattr(first, name)} and {getattr(second, name)}"
        for name in ("bos_token_id", "eos_token_id")
        if getattr(first, name) != getattr(second, name)
    ]
    if found or not (first.is_fast and second.is_fast):
        return found
    parts = [json.loads(one.backend_tokenizer.to_str()) for one in (first, second)]
    return [
        f"the {key} of tokenizer.json isn't the same"
        for key in dict.fromkeys((*parts[0], *parts[1]))
        if key not in _OF_A_CALL and parts[0].get(key) != parts[1].get(key)
    ]


def image_processor_differences(first: Any, second: Any) -> list[str]:
    """Return where two image processors differ in the pixels that they make."""
    # One that's made anew has lists where one that's loaded has tuples.
    own, theirs = (
        json.loads(json.dumps({name: getattr(one, name, None) for name in PIXELS}, default=dict))
        for one in (first, second)
    )
    return _differences(own, theirs)


def processor_differences(first: Any, second: Any) -> list[str]:
    """Return where two processors differ in the inputs that they make."""
    return [
        *tokenizer_differences(first.tokenizer, second.tokenizer),
        *image_processor_differences(first.image_processor, second.image_processor),
    ]


__all__ = ["PIXELS", "config_differences", "processor_differences"]
