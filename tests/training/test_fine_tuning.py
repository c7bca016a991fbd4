"""What keeps a fine-tuned model near to where it started: a locked tower, lower rates further down, a teacher."""

import copy
import logging

import pytest
import torch
from distributed import assert_same
from pairs import LabelledImages, Pairs, arguments, classifier, collate, collate_labels
from safetensors.torch import load_file
from tiny import EOS, TOWER, VOCABULARY, tiny_inputs, tiny_model
from tokenizer_helper import BYTES, tiny_clip_tokenizer
from torch import nn
from torch.nn.functional import normalize
from training_samples import pair_dataset, rows, tiny_pair_model, tiny_processor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, set_seed

from diffclip_hf.data import ImageTextCollator, TeacherCollator
from diffclip_hf.model.loss_diffclip import image_text_contrastive_loss
from diffclip_hf.train import main
from diffclip_hf.training import DiffCLIPTrainer
from diffclip_hf.training.distillation import distillation_loss
from diffclip_hf.training.fine_tuning import decay_by_depth, parameter_levels


PARTS = {"image": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_projection.")}


def trainer(folder, model: nn.Module | None = None, **kwargs) -> DiffCLIPTrainer:
    names = {"train_dataset", "data_collator", "teacher", "optimizers"}
    own = {"train_dataset": Pairs(), "data_collator": collate}
    own |= {name: kwargs.pop(name) for name in names & kwargs.keys()}
    return DiffCLIPTrainer(tiny_model() if model is None else model, arguments(folder, **kwargs), **own)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in weights(model).items() if not torch.equal(value, before[name])}


def clip(width: int = 24, image_size: int = 32, text: dict | None = None) -> CLIPModel:
    """Transformers' CLIP, which takes what the tiny DiffCLIP takes."""
    set_seed(1)
    text = {**TOWER, **(text or {"vocab_size": VOCABULARY, "eos_token_id": EOS, "pad_token_id": 0})}
    vision = {**TOWER, "image_size": image_size, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    # As they start, all its similarities would be alike.
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


# Locking ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_locked_tower_stays_as_it_is(tower, chunk, tmp_path):
    """And what it says too, though it has dropout; the rest is trained, the logit scale with it."""
    dropout = {kind: {"attention_dropout": 0.5} for kind in ("vision", "text")}
    model = tiny_model(**dropout)
    before = weights(model)
    seen = []

    def note(module, args, output):
        seen.append(module.training)

    getattr(model, PARTS[tower][0][:-1]).encoder.layers[0].register_forward_hook(note)
    run = trainer(tmp_path, model, lock=tower, contrastive_chunk_size=chunk, optim="adamw_torch", weight_decay=0.5)
    run.train()
    locked = {name for name in before if name.startswith(PARTS[tower])}
    assert changed(model, before) == before.keys() - locked
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name in locked)
    assert seen
    assert not any(seen)


