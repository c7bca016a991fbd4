"""Train or fine-tune DiffCLIP from the command line.

    python -m diffclip_hf.train --model_name_or_path MODEL --train_data DATA --output_dir FOLDER [OPTION ...]
    accelerate launch -m diffclip_hf.train --config FILE --train_data DATA --output_dir FOLDER [OPTION ...]
    python -m diffclip_hf.train --help

FILE is a YAML or JSON file of options, or a recipe with the paper's settings, such as `diffclip-vitb16`. Options on
the command line override it. They are those of `ModelArguments` and `DataArguments`, `contrastive_chunk_size`, and
those of Transformers' `TrainingArguments`.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .common.commands import run_command, stop_without_extra, warn_of_one_process
from .common.loading import check_path
from .common.machine import cpu_has_bf16
from .common.whole_files import check_output_file


try:
    # Transformers' Trainer needs it, and says so in many lines.
    import accelerate  # noqa: F401
    from transformers import set_seed
    from transformers.trainer import TRAINER_STATE_NAME

    from .training import DiffCLIPTrainer, DiffCLIPTrainingArguments
    from .training.checkpoints import last_checkpoint
    from .training.data_pass import log_samples
    from .training.options import CONTRASTIVE, DataArguments, ModelArguments
    from .training.parsing import parse_arguments
    from .training.tasks import classification_parts, contrastive_parts
except ModuleNotFoundError as error:
    stop_without_extra(error, "training", __name__)


logger = logging.getLogger(__name__)
# What is written when the training is done.
OUTPUT_FILES = ("training_args.bin", "config.json", "model.safetensors", "trainer_state.json", "all_results.json")


def resume_point(training_args: DiffCLIPTrainingArguments) -> str | None:
    """Return the checkpoint to resume from, None to start.

    Raises:
        ValueError: The output folder has a checkpoint that isn't asked for, or none that is, or what is asked for is
            none.
    """
    asked, folder = training_args.resume_from_checkpoint, training_args.output_dir
    found = last_checkpoint(folder or "")
    if asked is None or asked.lower() in ("false", "no", "none"):
        if found is not None:
            raise ValueError(
                f"output_dir {folder} has {Path(found).name}; resume with --resume_from_checkpoint last, or name a "
                "new folder."
            )
        return None
    if asked.lower() not in ("last", "true", "yes"):
        path = check_path(asked, "resume_from_checkpoint")
        if not (path / TRAINER_STATE_NAME).is_file():
            raise ValueError(f"resume_from_checkpoint is {asked!r}, which has no {TRAINER_STATE_NAME}: no checkpoint.")
        return str(path)
    if found is None:
        raise ValueError(f"resume_from_checkpoint is {asked!r}, but output_dir {folder} has no complete checkpoint.")
    return found


def _warn_of_slow_bf16(training_args: DiffCLIPTrainingArguments) -> None:
    """Warn where bfloat16 is asked of a processor that has no instructions for it."""
    if training_args.bf16 and training_args.device.type == "cpu" and not cpu_has_bf16():
        logger.warning(
            "bf16 is True, but this processor has no bfloat16 instructions, so that a step may take many times as "
            "long as in float32; pass --bf16 False."
        )


def _check_output(training_args: DiffCLIPTrainingArguments) -> None:
    """Raise a ValueError where the output can't be written."""
    output = Path(training_args.output_dir or "")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir is {str(output)!r}, which is a file; name a folder.")
    if training_args.should_save:
        for name in OUTPUT_FILES:
            check_output_file(output / name)


def _log_size(model: nn.Module, training_args: DiffCLIPTrainingArguments) -> None:
    """Log how much is trained, and on how much at once."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    logger.info(
        "Training %d of %d parameters in %s on %s, %d samples a step.",
        trained,
        sum(parameter.numel() for parameter in model.parameters()),
        " and ".join(sorted(dtypes)),
        "1 process" if training_args.world_size == 1 else f"{training_args.world_size} processes",
        training_args.per_device_train_batch_size * training_args.world_size,
    )


def run(
    model_args: ModelArguments, data_args: DataArguments, training_args: DiffCLIPTrainingArguments
) -> dict[str, float]:
    """Train, evaluate and save as the options say; return the metrics.

    Raises:
        ValueError: An option doesn't fit the others, the data or the model.
        FloatingPointError, OSError: As `DiffCLIPTrainer.train` raises.
    """
    warn_of_one_process("--use_cpu")
    _warn_of_slow_bf16(training_args)
    checkpoint = resume_point(training_args)
    _check_output(training_args)
    set_seed(training_args.seed)
    make_parts = contrastive_parts if model_args.task == CONTRASTIVE else classification_parts
    parts = make_parts(model_args, data_args, training_args)
    trainer = DiffCLIPTrainer(
        model=parts.model,
        args=training_args,
        train_dataset=parts.train_dataset,
        eval_dataset=parts.eval_dataset,
        data_collator=parts.train_collator,
        eval_data_collator=parts.eval_collator,
        processing_class=parts.processor,
        compute_metrics=parts.compute_metrics,
        zero_shot=parts.zero_shot,
        teacher=parts.teacher,
    )
    _log_size(parts.model, training_args)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    trainer.save_state()
    if parts.eval_dataset is not None or parts.zero_shot is not None:
        metrics |= trainer.evaluate()
    trainer.save_metrics("all", metrics, combined=False)
    if training_args.should_save:
        for name, collator in (("training", parts.train_collator), ("evaluation", parts.eval_collator)):
            if collator.counts["seen"]:
                log_samples(f"all of {name}", collator, collator.counts)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    # A process that leaves its group open at its exit may take the others' connections down with it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where an option or the data doesn't fit."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    return run_command(lambda: run(*parse_arguments(sys.argv[1:] if argv is None else argv)), logger)


if __name__ == "__main__":
    sys.exit(main())
