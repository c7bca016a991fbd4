"""Train the embedded model: a small DiffCLIP on emoji.

    python embedded/train.py --output-dir build/embedded --cache-dir .cache/embedded

About fifty minutes on two cores. The held-out vendor's drawings are never read here.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_data import TRAINING_VENDORS, Emoji, load_drawings, load_emoji
from emoji_tokenizer import train_tokenizer
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from diffclip_hf import (
    DiffCLIPConfig,
    DiffCLIPImageProcessorPil,
    DiffCLIPModel,
    DiffCLIPProcessor,
    add_remote_code,
)
from diffclip_hf.training import DiffCLIPTrainer, DiffCLIPTrainingArguments


logger = logging.getLogger("train")

IMAGE_SIZE = 48
CONTEXT_LENGTH = 32
MERGES = 1210
TEMPLATES = (
    "{}",
    "a picture of a {}",
    "an emoji of a {}",
    "a drawing of {}",
    "a photo of a {}.",
    "this is a photo of {}.",
)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


# The paper's four models: what each changes in the configuration of DiffCLIP.
VARIANTS: dict[str, dict[str, dict[str, str]]] = {
    "clip": {
        "vision_config": {"attention_type": "standard"},
        "text_config": {"attention_type": "standard"},
    },
    "diffclip": {},
    "diffclip-star": {"vision_config": {"lambda_init": "depth"}, "text_config": {"lambda_init": "depth"}},
    "diffclip-dagger": {"text_config": {"attention_type": "standard"}},
}


def build_model(vocab_size: int, variant: str = "diffclip") -> DiffCLIPModel:
    """Return an untrained model, a key of `VARIANTS`, small enough for the repository in float16."""
    changes = VARIANTS[variant]
    model = DiffCLIPModel(
        DiffCLIPConfig(
            projection_dim=128,
            vision_config={
                "hidden_size": 160,
                "intermediate_size": 640,
                "num_hidden_layers": 5,
                "num_attention_heads": 8,
                "image_size": IMAGE_SIZE,
                "patch_size": 8,
                **changes.get("vision_config", {}),
            },
            text_config={
                "hidden_size": 96,
                "intermediate_size": 384,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "vocab_size": vocab_size,
                "max_position_embeddings": CONTEXT_LENGTH,
                "bos_token_id": vocab_size - 2,
                "eos_token_id": vocab_size - 1,
                "pad_token_id": vocab_size - 1,
                **changes.get("text_config", {}),
            },
        )
    )
    # On a CPU, at 37 tokens, the fastest.
    model.set_attn_implementation("eager")
    return model


class EmojiIndices(Dataset):
    """The emoji's indices; the collator picks drawing and caption.

    An epoch goes through each emoji once, so that a batch never holds one twice, whose pairs would count as wrong.
    """

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class EmojiCollator:
    """Make a batch: for each emoji a random vendor's drawing, augmented, and one of its names in a template.

    Drawings aren't mirrored: arrows, hands and letters would be other emoji.
    """

    def __init__(
        self,
        items: list[Emoji],
        vendors: tuple[str, ...],
        cache_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
    ):
        drawings = [load_drawings(vendor, items, cache_dir) for vendor in vendors]
        self.items = items
        self.images = torch.from_numpy(np.stack([images for images, _ in drawings])).permute(0, 1, 4, 2, 3)
        present = np.stack([has for _, has in drawings])
        self.vendors_of = [np.flatnonzero(present[:, index]) for index in range(len(items))]
        self.tokenizer = tokenizer
        self.random = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def _uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=self.generator)

    def _caption(self, item: Emoji) -> str:
        # Mostly the name by which it will be asked for.
        name = item.name
        if item.others and self.random.random() < 0.4:
            name = str(self.random.choice(item.others))
        template = TEMPLATES[self.random.integers(len(TEMPLATES))] if self.random.random() < 0.6 else "{}"
        return template.format(name)

    def augment(self, images: torch.Tensor) -> torch.Tensor:
        """Place drawings, (n, 4, 64, 64) uint8, on a background, move and recolour them: (n, 3, 48, 48) in 0..1."""
        count = len(images)
        rgba = images.float() / 255
        alpha = rgba[:, 3:]
        # Premultiplied, so that resampling doesn't mix in the colour of what is transparent.
        layers = torch.cat([rgba[:, :3] * alpha, alpha], 1)
        angle = self._uniform(count, -0.25, 0.25)
        scale = self._uniform(count, 0.8, 1.35)
        stretch = self._uniform(count, 0.9, 1.1)
        cos, sin = angle.cos(), angle.sin()
        theta = torch.stack(
            [
                torch.stack([cos * scale * stretch, -sin * scale, self._uniform(count, -0.2, 0.2)], 1),
                torch.stack([sin * scale, cos * scale / stretch, self._uniform(count, -0.2, 0.2)], 1),
            ],
            1,
        )
        grid = affine_grid(theta, [count, 4, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        layers = grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        white = torch.ones(count, 3, 1, 1)
        coloured = torch.rand(count, 3, 1, 1, generator=self.generator)
        keep_white = (torch.rand(count, 1, 1, 1, generator=self.generator) < 0.6).float()
        background = keep_white * white + (1 - keep_white) * coloured
        result = layers[:, :3] + (1 - layers[:, 3:]) * background

        # Colours: a random mixing of the channels near the identity, contrast and brightness.
        mixing = torch.eye(3) + 0.15 * torch.randn(count, 3, 3, generator=self.generator)
        grey = (torch.rand(count, generator=self.generator) < 0.1).float().view(count, 1, 1)
        mixing = (1 - grey) * mixing / mixing.sum(-1, keepdim=True) + grey / 3
        result = torch.einsum("nij,njhw->nihw", mixing, result)
        contrast = self._uniform(count, 0.7, 1.3).view(count, 1, 1, 1)
        brightness = self._uniform(count, -0.1, 0.1).view(count, 1, 1, 1)
        return ((result - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)

    def __call__(self, indices: list[int]) -> dict:
        vendors = [int(self.random.choice(self.vendors_of[index])) for index in indices]
        pixel_values = (self.augment(self.images[vendors, indices]) - MEAN) / STD
        texts = self.tokenizer(
            [self._caption(self.items[index]) for index in indices],
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        return {**texts, "pixel_values": pixel_values, "return_loss": True}


def make_tokenizer(items: list[Emoji]) -> PreTrainedTokenizerBase:
    """Return a tokenizer learned from every name in every template."""
    captions = [
        template.format(name) for template in TEMPLATES for item in items for name in (item.name, *item.others)
    ]
    return train_tokenizer(captions, MERGES, CONTEXT_LENGTH)


def make_trainer(
    model: DiffCLIPModel,
    items: list[Emoji],
    collator: EmojiCollator,
    output_dir: Path,
    callbacks: list[TrainerCallback] | None = None,
    **changes: Any,
) -> DiffCLIPTrainer:
    """Return a trainer with the settings that made the embedded model, but for `changes` of its arguments."""
    settings = {
        "num_train_epochs": 500,
        "per_device_train_batch_size": 256,
        "learning_rate": 1e-3,
        "weight_decay": 0.2,
        "adam_beta2": 0.98,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "max_grad_norm": 1.0,
        "logging_steps": 50,
        "save_strategy": "steps",
        "save_steps": 400,
        "save_total_limit": 1,
        "dataloader_drop_last": True,
        "report_to": "none",
        "use_cpu": True,
        "bf16": True,  # autocast; the weights stay float32
    }
    return DiffCLIPTrainer(
        model=model,
        args=DiffCLIPTrainingArguments(output_dir=str(output_dir), **{**settings, **changes}),
        train_dataset=EmojiIndices(len(items)),
        data_collator=collator,
        callbacks=callbacks,
    )


def make_processor(tokenizer: PreTrainedTokenizerBase) -> DiffCLIPProcessor:
    """Return what makes the model's inputs."""
    image_processor = DiffCLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return DiffCLIPProcessor(image_processor, tokenizer)


def save(model: DiffCLIPModel, processor: DiffCLIPProcessor, folder: Path) -> None:
    """Write the model with its processor and its code: stored in float16, to be loaded as float32."""
    model.half().save_pretrained(folder)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = torch.float32
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    add_remote_code(folder)


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--cache-dir", type=Path, required=True, help="for the drawings, fetched on the first run")
    parser.add_argument("--variant", default="diffclip", choices=VARIANTS)
    parser.add_argument("--epochs", type=float, default=500)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", nargs="*", default=[], metavar="VENDOR", help="leave out, to choose settings by")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")

    set_seed(args.seed)
    items = load_emoji(args.cache_dir)
    tokenizer = make_tokenizer(items)
    model = build_model(len(tokenizer), args.variant)
    logger.info("%d emoji, %d tokens, %d parameters", len(items), len(tokenizer), model.num_parameters())
    vendors = tuple(vendor for vendor in TRAINING_VENDORS if vendor not in args.without)
    make_trainer(
        model,
        items,
        EmojiCollator(items, vendors, args.cache_dir, tokenizer, args.seed),
        args.output_dir / "checkpoints",
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        seed=args.seed,
    ).train()
    save(model, make_processor(tokenizer), args.output_dir)


if __name__ == "__main__":
    main()
