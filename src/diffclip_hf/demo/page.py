"""A page in the browser to try models on: a picture, labels, their scores, and where the model looks for each.

    python -m diffclip_hf.demo MODEL --examples FOLDER
    python -m diffclip_hf.demo MODEL --write-space DIR --examples FOLDER

MODEL is a DiffCLIP or Transformers' CLIP; name several, and the page offers them all. The page fetches nothing from
elsewhere and reports nothing to anyone. It reads only the pictures that were uploaded to it, and deletes them after an
hour or when it stops. On this machine's own address it answers requests for localhost alone; --allowed-host NAME lets
another name in, such as a proxy's.

--write-space writes a Hugging Face Space: this file as `app.py`, the package, `requirements.txt` and a `README.md`.
A Space takes its models from the list `models` at the top of its `README.md`: folders beside it, or ids on the Hub.
It offers the pictures in its folder `examples`.

Only the configuration, the weights as safetensors and the processor are copied from a model's folder; links are
refused. Examples are written anew, without what a camera noted in them, such as the place.
"""

import argparse
import contextlib
import html
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load

# By the package's name rather than relatively, since as a Space's `app.py` this file lies outside the package.
from diffclip_hf.common.commands import (
    CommandParser,
    add_device_option,
    require_extra,
    run_command,
    stop_without_extra,
)


try:
    import gradio as gr
except ModuleNotFoundError as error:
    stop_without_extra(error, "demo", __name__)
from starlette.middleware import Middleware

from diffclip_hf.common.loading import check_device, find_source, load_config
from diffclip_hf.common.whole_files import check_output_folder
from diffclip_hf.demo.guard import MAX_AGE, MAX_MEGABYTES, Guard, host_names, private_store, sweeping, uploaded_file
from diffclip_hf.demo.scores import MAPS, MAX_LABELS, classify, default_map, draw_overlay, load_pair
from diffclip_hf.demo.space import EXAMPLES, prepare_examples, write_space
from diffclip_hf.zero_shot import image_files


