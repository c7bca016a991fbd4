"""DiffCLIPTrainer in one process; test_distributed.py has it in several, and test_faults.py what goes wrong."""

import copy
import math
import weakref

import numpy as np
import pytest
import torch
from distributed import assert_same, gradients
from pairs import (
    LABELS,
    TEMPLATES,
    LabelledImages,
    Pairs,
    Stream,
    arguments,
    classifier,
    collate,
    collate_labels,
    stream_collate,
    zero_shot_parts,
)
from tiny import tiny_inputs, tiny_model
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from diffclip_hf import (
    DiffCLIPModel,
    ZeroShotClassifier,
)
from diffclip_hf.model.loss_diffclip import image_text_contrastive_loss
from diffclip_hf.training import DiffCLIPTrainer, ZeroShotTask
from diffclip_hf.training.gradient_cache import backward_in_chunks
from diffclip_hf.training.metrics import loss_in_blocks
from diffclip_hf.training.weights import give_logit_scale_a_dimension, take_logit_scales_dimension


TOLERANCE = 1e-6


def trainer(folder, model: nn.Module | None = None, cls: type = DiffCLIPTrainer, **kwargs) -> Trainer:
    """A trainer of pairs; keywords of `Trainer` apart, `kwargs` are training arguments."""
    names = {"train_dataset", "eval_dataset", "data_collator", "zero_shot", "processing_class", "callbacks"}
    own = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    own = {"train_dataset": Pairs(), "eval_dataset": Pairs(11), "data_collator": collate} | own
    args = arguments(folder, **kwargs) if cls is DiffCLIPTrainer else arguments(folder, TrainingArguments, **kwargs)
    return cls(tiny_model() if model is None else model, args, **own)


def losses(run: Trainer) -> list[float]:
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# --- Chunks ---------------------------------------------------------------------------------------------------------


def in_chunks(model: nn.Module, inputs: dict, chunk_size: int) -> torch.Tensor:
    return backward_in_chunks(
        model, lambda: model.logit_scale, inputs, chunk_size, torch.Tensor.backward, torch.enable_grad
    )


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_have_the_whole_batchs_gradient(dtype, chunk_size):
    inputs = tiny_inputs(8, 8, length=12)
    model, other = tiny_model().to(dtype).train(), tiny_model().to(dtype).train()
    loss = model(**inputs, return_loss=True).loss
    loss.backward()
    assert in_chunks(other, inputs, chunk_size).item() == pytest.approx(loss.item(), rel=TOLERANCE)
    # In float32 the largest gradient is the measure: one that nearly cancels is rounded as coarsely as what it's of.
    assert_same(gradients(other), gradients(model), floor=1 if dtype == torch.float32 else 1e-3)


