"""Rows that drop out, in two processes and in one: each usable row counts once, and no process waits for another."""

import json
import logging
import math
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from distributed import assert_same, launch
from pairs import LABELS, TEXT, arguments
from tiny import randomised, tiny_config
from torch.nn.functional import cross_entropy
from training_samples import sample, tiny_processor, write_tar

from diffclip_hf import DiffCLIPForImageClassification, DiffCLIPModel, ZeroShotClassifier
from diffclip_hf.data import ImageLabelCollator, ImageTextCollator, load_image_text_dataset
from diffclip_hf.training import DiffCLIPTrainer, ZeroShotTask


ROWS = 11
# Of batches of 2 on 2 processes: all that the second has of the first global batch, and rows of both later.
DAMAGED = (2, 3, 4, 9)
USABLE = [number for number in range(ROWS) if number not in DAMAGED]
LOSS_OF_PAIRS = 1e-5


def row(number: int, damaged: bool) -> dict:
    image = sample(number)["jpg"]
    return {"image": image[:100] if damaged else image, "caption": f"picture {number}", "label": number % 3}


def rows(count: int = ROWS, damaged=DAMAGED) -> list[dict]:
    return [row(number, number in damaged) for number in range(count)]


def pair_model() -> DiffCLIPModel:
    return randomised(DiffCLIPModel(tiny_config(text=TEXT)))


def classifier() -> DiffCLIPForImageClassification:
    config = tiny_config(text=TEXT)
    config.num_labels = 3
    return randomised(DiffCLIPForImageClassification(config))


def collator(cls=ImageTextCollator, train: bool = False, share: float = 1):
    return cls(tiny_processor(), train=train, max_skipped_share=share)


def write_shards(folder: Path) -> str:
    """Two shards, the second broken off after two of five samples; sample 2 has no caption, 4 half a character."""
    captions: dict[int, bytes | None] = {2: None, 4: b"\xed\xa0\xbc"}
    samples = [sample(number, captions.get(number, "")) for number in range(ROWS)]
    write_tar(folder / "0.tar", samples[:6])
    whole = write_tar(folder / "1.tar", samples[6:], first=6).read_bytes()
    (folder / "1.tar").write_bytes(whole[: whole.index(b"000000008.jpg") + 600])
    (folder / "1_stats.json").write_text(json.dumps({"successes": 5}))
    return str(folder)


SHARD_ROWS = [0, 1, 3, 5, 6, 7]
SIZES = (1, 2, 7)


def stream(count: int = ROWS, damaged=DAMAGED, shards: int = 1) -> datasets.IterableDataset:
    """A stream of `datasets`, as `streaming=True` gives it."""
    whole = rows(count, damaged)
    features = datasets.Features({"image": datasets.Value("binary"), "caption": datasets.Value("string")})
    columns = {name: [one[name] for one in whole] for name in features}
    return datasets.Dataset.from_dict(columns, features=features).to_iterable_dataset(num_shards=shards)


def world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def run(folder: Path, model, collate, **kwargs) -> DiffCLIPTrainer:
    names = {"train_dataset", "eval_dataset", "zero_shot", "processing_class", "compute_metrics"}
    parts = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    sizes = {f"per_device_{kind}_batch_size": 4 // world()[1] for kind in ("train", "eval")}
    return DiffCLIPTrainer(model, arguments(folder, **sizes | kwargs), data_collator=collate, **parts)


def trained(trainer: DiffCLIPTrainer) -> dict:
    trainer.train()
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "weights": {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()},
    }


