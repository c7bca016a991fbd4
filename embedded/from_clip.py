"""Train a CLIP on as differential attention, beside what else could be done with the same steps.

python embedded/from_clip.py --cache-dir .cache/embedded --output-dir docs/from_clip

A plain CLIP of the embedded model's size is trained with each seed. From its weights the arms of `ARMS` go on, with
equal steps and equal batches. A finished run stands in `figures.json` of the output folder and isn't made again, and
one that was stopped goes on from its last checkpoint, so that the command may be stopped and given again. The page and
its pictures are made of all the runs that are there.
"""

import argparse
import copy
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import VENDORS, Measurement
from emoji_data import TRAINING_VENDORS, Emoji, load_emoji
from from_clip_report import write_report
from peft import LoraConfig, inject_adapter_in_model
from single_drawings import EmojiCollator, make_tokenizer
from small_model import build_model, make_processor, make_trainer
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from diffclip_hf import DiffCLIPModel
from diffclip_hf.common.machine import describe_machine, describe_versions
from diffclip_hf.common.whole_files import write_text_whole
from diffclip_hf.model.attention_diffclip import attention_maps
from diffclip_hf.model.layers_diffclip import DiffCLIPAttention
from diffclip_hf.training import DiffCLIPTrainer
from diffclip_hf.training.checkpoints import last_checkpoint


logger = logging.getLogger("from_clip")
BATCH = 256
# The learning rate of what an arm adds, over that of the rest.
RATE = 10.0
# λ of a layer's first and last head at the start, those between evenly spaced.
LAMBDAS = (0.2, 0.5)
# Every step is measured up to this one, and then every so many.
FIRST_STEPS, LATER_STEPS = 14, 70
TOWERS = ("vision", "text")
# Of the models: the embedded model's, or a fraction of its width and depth, which costs a quarter.
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "embedded": {},
    "small": {
        "vision_config": {
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
        "text_config": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2},
    },
}
# What the parameters that an arm adds have in their names.
ADDED = ("second_query", "lambda_logit", "lora_")


# The differential form -----------------------------------------------------------------------------------------------


class SecondQueryAttention(DiffCLIPAttention):
    """Attention with a second query a head, out_h = (A1 − λ_h·A2)·v / (1 − λ_h), which starts as plain attention.

    A1 and A2 are the softmax maps of Q1 = x·W_q and Q2 = Q1 + x·D with the same keys, where D begins as 0, so that
    A2 = A1 and the output is A1·v for every λ_h. Computed as (A1 + λ_h/(1 − λ_h)·(A1 − A2))·v, it's so to the last
    bit in every dtype. Each λ_h is the sigmoid of its `lambda_logit`, so within 0 and 1.

    Args:
        plain: The attention whose weights it begins with.
        rank: Of D = B·A; None for a full matrix with a bias.
    """

    def __init__(self, plain: DiffCLIPAttention, rank: int | None):
        super().__init__(plain.config)
        self.load_state_dict(plain.state_dict())
        width = plain.config.hidden_size
        last: nn.Linear
        if rank is None:
            self.second_query: nn.Module = (last := nn.Linear(width, width))
            nn.init.zeros_(last.bias)
        else:
            last = nn.Linear(rank, width, bias=False)
            self.second_query = nn.Sequential(nn.Linear(width, rank, bias=False), last)
        nn.init.zeros_(last.weight)
        self.lambda_logit = nn.Parameter(torch.linspace(*LAMBDAS, self.num_heads).logit())

    def _attend(self, hidden_states, attention_mask, attn_implementation, is_causal, **kwargs):
        """Return the heads' outputs, (batch, tokens, num_heads, head_dim), and both maps of each head."""
        query = self.q_proj(hidden_states)
        key = self._split(self.k_proj(hidden_states), self.head_dim)
        value = self._split(self.v_proj(hidden_states), self.head_dim)
        first, second = (
            attention_maps(self._split(states, self.head_dim), key, attention_mask, self.scaling)
            for states in (query, query + self.second_query(hidden_states))
        )
        gain = self.lambda_logit.exp().to(first.dtype).view(-1, 1, 1)
        output = torch.matmul(first + gain * (first - second), value)
        return output.transpose(1, 2).contiguous(), (first, second)