# Transformers' newer name of it isn't known everywhere.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable:FutureWarning")
def test_a_locked_run_resumes_as_it_went_on(tmp_path):
    options = {"lock": "image", "layer_decay": 0.5, "optim": "adamw_torch"}
    model = tiny_model()
    model.gradient_checkpointing_enable()
    whole = trainer(tmp_path / "whole", model, max_steps=3, save_strategy="steps", save_steps=2, **options)
    whole.train()
    resumed = trainer(tmp_path / "whole", max_steps=3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))
    with pytest.raises(ValueError, match=r"optimizer's state in .* is another run's"):
        trainer(tmp_path, max_steps=3, optim="adamw_torch").train(str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")
def test_a_locked_towers_adapters_are_locked_after_resuming_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    def run(**kwargs):
        model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
        return trainer(tmp_path, model, lock="text", max_steps=2, **kwargs)

    run(save_strategy="steps", save_steps=1).train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trained = {name for name, parameter in resumed.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("vision_model" in name for name in trained)


# Learning rates by depth --------------------------------------------------------------------------------------------


def test_levels_by_hand():
    """With three layers in each tower."""
    levels = parameter_levels(name for name, _ in tiny_model(text={"num_hidden_layers": 2}).named_parameters())
    assert {levels[name] for name in levels if ".embeddings." in name and "vision" in name} == {4}
    assert {levels[name] for name in levels if ".embeddings." in name and "text" in name} == {3}
    for index in range(3):
        layer = {levels[name] for name in levels if f"vision_model.encoder.layers.{index}." in name}
        assert layer == {3 - index}
    assert levels["text_model.encoder.layers.1.self_attn.lambda_q1"] == 1
    assert levels["text_model.encoder.layers.0.self_attn.diff_norm.weight"] == 2
    top = {name for name, level in levels.items() if level == 0}
    assert top == {
        *("logit_scale", "visual_projection.weight", "text_projection.weight"),
        *(
            f"{norm}.{part}"
            for norm in ("text_model.final_layer_norm", "vision_model.post_layernorm")
            for part in ("weight", "bias")
        ),
    }
    others = parameter_levels(
        [
            "base_model.model.vision_model.encoder.layers.0.x",
            "base_model.model.vision_model.pre_layernorm.bias",
            "classifier.bias",
        ]
    )
    assert list(others.values()) == [1, 2, 0]


def test_rates_by_depth_are_logged_once_and_followed(tmp_path, caplog):
    caplog.set_level(logging.INFO, "diffclip_hf")
    model, plain = tiny_model(), tiny_model()
    before = weights(model)
    run = trainer(tmp_path, model, layer_decay=0.5, max_steps=1, max_grad_norm=0.0)
    run.train()
    other = trainer(tmp_path, plain, max_steps=1, max_grad_norm=0.0)
    other.train()
    levels = parameter_levels(before)
    # Of plain gradient descent a step is the rate times the gradient.
    expected = {
        name: before[name] + (value - before[name]) * 0.5 ** levels[name] for name, value in weights(plain).items()
    }
    assert_same(weights(model), expected)
    assert run.optimizer.param_groups[0]["lr"] == 0.1
    assert run.state.log_history[0]["learning_rate"] == 0.1
    (table,) = [record.getMessage() for record in caplog.records if "by depth" in record.getMessage()]
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["0.1", "0.05", "0.025", "0.0125", "0.00625"]
    assert "text_model.encoder.layers.2, vision_model.encoder.layers.2" in lines[2]


def test_rates_by_depth_with_fused_adam_and_weight_decay(tmp_path):
    run = trainer(tmp_path, layer_decay=0.5, optim="adamw_torch_fused", weight_decay=0.3)
    run.train()
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    groups = run.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        assert group["fused"]
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.3}
        levels = parameter_levels(names.values())
        assert {0.1 * 0.5 ** levels[names[id(parameter)]] for parameter in group["params"]} == {group["initial_lr"]}


def test_an_optimizer_without_groups_cant_have_rates_by_depth():
    model = tiny_model()
    with pytest.raises(ValueError, match="SGD doesn't take the model's parameters in groups"):
        decay_by_depth(torch.optim.SGD([model.logit_scale], lr=1.0), model, 0.5)


# Distillation -------------------------------------------------------------------------------------------------------


def embeds(seed: int, width: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        *(normalize(torch.randn(5, width, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)),
        torch.tensor(1.5 + seed / 10, dtype=torch.float64),
    ]


def test_the_loss_by_its_definition():
    """open_clip's: the cross-entropy of softmaxes, from which the teacher's own entropy is taken here."""
    own, theirs = embeds(0), embeds(1)
    for part in own:
        part.requires_grad_()
    expected = 0
    for tower in (0, 1):
        logits, their_logits = (
            [[(one[2].exp() * (one[tower][i] @ one[1 - tower][j])).item() for j in range(5)] for i in range(5)]
            for one in (own, theirs)
        )
        for row, their_row in zip(*map(torch.DoubleTensor, (logits, their_logits)), strict=True):
            shares, their_shares = row.exp() / row.exp().sum(), their_row.exp() / their_row.exp().sum()
            expected += (their_shares * (their_shares / shares).log()).sum() / 10
    cosines = sum((own[tower] * theirs[tower]).sum() for tower in (0, 1)) / 10
    loss = distillation_loss(*own, *theirs, weight=2.0, feature_weight=3.0)
    assert loss.item() == pytest.approx((2 * expected + 3 * (1 - cosines)).item(), rel=1e-6)

    gradient = torch.autograd.grad(distillation_loss(*own, *theirs, feature_weight=0.0), own)
    logits, their_logits = (one[2].exp() * one[0] @ one[1].t() for one in (own, theirs))
    cross = sum(
        -(their.softmax(1) * mine.log_softmax(1)).sum(1).mean() / 2
        for mine, their in ((logits, their_logits), (logits.t(), their_logits.t()))
    )
    for actual, other in zip(gradient, torch.autograd.grad(cross, own), strict=True):
        torch.testing.assert_close(actual, other)


def test_a_model_is_at_no_distance_from_itself():
    own = embeds(0)
    assert distillation_loss(*own, *own).item() == pytest.approx(0, abs=1e-12)


def test_embeddings_of_other_widths_are_left_alone():
    own, theirs = embeds(0), embeds(1, width=4)
    assert distillation_loss(*own, *theirs) == distillation_loss(*own, *theirs, feature_weight=0.0)
    with pytest.raises(ValueError, match="the model's embeddings have 6 numbers and the teacher's 4; it must be 0"):
        distillation_loss(*own, *theirs, feature_weight=1.0)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("kind", ["DiffCLIP", "CLIP", "another width"])
def test_a_step_with_a_teacher(kind, chunk, tmp_path):
    teacher = {"DiffCLIP": lambda: tiny_model(seed=5), "CLIP": clip, "another width": lambda: clip(16)}[kind]()
    before = weights(teacher)
    model = tiny_model()
    inputs = tiny_inputs(8, 8)
    data = [{name: value[index] for name, value in inputs.items()} for index in range(8)]
    run = trainer(
        tmp_path,
        copy.deepcopy(model),
        teacher=teacher,
        contrastive_chunk_size=chunk,
        distill_weight=0.5,
        max_steps=1,
        max_grad_norm=0.0,
        train_dataset=data,
    )
    run.train()
    with torch.no_grad():
        theirs = teacher.eval()(**inputs)
    outputs = model.train()(**inputs)
    own = (outputs.text_embeds, outputs.image_embeds, model.logit_scale)
    loss = image_text_contrastive_loss(*own) + distillation_loss(
        *own, theirs.text_embeds, theirs.image_embeds, teacher.logit_scale, weight=0.5
    )
    loss.backward()
    assert run.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    stepped = {name: (parameter - 0.1 * parameter.grad).detach() for name, parameter in model.named_parameters()}
    assert_same(weights(run.model), stepped, floor=1)
    assert not changed(teacher, before)
    assert not any(name.startswith("teacher") for name in run.model.state_dict())


def test_a_teacher_with_inputs_of_its_own(tmp_path):
    """It's given the same crops and captions, as its own processor makes them."""
    processor, other = tiny_processor(), tiny_processor()
    other.image_processor.image_mean, other.image_processor.image_std = [0.1] * 3, [0.5] * 3
    other.image_processor.crop_size = {"height": 16, "width": 16}
    collators = [ImageTextCollator(one, train=True, seed=3) for one in (processor, other)]
    collator = TeacherCollator(*collators)
    collator.set_epoch(1)
    batch = collator(rows(range(4)))
    assert batch["teacher_pixel_values"].shape == (4, 3, 16, 16)
    assert torch.equal(batch["teacher_input_ids"], batch["input_ids"])
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    pictures = batch["pixel_values"] * std[:, None, None] + mean[:, None, None]
    halved = nn.functional.avg_pool2d(pictures, 2)
    # The same crop, resized twice over otherwise.
    assert (batch["teacher_pixel_values"] * 0.5 + 0.1 - halved).abs().mean() < 0.02
    assert collator.counts["seen"] == 4
    with pytest.raises(ValueError, match="seed is 3 in the model's collator and 4 in the teacher's"):
        TeacherCollator(collators[0], ImageTextCollator(other, train=True, seed=4))

    kwargs = {"teacher": clip(image_size=16, text=BYTES), "train_dataset": rows(range(8)), "max_steps": 1}
    run = trainer(tmp_path, tiny_pair_model(), data_collator=collator, **kwargs)
    run.train()
    run.evaluate(rows(range(3)))  # with the same collator
    with pytest.raises(ValueError, match=r"teacher's image_size is 16, and the model's 32.*TeacherCollator"):
        trainer(tmp_path, tiny_pair_model(), data_collator=collators[0], **kwargs).train()


def test_the_command_makes_a_teachers_own_inputs(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    side = {"height": 16, "width": 16}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side), tiny_clip_tokenizer())
    for name, parts in (
        ("teacher", (clip(16, image_size=16, text=BYTES), processor)),
        ("model", (tiny_pair_model(), tiny_processor())),
    ):
        for part in parts:
            part.save_pretrained(tmp_path / name)
    pair_dataset().to_parquet(tmp_path / "pairs.parquet")
    line = ["--model_name_or_path", "model", "--teacher", "teacher", "--train_data", "pairs.parquet"]
    line = [str(tmp_path / word) if number % 2 else word for number, word in enumerate(line)]
    line += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu", "--report_to", "none"]
    assert main([*line, "--lock", "text", "--layer_decay", "0.5"]) == 0
    assert "The teacher has its own inputs: size.shortest_edge is 32 and 16" in caplog.text
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(PARTS["text"])}


