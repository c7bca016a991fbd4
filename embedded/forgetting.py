"""Fine-tune the embedded model on half of a new style, and measure what it forgets.

python embedded/forgetting.py --cache-dir .cache/embedded --output-dir docs/forgetting

Google's drawings, which the embedded model never saw, are parted by name: every second one is trained on, in each of
several ways. Both halves are measured before and after, and between the two (WiSE-FT), and so are Twitter's drawings,
which the embedded model knows. Each picture has to find its own name among all the names. Some ten minutes on two
cores.
"""

import argparse
import io
import json
import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_data import HELD_OUT, Emoji, load_drawings, load_emoji
from PIL import Image
from torch.nn.functional import normalize
from transformers import set_seed

from diffclip_hf import DiffCLIPModel, DiffCLIPProcessor
from diffclip_hf.common.loading import load_model, load_processor
from diffclip_hf.common.machine import describe_machine, describe_versions
from diffclip_hf.common.whole_files import check_output_file, write_text_whole, write_whole
from diffclip_hf.data import ImageTextCollator
from diffclip_hf.interpolate import draw_curve, sweep
from diffclip_hf.training import DiffCLIPTrainer, DiffCLIPTrainingArguments


logger = logging.getLogger("forgetting")
TRAINED, OTHER, KNOWN = "names trained on", "other names", "known style"
KNOWN_VENDOR = "twitter"
# What each way adds to plain fine-tuning: arguments of the trainer, and whether the first model teaches.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "lock text": ({"lock": "text"}, False),
    "lock image": ({"lock": "image"}, False),
    "layer decay 0.5": ({"layer_decay": 0.5}, False),
    "teacher": ({}, True),
}
BATCH = 256
ALPHAS = (0, 0.2, 0.4, 0.5, 0.6, 0.8, 1)
TEMPLATES = ("{}", "an emoji of a {}", "a drawing of {}")


class Style:
    """A vendor's drawings, each with its name."""

    def __init__(self, vendor: str, cache_dir: Path, processor: DiffCLIPProcessor):
        items = load_emoji(cache_dir)
        images, present = load_drawings(vendor, items, cache_dir)
        self.items: list[Emoji] = [items[i] for i in np.flatnonzero(present)]
        self.images = [Image.fromarray(images[i]) for i in np.flatnonzero(present)]
        # Made once for all the measurements.
        names = [item.name for item in self.items]
        self.texts = processor(text=names, padding=True, truncation=True, return_tensors="pt")
        self.pixels = processor(images=self.images, return_tensors="pt")["pixel_values"]

    def rows(self) -> list[dict[str, Any]]:
        """Return every second drawing, the half that is trained on, as `ImageTextCollator` takes it."""
        found = []
        for item, image in list(zip(self.items, self.images, strict=True))[::2]:
            file = io.BytesIO()
            image.save(file, "PNG")
            captions = [template.format(name) for template in TEMPLATES for name in (item.name, *item.others)]
            found.append({"image": file.getvalue(), "caption": captions})
        return found

    @torch.no_grad()
    def right(self, model: DiffCLIPModel) -> torch.Tensor:
        """Return whether each drawing's own name is the nearest of all, as 0.0 or 1.0."""
        texts = normalize(model.get_text_features(**self.texts).pooler_output, dim=-1)
        pixels = self.pixels.split(BATCH)
        images = torch.cat([model.get_image_features(pixel_values=part).pooler_output for part in pixels])
        return ((images @ texts.t()).argmax(1) == torch.arange(len(texts))).float()


def measure(model: DiffCLIPModel, style: Style, known: Style) -> dict[str, float]:
    """Return the share of right names of both halves of the style that is trained on, and of the known style."""
    right = style.right(model)
    parts = {TRAINED: right[::2], OTHER: right[1::2], KNOWN: known.right(model)}
    return {name: round(part.mean().item(), 4) for name, part in parts.items()}


def fine_tune(style: Style, args: argparse.Namespace, changes: dict[str, Any], is_taught: bool) -> DiffCLIPModel:
    """Return the model, trained further on half of a style."""
    set_seed(args.seed)
    model = load_model(args.model, DiffCLIPModel, dtype=torch.float32)
    teacher = load_model(args.model, DiffCLIPModel, dtype=torch.float32) if is_taught else None
    processor = load_processor(args.model, model.config, DiffCLIPProcessor)
    with tempfile.TemporaryDirectory() as folder:
        settings = DiffCLIPTrainingArguments(
            folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=BATCH,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.2,
            seed=args.seed,
            use_cpu=True,
            bf16=args.bf16,
            report_to="none",
            logging_steps=1000,
            save_strategy="no",
            **changes,
        )
        DiffCLIPTrainer(
            model,
            settings,
            train_dataset=style.rows(),
            data_collator=ImageTextCollator(processor, train=True, crop_scale=(0.7, 1), seed=args.seed),
            teacher=teacher,
        ).train()
    return model


def table(content: dict[str, Any]) -> str:
    """Return what was measured as Markdown, in percent."""
    names = (TRAINED, OTHER, KNOWN)

    def shares(point: dict[str, float]) -> str:
        return " | ".join(f"{100 * point[name]:.1f}" for name in names)

    lines = [
        f"| | {' | '.join(names)} | best α | {' | '.join(names)} |",
        "|---|" + "---|" * (2 * len(names) + 1),
        f"| before | {shares(content['before'])} | | | | |",
    ]
    for way, points in content["curves"].items():
        best = max(points, key=lambda point: sum(point[name] for name in names))
        lines.append(f"| {way} | {shares(points[-1])} | {best['alpha']:g} | {shares(best)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fine-tune and measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, required=True, help="for the drawings, fetched on the first run")
    parser.add_argument("--output-dir", type=Path, required=True, help="for the figures and their picture")
    parser.add_argument("--model", default=str(Path(__file__).parent / "diffclip-emoji"))
    parser.add_argument("--vendor", default=HELD_OUT, help="whose style is trained on (%(default)s)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, faster where the processor has it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    outputs = [args.output_dir / name for name in ("forgetting.json", "forgetting.png", "forgetting.md")]
    for path in outputs:
        check_output_file(path)
    first = load_model(args.model, DiffCLIPModel, dtype=torch.float32)
    processor = load_processor(args.model, first.config, DiffCLIPProcessor)
    style, known = (Style(vendor, args.cache_dir, processor) for vendor in (args.vendor, KNOWN_VENDOR))
    measured = partial(measure, style=style, known=known)
    content: dict[str, Any] = {
        "vendor": args.vendor,
        "known_vendor": KNOWN_VENDOR,
        "settings": {"epochs": args.epochs, "learning_rate": args.learning_rate, "seed": args.seed, "bf16": args.bf16},
        "names": len(style.items),
        "before": measured(first),
        "curves": {},
        "seconds": {},
        "machine": describe_machine(),
        "versions": describe_versions("accelerate"),
    }
    for way, (changes, is_taught) in WAYS.items():
        start = time.perf_counter()
        last = fine_tune(style, args, changes, is_taught)
        content["seconds"][way] = round(time.perf_counter() - start)
        logger.info("%s: trained in %d s", way, content["seconds"][way])
        # Written after each way, so that what there is when it's stopped is whole.
        content["curves"][way] = sweep(first, last, ALPHAS, measured)
        write_text_whole(outputs[0], json.dumps(content, indent=1) + "\n")
        write_whole(outputs[1], lambda path: draw_curve(content["curves"], (TRAINED, KNOWN), path))
        write_text_whole(outputs[2], table(content))


if __name__ == "__main__":
    main()
