"""The training command, as its users call it."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from hub_server import WRITER, HubServer
from safetensors.torch import load_file
from tiny import TOWER
from tokenizer_helper import tiny_clip_tokenizer
from torch.utils.data import DataLoader
from training_samples import picture, tiny_pair_model, tiny_processor, write_shards
from transformers import AutoModel, AutoProcessor, get_scheduler, set_seed

from diffclip_hf import DiffCLIPForImageClassification, DiffCLIPModel, train
from diffclip_hf.data import ImageTextCollator, ImageTextShards
from diffclip_hf.train import main
from diffclip_hf.training.model_configs import build_config
from diffclip_hf.training.models import build_model
from diffclip_hf.training.parsing import parse_arguments


RECIPES = sorted(
    path.name.removesuffix(".yaml") for path in (resources.files("diffclip_hf.training") / "recipes").iterdir()
)
TINY = {
    "projection_dim": 24,
    "text_config": {**TOWER, "vocab_size": 514, "max_position_embeddings": 77},
    "vision_config": {**TOWER, "image_size": 32, "patch_size": 8},
}
# On the CPU and quiet; what is logged, in every step, is in the trainer's state.
QUICK = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--logging_steps", "1", "--seed", "3"]


NEW = ["--model_config", "{}", "--train_data", "x"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Tar shards of 48 pairs, a folder of 12 pairs, one of labelled pictures, a tokenizer, a model."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "shards").mkdir()
    write_shards(folder / "shards", [16, 16, 16])
    (folder / "pairs").mkdir()
    lines = []
    for number in range(12):
        picture(100 + number).save(folder / "pairs" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (folder / "pairs" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    for split, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(("dark", "light")):
            (folder / "labelled" / split / name).mkdir(parents=True)
            for number in range(count):
                image = picture(10 * label + number).point(lambda value, label=label: value // 3 + 160 * label)
                image.save(folder / "labelled" / split / name / f"{number}.png")
    tiny_clip_tokenizer().save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    tiny_pair_model().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    return folder


def options(data: Path, output: Path, **changes) -> list[str]:
    """Return a command line that trains a new tiny model on the shards, with `changes` of its options."""
    chosen = {
        "model_config": json.dumps(TINY),
        "tokenizer": data / "tokenizer",
        "train_data": data / "shards",
        "output_dir": output,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "max_steps": 3,
        **changes,
    }
    return QUICK + [word for name, value in chosen.items() if value is not None for word in (f"--{name}", str(value))]


def losses(output: Path) -> list[float]:
    """Return the loss of every step."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


# Options ------------------------------------------------------------------------------------------------------------


def test_the_command_line_overrides_the_file(tmp_path, data):
    config = tmp_path / "options.yaml"
    config.write_text(
        "model_config: {projection_dim: 24}\nlearning_rate: 0.25\nweight_decay: 0.125\ntrain_data: there\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 5e-1}\ncrop_scale: [0.75, 1.0]\n"
        "use_cpu: true\n"
    )
    line = ["--config", str(config), "--learning_rate", "0.5", "--output_dir", str(tmp_path)]
    model_args, data_args, training_args = parse_arguments(line)
    assert training_args.learning_rate == 0.5
    assert training_args.weight_decay == 0.125
    assert training_args.lr_scheduler_kwargs == {"min_lr": 0.5}
    assert data_args.crop_scale == [0.75, 1.0]
    assert build_config(model_args.model_config).projection_dim == 24


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "diffclip-vitb16"]),
        (["--train_data", "x"], ["model_name_or_path", "model_config"]),
        (["--model_config", "{}"], ["train_data"]),
        ([*NEW, "--linear_probe"], ["linear_probe", "image-classification"]),
        (
            [
                "--model_config",
                "{}",
                "--train_data",
                "x",
                "--global_batch_size",
                "6",
                "--gradient_accumulation_steps",
                "4",
            ],
            ["global_batch_size", "6", "4"],
        ),
    ],
)
def test_options_that_dont_fit(line, words, tmp_path):
    with pytest.raises(ValueError, match=".*".join(words)):
        parse_arguments([*line, "--use_cpu", "--output_dir", str(tmp_path)])


