"""Models, processors and tokenizers from a folder or the Hub, whole or not at all.

Transformers goes on where a part is missing: weights that a file lacks start at random, and a tokenizer without its
vocabulary has two tokens. The commands load by these functions, which refuse both before any work.
"""

import importlib.util
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file, find_adapter_config_file
from transformers.utils.hub import extract_commit_hash

from ..model.image_fetching_diffclip import one_line
from .commands import closest, first_line, require_extra
from .json_files import read_json_object


logger = logging.getLogger(__name__)
CONFIG, ADAPTER = "config.json", "adapter_config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
# Of `from_pretrained`, what says where files are and not what the model is.
PLACE_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
# Towers that pool at the end-of-text token's id, so that a tokenizer with another one gives wrong embeddings.
POOLS_AT_END = ("diffclip_text_model", "clip_text_model")
# Towers that take images of one size alone.
FIXED_SIZE = ("diffclip_vision_model", "clip_vision_model")
# Trained on texts of full length without a mask, so that their padding counts.
FULL_LENGTH_MODELS = ("siglip", "siglip2", "siglip_text_model", "siglip2_text_model")
# What CLIP's first configurations have instead of the id; their text towers pool at the largest id.
OLD_END = 2
# Everything that Transformers raises for files that are missing, damaged or of another kind.
_LOADING_ERRORS = (
    *(OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError, StrictDataclassError),
    # Of JSON that has a list or a number in a mapping's place.
    *(AttributeError, TypeError, IndexError),
)


# Names --------------------------------------------------------------------------------------------------------------


def _not_there(path: Path) -> str:
    """Return the sentence that says where a path ends, and which names there are spelt like the missing one."""
    missing, parent = path, path.parent
    while not parent.is_dir() and parent != parent.parent:
        missing, parent = parent, parent.parent
    if missing.is_symlink():
        return f"There is no {path}: {missing} is a link to {os.readlink(missing)}, which isn't there."
    if not parent.is_dir():
        return f"There is no {path}."
    near = closest(missing.name, sorted(entry.name for entry in parent.iterdir()))
    return f"There is no {path}: the folder {parent.resolve()} has no {missing.name}{near}"


