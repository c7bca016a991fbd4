"""The experiment that trains a CLIP on as differential attention: its form, and its page."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from tiny import both, tiny_inputs, tiny_model
from torch.testing import assert_close


pytest.importorskip("emoji", reason="the emoji's names come from it, which the extra `dev` has")
pytest.importorskip("matplotlib", reason="the report is drawn with it")
pytest.importorskip("peft", reason="an arm of the experiment is LoRA")

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "from_clip"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts import each other as from their own folder."""
    monkeypatch.syspath_prepend(str(ROOT / "embedded"))


def plain_attention():
    """The first attention of a plain tower of random weights, of four heads of width 8."""
    return tiny_model(**both("standard")).vision_model.encoder.layers[0].self_attn


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("lambda_value", [0.0, 0.2, 0.5, 0.999])
def test_a_second_query_begins_as_plain_attention(rank, lambda_value):
    """At B = 0 for every λ in [0, 1), and the gradient reaches B at once."""
    from from_clip import SecondQueryAttention

    plain = plain_attention()
    hidden_states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    attention = SecondQueryAttention(plain, rank)
    attention.lambda_logit.data.fill_(torch.tensor(lambda_value).logit())
    output = attention(hidden_states)[0]
    assert_close(output, plain(hidden_states)[0], rtol=0, atol=1e-5)
    output.square().sum().backward()
    last = attention.second_query if rank is None else attention.second_query[-1]
    assert bool(last.weight.grad.any()) == (lambda_value > 0)
    assert last.weight.grad.isfinite().all()