def test_an_option_that_doesnt_exist(tmp_path, caplog):
    (tmp_path / "options.json").write_text('{"learning_rte": 1}')
    assert main(["--config", str(tmp_path / "options.json")]) == 1
    assert "learning_rte" in caplog.text


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_the_papers(recipe, tmp_path):
    line = ["--config", recipe, "--use_cpu", "--bf16", "False", "--train_data", "x", "--output_dir", str(tmp_path)]
    model_args, data_args, args = parse_arguments(line)
    config = build_config(model_args.model_config)
    differential = {"clip": (False, False), "diffclip-dagger": (True, False)}.get(recipe[:-7], (True, True))
    found = tuple(part.attention_type == "differential" for part in (config.vision_config, config.text_config))
    assert found == differential
    # λ_init of the first and the third layer: 0.8 everywhere, or by depth (0.8 − 0.6·exp(−0.3·l)).
    first, third = (0.2, 0.8 - 0.6 * 2.718281828**-0.6) if recipe == "diffclip-star-vitb16" else (0.8, 0.8)
    assert config.vision_config.get_lambda_init(0) == pytest.approx(first)
    assert config.vision_config.get_lambda_init(2) == pytest.approx(third)
    assert (config.vision_config.hidden_size, config.text_config.hidden_size) == (768, 512)

    assert args.per_device_train_batch_size == data_args.global_batch_size == 4096
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay) == (0.9, 0.98, 1e-8, 0.5)
    assert data_args.crop_scale == [0.5, 1.0]
    steps = 400
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    warmup = round(steps / args.num_train_epochs)
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) == pytest.approx(5e-4)
    assert rates.index(max(rates)) == pytest.approx(warmup - 1, abs=1)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)


def test_recipes_train_in_bfloat16_and_keep_float32_weights():
    import yaml

    for recipe in RECIPES:
        text = (resources.files("diffclip_hf.training") / "recipes" / f"{recipe}.yaml").read_text()
        assert yaml.safe_load(text)["bf16"] is True


# Runs ---------------------------------------------------------------------------------------------------------------


def test_a_new_model_on_shards_evaluated_and_loaded(data, tmp_path):
    """Train, evaluate on pairs and on labelled pictures, and load what is saved as a user does."""
    line = options(
        data,
        tmp_path / "out",
        eval_data=data / "pairs",
        eval_split="train",
        zero_shot_data=data / "labelled",
        zero_shot_split="test",
        eval_strategy="steps",
        eval_steps=2,
        contrastive_chunk_size=3,
    )
    assert main(line) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == 3
    assert {f"lambda/{tower}_model.{layer}" for tower in ("text", "vision") for layer in range(3)} <= set(logged[0])
    assert {"logit_scale", "grad_norm", "learning_rate"} <= set(logged[0])
    evaluated = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 3]
    assert 0 <= evaluated[-1]["eval_image_to_text_recall@5"] <= 1
    assert evaluated[-1]["eval_zero_shot_accuracy"] in [number / 8 for number in range(9)]
    model = AutoModel.from_pretrained(tmp_path / "out")
    inputs = AutoProcessor.from_pretrained(tmp_path / "out")(
        text=["a", "b"], images=[picture(0)], return_tensors="pt", padding=True
    )
    assert model(**inputs).logits_per_image.shape == (1, 2)
    assert (tmp_path / "out" / "modeling_diffclip.py").is_file()


def test_zero_shot_accuracy_alone(data, tmp_path):
    """Labelled pictures are evaluated on without pairs beside them, while training and at its end."""
    line = options(
        data,
        tmp_path / "out",
        zero_shot_data=data / "labelled",
        zero_shot_split="test",
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
    )
    assert main(line) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    found = [entry["eval_zero_shot_accuracy"] for entry in history if "eval_zero_shot_accuracy" in entry]
    at_the_end = json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_zero_shot_accuracy"]
    assert found == [at_the_end]
    assert at_the_end in [number / 8 for number in range(9)]