def check_path(path: str | os.PathLike, option: str) -> Path:
    """Return the path of a folder or a file that is there, with `~` written out.

    Raises:
        ValueError: There's nothing; the message names the option and what is spelt alike.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise ValueError(f"{option} is {os.fspath(path)!r}. {_not_there(found)}")
    return found


def is_local(name: str, needs_owner: bool = True) -> bool:
    """Say whether a name that isn't there can only be meant as a path, for no id on the Hub is like it.

    Args:
        name: A path or an id.
        needs_owner: Whether an id has an owner; a few old data sets have none.
    """
    return (
        name.startswith((".", "~", "/"))
        or name.endswith(("/", os.sep))
        or "\\" in name
        or re.match("[A-Za-z]:", name) is not None
        or name.count("/") > 1
        or (needs_owner and "/" not in name)
    )


def _refuse_address(name: str) -> None:
    """Raise a ValueError for an address, with the id in it."""
    if "://" in name:
        near = re.fullmatch(r"https?://[^/]*huggingface\.co/(?:datasets/)?([^/]+/[^/?#]+).*", name)
        hint = f", {near[1]!r}" if near else ", as in 'openai/clip-vit-base-patch16'"
        raise ValueError(f"{name!r} is an address; name a folder or an id on the Hub{hint}.")


def _is_cached(name: str, repo_type: str, cache_dir: str | os.PathLike | None) -> bool:
    """Say whether a cache of the Hub's has a repository."""
    places = [Path(cache_dir or constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=repo_type))]
    if repo_type == "dataset" and importlib.util.find_spec("datasets") is not None:
        import datasets

        places.append(Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")))
    return any(place.is_dir() for place in places)


def find_source(name: str | os.PathLike, cache_dir: str | os.PathLike | None = None, repo_type: str = "model") -> str:
    """Return the folder or the Hub's id that a name stands for, with `~` written out; the Hub isn't asked.

    A name that looks like a path, or whose first part is a folder here, is a path, unless the Hub's cache has a
    repository of that name.

    Args:
        name: A path or an id.
        cache_dir: The Hub's cache, by default the client's own.
        repo_type: `"model"` or `"dataset"`.

    Raises:
        ValueError: It's a path that isn't there, or an address.
    """
    text = os.fspath(name)
    if not text.strip():
        raise ValueError(f"A {repo_type}'s name is empty; name a folder or an id on the Hub.")
    _refuse_address(text)
    path = Path(text).expanduser()
    if path.exists():
        return str(path)
    if is_local(text, needs_owner=repo_type == "model"):
        owner = " An id on the Hub has an owner and a name, with one slash." if "/" not in text else ""
        raise ValueError(_not_there(path) + owner)
    # An old data set's id has no owner, so that only a name that is spelt alike tells a path.
    is_near = path.parent.is_dir() if "/" in text else not closest(text, os.listdir()).startswith(".")
    if is_near and not _is_cached(text, repo_type, cache_dir):
        raise ValueError(
            f"{_not_there(path)} To load {text} from the Hub, start from where there is no folder {path.parent}."
        )
    return text


def _model_folder(name: str | os.PathLike, options: Mapping[str, Any], *files: str) -> str:
    """Return what `find_source` returns, whose options may be given for the Hub, as in `from_pretrained`.

    Raises:
        ValueError: It's a file, a folder without any of these files, or a folder with a revision.
    """
    source = find_source(name, options.get("cache_dir"))
    folder = Path(source)
    if options.get("revision") is not None and folder.is_dir():
        raise ValueError(
            f"The revision {options['revision']!r} can't be used with {source}, a folder; only the Hub has revisions."
        )
    if folder.is_file():
        raise ValueError(f"{source} is a file; name the folder that save_pretrained wrote.")
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        if (folder / ADAPTER).is_file():
            raise ValueError(f"{source} has no {' or '.join(files)}, but an adapter; name the model that it is for.")
        inside = sorted(entry.parent.name for file in files for entry in folder.glob(f"*/{file}"))
        hint = f"; there is one in {', '.join(inside[-3:])}" if inside else "; name one that save_pretrained wrote"
        raise ValueError(f"{source} has no {' or '.join(files)}{hint}.")
    return source


@contextmanager
def _named(source: str, part: str) -> Iterator[None]:
    """Turn what Transformers raises while it loads a part into a ValueError of one line."""
    try:
        yield
    except _LOADING_ERRORS as error:
        reason = first_line(error).split(". If you")[0] if isinstance(error, OSError) else one_line(error, 400)
        raise ValueError(f"The {part} of {source} can't be loaded: {reason}") from error


# Models -------------------------------------------------------------------------------------------------------------


def load_config(name: str | os.PathLike, config_class: Any = AutoConfig, **options: Any) -> PreTrainedConfig:
    """Return a model's configuration.

    Args:
        name: A folder or an id on the Hub.
        config_class: `AutoConfig`, or the class that it has to be.
        options: As in `from_pretrained`.

    Raises:
        ValueError: There's none, it's of another kind, or it isn't valid.
    """
    source = _model_folder(name, options, CONFIG)
    with _named(source, "configuration"):
        config = AutoConfig.from_pretrained(source, **options)
    if config_class is not AutoConfig and not isinstance(config, config_class):
        raise ValueError(
            f"{source} holds a configuration of the kind {config.model_type!r}; it must be of "
            f"{config_class.model_type!r}."
        )
    return config


def commit_of(name: str | os.PathLike, **options: Any) -> str | None:
    """Return the commit of a model or an adapter on the Hub, None of a folder.

    A configuration that newer releases of Transformers loaded doesn't know it.

    Args:
        name: A folder or an id on the Hub.
        options: As in `from_pretrained`.

    Raises:
        ValueError: There's no such model.
    """
    source = _model_folder(name, options, CONFIG, ADAPTER)
    if Path(source).is_dir():
        return None
    with _named(source, "configuration"):
        file = find_adapter_config_file(source, **options) or cached_file(source, CONFIG, **options)
        return extract_commit_hash(file, None)


def _check_kind(source: str, config: PreTrainedConfig, model_class: Any) -> None:
    """Raise a ValueError unless a configuration is one of those that a model class takes."""
    if hasattr(model_class, "_model_mapping"):
        known = model_class._model_mapping
        found = known.get(type(config), None)
        classes = [one for one in (found if isinstance(found, (list, tuple)) else [found]) if one is not None]
        if classes and not any(
            hasattr(one, "get_image_features") and hasattr(one, "get_text_features") for one in classes
        ):
            raise ValueError(
                f"{source} holds a {classes[0].__name__}, which has no get_image_features and no get_text_features; "
                "name a DiffCLIP, or another model with one tower for images and one for texts."
            )
        return
    wanted = model_class.config_class
    if not isinstance(config, wanted) and wanted not in config.sub_configs.values():
        raise ValueError(
            f"{source} holds a model of the kind {config.model_type!r}; {model_class.__name__} needs one of the kind "
            f"{wanted.model_type!r}."
        )


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep Transformers' table of missing weights off the log, for `_check_weights` says it in one line."""
    logs = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "integrations.peft")]

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    for log in logs:
        log.addFilter(is_other)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(is_other)