logger = logging.getLogger("diffclip_hf.demo")
HERE = Path(__file__).resolve().parent
SHOWN_BARS, MAX_EXAMPLES = 10, 12
# How long a message stays, if nothing is changed.
MESSAGE_SECONDS = 600
# Of requests in the queue, and of results that are kept for who asked, a megabyte each.
MAX_WAITING, MAX_SESSIONS = 32, 200
TEMPLATES = ("{}", "a photo of a {}.", "This is a photo of {}.")
TEMPLATE_INFO = (
    "{} stands for the label. {} alone takes labels as written: right for whole captions, and for models trained on "
    "names, such as the small emoji model. The released models were trained on captions: try “a photo of a {}.”"
)
STYLE = """
/* Small pictures are enlarged. */
#picture img, #overlay img { width: 100%; height: 100%; object-fit: contain; }
/* The message says what is wrong, and leaves when that is mended. */
[data-testid=status-tracker]:has(.error) { display: none; }
/* Below the name of the block. */
#scores .bars { padding-top: 20px; }
#scores button.share {
    display: block; width: 100%; padding: 4px 0; margin: 0; border: 0; box-shadow: none; background: none;
    text-align: left; cursor: pointer; color: var(--body-text-color); font-size: var(--text-md);
}
#scores button.share span { display: flex; justify-content: space-between; gap: 12px; overflow-wrap: anywhere; }
#scores button.share span b { font-weight: 500; font-variant-numeric: tabular-nums; white-space: nowrap; }
#scores button.share i {
    display: block; height: 6px; min-width: 2px; border-radius: 3px; background: var(--color-accent);
}
#scores button.share:hover span, #scores button.share:focus-visible span { text-decoration: underline; }
#scores p { margin: 4px 0 0; color: var(--body-text-color-subdued); font-size: var(--text-sm); }
"""
# The bars of a value such as Gradio's own `Label` has. What is a label is put in as text: a template would take it for
# a piece of one.
BARS = """
const draw = () => {
    const box = element.querySelector(".bars");
    box.replaceChildren();
    const found = props.value?.confidences ?? [];
    const percent = (share) => `${(100 * share).toFixed(1)} %`;
    const add = (parent, kind, text) => {
        const child = parent.appendChild(document.createElement(kind));
        child.textContent = text;
        return child;
    };
    found.slice(0, props.most).forEach(({label, confidence}, index) => {
        const bar = add(box, "button", "");
        bar.className = "share";
        const line = add(bar, "span", label);
        add(line, "b", percent(confidence));
        add(bar, "i", "").style.width = `${100 * confidence}%`;
        bar.addEventListener("click", () => trigger("select", {index, value: label, selected: true}));
    });
    const rest = found.slice(props.most).reduce((sum, one) => sum + one.confidence, 0);
    if (found.length > props.most)
        add(box, "p", `The ${props.most} best of ${found.length} labels; the others share ${percent(rest)}.`);
    else if (!found.length)
        add(box, "p", "The scores of your labels will appear here.");
};
draw();
watch("value", draw);
"""
# Where the results are below the others, as on a phone.
SHOW_RESULTS = """() => {
    const { top, bottom } = document.querySelector("#scores").getBoundingClientRect();
    if (top < 0 || bottom > window.innerHeight)
        document.querySelector("#scores").scrollIntoView({ behavior: "smooth", block: "start" });
}"""
# What was wrong with the last inputs isn't said of others.
CLOSE_MESSAGES = """(...inputs) => {
    for (const close of document.querySelectorAll("[data-testid=toast-close]")) close.click();
    return inputs;
}"""
INTRODUCTION = """\
# DiffCLIP in the browser
Give the model a picture and some labels. It says which label fits best, and shows where in the picture it looks for
each. DiffCLIP is CLIP with differential attention ([paper](https://arxiv.org/abs/2503.06626)).
"""
LEGEND = """\
A score is a label's share among the labels that you gave, so one of them always looks good, even if none fits. Click
a bar, or choose a label, to see what speaks for it: the darker, the more. **What the score depends on** hides one
part of the picture after another and shows where that costs the score. **How much each place is like the label**
compares each part's own values with it. In both, half of what speaks for your other labels is taken away. **Where
attention goes** is [relevance](https://arxiv.org/abs/2103.15679), which often falls beside the thing itself. Each
label's colours have a scale of their own. The model sees only the middle square of the picture, so the map shows only
that.
"""


def example_label(path: Path) -> str:
    """Return what a prepared example's file name says that it shows, `dog face` for `03-dog-face.png`."""
    return " ".join(re.sub(r"^(\d\d-)+|[-_,]", " ", path.stem).split())


def describe(models: Mapping[str, str]) -> str:
    """Return what the models know, as HTML: what their cards begin with, or where a card may be."""
    lines = []
    for shown, source in models.items():
        name = html.escape(shown)
        if Path(source).is_dir():
            summary = html.escape(card_summary(Path(source))) or "It has no model card that says what it knows."
        else:
            address = html.escape(f"https://huggingface.co/{source}")
            summary = f'<a href="{address}" target="_blank">Its card on the Hub</a> says what it knows.'
        lines.append(f"<p><b>{name}</b>: {summary}</p>")
    return "".join(lines)


