"""Make a repository's model card from the template `model_card.md` and what a folder says of itself.

The paper's figures and the texts on its variants are in `model_card_data.json`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData

from diffclip_hf import DiffCLIPConfig

from ..common.json_files import read_json_object
from .convert_original_checkpoint import variant_of


_HERE = Path(__file__).parent
# What the paper's models have in common; figures are given for no other.
_VITB16 = {
    "vision_config": ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size"),
    "text_config": ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"),
}
# Parts of the template that stand only in cards of repositories with code, or only in those without.
_CONDITIONAL = re.compile(r"<!-- only (with|without) code -->\n(.*?)<!-- end -->\n", re.DOTALL)


class CardError(ValueError):
    """A file or an option that the card is made from doesn't fit; the message says which, and what is expected."""


@dataclass(frozen=True)
class Card:
    """What a card is made from.

    Attributes:
        repo_id, revision: Where the card will be; the main branch where `revision` is None.
        folder: With `config.json` and `processor_config.json`.
        report: The conversion's, None where there is none.
        remote_code: Whether the code is in the repository.
        dataset: Key of the data file's `datasets`; by default that of the source.
        source_repo: The original's repository; by default the one that the report names.
        license: Of the weights, by the Hub's name.
    """

    repo_id: str
    revision: str | None
    folder: Path
    report: dict[str, Any] | None
    remote_code: bool
    dataset: str | None
    source_repo: str | None
    license: str


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def source_and_dataset(card: Card, data: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the original's repository and the training data's key, from the options or the report, else None.

    Raises:
        CardError: An option contradicts the report, or the training data of a known repository.
    """
    reported = (card.report or {}).get("source", {}).get("repo_id")
    if card.source_repo and reported and card.source_repo != reported:
        raise CardError(f"--source-repo is {card.source_repo}; the conversion's report says {reported}.")
    source = card.source_repo or reported
    known = data["sources"].get(source)
    trained_on = known or data["synthclip"].get(source)
    if card.dataset and trained_on and card.dataset != known:
        raise CardError(f"--dataset is {card.dataset}; {source} was trained on {trained_on}.")
    return source, card.dataset or known


def preprocessing(folder: Path) -> str:
    """Return what the image processor does, in words, from its saved values."""
    path = folder / "processor_config.json"
    try:
        images = read_json_object(path)["image_processor"]
        edge, crop = images["size"]["shortest_edge"], images["crop_size"]
        mean, std = (", ".join(f"{value:g}" for value in images[name]) for name in ("image_mean", "image_std"))
        sides, kind = f"{crop['height']}×{crop['width']}", str(images["image_processor_type"])
    except (KeyError, TypeError, ValueError) as error:
        raise CardError(
            f"{path} isn't of DiffCLIP's image processor ({type(error).__name__}: {error}); it must have "
            "image_processor_type, size.shortest_edge, crop_size, image_mean and image_std."
        ) from error
    # Transformers' own drop it.
    over_white = "Transparency is laid over white. " if kind.startswith("DiffCLIP") else ""
    return (
        f"Images: shorter edge to {edge} pixels, centre crop of {sides}, values from 0 to 1, then mean ({mean}) and "
        f"standard deviation ({std}). {over_white}Texts: CLIP's byte-pair tokens, lower case, "
        "between a start and an end token. `AutoProcessor` does all of it."
    )


def configuration(config: DiffCLIPConfig) -> str:
    """Return a table of both towers' sizes and attention."""
    vision, text = config.vision_config, config.text_config

    def lambda_init(tower: Any) -> str:
        return "none" if tower.attention_type == "standard" else str(tower.lambda_init)

    return table(
        ["", "image tower", "text tower"],
        [
            ["attention", vision.attention_type, text.attention_type],
            ["λ_init", lambda_init(vision), lambda_init(text)],
            ["layers", vision.num_hidden_layers, text.num_hidden_layers],
            ["width", vision.hidden_size, text.hidden_size],
            ["heads", vision.num_attention_heads, text.num_attention_heads],
            [
                "input",
                f"{vision.image_size}×{vision.image_size} pixels, patches of {vision.patch_size}",
                f"{text.max_position_embeddings} tokens of {text.vocab_size}",
            ],
            ["embedding", config.projection_dim, config.projection_dim],
        ],
    )


def is_vitb16(config: DiffCLIPConfig) -> bool:
    """Return whether a configuration has the sizes of the paper's models."""
    paper = DiffCLIPConfig()
    return all(
        getattr(getattr(config, tower), name) == getattr(getattr(paper, tower), name)
        for tower, names in _VITB16.items()
        for name in names
    )


def paper_figures(
    config: DiffCLIPConfig, variant: str, source: str | None, dataset: str | None, data: dict[str, Any]
) -> str:
    """Return the paper's figures of a variant and training data, or why there are none."""
    if source in data["synthclip"]:
        return "DiffCLIP's paper has no figures of this model: it is of SynthCLIP, by the same authors."
    if variant == "openai-clip":
        return "DiffCLIP's paper has no figures of this model, which is none of its four."
    if not is_vitb16(config):
        return "The paper reports ViT-B/16 models; this one has other sizes, so none of its figures apply."
    if dataset is None:
        return "The training data isn't known here, so none of the paper's figures are given."
    figures = data["figures"][dataset].get(variant)
    if figures is None:
        return f"The paper has no figures of this model with {data['datasets'][dataset]['title']}."
    parts = [
        f"**These are the paper's figures** ([arXiv 2503.06626](https://arxiv.org/abs/2503.06626)) of "
        f"{data['variants'][variant]['title']}, ViT-B/16, trained on {data['datasets'][dataset]['title']}. They were "
        "not measured with this repository's files."
    ]
    classification = [["linear probing", figures.get("linear")], ["few-shot", figures.get("few_shot")]]
    rows = [[name, *numbers] for name, numbers in classification if numbers]
    if rows:
        parts.append("Accuracy in %:\n\n" + table(["", *data["columns"]["classification"]], rows))
    if "retrieval" in figures:
        parts.append("Recall@5 in %:\n\n" + table(data["columns"]["retrieval"], [figures["retrieval"]]))
    if "zero_shot" in figures:
        parts.append(f"Zero-shot accuracy on ImageNet: {figures['zero_shot']} %.")
    return "\n\n".join([*parts, *figures.get("notes", [])])


def conversion(report: dict[str, Any] | None) -> str:
    """Return the conversion's report in words and tables.

    Raises:
        CardError: The report lacks a part, or a part is of another form than the conversion writes.
    """
    if report is None:
        return "There is no report of a conversion: nobody has checked here that the numbers are the original's."
    try:
        return _conversion(report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CardError(
            f"conversion_report.json is not of the form that the conversion writes ({type(error).__name__}: {error})."
        ) from error


def _conversion(report: dict[str, Any]) -> str:
    gate, source, parameters = report["gate"], report["source"], report["parameters"]
    at = f" at `{source['commit']}`" if "repo_id" in source else ""
    if "file" in source:
        where = f" of `{source['repo_id']}`{at}" if at else ""
        origin = f"`{source['file']}`{where} (SHA-256 `{source['sha256']}`)"
        reference = "a forward pass written from the original's formulas"
    else:
        origin, reference = f"the `CLIPModel` `{source['model']}`{at}", "Transformers' own classes"
    parts = [
        f"Converted from {origin}, and compared in {gate['dtype']} with {reference}. Largest error "
        f"{gate['largest_error']:.1e}, allowed {gate['limit']:.0e}; an error is the {gate['error_is']}.",
        f"Parameters: {parameters['total']:,}, of them {parameters['vision']:,} in the image tower and "
        f"{parameters['text']:,} in the text tower.",
    ]
    assumptions = report.get("assumptions", [])
    if assumptions:
        parts.append("Assumed, since no checkpoint says it: " + " ".join(map(str, assumptions)))
    rows = [
        [output, inputs, implementation, f"{error:.1e}"]
        for inputs, by_implementation in gate["errors"].items()
        for implementation, by_output in by_implementation.items()
        for output, error in by_output.items()
    ]
    parts.append(table(["output", "inputs", "attention", "error"], rows))
    towers = {name: report["lambda"].get(name) for name in ("vision", "text")}
    found = {name: layers for name, layers in towers.items() if layers}
    if found:
        rows = [[name, *(f"{layer['lambda']:.3f}" for layer in layers)] for name, layers in found.items()]
        longest = max(map(len, found.values()))
        rows = [row + [""] * (longest + 1 - len(row)) for row in rows]
        parts.append("λ by layer:\n\n" + table(["tower", *range(longest)], rows))
    hashes = [
        [f"`{name}`", f"`{about['sha256']}`"]
        for name, about in report["files"].items()
        if name.endswith(".safetensors")
    ]
    parts.append(table(["weights", "SHA-256"], hashes))
    return "\n\n".join(parts)


def front_matter(card: Card, variant: str, source: str | None, dataset: str | None, data: dict[str, Any]) -> str:
    """Return the metadata that the Hub reads, as YAML."""
    plain = variant in ("clip", "openai-clip")
    return ModelCardData(
        license=card.license,
        # Both training sets that are known here have English captions.
        language="en" if dataset else None,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        datasets=[data["datasets"][dataset]["id"]] if dataset else None,
        base_model=source,
        metrics=["accuracy", "recall"],
        tags=["diffclip", "clip", "vision"] + ([] if plain else ["differential-attention"]),
    ).to_yaml()


def about(variant: str, source: str | None, data: dict[str, Any]) -> str:
    """Return what the model is, in a sentence or two."""
    if source in data["synthclip"]:
        return (
            "Both towers of this model have standard attention: it is a CLIP of "
            "[SynthCLIP](https://arxiv.org/abs/2402.01832), by the same authors and code, trained on "
            f"{data['synthclip'][source]}."
        )
    return data["variants"][variant]["about"]


def render_card(card: Card) -> str:
    """Return the text of the model card.

    Raises:
        CardError: A file or an option that it is made from doesn't fit.
    """
    data = json.loads((_HERE / "model_card_data.json").read_text(encoding="utf-8"))
    config = DiffCLIPConfig.from_pretrained(card.folder)
    variant = variant_of(config)
    source, dataset = source_and_dataset(card, data)
    revision = f", revision={json.dumps(card.revision)}" if card.revision else ""
    kept = "with" if card.remote_code else "without"
    text = (_HERE / "model_card.md").read_text(encoding="utf-8")
    template = Template(_CONDITIONAL.sub(lambda part: part[2] if part[1] == kept else "", text))
    return template.substitute(
        metadata=front_matter(card, variant, source, dataset, data),
        name=card.repo_id.split("/")[-1],
        title="A plain CLIP in the classes of DiffCLIP"
        if source in data["synthclip"]
        else data["variants"][variant]["title"],
        about=about(variant, source, data),
        repo_id=card.repo_id,
        revision_argument=revision,
        revision_option=f" --revision {card.revision}" if card.revision else "",
        preprocessing=preprocessing(card.folder),
        configuration=configuration(config),
        paper=paper_figures(config, variant, source, dataset, data),
        conversion=conversion(card.report),
        context_length=config.text_config.max_position_embeddings,
    )
