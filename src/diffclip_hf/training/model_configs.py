"""The configuration of a model that starts from random weights."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..common.json_files import parse_json_object
from ..common.loading import load_config
from ..common.options import check_names, read_options
from ..model.configuration_diffclip import DiffCLIPConfig
from ..model.image_fetching_diffclip import one_line


# Of a configuration's JSON, what isn't among its fields.
CONFIG_EXTRAS = ("auto_map", "num_labels", "output_attentions", "torch_dtype", "_name_or_path")


def config_from_fields(fields: dict[str, Any], what: str = "model_config") -> DiffCLIPConfig:
    """Return a configuration from its fields, each of which has to be one.

    Raises:
        ValueError: A field isn't one of a configuration or of its towers, or hasn't the right kind.
    """
    default = DiffCLIPConfig()
    towers = {name: getattr(default, name) for name in default.sub_configs}
    for config, given, where in (
        (default, fields, what),
        *((towers[name], fields.get(name), f"{name} of {what}") for name in towers),
    ):
        if given is None:
            continue
        if not isinstance(given, dict):
            raise ValueError(f"{where} is {given!r}; it must hold fields by name, as in {{...}}.")
        check_names(given, {*config.to_dict(), *CONFIG_EXTRAS}, where, "a field")
        model_type = given.get("model_type", config.model_type)
        if model_type != config.model_type:
            raise ValueError(f"model_type in {where} is {model_type!r}; it must be {config.model_type!r}.")
    try:
        return DiffCLIPConfig(**fields)
    # What Transformers' own fields raise for a value of another kind.
    except (AttributeError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{what} has a field of the wrong kind: {one_line(error)}.") from error


def build_config(model_config: str) -> DiffCLIPConfig:
    """Return a configuration from its fields as JSON, or from a folder, a file or the Hub.

    Raises:
        ValueError: The fields aren't JSON or aren't a configuration's, or there is no such configuration.
    """
    if model_config.lstrip().startswith("{"):
        return config_from_fields(parse_json_object(model_config, f"model_config {model_config}"))
    path = Path(model_config).expanduser()
    if path.is_file():
        return config_from_fields(read_options(path, f"model_config {model_config}"), f"model_config {model_config}")
    return load_config(model_config, DiffCLIPConfig)  # type: ignore[return-value]


__all__ = ["build_config", "config_from_fields"]