def attentions(model: DiffCLIPModel, tower: str) -> list[Any]:
    """Return a tower's attention modules in the layers' order."""
    return [layer.self_attn for layer in getattr(model, f"{tower}_model").encoder.layers]


# The arms ------------------------------------------------------------------------------------------------------------


def with_second_query(model: DiffCLIPModel, rank: int | None) -> DiffCLIPModel:
    """Give each attention of a plain CLIP a second query, in place."""
    for tower in TOWERS:
        for layer in getattr(model, f"{tower}_model").encoder.layers:
            layer.self_attn = SecondQueryAttention(layer.self_attn, rank)
    return model


def with_lora(model: DiffCLIPModel, rank: int) -> DiffCLIPModel:
    """Add LoRA to the queries and values of a plain CLIP, in place, its own weights still trained."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"])
    inject_adapter_in_model(config, model)
    return model.requires_grad_(True)


def from_scratch(model: DiffCLIPModel) -> DiffCLIPModel:
    """Return a new DiffCLIP of a CLIP's size."""
    config = copy.deepcopy(model.config)
    for tower in (config.vision_config, config.text_config):
        tower.attention_type = "differential"
    new = DiffCLIPModel(config)
    new.set_attn_implementation("eager")
    return new


def naively(model: DiffCLIPModel) -> DiffCLIPModel:
    """Return a DiffCLIP with a plain CLIP's weights, the λ vectors and norms new."""
    new = from_scratch(model)
    missing, unexpected = new.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any("lambda_" not in name and "diff_norm" not in name for name in missing):
        raise ValueError(f"The CLIP's weights don't fit: {unexpected} too many, {missing} too few.")
    return new


@dataclass(frozen=True)
class Arm:
    """What is done with a trained CLIP.

    Args:
        make: Makes the model that is trained, of a CLIP that it may change.
        added_rate: The learning rate of added parameters, over that of the rest.
        added_alone: Only added parameters are trained.
        taught: The CLIP teaches.
        whole: It's trained for the CLIP's steps and the arms' together.
    """

    make: Callable[[DiffCLIPModel], DiffCLIPModel]
    added_rate: float = 1.0
    added_alone: bool = False
    taught: bool = False
    whole: bool = False


ARMS = {
    "plain": Arm(lambda model: model),
    "lora": Arm(partial(with_lora, rank=4), RATE),
    "second": Arm(partial(with_second_query, rank=8), RATE),
    "naive": Arm(naively),
    "naive-taught": Arm(naively, taught=True),
    "scratch": Arm(from_scratch, whole=True),
    "second-full": Arm(partial(with_second_query, rank=None)),
    "lora-alone": Arm(partial(with_lora, rank=4), RATE, added_alone=True),
    "second-alone": Arm(partial(with_second_query, rank=8), RATE, added_alone=True),
}


def is_added(name: str) -> bool:
    """Return whether a parameter, by its name, is one that an arm adds."""
    return any(part in name for part in ADDED)


def give_added_their_rate(trainer: DiffCLIPTrainer, factor: float) -> None:
    """Multiply the learning rate of the model's added parameters, before training."""
    added = {id(parameter) for name, parameter in trainer.model.named_parameters() if is_added(name)}
    optimizer = trainer.create_optimizer()
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        for is_new in (False, True):
            if found := [parameter for parameter in group["params"] if (id(parameter) in added) == is_new]:
                rate = group["lr"] * (factor if is_new else 1)
                optimizer.add_param_group({**group, "params": found, "lr": rate})


# What is measured ----------------------------------------------------------------------------------------------------


class EpochCollator(EmojiCollator):
    """Has batches of the seed, the stage and the epoch alone, so that a run that goes on sees the same ones."""

    def __init__(self, items: list[Emoji], cache_dir: Path, tokenizer: PreTrainedTokenizerBase, seed: int, stage: int):
        super().__init__(items, TRAINING_VENDORS, cache_dir, tokenizer, seed)
        self.seeds = (seed, stage)

    def set_epoch(self, epoch: int) -> None:
        """Begin the choices of an epoch, from 0."""
        self.random = np.random.default_rng((*self.seeds, epoch))
        self.generator.manual_seed(int(self.random.integers(2**62)))


