"""Training on data as it comes: without a warning, resumed, with crops of each epoch's own, and judged at its end."""

import itertools
import logging

import numpy as np
import pytest
import torch
from pairs import arguments
from training_samples import pair_dataset, rows, sample, tiny_pair_model, tiny_processor, write_shards, write_tar
from transformers import Trainer

from diffclip_hf.data import ImageTextCollator, ImageTextShards, load_image_text_dataset
from diffclip_hf.training import DiffCLIPTrainer


pytestmark = pytest.mark.usefixtures("propagate_logs")


def train(
    folder, data, steps, resume=None, trainer_class=DiffCLIPTrainer, workers=0, batch_size=2, accumulated=1, seed=0
):
    """Train the tiny model and return the loss of every step."""
    torch.manual_seed(0)
    collator = ImageTextCollator(tiny_processor(), train=True, max_skipped_share=1)
    args = arguments(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulated,
        max_steps=steps,
        optim="adamw_torch_fused",
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=3,
        dataloader_num_workers=workers,
        seed=seed,
    )
    trainer = trainer_class(tiny_pair_model(), args, data_collator=collator, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], collator


def test_the_stock_trainer_trains_on_a_dataset_without_a_warning(tmp_path, caplog):
    pair_dataset(8).save_to_disk(tmp_path / "data")
    data = load_image_text_dataset(str(tmp_path / "data"))
    losses, collator = train(tmp_path / "out", data, 2, trainer_class=Trainer)
    assert np.isfinite(losses).all()
    assert len(losses) == 2
    assert collator.counts["seen"] >= 4
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["shards", "dataset"])
def test_a_resumed_training_has_the_losses_of_an_unbroken_one(tmp_path, kind, workers):
    if kind == "shards":
        (tmp_path / "data").mkdir()
        write_shards(tmp_path / "data", [5, 6, 5])

    def data():
        return ImageTextShards(str(tmp_path / "data"), 2) if kind == "shards" else load_saved()

    def load_saved():
        if not (tmp_path / "data").exists():
            pair_dataset(16).save_to_disk(tmp_path / "data")
        return load_image_text_dataset(str(tmp_path / "data"))

    # Epochs of 4 steps of 2 batches, so the resumed epochs begin at batch 6 of 8 and at batch 4.
    options = {"workers": workers, "accumulated": 2}
    whole, _ = train(tmp_path / "whole", data(), 10, **options)
    train(tmp_path / "cut", data(), 6, **options)
    for done in (3, 6):
        rest, collator = train(
            tmp_path / "cut", data(), 10, resume=str(tmp_path / f"cut/checkpoint-{done}"), **options
        )
        np.testing.assert_allclose(rest, whole, rtol=0, atol=1e-6)
        # Only what was trained on was decoded, but for what workers had fetched beforehand.
        assert collator.counts["seen"] <= (10 - done) * 4 + 4 * 2 * max(workers, 1)


def test_every_epoch_has_crops_of_its_own(tmp_path):
    write_tar(tmp_path / "0.tar", map(sample, range(2)))
    seen = []
    collate = ImageTextCollator.__call__

    class Recording(ImageTextCollator):
        def __call__(self, rows):
            batch = collate(self, rows)
            seen.append(batch["pixel_values"].sort(0).values)
            return batch

    shards = ImageTextShards(str(tmp_path), 2)
    collator = Recording(tiny_processor(), train=True)
    args = arguments(tmp_path / "out", per_device_train_batch_size=2, num_train_epochs=3, max_steps=-1)
    DiffCLIPTrainer(tiny_pair_model(), args, data_collator=collator, train_dataset=shards).train()
    assert len(seen) == 3
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(seen, 2))


def test_an_epochs_end_judges_what_was_dropped(tmp_path):
    data = [*rows(range(7)), {"image": b"", "caption": "x", "key": "a"}]
    collator = ImageTextCollator(tiny_processor(), train=True, max_skipped_share=0.1)
    args = arguments(tmp_path / "out", per_device_train_batch_size=4, num_train_epochs=1, max_steps=-1)
    trainer = DiffCLIPTrainer(tiny_pair_model(), args, data_collator=collator, train_dataset=data)
    with pytest.raises(ValueError, match=r"1 of 8 samples had to be skipped .*max_skipped_share=0\.1"):
        trainer.train()