def test_both_passes_drop_the_same():
    model = tiny_model(vision={"attention_dropout": 0.3}, text={"attention_dropout": 0.3}).train()
    other = copy.deepcopy(model)
    inputs = tiny_inputs(6, 6, length=12)
    torch.manual_seed(3)
    loss = in_chunks(model, inputs, 2)
    after = torch.rand(3)

    # The chunks with the same masks, all in memory.
    torch.manual_seed(3)
    outputs = [other(**{name: value[start : start + 2] for name, value in inputs.items()}) for start in (0, 2, 4)]
    embeds = (torch.cat([output[name] for output in outputs]) for name in ("text_embeds", "image_embeds"))
    expected = image_text_contrastive_loss(*embeds, other.logit_scale)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    assert_same(gradients(model), gradients(other))
    torch.testing.assert_close(after, torch.rand(3))


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the most bytes that the autograd graph keeps at once."""

    def __init__(self):
        self.now = self.peak = 0
        super().__init__(self.pack, lambda kept: kept[0])

    def pack(self, tensor: torch.Tensor):
        kept = _Kept([tensor])
        self.now += tensor.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self.release, tensor.nbytes)
        return kept

    def release(self, size: int) -> None:
        self.now -= size


class _Kept(list):
    """A list that can be referred to weakly."""


def test_memory_grows_with_the_chunk_and_not_the_batch():
    def peak(rows: int, chunk_size: int | None) -> int:
        model, inputs = tiny_model().train(), tiny_inputs(rows, rows, length=30)
        saved = SavedBytes()
        with saved:
            if chunk_size is None:
                model(**inputs, return_loss=True).loss.backward()
            else:
                in_chunks(model, inputs, chunk_size)
        return saved.peak

    # The logits and the embeddings, which grow with the batch, are a few KB of these.
    assert peak(24, 4) <= 1.02 * peak(4, 4)
    assert peak(24, 8) >= 1.8 * peak(24, 4)
    assert peak(24, None) >= 4.5 * peak(24, 4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_in_chunks_is_training_on_the_whole_batch(accumulation, tmp_path):
    runs = [
        trainer(tmp_path, contrastive_chunk_size=chunk, gradient_accumulation_steps=accumulation)
        for chunk in (None, 3)
    ]
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=TOLERANCE)
    assert_same(weights(runs[1].model), weights(runs[0].model))


# --- The stock Trainer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Trainer, DiffCLIPTrainer])
@pytest.mark.parametrize("task", ["contrastive", "classification"])
def test_accumulated_gradients_are_the_mean_of_the_steps(task, cls, tmp_path):
    model, data = (tiny_model(), {}) if task == "contrastive" else (classifier(), {"train_dataset": LabelledImages()})
    data |= {} if task == "contrastive" else {"data_collator": collate_labels}
    expected = copy.deepcopy(model).train()
    run = trainer(
        tmp_path, model, cls, per_device_train_batch_size=4, max_steps=1, gradient_accumulation_steps=2, **data
    )
    batches = [batch for batch, _ in zip(run.get_train_dataloader(), range(2), strict=False)]
    mean = sum(expected(**batch).loss for batch in batches) / 2
    run.train()
    assert losses(run) == [pytest.approx(mean.item(), rel=TOLERANCE)]
    mean.backward()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    assert run.state.log_history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    stepped = {name: p.detach() - 0.1 * p.grad for name, p in expected.named_parameters()}
    assert_same(weights(run.model), stepped)


def test_plain_accumulation_warns(tmp_path, caplog):
    trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    (record,) = caplog.records
    assert "doesn't enlarge the contrastive batch" in record.message
    assert "contrastive_chunk_size" in record.message
    caplog.clear()
    trainer(tmp_path)
    trainer(tmp_path, classifier(), gradient_accumulation_steps=2)
    assert not caplog.records


# --- The recipe -----------------------------------------------------------------------------------------------------


def test_weight_decay_falls_on_matrices_alone(tmp_path):
    run = trainer(tmp_path, weight_decay=0.5)
    decayed, spared = (
        {name for name, p in run.model.named_parameters() if any(p is other for other in group["params"])}
        for group in run.create_optimizer().param_groups
    )
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.5, 0.0]
    kinds = {name.split(".layers.")[-1].partition(".")[2] if ".layers." in name else name for name in spared}
    attention = {
        f"self_attn.{part}" for part in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "diff_norm.weight")
    }
    assert kinds == attention | {
        *(f"self_attn.{part}_proj.bias" for part in ("q", "k", "v", "out")),
        *(f"{norm}.{part}" for norm in ("layer_norm1", "layer_norm2") for part in ("weight", "bias")),
        "mlp.fc1.bias",
        "mlp.fc2.bias",
        "logit_scale",
        "text_model.final_layer_norm.weight",
        "text_model.final_layer_norm.bias",
        "vision_model.post_layernorm.weight",
        "vision_model.post_layernorm.bias",
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.patch_embedding.bias",
    }
    assert decayed == dict(run.model.named_parameters()).keys() - spared
    assert {"text_projection.weight", "vision_model.embeddings.position_embedding.weight"} <= decayed


@pytest.mark.parametrize(("gradient", "bound"), [(-1e6, math.log(100)), (1e6, 0.0)])
def test_logit_scale_stays_within_its_bounds(gradient, bound, tmp_path):
    model = tiny_model()
    model.logit_scale.register_hook(lambda _: torch.tensor(gradient))
    trainer(tmp_path, model, max_grad_norm=0, max_steps=1).train()
    assert model.logit_scale.item() == pytest.approx(bound)


def test_a_frozen_logit_scale_is_left(tmp_path):
    model = tiny_model()
    model.logit_scale.data.fill_(5)
    model.logit_scale.requires_grad_(False)
    trainer(tmp_path, model, max_steps=1).train()
    assert model.logit_scale.item() == 5


class Reporter(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_every_reporter_gets_lambdas_and_the_scale(tmp_path):
    reporter = Reporter()
    model = tiny_model(text={"attention_type": "standard"})
    run = trainer(tmp_path, model, callbacks=[reporter])
    run.train()
    first, last = (log for log in reporter.logs if "loss" in log)
    layers = model.vision_model.encoder.layers
    assert {name for name in last if name.startswith("lambda")} == {f"lambda/vision_model.{i}" for i in range(3)}
    for index, layer in enumerate(layers):
        q1, k1, q2, k2 = (getattr(layer.self_attn, f"lambda_{name}").detach() for name in ("q1", "k1", "q2", "k2"))
        value = math.exp(q1 @ k1) - math.exp(q2 @ k2) + 0.8
        assert last[f"lambda/vision_model.{index}"] == pytest.approx(value, rel=TOLERANCE)
    assert last["logit_scale"] == pytest.approx(math.exp(model.logit_scale.item()), rel=TOLERANCE)
    assert first["logit_scale"] != last["logit_scale"]
    assert {"grad_norm", "learning_rate"} <= last.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_trained_in_float32(dtype, tmp_path, caplog):
    run = trainer(tmp_path, tiny_model().to(dtype), bf16=True)
    assert str(dtype).removeprefix("torch.") in caplog.text
    run.train()
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert all(map(math.isfinite, losses(run)))


def test_a_model_in_float32_is_not_mentioned(tmp_path, caplog):
    trainer(tmp_path)
    assert not caplog.records


def test_chunks_under_autocast_are_near_the_whole_batch(tmp_path):
    start, updates = tiny_model(), []
    for chunk in (None, 3):
        run = trainer(tmp_path, contrastive_chunk_size=chunk, bf16=True, max_steps=1)
        run.train()
        pairs = zip(run.model.parameters(), start.parameters(), strict=True)
        updates.append(torch.cat([(after - before).detach().flatten() for after, before in pairs]))
    # bfloat16 has 8 bits, and the logits of chunks are float32; 0.0095 was measured.
    assert (updates[1] - updates[0]).norm() <= 0.03 * updates[0].norm()


# --- Evaluation -----------------------------------------------------------------------------------------------------


def embeddings(model: DiffCLIPModel, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.text_embeds, outputs.image_embeds


def test_evaluation_is_on_all_embeddings(tmp_path):
    run = trainer(tmp_path)
    metrics = run.evaluate()
    texts, images = embeddings(run.model, list(Pairs(11)))
    scores = texts @ images.t()
    for k in (1, 5, 10):
        for name, similarity in (("text_to_image", scores), ("image_to_text", scores.t())):
            hits = [row.argsort(descending=True)[:k].tolist().count(i) for i, row in enumerate(similarity)]
            assert metrics[f"eval_{name}_recall@{k}"] == pytest.approx(sum(hits) / 11)
    # A batch of 8 and one of 3, each with its own negatives, and each pair with the same weight.
    parts = [image_text_contrastive_loss(texts[s], images[s], run.model.logit_scale) for s in (slice(8), slice(8, 11))]
    assert metrics["eval_loss"] == pytest.approx(((8 * parts[0] + 3 * parts[1]) / 11).item(), rel=TOLERANCE)
    assert run.model.logit_scale.grad is None


def test_the_loss_in_blocks_is_that_of_the_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    texts, images = (normalize(torch.randn(11, 6, generator=generator), dim=-1) for _ in range(2))
    # As NumPy has it, in float64: −log of each pair's share of its row's and of its column's.
    exponents = np.exp(50.0 * texts.double().numpy() @ images.double().numpy().T)
    own = exponents.diagonal()
    expected = -(np.log(own / exponents.sum(1)) + np.log(own / exponents.sum(0))).mean() / 2
    for block_size in (3, 11):
        assert loss_in_blocks(texts, images, torch.tensor(50.0), block_size).item() == pytest.approx(expected)


def test_predictions_are_embeddings(tmp_path):
    run = trainer(tmp_path)
    output = run.predict(Pairs(11))
    for actual, expected in zip(output.predictions, embeddings(run.model, list(Pairs(11))), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected)
    assert "test_text_to_image_recall@1" in output.metrics


def test_zero_shot_accuracy_is_the_classifiers(tmp_path):
    parts = zero_shot_parts()
    run = trainer(tmp_path, **parts)
    classify = ZeroShotClassifier(parts["model"], parts["processing_class"], LABELS, TEMPLATES, progress_bar=False)
    with torch.no_grad():
        images = parts["model"].encode_image(LabelledImages(10).images)
    predicted = (images @ classify.label_embeds.t()).argmax(1)
    expected = sum(predicted[i] == i % 3 for i in range(10)) / 10
    assert 0 < expected < 1
    assert run.evaluate()["eval_zero_shot_accuracy"] == pytest.approx(expected.item())
    assert "test_zero_shot_accuracy" not in run.predict(Pairs(11)).metrics


def test_image_classification_is_evaluated_as_ever(tmp_path):
    parts = {"train_dataset": LabelledImages(), "eval_dataset": LabelledImages(5), "data_collator": collate_labels}
    run, stock = (trainer(tmp_path, classifier(), cls, **parts) for cls in (DiffCLIPTrainer, Trainer))
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=TOLERANCE)
    assert not [name for name in metrics if "recall" in name]
    run.train()
    assert "lambda/vision_model.2" in run.state.log_history[0]
    assert "logit_scale" not in run.state.log_history[0]


# --- Data that splits itself ----------------------------------------------------------------------------------------


class Collator:
    """Notes the pairs of each batch, and the epoch that it was told."""

    def __init__(self):
        self.batches, self.epochs = [], []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __call__(self, rows: list[dict]) -> dict:
        self.batches.append([row.pop("index").item() for row in rows])
        return collate(rows)


def test_a_stream_is_told_its_epoch_and_position(tmp_path):
    stream, collator = Stream(), Collator()
    parts = {"train_dataset": stream, "data_collator": collator, "per_device_train_batch_size": 5}
    run = trainer(tmp_path, **parts, max_steps=-1, num_train_epochs=2, save_strategy="steps", save_steps=3)
    run.train()
    # Four batches of five in an epoch of 24, the last four pairs of which are dropped.
    assert run.state.global_step == 8
    assert stream.calls == [("epoch", 0), ("position", 0, 0), ("epoch", 1), ("position", 1, 0)]
    assert collator.epochs == [0, 1]
    expected = [stream.order(epoch)[start : start + 5] for epoch in (0, 1) for start in range(0, 20, 5)]
    assert collator.batches == expected

    # From the sixth step, two batches into the second epoch.
    stream, collator = Stream(), Collator()
    parts |= {"train_dataset": stream, "data_collator": collator}
    resumed = trainer(tmp_path, **parts, max_steps=-1, num_train_epochs=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert stream.calls == [("epoch", 1), ("position", 1, 2)]
    assert collator.epochs == [1]
    assert losses(resumed) == losses(run)


def test_a_streams_position_counts_batches_and_not_updates(tmp_path):
    stream = Stream()
    parts = {"train_dataset": stream, "data_collator": Collator(), "per_device_train_batch_size": 2}
    parts |= {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 1}
    trainer(tmp_path, **parts, save_strategy="steps", save_steps=2).train()
    trainer(tmp_path, **parts).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert stream.calls[-2:] == [("epoch", 0), ("position", 0, 6)]
    trainer(tmp_path, **parts, ignore_data_skip=True).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert stream.calls[-2:] == [("epoch", 0), ("position", 0, 0)]


def test_a_streams_workers_share_it(tmp_path):
    stream = Stream()
    run = trainer(tmp_path, train_dataset=stream, dataloader_num_workers=2, per_device_train_batch_size=4)
    loader = run.get_train_dataloader()
    assert type(loader) is DataLoader
    assert len(loader) == 6
    firsts = sorted(row["input_ids"].tolist() for row in Pairs())
    assert sorted(row.tolist() for batch in loader for row in batch["input_ids"]) == firsts


def test_an_evaluation_stream(tmp_path):
    # Evaluated at an epoch's last step, where accelerate knows of a remainder of the training data, not of this.
    parts = {"train_dataset": Pairs(11), "eval_dataset": Stream(16), "data_collator": stream_collate}
    run = trainer(tmp_path, **parts, max_steps=2, eval_strategy="steps", eval_steps=1)
    run.train()
    assert run.predict(Stream(16)).predictions[0].shape == (16, 24)
    fresh = trainer(tmp_path, run.model, eval_dataset=[Pairs()[i] for i in Stream(16).order(0)]).evaluate()
    evaluated = [log for log in run.state.log_history if "eval_loss" in log]
    assert evaluated[-1]["eval_loss"] == pytest.approx(fresh["eval_loss"], rel=TOLERANCE)


# --- PEFT -----------------------------------------------------------------------------------------------------------


# PEFT's, of Transformers' older name for activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], init_lora_weights=False)
    runs = []
    for chunk in (None, 3):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(), config)
        model.base_model.model.logit_scale.requires_grad_(True)
        runs.append(trainer(tmp_path / str(chunk), model, contrastive_chunk_size=chunk, save_strategy="steps"))
        before = {name: tensor.clone() for name, tensor in weights(model).items()}
        runs[-1].train()
        changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if "lora" in name or name.endswith("logit_scale")}
    assert_same(weights(runs[1].model), weights(runs[0].model))
    assert "lambda/text_model.0" in runs[0].state.log_history[0]
    assert "eval_text_to_image_recall@1" in runs[0].evaluate()


# --- What is refused ------------------------------------------------------------------------------------------------


def test_refused(tmp_path):
    with pytest.raises(TypeError, match="args is of type TrainingArguments; it must be DiffCLIPTrainingArguments"):
        DiffCLIPTrainer(tiny_model(), arguments(tmp_path, TrainingArguments))
    with pytest.raises(ValueError, match="contrastive_chunk_size is 0; it must be at least 1"):
        arguments(tmp_path, contrastive_chunk_size=0)
    with pytest.raises(ValueError, match="contrastive_chunk_size is given, but DiffCLIPForImageClassification has no"):
        trainer(tmp_path, classifier(), contrastive_chunk_size=2)
    with pytest.raises(ValueError, match="zero_shot is given, but processing_class has no tokenizer"):
        trainer(tmp_path, zero_shot=ZeroShotTask(LabelledImages(), collate_labels, ["cat"]))
    with pytest.raises(ValueError, match="batch_eval_metrics is given"):
        trainer(tmp_path, batch_eval_metrics=True)
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    stream = Stream()
    stream.batch_size = 4
    with pytest.raises(ValueError, match="Stream has batch_size 4, and per_device_train_batch_size is 8"):
        trainer(tmp_path, train_dataset=stream).train()


def test_data_that_is_missing_is_named(tmp_path, monkeypatch):
    run = trainer(tmp_path, train_dataset=None, eval_dataset=None)
    for processes in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(type(run.args), "world_size", processes)
            with pytest.raises(ValueError, match="train_dataset is None; training needs one"):
                run.get_train_dataloader()
    with pytest.raises(ValueError, match="eval_dataset is None; evaluation needs one"):
        run.evaluate()
    run.train_dataset = Pairs(0)
    with pytest.raises(ValueError, match="The training data has no rows"):
        run.get_train_dataloader()
    run.data_collator = run.eval_data_collator = lambda rows: {"pixel_values": collate(rows)["pixel_values"]}
    with pytest.raises(ValueError, match="has images or texts alone; a contrastive model needs pairs of both"):
        run.evaluate(Pairs(4))


def test_a_model_that_is_made_late_is_trained_in_float32(tmp_path, caplog):
    run = DiffCLIPTrainer(
        None, arguments(tmp_path), model_init=lambda: tiny_model().half(), train_dataset=Pairs(), data_collator=collate
    )
    assert "The model's weights are float16; they're trained in float32" in caplog.text
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


def test_a_plain_loader_gives_the_same_figures(tmp_path):
    """As where somebody's own class makes the loader."""
    run = trainer(tmp_path)
    plain = DataLoader(Pairs(11), batch_size=4, collate_fn=collate)
    found = run.evaluation_loop(plain, "Evaluation", metric_key_prefix="eval")
    assert found.num_samples == 11
    expected = run.evaluate()
    for name in ("eval_text_to_image_recall@1", "eval_image_to_text_recall@5"):
        assert found.metrics[name] == expected[name]