def _some(names: Iterable[str]) -> str:
    """Return the first three names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_weights(source: str, model: Any, info: dict[str, Any], new: tuple[str, ...]) -> None:
    """Raise a ValueError where weights were missing, of another shape, or for layers that the model hasn't."""
    saved = ", ".join(getattr(model.config, "architectures", None) or [])
    what = f"{type(model).__name__}" + (
        f" (it was saved as {saved})" if saved and saved != type(model).__name__ else ""
    )
    if missing := [name for name in info["missing_keys"] if not name.startswith(new)]:
        raise ValueError(f"{source} lacks weights of a {what}: {_some(missing)}.")
    mismatched = {name: (tuple(there), tuple(wanted)) for name, there, wanted in info["mismatched_keys"]}
    if wrong := [name for name in mismatched if not name.startswith(new)]:
        name = min(wrong)
        there, wanted = mismatched[name]
        raise ValueError(
            f"The weights of {source} aren't those of its config.json, which differ in {_some(wrong)}: {name} has the "
            f"shape {there}; it must have {wanted}."
        )
    # A quantised layer has more than the model's own tensors.
    if getattr(model.config, "quantization_config", None) is None:
        parts = {name for name, _ in model.named_children()}
        extra = [name for name in info["unexpected_keys"] if name.split(".")[0] in parts]
        if extra := [name for name in extra if not name.endswith("position_ids") and not name.startswith(new)]:
            raise ValueError(
                f"{source} has weights that its config.json leaves no place for in a {what}: {_some(extra)}."
            )
    if started := sorted({*info["missing_keys"], *mismatched}):
        logger.info("These weights of %s start anew: %s.", source, _some(started))


def load_model(
    name: str | os.PathLike, model_class: Any = AutoModel, *, new: Sequence[str] = (), **options: Any
) -> Any:
    """Return a model with all of its weights, in evaluation mode.

    Args:
        name: A folder or an id on the Hub, of a model or of an adapter that PEFT saved.
        model_class: `AutoModel`, for any with `get_image_features` and `get_text_features`, or a model's class.
        new: Prefixes of the weights that may be missing or of another shape, and start at random.
        options: As in `from_pretrained`.

    Raises:
        ValueError: There's no such model, it's of another kind, or weights are missing, of another shape or for layers
            that its configuration hasn't.
    """
    source = _model_folder(name, options, CONFIG, ADAPTER)
    places = {key: value for key, value in options.items() if key in PLACE_OPTIONS}
    own = {key: value for key, value in places.items() if key != "trust_remote_code"}
    with _named(source, "adapter"):
        adapter = None if (Path(source) / CONFIG).is_file() else find_adapter_config_file(source, **own)
    if adapter is not None:
        return _with_adapter(source, Path(adapter), model_class, new, options)
    _check_kind(source, load_config(source, **places), model_class)
    with _named(source, "model"), _without_report():
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_weights(source, model, info, tuple(new))
    return model