def test_it_resumes_where_it_stopped(data, tmp_path, caplog):
    """6 steps, 2 of them of a second epoch, equal 5 steps, thrown away from the fourth on, and the rest."""
    # A stated schedule: by default it would depend on max_steps.
    common = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 12, "save_strategy": "steps"}
    assert main(options(data, tmp_path / "whole", max_steps=6, **common, save_steps=6)) == 0
    assert main(options(data, tmp_path / "parts", max_steps=3, **common, save_steps=3)) == 0
    assert main(options(data, tmp_path / "parts", max_steps=6, **common)) == 1
    assert "resume_from_checkpoint" in caplog.text
    assert main(options(data, tmp_path / "parts", max_steps=6, **common, resume_from_checkpoint="last")) == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(parts[name], value, atol=1e-6) for name, value in whole.items())


def test_fine_tuning_and_linear_probing(data, tmp_path):
    """Both tell dark pictures from light ones; probing leaves the image tower as it was."""
    line = {
        "model_config": None,
        "tokenizer": None,
        "model_name_or_path": data / "model",
        "task": "image-classification",
        "train_data": data / "labelled",
        "eval_data": data / "labelled",
        "eval_split": "test",
        "learning_rate": 0.02,
        "max_steps": 12,
    }
    before = load_file(data / "model" / "model.safetensors")
    for probe in (False, True):
        output = tmp_path / f"probe-{probe}"
        assert main(options(data, output, **line) + ["--linear_probe"] * probe) == 0
        results = json.loads((output / "all_results.json").read_text())
        assert results["eval_accuracy"] == 1
        model = DiffCLIPForImageClassification.from_pretrained(output)
        assert model.config.id2label == {0: "dark", 1: "light"}
        after = model.state_dict()
        changed = {name for name in after if name in before and not torch.equal(after[name], before[name])}
        assert bool(changed) is not probe


# PEFT's, of Transformers' older name for activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_adapters_that_load_again(data, tmp_path, monkeypatch):
    from peft import PeftModel

    monkeypatch.chdir(data)

    line = options(
        data,
        tmp_path / "out",
        model_config=None,
        tokenizer=None,
        model_name_or_path="model",
        lora_rank=2,
        learning_rate=0.05,
    )
    assert main(line) == 0
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(data / "model")
    adapters = load_file(tmp_path / "out" / "adapter_model.safetensors")
    trained = {name.split(".")[-3] for name in adapters}
    assert trained == {"q_proj", "k_proj", "v_proj", "out_proj"}
    base = DiffCLIPModel.from_pretrained(data / "model")
    inputs = tiny_processor()(text=["a b"], images=[picture(0)], return_tensors="pt")
    with torch.no_grad():
        before = base(**inputs).logits_per_image
        found = PeftModel.from_pretrained(base, tmp_path / "out").eval()(**inputs).logits_per_image
        # By hand: W + (alpha / rank) · B·A, alpha being twice the rank.
        byhand = DiffCLIPModel.from_pretrained(data / "model")
        weights = dict(byhand.named_parameters())
        for name, down in adapters.items():
            if ".lora_A." in name:
                place = name.removeprefix("base_model.model.").replace(".lora_A", "")
                weights[place] += 2 * adapters[name.replace("lora_A", "lora_B")] @ down
        expected = byhand(**inputs).logits_per_image
    assert not torch.allclose(found, before, atol=1e-3)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_tensorboard_gets_lambda(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = options(data, tmp_path / "out", max_steps=1, report_to="tensorboard")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "board")
    try:
        assert main(line) == 0
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/grad_norm", "train/logit_scale", "train/lambda/vision_model.0"} <= set(tags)


