"""Train the embedded model: a small DiffCLIP, on scenes of emoji with captions as people write them.

    python embedded/train.py --output-dir build/embedded --cache-dir .cache/embedded

The same command goes on from the last checkpoint where there is one. The held-out vendor's drawings are never read
here.
"""

import argparse
import logging
from pathlib import Path

import torch
from captions import caption_texts
from emoji_data import TRAINING_VENDORS, Emoji, load_emoji
from emoji_tokenizer import train_tokenizer
from scenes import SceneCollator, load_keywords
from small_model import CONTEXT_LENGTH, VARIANTS, build_model, make_processor, make_trainer, save
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from diffclip_hf import DiffCLIPModel, DiffCLIPProcessor
from diffclip_hf.common.loading import load_model, load_processor


logger = logging.getLogger("train")

MERGES = 1800


def make_tokenizer(items: list[Emoji], cache_dir: Path) -> PreTrainedTokenizerBase:
    """Return a tokenizer learned from every name, everyday phrase and keyword in the captions' templates."""
    return train_tokenizer(caption_texts(items, load_keywords(items, cache_dir)), MERGES, CONTEXT_LENGTH)


def take_weights(model: DiffCLIPModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Begin with another such model's weights: those of one shape, and a token's from the tokens that spelled it.

    A tower whose attention is of the other form takes the projections all the same, and learns the rest.
    """
    other = load_model(folder, DiffCLIPModel, dtype=torch.float32)
    other_tokenizer = load_processor(folder, other.config, DiffCLIPProcessor).tokenizer
    theirs, ours = other.state_dict(), model.state_dict()
    taken = {name: theirs[name] for name in ours if name in theirs and theirs[name].shape == ours[name].shape}
    name = "text_model.embeddings.token_embedding.weight"
    table = theirs[name]
    known = other_tokenizer.get_vocab()
    rows = ours[name].clone()
    for token, index in tokenizer.get_vocab().items():
        if token in known:
            rows[index] = table[known[token]]
        else:
            spelled = tokenizer.convert_tokens_to_string([token]).replace("</w>", "").strip()
            ids = other_tokenizer(spelled, add_special_tokens=False)["input_ids"]
            rows[index] = table[ids].mean(0) if ids else rows[index]
    model.load_state_dict({**ours, **taken, name: rows})
    logger.info("Took %d of %d tensors from %s", len(taken), len(ours), folder)


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--cache-dir", type=Path, required=True, help="for the drawings, fetched on the first run")
    parser.add_argument("--variant", default="diffclip-dagger", choices=VARIANTS)
    parser.add_argument(
        "--start-from", type=Path, help="a folder with another such model, whose weights to begin with"
    )
    parser.add_argument("--epochs", type=int, default=620)
    parser.add_argument("--decay", type=float, default=0.3, help="the last share, in which the learning rate falls")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", nargs="*", default=[], metavar="VENDOR", help="leave out, to choose settings by")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")

    set_seed(args.seed)
    items = load_emoji(args.cache_dir)
    tokenizer = make_tokenizer(items, args.cache_dir)
    model = build_model(len(tokenizer), args.variant)
    logger.info("%d emoji, %d tokens, %d parameters", len(items), len(tokenizer), model.num_parameters())
    if args.start_from is not None:
        take_weights(model, tokenizer, args.start_from)
    vendors = tuple(vendor for vendor in TRAINING_VENDORS if vendor not in args.without)
    checkpoints = args.output_dir / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    # Other pictures than those before the checkpoint.
    seed = args.seed if last is None else args.seed + int(Path(last).name.rpartition("-")[2])
    steps = args.epochs * (len(items) // args.batch_size)
    make_trainer(
        model,
        len(items),
        SceneCollator(items, vendors, args.cache_dir, tokenizer, seed),
        checkpoints,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(args.decay * steps), "decay_type": "cosine"},
        seed=args.seed,
    ).train(resume_from_checkpoint=last)
    save(model, make_processor(tokenizer), args.output_dir)


if __name__ == "__main__":
    main()