def test_a_second_query_is_the_formula():
    """(A1 − λ·A2)·v / (1 − λ), written out in float64 for one head at a time."""
    from from_clip import SecondQueryAttention

    attention = SecondQueryAttention(plain_attention(), 2).double()
    generator = torch.Generator().manual_seed(1)
    low, high = attention.second_query
    high.weight.data = torch.randn(32, 2, generator=generator, dtype=torch.float64)
    x = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    query, key, value = (layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    second_query = query + x @ (high.weight @ low.weight).t()
    heads = []
    for head, lambda_value in enumerate([0.2, 0.3, 0.4, 0.5]):
        own = slice(8 * head, 8 * head + 8)
        first, second = ((one[:, own] @ key[:, own].t() / 8**0.5).softmax(-1) for one in (query, second_query))
        heads.append((first - lambda_value * second) @ value[:, own] / (1 - lambda_value))
    expected = attention.out_proj(torch.cat(heads, -1))
    # λ is kept as a logit in float32.
    assert_close(attention(x[None])[0][0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arm", ["lora", "second", "second-full"])
def test_a_clip_that_gets_more_parameters_says_the_same(arm):
    """In both towers, with padding and the causal mask; low-rank arms add as many parameters, but for λ."""
    from from_clip import ARMS, distances, is_added, lambdas

    model, inputs = tiny_model(**both("standard")), tiny_inputs()
    expected = model(**inputs)
    changed = ARMS[arm].make(model)
    found = changed(**inputs)
    assert_close(found.logits_per_image, expected.logits_per_image, rtol=0, atol=1e-5)
    assert all(parameter.requires_grad for parameter in changed.parameters())
    added = sum(one.numel() for name, one in changed.named_parameters() if is_added(name))
    layers, width, heads = 6, 32, 4
    lambdas_added = 0 if arm == "lora" else layers * heads
    assert added == lambdas_added + layers * (width * (width + 1) if arm == "second-full" else 2 * 8 * width)
    if arm == "lora":
        assert distances(changed, inputs) == lambdas(changed) == {}
    else:
        assert distances(changed, inputs) == {"vision": [0.0] * 3, "text": [0.0] * 3}
        assert lambdas(changed) == {tower: [[0.2, 0.3, 0.4, 0.5]] * 3 for tower in ("vision", "text")}


def test_added_parameters_have_their_own_learning_rate(tmp_path):
    from from_clip import ARMS, give_added_their_rate, is_added
    from small_model import make_trainer

    model = ARMS["second"].make(tiny_model(**both("standard")))
    trainer = make_trainer(model, 1, lambda rows: {}, tmp_path, learning_rate=1e-4, bf16=False)
    give_added_their_rate(trainer, 10)
    rates = {
        id(one): (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for one in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (1e-3 if is_added(name) else 1e-4, 0.2 if parameter.ndim >= 2 else 0)


def made_up(second: tuple[float, float]) -> dict:
    """Figures of two seeds, of which the second query's are given; those of the others are 0.40 and 0.42."""
    names = ("zero-shot top-1 among 20", "zero-shot top-1 among 100", "text to image Recall@5 among 1906", "loss")
    runs = {}
    for arm in ("clip", "plain", "lora", "second"):
        for seed, value in enumerate(second if arm == "second" else (0.40, 0.42)):
            runs[f"{arm}-{seed}"] = {
                "arm": arm,
                "seed": seed,
                "steps": 140,
                "parameters": 1000,
                "added parameters": 10,
                "figures": {vendor: dict.fromkeys(names, value) for vendor in ("google", "twitter")},
                "fixed batch": [[step, 3.5] for step in (0, 1, 7, 14, 140)],
                "lambda": [{"text": [[0.2, 0.5]]}, {"text": [[0.3, 0.4]]}] if arm == "second" else [{}, {}],
                "distance": {"text": [0.125]} if arm == "second" else {},
                "machine": {"processor": "Abacus", "cores": 2, "threads": 1},
                "versions": {"torch": "2"},
            }
    settings = {"clip_epochs": 20, "epochs": 20, "learning_rate": 5e-4, "first_learning_rate": 1e-3}
    return {"settings": settings | {"warmup_steps": 14, "first_warmup_steps": 100, "rate": 10.0}, "runs": runs}


def test_the_page_says_what_the_figures_are():
    """Deviations of 0.0141 around 0.41: above by more than twice that is clear, 0.02 isn't."""
    from from_clip_report import page

    text = " ".join(page(made_up((0.45, 0.45))).split())
    assert "**It is**, with second query, rank 8." in text
    assert "| a. trained on | 2 | 41.0 ± 1.4 | 41.0 ± 1.4 | 41.0 ± 1.4 | 0.41 ± 0.01 |" in text
    assert "| c. second query, rank 8 − b. LoRA | +4.0 ± 1.4 | +4.0 ± 1.4 |" in text
    assert "| c. second query, rank 8 | text | 0.20 to 0.50 | 0.30 to 0.40 | 0.35 | 0.12 |" in text
    assert "no seed's first loss differs" in text
    assert "**It isn't**" in page(made_up((0.42, 0.44)))
    one_style = made_up((0.45, 0.45))
    for run in one_style["runs"].values():
        run["figures"]["twitter"]["zero-shot top-1 among 100"] = 0.5
    assert "**It isn't**" in page(one_style)
    one_seed = made_up((0.45, 0.45))
    one_seed["runs"] = {name: run for name, run in one_seed["runs"].items() if run["seed"] == 0}
    assert "With one seed" in " ".join(page(one_seed).split())
    with pytest.raises(ValueError, match="no runs of lora"):
        page({**one_seed, "runs": {name: run for name, run in one_seed["runs"].items() if run["arm"] != "lora"}})


def test_the_page_in_the_repository_is_of_its_runs():
    """The page as a whole, means and deviations computed anew; and the form began where the CLIP was."""
    from from_clip_report import page

    content = json.loads((PAGE / "figures.json").read_text(encoding="utf-8"))
    text = (PAGE / "README.md").read_text(encoding="utf-8")
    assert page(content) == text
    runs = content["runs"].values()
    for arm in {run["arm"] for run in runs}:
        for vendor in ("google", "twitter"):
            values = [100 * run["figures"][vendor]["zero-shot top-1 among 100"] for run in runs if run["arm"] == arm]
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            assert f"| {statistics.mean(values):.1f}{deviation} |" in text
    for run in runs:
        if run["arm"] in ("plain", "lora", "second", "second-full"):
            (step, first), clip = run["fixed batch"][0], content["runs"][f"clip-{run['seed']}"]["fixed batch"][-1]
            assert (step, first) == (0, pytest.approx(clip[1], abs=1e-5))
    for name in ("figures.png", "first_steps.png"):
        assert f"]({name})" in text
        assert (PAGE / name).stat().st_size > 10_000