class Losses(TrainerCallback):
    """Logs the loss on one fixed batch, in float32, after each of the first steps, and then less often."""

    def __init__(self, batch: dict[str, Any]):
        self.batch = batch

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self._measure(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        if step <= FIRST_STEPS or step % LATER_STEPS == 0 or step == state.max_steps:
            self._measure(state, model)

    @torch.no_grad()
    def _measure(self, state, model: DiffCLIPModel) -> None:
        model.eval()
        state.log_history.append({"step": state.global_step, "fixed batch": model(**self.batch).loss.item()})
        model.train()


@torch.no_grad()
def distances(model: DiffCLIPModel, batch: dict[str, Any]) -> dict[str, list[float]]:
    """Return how far a differential model's second maps are from its first ones: tower → a mean for each layer.

    It's half the sum of |A1 − A2| over the keys, 0 for equal maps and 1 for maps that share no key, averaged over
    heads and over the queries that aren't padding. Towers of plain attention have none.
    """
    found: dict[str, list[float]] = {}
    for tower in TOWERS:
        maps: list[Any] = []
        hooks = [
            module.register_forward_hook(lambda module, args, output, maps=maps: maps.append(output[1]))
            for module in attentions(model, tower)
        ]
        model.eval()(**batch)
        for hook in hooks:
            hook.remove()
        kept = batch["attention_mask"].bool() if tower == "text" else slice(None)
        if hasattr(attentions(model, tower)[0], "get_lambda"):
            maps = [(one[:, 0::2], one[:, 1::2]) for one in maps]
        if isinstance(maps[0], tuple):
            apart = [((first - second).abs().sum(-1) / 2).mean(1) for first, second in maps]
            found[tower] = [round(one[kept].mean().item(), 4) for one in apart]
    return found


def lambdas(model: DiffCLIPModel) -> dict[str, list[list[float]]]:
    """Return λ of each layer of the differential towers: one a head, or the layer's only one."""
    found = {}
    for tower in TOWERS:
        modules = attentions(model, tower)
        if isinstance(modules[0], SecondQueryAttention):
            found[tower] = [[round(one, 4) for one in module.lambda_logit.sigmoid().tolist()] for module in modules]
        elif hasattr(modules[0], "get_lambda"):
            found[tower] = [[round(module.get_lambda().item(), 4)] for module in modules]
    return found


# The runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What all runs share; `figures.json` begins with it."""

    size: str = "small"
    clip_epochs: int = 100
    epochs: int = 20
    learning_rate: float = 5e-4
    # Of the first model of a seed, and of what is trained from scratch: the embedded model's.
    first_learning_rate: float = 1e-3
    warmup_steps: int = 14
    first_warmup_steps: int = 100
    rate: float = RATE


class Runs:
    """Trains and measures; each run's figures are written as soon as it is done."""

    def __init__(self, args: argparse.Namespace):
        self.cache_dir, self.work_dir, self.file = args.cache_dir, args.work_dir, args.output_dir / "figures.json"
        self.settings = Settings(args.size, args.clip_epochs, args.epochs)
        self.items = load_emoji(args.cache_dir)
        self.tokenizer = make_tokenizer(self.items)
        processor = make_processor(self.tokenizer)
        self.measurements = {vendor: Measurement(vendor, self.items, processor, args.cache_dir) for vendor in VENDORS}
        self.batch = self.collator(seed=12345, stage=0)(
            list(range(0, len(self.items), len(self.items) // BATCH))[:BATCH]
        )
        self.done()

    def done(self) -> dict[str, Any]:
        """Return the finished runs of `figures.json`, read anew, since another process may be at other seeds.

        Raises:
            ValueError: They have other settings.
        """
        settings = asdict(self.settings)
        content = json.loads(self.file.read_text()) if self.file.is_file() else {"settings": settings, "runs": {}}
        if content["settings"] != settings:
            raise ValueError(
                f"The runs in {self.file} have the settings {content['settings']}, not {settings}; give the same, or "
                "another --output-dir."
            )
        return content["runs"]

    def collator(self, seed: int, stage: int) -> EpochCollator:
        """Return what makes batches of a seed; the CLIP's stage is 0, the arms' is 1."""
        return EpochCollator(self.items, self.cache_dir, self.tokenizer, seed, stage)

    def clip(self, seed: int) -> DiffCLIPModel:
        """Return the plain CLIP of a seed, trained unless there is one."""
        folder = self.work_dir / f"clip-{seed}"
        if not folder.is_dir():
            set_seed(seed)
            model = build_model(len(self.tokenizer), "clip", SIZES[self.settings.size])
            self._run("clip", seed, model, Arm(lambda model: model), stage=0, epochs=self.settings.clip_epochs)
            model.save_pretrained(folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)
        model = DiffCLIPModel.from_pretrained(folder, dtype=torch.float32)
        model.set_attn_implementation("eager")
        return model

    def arm(self, name: str, seed: int) -> None:
        """Train and measure an arm with a seed, unless its figures are there."""
        if f"{name}-{seed}" in self.done():
            return
        arm, first = ARMS[name], self.clip(seed)
        set_seed(seed)
        model = arm.make(first)
        if arm.added_alone:
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(is_added(parameter_name))
        whole = self.settings.clip_epochs if arm.whole else 0
        self._run(name, seed, model, arm, stage=0 if arm.whole else 1, epochs=whole + self.settings.epochs)

    def _run(self, name: str, seed: int, model: DiffCLIPModel, arm: Arm, stage: int, epochs: int) -> None:
        """Train a model, measure it and write its figures."""
        logger.info("Training %s with seed %d", name, seed)
        steps = len(self.items) // BATCH
        first = stage == 0
        settings = self.settings
        folder = self.work_dir / f"checkpoints-{name}-{seed}"
        trainer = make_trainer(
            model,
            len(self.items),
            self.collator(seed, stage),
            folder,
            [Losses(self.batch)],
            teacher=self.clip(seed) if arm.taught else None,
            num_train_epochs=epochs,
            learning_rate=settings.first_learning_rate if first else settings.learning_rate,
            warmup_steps=settings.first_warmup_steps if first else settings.warmup_steps,
            seed=seed,
            logging_steps=steps,
            save_steps=10 * steps,
            disable_tqdm=True,
        )
        give_added_their_rate(trainer, arm.added_rate)
        start_lambdas = lambdas(model)
        start = time.process_time()
        trainer.train(resume_from_checkpoint=last_checkpoint(str(folder)) is not None)
        seconds = time.process_time() - start
        history = trainer.state.log_history
        parameters = dict(model.named_parameters())
        run = {
            "arm": name,
            "seed": seed,
            "steps": trainer.state.global_step,
            "parameters": sum(one.numel() for one in parameters.values()),
            "added parameters": sum(one.numel() for key, one in parameters.items() if is_added(key)),
            "trained parameters": sum(one.numel() for one in parameters.values() if one.requires_grad),
            "figures": {vendor: measurement(model) for vendor, measurement in self.measurements.items()},
            "fixed batch": [[one["step"], round(one["fixed batch"], 6)] for one in history if "fixed batch" in one],
            "training": [[one["step"], round(one["loss"], 4)] for one in history if "loss" in one],
            "lambda": [start_lambdas, lambdas(model)],
            "distance": distances(model, self.batch),
            # Of the processor, so that what else runs doesn't count.
            "seconds": round(seconds),
            "machine": describe_machine(),
            "versions": describe_versions("accelerate", "peft"),
        }
        content = {"settings": asdict(settings), "runs": {**self.done(), f"{name}-{seed}": run}}
        write_text_whole(self.file, json.dumps(content, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        logger.info("%s, seed %d: %s", name, seed, run["figures"])


def main() -> None:
    """Train what is missing and write the report, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, required=True, help="for the drawings, fetched on the first run")
    parser.add_argument("--output-dir", type=Path, required=True, help="for the report and the figures")
    parser.add_argument("--work-dir", type=Path, default=Path("build/from_clip"), help="for models and checkpoints")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--size", default=Settings.size, choices=SIZES, help="of the models (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--clip-epochs", type=int, default=Settings.clip_epochs, help="of the plain CLIP (%(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="of each arm after it (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = Runs(args)
    # Seed by seed, so that what is there when it is stopped has seen all the arms equally often.
    for seed in args.seeds:
        for name in args.arms:
            runs.arm(name, seed)
        write_report(args.output_dir)


if __name__ == "__main__":
    main()