def right(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def refused(trainer: DiffCLIPTrainer, method: str) -> str:
    with pytest.raises(ValueError, match="had to be skipped") as caught:
        getattr(trainer, method)()
    return str(caught.value)


def everything(folder: Path, shards: str) -> dict:
    """What can be compared of one process and of two."""
    rank, processes = world()
    found = {}
    zero_shot = ZeroShotTask(rows(), collator(ImageLabelCollator), LABELS)
    parts = {"zero_shot": zero_shot, "processing_class": tiny_processor()}
    pairs = run(folder / "pairs", pair_model(), collator(), eval_dataset=rows(), **parts)
    found["metrics"] = pairs.evaluate()
    found["pairs"] = pairs.predict(rows()).predictions
    images = [{"pixel_values": torch.full((3, 32, 32), float(number))} for number in range(3)]
    alone = run(folder / "alone", pair_model(), None)
    found["images"] = alone.predict(images).predictions
    found["one row"] = pairs.predict(rows(1, ())).predictions[0]

    for size in SIZES:
        measured = run(folder / "shards", pair_model(), collator(), per_device_eval_batch_size=size)
        data = load_image_text_dataset(shards, batch_size=4, max_skipped_share=1, max_broken_share=0.5)
        found[f"shards, {size}"] = measured.predict(data).predictions
        found["broken"] = data.counts["broken_shards"]

    found["stream"] = pairs.predict(stream()).predictions
    by_node = split_dataset_by_node(stream(shards=4), rank, processes)
    found["stream by node"] = pairs.predict(by_node).predictions

    labels = run(
        folder / "labels", classifier(), collator(ImageLabelCollator), eval_dataset=rows(), compute_metrics=right
    )
    found["label metrics"] = labels.evaluate()
    found["labels"] = labels.predict(rows())

    steps = {"max_steps": -1, "num_train_epochs": 2}
    for name, options in {"plain": {}, "chunks": {"contrastive_chunk_size": 1}}.items():
        training = run(folder / name, pair_model(), collator(train=True), train_dataset=rows(), **steps, **options)
        found[f"trained, {name}"] = trained(training)
    training = run(folder / "t", classifier(), collator(ImageLabelCollator, True), train_dataset=rows(), **steps)
    found["trained, labels"] = trained(training)
    # Three passes of 3 steps, of which the last has 3 rows.
    training = run(folder / "s", pair_model(), collator(train=True), train_dataset=stream(), max_steps=9)
    found["trained, stream"] = trained(training)
    # With rows of both on one, which the other waits for with empty batches: 8 rows here and 3 there.
    by_node = split_dataset_by_node(stream(9, (), shards=2), rank, processes)
    training = run(folder / "n", pair_model(), collator(train=True), train_dataset=by_node, max_steps=6)
    found["trained, by node"] = trained(training)["losses"]

    # 4 of 11, of which the first process has 2 and 6.
    data = {"train_dataset": rows(), "eval_dataset": rows()}
    strict = run(folder / "strict", pair_model(), collator(share=0.36), max_steps=-1, num_train_epochs=1, **data)
    found["refused"] = [refused(strict, method) for method in ("evaluate", "train")]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[dict, list[dict]]:
    """What one process has, and each of two."""
    folder = tmp_path_factory.mktemp("dropped")
    (folder / "shards").mkdir()
    shards = write_shards(folder / "shards")
    return everything(folder / "one", shards), launch(everything, 2, folder / "two", shards)


def embeddings(numbers) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of whole rows, one by one, by the model itself."""
    model, processor = pair_model(), tiny_processor()
    texts, images = [], []
    for number in numbers:
        image = ImageTextCollator(processor, train=False)([row(number, False)])["pixel_values"]
        tokens = processor(text=[f"picture {number}"], return_tensors="pt")
        with torch.no_grad():
            texts.append(model.encode_text(tokens["input_ids"], tokens["attention_mask"]))
            images.append(model.encode_image(image))
    return torch.cat(texts), torch.cat(images)


def same_pairs(predictions, numbers) -> None:
    assert len(predictions) == 2
    for actual, expected in zip(predictions, embeddings(numbers), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2])
class TestEvaluation:
    """In one process, and in each of two."""

    @pytest.fixture
    def one(self, found, which) -> dict:
        return found[0] if which == 0 else found[1][which - 1]

    def test_every_usable_row_once_and_in_order(self, one):
        same_pairs(one["pairs"], USABLE)
        same_pairs(one["stream"], USABLE)
        for size in SIZES:
            same_pairs(one[f"shards, {size}"], SHARD_ROWS)
        assert one["broken"] == 1
        # Nodes have rows of their own, so that only their order differs.
        expected = embeddings(USABLE)[0].numpy()
        actual = one["stream by node"][0]
        np.testing.assert_allclose(actual[actual[:, 0].argsort()], expected[expected[:, 0].argsort()], atol=1e-5)

    def test_the_metrics_are_those_of_the_usable_rows(self, one):
        texts, images = embeddings(USABLE)
        scores = texts @ images.t()
        for k in (1, 5):
            hits = [index in scores[index].argsort(descending=True)[:k] for index in range(len(USABLE))]
            assert one["metrics"][f"eval_text_to_image_recall@{k}"] == pytest.approx(sum(hits) / len(hits))
        # Global batches of 4 and 3.
        expected = 0.0
        scale = pair_model().logit_scale.exp()
        for part in (slice(0, 4), slice(4, 7)):
            logits = scale * scores[part, part]
            both = (logits.logsumexp(0) + logits.logsumexp(1)) / 2 - logits.diagonal()
            expected += both.sum().item() / len(USABLE)
        assert one["metrics"]["eval_loss"] == pytest.approx(expected, abs=LOSS_OF_PAIRS)

        classify = ZeroShotClassifier(pair_model(), tiny_processor(), LABELS, progress_bar=False)
        predicted = (images @ classify.label_embeds.t()).argmax(1)
        accuracy = sum(int(predicted[place]) == number % 3 for place, number in enumerate(USABLE)) / len(USABLE)
        assert one["metrics"]["eval_zero_shot_accuracy"] == pytest.approx(accuracy)

    def test_a_classifier_too(self, one):
        pixels = [ImageLabelCollator(tiny_processor(), train=False)([row(n, False)])["pixel_values"] for n in USABLE]
        with torch.no_grad():
            logits = classifier()(torch.cat(pixels)).logits
        labels = torch.tensor([number % 3 for number in USABLE])
        np.testing.assert_allclose(one["labels"].predictions, logits, atol=1e-5)
        assert one["labels"].label_ids.tolist() == labels.tolist()
        assert one["label metrics"]["eval_loss"] == pytest.approx(cross_entropy(logits, labels).item(), abs=1e-5)
        assert one["label metrics"]["eval_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean())

    def test_one_modality_and_fewer_rows_than_processes(self, one):
        pixels = torch.stack([torch.full((3, 32, 32), float(number)) for number in range(3)])
        with torch.no_grad():
            np.testing.assert_allclose(one["images"], pair_model().encode_image(pixels), atol=1e-5)
        np.testing.assert_allclose(one["one row"], embeddings([0])[0], atol=1e-5)

    def test_too_many_dropped_are_refused_by_all_processes(self, one):
        for said in one["refused"]:
            assert "4 of 11 samples had to be skipped (corrupt images: 4" in said


@pytest.mark.parametrize("name", ["plain", "chunks", "labels", "stream"])
def test_two_processes_train_as_one_does(name, found):
    one = found[0][f"trained, {name}"]
    for process in found[1]:
        two = process[f"trained, {name}"]
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=1e-6)
        assert_same(two["weights"], one["weights"], floor=1)


def test_a_stream_split_by_node_trains_on_every_row(found):
    for process in found[1]:
        assert len(process["trained, by node"]) == 6
        assert all(map(math.isfinite, process["trained, by node"]))
    assert found[1][0]["trained, by node"] == found[1][1]["trained, by node"]


# In one process ------------------------------------------------------------------------------------------------------


def momentum(folder, cls, chunk=None, damaged=(), **kwargs) -> DiffCLIPTrainer:
    """A trainer with one row a step, an optimizer with momentum and weight decay, and damaged rows."""
    model = pair_model() if cls is ImageTextCollator else classifier()
    options = {"per_device_train_batch_size": 1, "optim": "adamw_torch", "weight_decay": 0.5, "save_strategy": "steps"}
    options |= {"save_steps": 1, "max_steps": 4, "train_sampling_strategy": "sequential", "learning_rate": 1e-3}
    options |= {"contrastive_chunk_size": chunk} | kwargs
    return run(folder, model, collator(cls, True), train_dataset=rows(4, damaged), **options)


@pytest.mark.parametrize(
    ("cls", "chunk"), [(ImageTextCollator, None), (ImageTextCollator, 1), (ImageLabelCollator, None)]
)
def test_a_batch_of_nothing_changes_no_weight_and_training_goes_on(cls, chunk, tmp_path, caplog):
    def saved(step: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")

    caplog.set_level(logging.WARNING)
    trainer = momentum(tmp_path, cls, chunk, damaged=(1,))
    trainer.train()
    assert trainer.state.global_step == 4
    assert "Nothing is left of the batch of step 2" in caplog.text
    unchanged = [all(torch.equal(saved(n)[k], v) for k, v in saved(n + 1).items()) for n in (1, 2, 3)]
    assert unchanged == [True, False, False]
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged[1] == 0
    resumed = momentum(tmp_path, cls, chunk, damaged=(1,))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [log["loss"] for log in resumed.state.log_history if "loss" in log] == logged


def test_an_accumulated_step_with_a_batch_of_nothing_counts_the_others(tmp_path):
    """Of two accumulated batches of one row each, the mean has the empty one with a loss of 0."""
    step = {"gradient_accumulation_steps": 2, "max_steps": 1, "optim": "sgd", "weight_decay": 0.0}
    changes = []
    for damaged in ((1,), (0, 1)):
        trainer = momentum(tmp_path / str(len(damaged)), ImageLabelCollator, damaged=damaged, **step)
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
        changes.append(max((weight - before[name]).abs().max() for name, weight in trainer.model.named_parameters()))
    assert changes[0] > 0
    assert changes[1] == 0


@pytest.mark.parametrize("cls", [ImageTextCollator, ImageLabelCollator])
def test_nothing_at_all_is_left_to_evaluate(cls, tmp_path):
    model = pair_model() if cls is ImageTextCollator else classifier()
    trainer = run(tmp_path, model, collator(cls), eval_dataset=rows(3, (0, 1, 2)))
    with pytest.raises(ValueError, match="Nothing is left of the data for evaluation"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="Nothing is left of the data for prediction"):
        trainer.predict([])


def test_zero_shot_data_is_judged_and_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    task = partial(ZeroShotTask, rows(), labels=LABELS)
    parts = {"eval_dataset": rows(4, ()), "processing_class": tiny_processor()}
    run(tmp_path, pair_model(), collator(), zero_shot=task(collator=collator(ImageLabelCollator)), **parts).evaluate()
    said = "Samples in zero-shot: 11 seen, 4 corrupt images, 0 missing labels (ImageLabelCollator)"
    assert said in caplog.text
    strict = task(collator=collator(ImageLabelCollator, share=0.3))
    with pytest.raises(ValueError, match="4 of 11 samples had to be skipped"):
        run(tmp_path, pair_model(), collator(), zero_shot=strict, **parts).evaluate()


def test_each_pass_is_judged_by_itself(tmp_path):
    """Whole training data doesn't hide damaged evaluation data, though one collator reads both."""
    trainer = run(
        tmp_path, pair_model(), collator(share=0.2), train_dataset=rows(24, ()), eval_dataset=rows(4, (0, 1))
    )
    trainer.train()
    with pytest.raises(ValueError, match="2 of 4 samples had to be skipped"):
        trainer.evaluate()


def test_a_cut_pass_is_judged_with_those_before_it(tmp_path):
    """One damaged row of 12 is allowed, also where it's met twice, in 12 + 3 rows, or resuming has 3 rows left."""
    options = {"per_device_train_batch_size": 3, "train_sampling_strategy": "sequential", "save_strategy": "steps"}
    first = {"train_dataset": rows(12, (0,)), "max_steps": 5, **options}
    run(tmp_path / "cut", pair_model(), collator(share=0.15), **first).train()
    with pytest.raises(ValueError, match=r"2 of 1[58] samples had to be skipped"):
        run(tmp_path / "cut", pair_model(), collator(share=0.1), **first).train()
    last = {"train_dataset": rows(12, (11,)), "max_steps": 4, "save_steps": 3, **options}
    run(tmp_path / "whole", pair_model(), collator(share=0.1), **last).train()
    again = run(tmp_path / "whole", pair_model(), collator(share=0.1), **last)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def test_data_without_rows_trains_nothing_and_says_so(tmp_path):
    for data in ([], stream(3, ()).filter(lambda row: False)):
        with pytest.raises(ValueError, match="The training data has no rows"):
            run(tmp_path, pair_model(), collator(), train_dataset=data, max_steps=2).train()