def run_command(command: list, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a process of its own, with one thread; where it crashes, it says in which line."""
    defaults = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONFAULTHANDLER": "1"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=os.environ | defaults | environment,
        capture_output=True,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def first_loss(data: Path, line: list[str]) -> float:
    """Return the loss of the first step's 16 pairs in one process: each of two ranks' first batch of 8."""
    model_args, _, training_args = parse_arguments(line)
    set_seed(training_args.seed)
    model, processor = build_model(model_args, None)
    text_embeds, image_embeds = [], []
    for rank in range(2):
        shards = ImageTextShards(str(data / "shards"), 8, seed=training_args.seed, rank=rank, world_size=2)
        collator = ImageTextCollator(processor, train=True, seed=training_args.seed)
        batch = next(iter(DataLoader(shards, batch_size=8, num_workers=2, collate_fn=collator)))
        text_embeds.append(model.encode_text(batch["input_ids"], batch["attention_mask"]))
        image_embeds.append(model.encode_image(batch["pixel_values"]))
    logits = model.logit_scale.exp() * torch.cat(text_embeds) @ torch.cat(image_embeds).t()
    own = logits.diagonal()
    return ((logits.logsumexp(0) + logits.logsumexp(1)) / 2 - own).mean().item()


def test_accelerate_launch_on_two_processes(data, tmp_path):
    """As the README has it: tar shards, two processes, each with two workers, evaluated and saved once."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]
    line = options(
        data,
        tmp_path / "out",
        per_device_train_batch_size=None,
        global_batch_size=16,
        eval_data=data / "pairs",
        eval_split="train",
        dataloader_num_workers=2,
    )
    done = run_command([sys.executable, *launch, "-m", "diffclip_hf.train", *line], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on 2 processes, 16 samples a step" in done.stderr
    assert losses(tmp_path / "out")[0] == pytest.approx(first_loss(data, line), abs=1e-5)
    assert "eval_text_to_image_recall@1" in json.loads((tmp_path / "out" / "all_results.json").read_text())
    AutoModel.from_pretrained(tmp_path / "out")


def test_accelerate_launch_without_gpus_starts_one_process_and_it_is_said(data, tmp_path, monkeypatch, caplog):
    # As accelerate 1.15 leaves the environment; here it would take 20 seconds.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main(options(data, tmp_path / "out", max_steps=1)) == 0
    assert "accelerate started one process" in caplog.text
    assert "--multi_gpu" in caplog.text


def test_push_to_hub(data, warm_python, tmp_path):
    """The trained model goes to the Hub, from which it loads without the package."""
    with HubServer(tmp_path / "hub") as hub:
        line = options(data, tmp_path / "out", max_steps=1, push_to_hub=True, hub_model_id="org/trained")
        environment = hub.environment(tmp_path / "home", WRITER)
        warm_python.run("-m", "diffclip_hf.train", *line, folder=tmp_path, environment=environment)
        code = (
            "import sys; sys.modules['diffclip_hf'] = None; from transformers import AutoModel; "
            "AutoModel.from_pretrained('org/trained', trust_remote_code=True)"
        )
        environment = hub.environment(tmp_path / "other", WRITER)
        warm_python.run("-c", code, folder=tmp_path, environment=environment)


def test_it_says_what_is_wrong_with_the_data(data, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    assert main(options(data, tmp_path / "out", train_data=data / "missing.tar")) == 1
    assert "missing.tar" in caplog.text


def test_what_isnt_whole_isnt_trained(data, tmp_path, caplog, monkeypatch):
    """A lost vocabulary, a misspelt tokenizer, another model and lost weights; each is one line before any step."""
    monkeypatch.setattr(train, "DiffCLIPTrainer", lambda **kwargs: pytest.fail("trained"))
    shutil.copytree(data / "model", tmp_path / "no-vocabulary")
    (tmp_path / "no-vocabulary" / "tokenizer.json").unlink()
    labels = {"num_labels": 3}
    DiffCLIPForImageClassification.from_pretrained(data / "model", **labels).save_pretrained(tmp_path / "no-text")
    tiny_processor().save_pretrained(tmp_path / "no-text")
    old = {"model_config": None, "tokenizer": None}
    for changes, words in (
        (old | {"model_name_or_path": tmp_path / "no-vocabulary"}, "has no vocabulary"),
        (old | {"model_name_or_path": tmp_path / "no-text"}, "lacks weights of a DiffCLIPModel"),
        (old | {"model_name_or_path": tmp_path / "no-txt"}, "did you mean no-text"),
        ({"tokenizer": data / "tokeniser"}, "did you mean tokenizer"),
        (
            {"model_config": json.dumps(TINY | {"text_config": {**TINY["text_config"], "vocab_size": 500}})},
            "vocab_size, 500, must be at least as many",
        ),
    ):
        caplog.clear()
        assert main(options(data, tmp_path / "out", **changes)) == 1
        assert words in caplog.messages[-1]
    assert not (tmp_path / "out").exists()
