"""A page in the browser to try models on: a picture, labels, their scores, and where the model looks for each.

    python -m diffclip_hf.demo MODEL [MODEL ...] [--examples FOLDER] [--host 0.0.0.0] [--port 7860] [--device cuda]
    python -m diffclip_hf.demo MODEL [MODEL ...] --write-space DIR [--examples FOLDER]

MODEL is a folder or an id on the Hub, of a DiffCLIP or of Transformers' CLIP. The page fetches nothing from elsewhere,
and nothing is reported to anyone.

--write-space writes a Hugging Face Space: this file as `app.py`, the package, `requirements.txt` and a `README.md`.
Started without MODEL, as a Space starts it, the file takes the models from `models` in the front matter of the
`README.md` beside it, where a name is the folder of that name beside it, or else an id on the Hub; to change a Space's
models, change that list. Pictures in a folder `examples` beside it are offered as examples.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from transformers import AutoConfig


try:
    import gradio as gr
except ImportError as error:
    raise ImportError("The demo needs Gradio; pip install 'diffclip-hf[demo]'.") from error

# By the package's name rather than relatively, since as a Space's `app.py` this file lies outside the package.
from diffclip_hf.demo_scores import MAX_LABELS, classify, draw_overlay
from diffclip_hf.demo_space import EXAMPLES, write_space
from diffclip_hf.zero_shot import image_files


logger = logging.getLogger("diffclip_hf.demo")
HERE = Path(__file__).resolve().parent
MAX_MEGABYTES = 20
SHOWN_BARS, MAX_EXAMPLES = 10, 12
TEMPLATES = ("{}", "a photo of a {}.", "This is a photo of {}.")
TEMPLATE_INFO = (
    "{} stands for the label. {} alone takes labels as written: right for whole captions, and for models trained on "
    "names, such as the small emoji model. The released models were trained on captions: try “a photo of a {}.”"
)
# Small pictures are enlarged.
STYLE = "#picture img, #overlay img { width: 100%; height: 100%; object-fit: contain; }"
INTRODUCTION = """\
# DiffCLIP in the browser
Give a picture and some labels. The model says which label fits best, and where in the picture it looks for each.
DiffCLIP is CLIP with differential attention ([paper](https://arxiv.org/abs/2503.06626)).
"""
LEGEND = """\
Scores are shares among the labels given. Click a bar, or choose a label, to see which parts of the picture raise its
score, the darker the more ([method](https://arxiv.org/abs/2103.15679)). Only the middle square, which the model sees,
is shown; each label's colours are on a scale of their own.
"""


def build_page(models: Mapping[str, str], device: str = "cpu", examples: Sequence[Path] = ()) -> gr.Blocks:
    """Return the page.

    Args:
        models: What each model is called on the page → its folder or its id on the Hub.
        device: Where they run.
        examples: Pictures to choose from.
    """

    def on_classify(upload, labels, template, shown):
        inputs = (upload, labels, template, shown)
        try:
            if shown not in models:
                raise ValueError(f"There is no model {shown!r:.200}; choose one of {', '.join(models)}.")
            classified = classify(upload and upload["path"], labels or "", template, models[shown], device)
            best = next(iter(classified.scores))
            drawn = draw_overlay(classified, best, device)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), title="That can't be classified", print_exception=False) from error
        if classified.cut:
            gr.Warning(f"Longer than the model's texts, and cut: {', '.join(classified.cut)}.", title="Labels cut")
        return (inputs, classified), classified.scores, gr.Dropdown(list(classified.scores), value=best), drawn

    def on_choose(result, label):
        return draw_overlay(result[1], label, device) if result and label in result[1].scores else None

    def on_bar(result, selected: gr.SelectData):
        return selected.value, on_choose(result, selected.value)

    def after_result(result, *inputs):
        if result and result[0] == inputs:
            return [gr.skip()] * 4
        return None, None, gr.Dropdown([], value=None), None

    def on_change(result, *inputs):
        # Without a result there's nothing to take away, and one may be under way.
        return after_result(result, *inputs) if result else [gr.skip()] * 4

    with gr.Blocks(title="DiffCLIP", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label=f"Picture, up to {MAX_MEGABYTES} MB",
                    sources=["upload", "clipboard"],
                    height=260,
                    elem_id="picture",
                )
                labels = gr.Textbox(
                    label="Labels",
                    info=f"Separated by commas or lines, up to {MAX_LABELS}.",
                    placeholder="pizza, rocket, dog face",
                    lines=2,
                    elem_id="labels",
                )
                template = gr.Dropdown(
                    list(TEMPLATES),
                    value=TEMPLATES[0],
                    allow_custom_value=True,
                    label="Template",
                    info=TEMPLATE_INFO,
                    elem_id="template",
                )
                model = gr.Dropdown(list(models), label="Model", elem_id="model")
                run = gr.Button("Classify", variant="primary", elem_id="classify")
                if examples:
                    gr.Examples([[str(path)] for path in examples], picture, label="Examples")
            with gr.Column():
                bars = gr.Label(label="Scores", num_top_classes=SHOWN_BARS, show_heading=False, elem_id="scores")
                chosen = gr.Dropdown(
                    [], label="Where the model looks for this label", interactive=True, elem_id="chosen"
                )
                drawn = gr.Image(
                    label="Relevance",
                    format="png",
                    height=420,
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="overlay",
                )
                gr.Markdown(LEGEND)
        # What was classified, and the result; of the session, on the server.
        state = gr.State()
        inputs, outputs = [picture, labels, template, model], [state, bars, chosen, drawn]
        # One at a time, for a model is loaded once and takes all cores.
        slow: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        # `preprocess=False` gives the picture as the file that came; Gradio's own reading of it drops alpha.
        asked = [
            run.click(on_classify, inputs, outputs, preprocess=False, api_name="classify", **slow),
            chosen.input(on_choose, [state, chosen], drawn, trigger_mode="always_last", api_name="overlay", **slow),
            bars.select(on_bar, state, [chosen, drawn], api_visibility="private", **slow),
        ]
        # A result of other inputs than those beside it goes, whether they change after it came or before.
        for event in asked:
            event.then(after_result, [state, *inputs], outputs, preprocess=False, **quick)
        changes = [picture.change, labels.change, template.change, model.change]
        gr.on(changes, on_change, [state, *inputs], outputs, preprocess=False, trigger_mode="always_last", **quick)
    return page


def serve(page: gr.Blocks, host: str | None = None, port: int | None = None) -> None:
    """Serve a page until the process is interrupted.

    Raises:
        OSError: The port is taken, or none is free.
    """
    page.queue(max_size=32).launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        show_error=True,
        max_file_size=f"{MAX_MEGABYTES}mb",
        footer_links=[],
        css=STYLE,
        # Fonts of the system, so that none is fetched.
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


def models_beside() -> list[str]:
    """Return the models that the `README.md` beside this file lists, which are folders beside it or ids on the Hub."""
    readme = HERE / "README.md"
    listed = (metadata_load(readme) or {}).get("models", []) if readme.is_file() else []
    return [str(HERE / name) if (HERE / name).is_dir() else name for name in listed]


def named_models(names: Sequence[str]) -> dict[str, str]:
    """Return what each model is called on the page, a folder by its last part, and where it is.

    Raises:
        ValueError: There's none, one isn't a model, or two would be called the same.
    """
    if not names:
        raise ValueError("MODEL is missing; name folders or ids on the Hub.")
    models = {}
    for name in names:
        try:
            AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"MODEL is {name!r}; it must be a model's folder or id on the Hub: {reason}") from error
        shown = Path(name).resolve().name if Path(name).is_dir() else name
        if shown in models:
            raise ValueError(f"MODEL is {name!r}, but another is called {shown!r} too; rename one of the folders.")
        models[shown] = name
    return models


def check_device(device: str) -> None:
    """Raise a ValueError for a device that isn't there."""
    try:
        torch.empty(0, device=device)
    # PyTorch raises an AssertionError for a CUDA device where it was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {device!r}: {str(error).splitlines()[0]}") from error


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m diffclip_hf.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", help="a folder or an id on the Hub")
    parser.add_argument(
        "--examples", metavar="FOLDER", type=Path, help=f"up to {MAX_EXAMPLES} pictures to choose from"
    )
    parser.add_argument("--host", help="the address to listen at; 127.0.0.1, if the environment says nothing else")
    parser.add_argument("--port", type=int, help="the first free one from 7860, if the environment says nothing else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    parser.add_argument("--write-space", metavar="DIR", type=Path, help="write a Hugging Face Space and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where an option doesn't fit."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    args = build_parser().parse_args(argv)
    folder = HERE / EXAMPLES if args.examples is None and (HERE / EXAMPLES).is_dir() else args.examples
    try:
        models = named_models(args.models or models_beside())
        examples = [] if folder is None else image_files(folder)[:MAX_EXAMPLES]
        if args.write_space is not None:
            write_space(args.write_space, Path(__file__), models, examples)
        else:
            check_device(args.device)
            serve(build_page(models, args.device, examples), args.host, args.port)
    except (ValueError, OSError, ImportError) as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