# What doesn't go together -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lock": "both"}, "lock is 'both'; it must be image or text"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0; it must be in 0..1, not 0"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"distill_weight": -1.0}, "distill_weight is -1.0; it must be at least 0"),
        ({"distill_feature_weight": float("nan")}, "distill_feature_weight is nan"),
        ({"distill_weight": 2.0}, "distill_weight or distill_feature_weight is given, but there's no teacher"),
        ({"teacher": "self"}, "The teacher has the model's own weights"),
        ({"teacher": nn.Linear(2, 2)}, "a Linear, which has no get_image_features and no get_text_features"),
        (
            {"teacher": clip(16), "distill_feature_weight": 1.0},
            "the model's projection_dim is 24 and the teacher's 16; it must be 0",
        ),
    ],
)
def test_what_is_refused(options, words, tmp_path):
    model = tiny_model()
    options = {name: model if value == "self" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, model, **options)


def test_a_ready_made_optimizer_has_rates_of_its_own(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="the optimizer is ready made"):
        trainer(tmp_path, model, layer_decay=0.5, optimizers=(optimizer, None))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"lock": "image"}, "lock is given, but .* has one tower"), ({"teacher": clip()}, "teacher is given, but")],
)
def test_a_classifier_has_no_second_tower(options, words, tmp_path):
    data = {"train_dataset": LabelledImages(), "data_collator": collate_labels}
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, classifier(), **data, **options)