def card_summary(folder: Path, most: int = 500) -> str:
    """Return the first paragraph of a folder's model card as plain text, of at most so many characters."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
    paragraphs = [part for part in re.split(r"\n\s*\n", text.strip()) if not re.match(r"\s*([#<!|`]|\[!)", part)]
    plain = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraphs[0].split())) if paragraphs else ""
    plain = re.sub(r"[*`]", "", plain)
    return plain if len(plain) <= most else f"{plain[:most].rsplit(' ', 1)[0]} …"


@dataclass(frozen=True)
class PageEvents:
    """What the page's events do.

    Args:
        models: What each model is called on the page → its folder or its id on the Hub.
        store: The folder that `private_store` gives.
        device: Where the models run.
        examples: Pictures to choose from, in the store.
    """

    models: Mapping[str, str]
    store: Path
    device: str | torch.device
    examples: Sequence[Path]

    def on_classify(self, upload, labels, template, shown, kind):
        inputs = (upload, labels, template, shown)
        try:
            path = None if upload is None else str(uploaded_file(dict(upload).get("path"), self.store))
            if not all(isinstance(text, str) for text in (labels or "", template or "", shown)):
                raise ValueError("Labels, template and model must be texts.")
            if shown not in self.models:
                raise ValueError(f"There is no model {shown!r:.200}; choose one of {', '.join(self.models)}.")
            if not isinstance(kind, str) or kind not in MAPS:
                raise ValueError(f"There is no map {kind!r:.200}; choose one of {', '.join(MAPS)}.")
            classified = classify(path, labels or "", template, self.models[shown], self.device)
            best = next(iter(classified.scores))
            drawn = draw_overlay(classified, best, self.device, kind)
        except (ValueError, TypeError, OSError) as error:
            # Gradio shows HTML.
            text = html.escape(str(error), quote=False)
            raise gr.Error(text, MESSAGE_SECONDS, title="That can't be classified", print_exception=False) from error
        if classified.cut:
            cut = html.escape(", ".join(classified.cut), quote=False)
            gr.Warning(f"Too long for the model, and cut: {cut}.", MESSAGE_SECONDS, title="Labels cut")
        shares = [{"label": label, "confidence": share} for label, share in classified.scores.items()]
        bars = {"label": best, "confidences": shares}
        return (inputs, classified), bars, gr.Dropdown(list(classified.scores), value=best), drawn

    def on_choose(self, result, label, kind):
        known = result and isinstance(label, str) and label in result[1].scores
        known = known and isinstance(kind, str) and kind in MAPS
        return draw_overlay(result[1], label, self.device, kind) if known else None

    def on_bar(self, result, kind, selected: gr.SelectData):
        return selected.value, self.on_choose(result, selected.value, kind)

    def on_example(self, number, labels):
        if not isinstance(number, int) or not 0 <= number < len(self.examples):
            raise gr.Error("There is no such example.", print_exception=False)
        # Labels that somebody wrote stay.
        written = isinstance(labels, str) and labels.strip()
        return str(self.examples[number]), labels if written else ", ".join(map(example_label, self.examples))

    def after_result(self, result, *inputs):
        if result and result[0] == inputs:
            return [gr.skip()] * 4
        return None, None, gr.Dropdown([], value=None), None

    def on_change(self, result, *inputs):
        # Without a result there's nothing to take away, and one may be under way.
        return self.after_result(result, *inputs) if result else [gr.skip()] * 4


def _question_fields(models: Mapping[str, str], examples: Sequence[Path]) -> dict[str, Any]:
    """Lay out the column of what a person gives, and return its fields by name; `offered` is None without examples."""
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
    gr.HTML(describe(models), elem_id="about")
    run = gr.Button("Classify", variant="primary", elem_id="classify")
    offered = None
    if examples:
        # Not Gradio's own `Examples`, whose clicks pass the queue by.
        offered = gr.Dataset(
            label="Examples: choose one to classify it",
            components=[picture],
            samples=[[str(path)] for path in examples],
            type="index",
            elem_id="examples",
        )
    return {
        "picture": picture,
        "labels": labels,
        "template": template,
        "model": model,
        "run": run,
        "offered": offered,
    }


def _answer_fields(kind: str) -> dict[str, Any]:
    """Lay out the column of what a person gets, with the map that is shown at first, and return its fields by name."""
    bars = gr.HTML(
        label="Scores",
        html_template="<div class='bars'></div>",
        js_on_load=BARS,
        most=SHOWN_BARS,
        show_label=True,
        container=True,
        padding=True,
        elem_id="scores",
    )
    chosen = gr.Dropdown([], label="Where the model looks for this label", interactive=True, elem_id="chosen")
    kinds = gr.Dropdown(
        [(text, name) for name, text in MAPS.items()],
        value=kind,
        label="Map",
        info="The first runs the model about 100 times, the others once.",
        elem_id="kind",
    )
    drawn = gr.Image(
        label="What speaks for the label",
        format="png",
        height=420,
        interactive=False,
        buttons=["fullscreen"],
        elem_id="overlay",
    )
    gr.Markdown(LEGEND)
    return {"bars": bars, "chosen": chosen, "kinds": kinds, "drawn": drawn}


def _connect(events: PageEvents, asked_by: Mapping[str, Any], shown_by: Mapping[str, Any]) -> None:
    """Say what happens when a person does something."""
    picture, labels, template, model = (asked_by[name] for name in ("picture", "labels", "template", "model"))
    run, offered = asked_by["run"], asked_by["offered"]
    bars, chosen, kinds, drawn = (shown_by[name] for name in ("bars", "chosen", "kinds", "drawn"))
    # What was classified, and the result; of the session, on the server.
    state = gr.State(time_to_live=MAX_AGE)
    inputs, outputs = [picture, labels, template, model], [state, bars, chosen, drawn]
    choice = [state, chosen, kinds]
    # One at a time, for a model is loaded once and takes all cores.
    slow: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    # Beside those, yet in the queue too: there is no other way in.
    quick: dict[str, Any] = {
        "concurrency_id": "quick",
        "concurrency_limit": 8,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    # `preprocess=False` gives the picture as the file that came; Gradio's own reading of it drops alpha.
    answer: dict[str, Any] = {
        "fn": events.on_classify,
        "inputs": [*inputs, kinds],
        "outputs": outputs,
        "preprocess": False,
        **slow,
    }
    done = [run.click(**answer, js=CLOSE_MESSAGES, api_name="classify")]
    if offered is not None:
        example = offered.click(events.on_example, [offered, labels], [picture, labels], js=CLOSE_MESSAGES, **quick)
        done.append(example.success(**answer, api_visibility="private"))
    asked = [
        *done,
        chosen.input(events.on_choose, choice, drawn, trigger_mode="always_last", api_name="overlay", **slow),
        kinds.input(events.on_choose, choice, drawn, trigger_mode="always_last", api_visibility="private", **slow),
        bars.select(events.on_bar, [state, kinds], [chosen, drawn], api_visibility="private", **slow),
    ]
    # A result of other inputs than those beside it goes, whether they change after it came or before.
    for event in asked:
        event.then(events.after_result, [state, *inputs], outputs, preprocess=False, **quick)
    changes = [picture.change, labels.change, template.change, model.change]
    gr.on(changes, events.on_change, [state, *inputs], outputs, preprocess=False, trigger_mode="always_last", **quick)
    for event in done:
        event.success(None, js=SHOW_RESULTS)
    # Of what a person does alone: `change` comes after an answer too.
    edits = [picture.upload, picture.clear, labels.input, template.input, model.input]
    gr.on(edits, None, js=CLOSE_MESSAGES)


def build_page(
    models: Mapping[str, str], store: Path, device: str | torch.device = "cpu", examples: Sequence[Path] = ()
) -> gr.Blocks:
    """Return the page.

    Args:
        models: What each model is called on the page → its folder or its id on the Hub.
        store: The folder that `private_store` gives, in whose context this is called.
        device: Where the models run.
        examples: Pictures to choose from, in the store.
    """
    with gr.Blocks(title="DiffCLIP", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                asked_by = _question_fields(models, examples)
            with gr.Column():
                # If occlusion is slow for any of the models, begin with the faster map.
                kinds = {default_map(source, device) for source in models.values()}
                shown_by = _answer_fields("values" if "values" in kinds else "occlusion")
        _connect(PageEvents(models, store, device, examples), asked_by, shown_by)
    return page


def check_host(host: str) -> None:
    """Raise an OSError for an address at which this machine can't listen; Gradio would try port by port."""
    bare = host.strip("[]")
    try:
        with socket.create_server((bare, 0), family=socket.AF_INET6 if ":" in bare else socket.AF_INET):
            pass
    except (OSError, UnicodeError) as error:
        raise OSError(f"--host is {host!r}, at which this machine can't listen: {error}") from error