def _with_adapter(source: str, adapter: Path, model_class: Any, new: Sequence[str], options: dict[str, Any]) -> Any:
    """Return the model of an adapter, which is loaded by itself, with the adapter."""
    require_extra("training", "peft")
    base = read_json_object(adapter).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{source} holds an adapter whose {ADAPTER} names no base_model_name_or_path.")
    # A revision and a folder are the adapter's.
    own = {key: options[key] for key in PLACE_OPTIONS if key in options and key != "trust_remote_code"}
    model = load_model(
        base, model_class, new=new, **{key: options[key] for key in options if key not in ("revision", "subfolder")}
    )
    with _named(source, "adapter"), _without_report():
        found = model.load_adapter(source, adapter_kwargs=own, ignore_mismatched_sizes=True)
    info = {key: getattr(found, key) for key in ("missing_keys", "mismatched_keys", "unexpected_keys")}
    _check_weights(source, model, info, tuple(new))
    return model.eval()


# Processors ---------------------------------------------------------------------------------------------------------


def check_tokenizer(tokenizer: Any, config: PreTrainedConfig | None = None, name: str | os.PathLike = "") -> None:
    """Raise a ValueError unless a tokenizer has a vocabulary and its ids are those of a model.

    Args:
        tokenizer: Any of Transformers'.
        config: The model's or its text tower's configuration; None to look at the tokenizer alone.
        name: Where it comes from.
    """
    which = f"The tokenizer of {os.fspath(name)}" if os.fspath(name) else "The tokenizer"
    vocabulary = tokenizer.get_vocab()
    if not set(vocabulary) - set(tokenizer.all_special_tokens):
        hint = "" if Path(os.fspath(name)).is_dir() else ", or the Hub has no such repository or can't be reached"
        raise ValueError(
            f"{which} has no vocabulary: its tokenizer.json, or vocab.json and merges.txt, is missing{hint}."
        )
    if config is None:
        return
    text = config.get_text_config()
    size, largest = getattr(text, "vocab_size", None), max(vocabulary.values())
    if size is not None and largest >= size:
        raise ValueError(
            f"{which} has ids up to {largest}; the model's vocab_size is {size}, so it is another model's tokenizer."
        )
    end = getattr(text, "eos_token_id", None)
    if text.model_type not in POOLS_AT_END or end is None:
        return
    if end == OLD_END != tokenizer.eos_token_id:
        if tokenizer.eos_token_id != largest:
            raise ValueError(
                f"{which} has the end-of-text id {tokenizer.eos_token_id}; the model pools at the largest, {largest}."
            )
        return
    ends = list(end) if isinstance(end, (list, tuple)) else [end]
    for field, found, allowed in (
        ("eos_token_id", tokenizer.eos_token_id, ends),
        ("bos_token_id", tokenizer.bos_token_id, [text.bos_token_id]),
    ):
        if allowed != [None] and found not in allowed:
            raise ValueError(
                f"{which} has the {field} {found}; the model's is {' or '.join(map(str, allowed))}, so it is another "
                "model's tokenizer."
            )
    if not set(tokenizer("a photo")["input_ids"]) & set(ends):
        raise ValueError(f"{which} ends no text with the end-of-text id {ends[0]}, at which the model pools.")


