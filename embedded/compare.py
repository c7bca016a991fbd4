"""Train the paper's four models at the embedded model's size, equally long, and compare them.

python embedded/compare.py --cache-dir .cache/embedded --output-dir docs/comparison

Each model is trained with each seed, and measured on drawings of a style that it was trained on and of one that it
never saw. A run's measurements are kept in `runs/` of the output folder, and a run that is there is not made again, so
that the command may be stopped and given again. The report and its pictures are made of all the runs that are there.
"""

import argparse
import json
import logging
import re
import statistics
import textwrap
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from emoji_data import HELD_OUT, TRAINING_VENDORS, Emoji, load_drawings, load_emoji
from evaluate import figures_of
from PIL import Image
from single_drawings import EmojiCollator, make_tokenizer
from small_model import VARIANTS, build_model, make_processor, make_trainer, save
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from diffclip_hf import DiffCLIPModel, DiffCLIPProcessor, ZeroShotClassifier
from diffclip_hf.common.machine import describe_machine, describe_versions
from diffclip_hf.common.whole_files import write_text_whole
from diffclip_hf.model.loss_diffclip import symmetric_cross_entropy


matplotlib.use("Agg")
import matplotlib.pyplot as plt


logger = logging.getLogger("compare")
HERE = Path(__file__).parent
TRAINED = "twitter"
MAIN_FIGURE = "zero-shot top-1 among 100"
VENDORS = {TRAINED: "a style that was trained on", HELD_OUT: "a style that was never seen"}
NAMES = {"clip": "CLIP", "diffclip": "DiffCLIP", "diffclip-star": "DiffCLIP*", "diffclip-dagger": "DiffCLIP†"}
COLOURS = {"clip": "#777777", "diffclip": "#c0392b", "diffclip-star": "#e69f00", "diffclip-dagger": "#0072b2"}
# As many pairs as a training batch has, so that the two losses can be compared.
LOSS_BATCH = 256


def lambdas(model: DiffCLIPModel) -> dict[str, list[float]]:
    """Return λ of each layer of the differential towers, in the layers' order."""
    found = {}
    for tower in ("vision", "text"):
        layers = getattr(model, f"{tower}_model").encoder.layers
        if hasattr(layers[0].self_attn, "get_lambda"):
            found[tower] = [round(layer.self_attn.get_lambda().item(), 4) for layer in layers]
    return found