def open_server(
    page: gr.Blocks, store: Path, hosts: frozenset[str] | None, host: str = "127.0.0.1", port: int | None = None
) -> str:
    """Begin to serve a page, until `page.close()`, and return its address.

    Args:
        page: What `build_page` returned, with the same store.
        store: The folder that `private_store` gives.
        hosts: The names that requests may be for, as `host_names` gives them, or None for any.
        host: The address to listen at.
        port: By the environment, or else the first free one from 7860.

    Raises:
        OSError: The port is taken, or none is free.
    """
    guard = Middleware(Guard, store=store, hosts=hosts)
    page.queue(max_size=MAX_WAITING, api_open=False)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        # What else Gradio would open, some of it by the environment.
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        num_workers=0,
        enable_monitoring=False,
        run_history=False,
        # Errors that are not for the person at the page stay on the log.
        show_error=False,
        state_session_capacity=MAX_SESSIONS,
        max_file_size=f"{MAX_MEGABYTES}mb",
        footer_links=[],
        css=STYLE,
        # Fonts of the system, so that none is fetched.
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"middleware": [guard], "lifespan": sweeping(store)},
    )
    return address


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
    models: dict[str, str] = {}
    for name in names:
        source = find_source(name)
        load_config(source)
        shown = Path(source).resolve().name if Path(source).is_dir() else source
        if shown in models:
            raise ValueError(f"MODEL is {name!r}, but another is called {shown!r} too; rename one of the folders.")
        models[shown] = source
    return models


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = CommandParser(
        prog="python -m diffclip_hf.demo",
        usage="%(prog)s MODEL [MODEL ...] [--examples FOLDER] [OPTION ...]\n"
        "       %(prog)s MODEL [MODEL ...] --write-space DIR [--examples FOLDER]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", help="A model's folder or its id on the Hub.")
    parser.add_argument(
        "--examples",
        metavar="FOLDER",
        type=Path,
        help=f"A folder of up to {MAX_EXAMPLES} pictures to choose from. Names such as dog-face.png become labels.",
    )
    parser.add_argument("--host", help="The address to listen at. (default: GRADIO_SERVER_NAME, or else 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, help="The port. (default: GRADIO_SERVER_PORT, or else the first free one from 7860)"
    )
    parser.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="A further name that requests may be for, such as a proxy's. Repeat the option for several.",
    )
    add_device_option(parser)
    parser.add_argument(
        "--write-space", metavar="DIR", type=Path, help="Write a Hugging Face Space into this folder and stop."
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Write a Space or serve the page, as the command line says.

    Raises:
        ValueError, OSError, ImportError: An option doesn't fit, or a model can't be used.
    """
    require_extra("plotting", "matplotlib")
    if args.port is not None and not 0 < args.port < 65536:
        raise ValueError(f"--port is {args.port}; it must be from 1 to 65535.")
    host = args.host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    hosts = host_names(host, args.allowed_host)
    if args.write_space is not None:
        check_output_folder(args.write_space)
    else:
        check_host(host)
    device = check_device(args.device)
    models = named_models(args.models or models_beside())
    folder = HERE / EXAMPLES if args.examples is None and (HERE / EXAMPLES).is_dir() else args.examples
    examples = [] if folder is None else image_files(folder)[:MAX_EXAMPLES]
    if args.write_space is not None:
        # What a Space loads from the Hub needn't be here.
        for name in models.values():
            if Path(name).is_dir():
                load_pair(name, "cpu")
        write_space(args.write_space, Path(__file__), models, examples)
        return
    for name in models.values():
        load_pair(name, device)
    # So that a process that is told to end leaves no pictures behind either.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), private_store() as store:
        page = build_page(models, store, device, prepare_examples(examples, store / EXAMPLES))
        open_server(page, store, hosts, host, args.port)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where an option doesn't fit."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    args = build_parser().parse_args(argv)
    return run_command(lambda: run(args), logger)


if __name__ == "__main__":
    sys.exit(main())