def check_image_processor(processor: Any, config: PreTrainedConfig | None, name: str | os.PathLike) -> None:
    """Raise a ValueError unless an image processor gives finite pixels, and a model the size that it takes.

    Args:
        processor: Any of Transformers'.
        config: The model's or its image tower's configuration; None to look at the numbers alone.
        name: Where it comes from.
    """
    which = f"The image processor of {os.fspath(name)}"
    mean, std = (getattr(processor, field, None) or [] for field in ("image_mean", "image_std"))
    if getattr(processor, "do_normalize", False):
        for field, values, is_right, allowed in (
            ("image_mean", mean, all(map(math.isfinite, mean)), "finite"),
            ("image_std", std, all(0 < value < math.inf for value in std), "positive and finite"),
        ):
            if not is_right:
                raise ValueError(f"{which} has the {field} {list(values)}; each must be {allowed}.")
    vision = getattr(config, "vision_config", config)
    if getattr(vision, "model_type", None) not in FIXED_SIZE or not getattr(processor, "do_resize", False):
        return
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    found = (size.get("height"), size.get("width"))
    if None not in found and found != (vision.image_size, vision.image_size):
        raise ValueError(
            f"{which} makes images of {found[1]}x{found[0]} pixels; the model's image_size is {vision.image_size}, so "
            "it is another model's image processor."
        )


def load_tokenizer(name: str | os.PathLike, tokenizer_class: Any = AutoTokenizer, **options: Any) -> Any:
    """Return a tokenizer that has a vocabulary.

    Args:
        name: A folder or an id on the Hub.
        tokenizer_class: `AutoTokenizer`, or a tokenizer's class.
        options: As in `from_pretrained`.

    Raises:
        ValueError: There's none, or it has no vocabulary.
    """
    source = _model_folder(name, options, *TOKENIZER_FILES)
    with _named(source, "tokenizer"):
        tokenizer = tokenizer_class.from_pretrained(source, **options)
    check_tokenizer(tokenizer, None, source)
    return tokenizer


def load_processor(
    name: str | os.PathLike,
    config: PreTrainedConfig | None = None,
    processor_class: Any = AutoProcessor,
    **options: Any,
) -> Any:
    """Return a processor with an image processor and a tokenizer, which has to be a model's; it cuts at its length.

    Args:
        name: A folder or an id on the Hub.
        config: The model's configuration, whose ids the tokenizer must have.
        processor_class: `AutoProcessor`, or a processor's class.
        options: As in `from_pretrained`.

    Raises:
        ValueError: There's no such processor, a part is missing, or a part isn't the model's.
    """
    source = _model_folder(name, options, *PROCESSOR_FILES)
    with _named(source, "processor"):
        processor = processor_class.from_pretrained(source, **options)
    if missing := [part for part in ("image_processor", "tokenizer") if getattr(processor, part, None) is None]:
        raise ValueError(
            f"{source} holds a {type(processor).__name__}, which has no {' and no '.join(missing)}; save the model's "
            "processor there."
        )
    check_tokenizer(processor.tokenizer, config, source)
    check_image_processor(processor.image_processor, config, source)
    longest = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and processor.tokenizer.model_max_length > longest:
        # As where tokenizer_config.json is lost: the first longer text would stop the model, hours into a run.
        logger.warning("The tokenizer of %s has no limit that suits the model: texts are cut at %d.", source, longest)
        processor.tokenizer.model_max_length = longest
    return processor


# Machines -----------------------------------------------------------------------------------------------------------


def check_device(device: str | torch.device) -> torch.device:
    """Return a device that is there.

    Raises:
        ValueError: There's no such device, or it holds no numbers.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    # PyTorch raises an AssertionError for a CUDA device where it was built without CUDA.
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = first_line(error).split(". ")[0]
        raise ValueError(f"The device {str(device)!r} can't be used: {reason}.") from error
    if found.type == "meta":
        raise ValueError("The device 'meta' holds no numbers; name another, such as 'cpu'.")
    return found


__all__ = [
    "check_device",
    "check_image_processor",
    "check_path",
    "check_tokenizer",
    "commit_of",
    "find_source",
    "is_local",
    "load_config",
    "load_model",
    "load_processor",
    "load_tokenizer",
]