class Measurement:
    """Measures a model on one vendor's drawings, each with its own name as it is."""

    def __init__(self, vendor: str, items: list[Emoji], processor: DiffCLIPProcessor, cache_dir: Path):
        images, present = load_drawings(vendor, items, cache_dir)
        indices = np.flatnonzero(present)
        self.images = [Image.fromarray(images[i]) for i in indices]
        self.names = [items[i].name for i in indices]
        self.processor = processor

    def __call__(self, model: DiffCLIPModel) -> dict[str, float]:
        """Return the figures, shares of 1, and the contrastive loss over batches of `LOSS_BATCH` pairs, in nats."""
        model.eval()
        logits = ZeroShotClassifier(model, self.processor, self.names, "{}", progress_bar=False).logits(self.images)
        order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
        losses = []
        for rows in order.split(LOSS_BATCH)[: len(logits) // LOSS_BATCH]:
            block = logits[rows][:, rows]
            losses.append(symmetric_cross_entropy(block).item())
        figures = {name: value for name, (value, _) in figures_of(logits).items()}
        return {"loss": round(statistics.mean(losses), 4), **{name: round(v, 4) for name, v in figures.items()}}


class Curves(TrainerCallback):
    """Measures while training, every so many epochs; nothing is chosen by it."""

    def __init__(self, measurement: Measurement, every: int):
        self.measurement, self.every = measurement, every
        self.validation: list[dict[str, Any]] = []
        self.lambdas: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._measure(0, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        epoch = round(state.epoch)
        if epoch % self.every == 0:
            self._measure(epoch, model)

    def _measure(self, epoch: int, model: DiffCLIPModel) -> None:
        self.validation.append({"epoch": epoch, **self.measurement(model)})
        self.lambdas.append({"epoch": epoch, **lambdas(model)})
        model.train()


def run(
    variant: str,
    seed: int,
    epochs: int,
    items: list[Emoji],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    work_dir: Path,
) -> dict[str, Any]:
    """Train one model with one seed; return its measurements, and leave the model in `work_dir`."""
    set_seed(seed)
    model = build_model(len(tokenizer), variant)
    processor = make_processor(tokenizer)
    measurements = {vendor: Measurement(vendor, items, processor, cache_dir) for vendor in VENDORS}
    curves = Curves(measurements[HELD_OUT], every=max(1, epochs // 12))
    collator = EmojiCollator(items, TRAINING_VENDORS, cache_dir, tokenizer, seed)
    trainer = make_trainer(
        model,
        len(items),
        collator,
        work_dir / "checkpoints",
        [curves],
        num_train_epochs=epochs,
        seed=seed,
        save_strategy="no",
        logging_steps=len(items) // 256,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "variant": variant,
        "seed": seed,
        "epochs": epochs,
        "steps": trainer.state.global_step,
        "parameters": model.num_parameters(),
        "figures": {vendor: measurement(model) for vendor, measurement in measurements.items()},
        "training": [{"epoch": round(entry["epoch"], 2), "loss": round(entry["loss"], 4)} for entry in history],
        "validation": curves.validation,
        "lambda": curves.lambdas,
        "seconds": round(seconds),
        "machine": describe_machine(),
        "versions": describe_versions("accelerate"),
    }
    save(model, processor, work_dir)
    return result


# The report ---------------------------------------------------------------------------------------------------------


def by_variant(runs: list[dict]) -> dict[str, list[dict]]:
    """Return the runs of each variant, in the order of `VARIANTS`."""
    return {name: found for name in VARIANTS if (found := [one for one in runs if one["variant"] == name])}


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Return the mean and the sample's standard deviation, 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(runs: list[dict], vendor: str) -> str:
    """Return a vendor's figures as a Markdown table, mean ± standard deviation over the seeds, in percent."""
    groups = by_variant(runs)
    names = [name for name in runs[0]["figures"][vendor] if name != "loss"]
    lines = ["| model | seeds | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for variant, group in groups.items():
        cells = []
        for name in names:
            mean, deviation = mean_and_deviation([100 * one["figures"][vendor][name] for one in group])
            cells.append(f"{mean:.1f} ± {deviation:.1f}" if len(group) > 1 else f"{mean:.1f}")
        lines.append(f"| {NAMES[variant]} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def outcome(runs: list[dict]) -> str:
    """Return the order of the models in the main figure, with the embedded model's value beside, in Markdown."""
    means = {
        variant: mean_and_deviation([100 * one["figures"][HELD_OUT][MAIN_FIGURE] for one in group])
        for variant, group in by_variant(runs).items()
    }
    order = sorted(means, key=lambda variant: means[variant][0], reverse=True)
    places = ", ".join(f"{NAMES[variant]} ({means[variant][0]:.1f} ± {means[variant][1]:.1f})" for variant in order)
    embedded = 100 * json.loads((HERE / "report.json").read_text())["figures"][MAIN_FIGURE]["measured"]
    return (
        f"By {MAIN_FIGURE} on the unseen style, from the first to the last: {places}. The embedded model isn't one "
        f"of them: it was trained longer, on scenes (see `embedded/README.md`), and has {embedded:.1f} there."
    )


def plot_curves(runs: list[dict], path: Path) -> None:
    """Draw the training loss, the loss and the accuracy on the unseen style, mean and range over the seeds."""
    panels = [
        ("training", "loss", "training loss, nats"),
        ("validation", "loss", "loss on the unseen style, nats"),
        ("validation", MAIN_FIGURE, "top-1 among 100 on the unseen style"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, (part, key, title) in zip(axes, panels, strict=True):
        for variant, group in by_variant(runs).items():
            epochs = [point["epoch"] for point in group[0][part]]
            values = np.array([[point[key] for point in one[part]] for one in group])
            axis.plot(epochs, values.mean(0), color=COLOURS[variant], label=NAMES[variant], lw=1.5)
            axis.fill_between(epochs, values.min(0), values.max(0), color=COLOURS[variant], alpha=0.15, lw=0)
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_figures(runs: list[dict], path: Path) -> None:
    """Draw every seed's figures as dots beside their mean."""
    names = [name for name in runs[0]["figures"][HELD_OUT] if name != "loss"]
    figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained", sharey=True)
    for axis, (vendor, style) in zip(axes, VENDORS.items(), strict=True):
        for offset, (variant, group) in enumerate(by_variant(runs).items()):
            places = np.arange(len(names)) + 0.18 * (offset - 1.5)
            values = np.array([[100 * one["figures"][vendor][name] for name in names] for one in group])
            axis.bar(places, values.mean(0), 0.16, color=COLOURS[variant], alpha=0.55, label=NAMES[variant])
            for row in values:
                axis.plot(places, row, ".", color="black", ms=4)
        short = [re.sub(r"(Recall@\d+) among \d+", r"\1", name) for name in names]
        labels = [name.replace(" Recall", "\nRecall").replace(" top-1", "\ntop-1") for name in short]
        axis.set_xticks(range(len(names)), labels, fontsize=8)
        axis.set(title=f"{style} ({vendor})", ylim=(0, 100))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("%")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_lambdas(runs: list[dict], path: Path) -> None:
    """Draw λ over depth at the end of training, a line for each seed, and where it began."""
    # As wide as a telephone shows without making it smaller.
    figure, axes = plt.subplots(1, 2, figsize=(5.2, 3.4), layout="constrained", sharey=True)
    for axis, tower in zip(axes, ("vision", "text"), strict=True):
        for variant, group in by_variant(runs).items():
            for number, one in enumerate(group):
                first, last = one["lambda"][0], one["lambda"][-1]
                if tower in last:
                    depth = range(1, len(last[tower]) + 1)
                    label = NAMES[variant] if number == 0 else None
                    axis.plot(depth, last[tower], "o-", color=COLOURS[variant], label=label, ms=4, alpha=0.8)
                    axis.plot(depth, first[tower], ":", color=COLOURS[variant], lw=1, alpha=0.6)
        axis.set_xlabel("layer", fontsize=12)
        axis.set_title(f"{'image' if tower == 'vision' else 'text'} tower", fontsize=12)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("λ (dotted: before training)", fontsize=12)
    axes[0].legend(frameon=False, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


REPORT = """# The paper's four models at a small size

CLIP, DiffCLIP, DiffCLIP* (λ_init by depth) and DiffCLIP† (differential attention in the image tower alone), trained
from scratch on the drawings of emoji of the embedded model (`embedded/README.md`), one in a picture with one of its
names as caption, with the same architecture,
{parameters} parameters, and the same budget: {epochs} epochs, {steps} steps of 256 pairs, {seeds} seed{plural} each.
Everything on this page is made by

```bash
python embedded/compare.py --cache-dir .cache/embedded --output-dir docs/comparison
```

on {machine}. Figures are percent, the mean ± the standard deviation over the seeds where
there are several; zero-shot is the own name among others drawn at random, recall is among all names or drawings. The
settings are those of the embedded model, a DiffCLIP, and were not tuned for any of the four.

## {unseen}

{unseen_table}

## {trained}

{trained_table}

{outcome}

![Every seed's figures](figures.png)

![Loss and accuracy while training: mean and range over the seeds](curves.png)

![λ of each layer](lambda.png)

Where CLIP and DiffCLIP of these look for a text is in [localization.json](localization.json), and summed up [in the
guide](../guides/look.md#clip-beside-diffclip).

## What this can and can't show

It can show that the four train alike with the same code, and how far apart seeds put them: a difference between two
models that is not clearly larger than the deviations beside it says nothing. It can't show which is better at the size
that the paper speaks of: two million parameters against 150 million, 1,906 names drawn by seven hands against millions
of photographs with captions, one patch grid of 6 × 6 on which there is little for an attention map to be noisy about,
and a budget of minutes in which no model has stopped improving, so that what is compared is how fast they learn.
"""


def span(values: list[int]) -> str:
    """Return one number, or the least and the largest."""
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def write_report(folder: Path) -> None:
    """Make the report and its pictures of the runs in a folder."""
    runs = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    if not runs:
        raise ValueError(f"There is no run in {folder / 'runs'}.")
    if len({(one["epochs"], one["steps"]) for one in runs}) != 1:
        raise ValueError(f"The runs in {folder / 'runs'} were trained for different times; they must be the same.")
    plot_curves(runs, folder / "curves.png")
    plot_figures(runs, folder / "figures.png")
    plot_lambdas(runs, folder / "lambda.png")
    seeds = [len(group) for group in by_variant(runs).values()]
    machine = runs[0]["machine"]
    content = REPORT.format(
        parameters=span([one["parameters"] for one in runs]),
        epochs=runs[0]["epochs"],
        steps=runs[0]["steps"],
        seeds=span(seeds),
        plural="" if max(seeds) == 1 else "s",
        machine=f"{machine['cores']} cores of an {machine['processor']}, torch {runs[0]['versions']['torch']}",
        unseen=f"On {VENDORS[HELD_OUT]} ({HELD_OUT})",
        trained=f"On {VENDORS[TRAINED]} ({TRAINED})",
        unseen_table=table(runs, HELD_OUT),
        trained_table=table(runs, TRAINED),
        outcome=textwrap.fill(outcome(runs), 119),
    )
    (folder / "README.md").write_text(content, encoding="utf-8")


def main() -> None:
    """Train what is missing and write the report, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, required=True, help="for the drawings, fetched on the first run")
    parser.add_argument("--output-dir", type=Path, required=True, help="for the report and the measurements")
    parser.add_argument("--models-dir", type=Path, default=Path("build/comparison"), help="for the trained models")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    items = load_emoji(args.cache_dir)
    tokenizer = make_tokenizer(items)
    (args.output_dir / "runs").mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that what is there when it is stopped has seen all the models equally often.
    for seed in args.seeds:
        for variant in args.variants:
            path = args.output_dir / "runs" / f"{variant}-{seed}.json"
            if path.is_file():
                continue
            work_dir = args.models_dir / f"{variant}-{seed}"
            logger.info("Training %s with seed %d", NAMES[variant], seed)
            result = run(variant, seed, args.epochs, items, tokenizer, args.cache_dir, work_dir)
            write_text_whole(path, json.dumps(result, indent=1) + "\n")
            logger.info("%s, seed %d: %s", NAMES[variant], seed, result["figures"][HELD_OUT])
    write_report(args.output_dir)


if __name__ == "__main__":
    main()