def test_the_scale_has_a_dimension_under_fsdp_and_none_when_it_is_saved():
    model = tiny_model()
    value = model.logit_scale.item()
    model.logit_scale.requires_grad_(False)
    give_logit_scale_a_dimension(model)
    assert (model.logit_scale.tolist(), model.logit_scale.requires_grad) == ([value], False)
    saved = take_logit_scales_dimension(model.state_dict())
    assert saved["logit_scale"].shape == ()
    assert {name: tensor.shape for name, tensor in saved.items()} == {
        name: tensor.shape for name, tensor in tiny_model().state_dict().items()
    }


def test_noise_of_neftune_has_its_effect(tmp_path):
    plain, noisy = (trainer(tmp_path, max_steps=1, **options) for options in ({}, {"neftune_noise_alpha": 50.0}))
    for run in (plain, noisy):
        run.train()
    assert abs(losses(plain)[0] - losses(noisy)[0]) > 1e-3


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_out_of_range_is_named(tmp_path, label):
    rows = [{**LabelledImages()[0], "labels": label}]
    run = trainer(tmp_path, classifier(), train_dataset=rows, eval_dataset=rows, data_collator=collate_labels)
    for method in (run.train, run.evaluate):
        with pytest.raises(ValueError, match=rf"A label is {label}; there are \d labels, so it must be in 0\.\.\d"):
            method()
