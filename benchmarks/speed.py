"""Compare DiffCLIP's speed and memory with those of Transformers' CLIPModel at the same size, ViT-B/16.

python benchmarks/speed.py [--only PART …] [--seconds 6] [--device cuda] [--output benchmarks/speed.json]

Writes the measurements (JSON), a table (Markdown) and two plots (PNG) beside each other, one of the core and one of
the rest. speed_profile.py shows by operator where the time goes. Parts:

- core: differential attention alone against PyTorch's SDPA of the same width, forward, and forward and backward;
  `sdpa`, the default, beside each of our other forms.
- projections: q, k and v as three matrix products, which the model does, and as one.
- images, texts: the towers, forward.
- compiled: the towers, compiled, forward.
- busy: the image tower beside one and two busy processes, which multiply small matrices.
- training: forward, contrastive loss, backward and AdamW.
- memory: the peak of a process for each contender.
- startup: importing the model class and loading a folder, each in a process of its own.

CLIPModel has our activations: exact GELU in the image tower, QuickGELU in the text tower. As OpenAI released it, it
has QuickGELU in both, and is measured so too.

The contenders of a case run in turn in one process, in another order each round, for at least seven rounds. Reported
are the median times, the median of the rounds' ratios to the reference, and between which ratios the middle half of
the rounds lies. A case measured again takes the place of the one in the file, and each says when and on which machine
it was measured. The weights are random. On a GPU the towers and the training run in bfloat16.
"""

import argparse
import datetime
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from measuring import (
    MIB,
    child_arguments,
    make_parser,
    measured_on,
    memory,
    random_inputs,
    run_child,
    tell_parent,
    write_report,
)
from torch import nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel

from diffclip_hf import DiffCLIPConfig, DiffCLIPModel
from diffclip_hf.model.attention_diffclip import differential_attention_forward
from diffclip_hf.model.blocked_attention_diffclip import blocked_differential_attention, blocked_forward


logger = logging.getLogger("speed")
PARTS = ("core", "projections", "images", "texts", "compiled", "busy", "training", "memory", "startup")
CLIP = "CLIPModel"
QUICK_GELU = "CLIPModel, QuickGELU"
LEAST_ROUNDS = 7
PLAIN_SDPA = "plain SDPA"
# (batch, tokens, heads, head width, causal)
CORE_SHAPES = [
    (8, 77, 8, 64, True),
    (64, 77, 8, 64, True),
    (8, 77, 12, 64, False),
    (1, 197, 12, 64, False),
    (8, 197, 12, 64, False),
    (1, 577, 12, 64, False),
    (1, 1025, 12, 64, False),
    (1, 2049, 12, 64, False),
    (1, 4097, 12, 64, False),
]
# Our implementations that run on a device.
IMPLEMENTATIONS = {"cpu": ["sdpa", "eager"], "cuda": ["sdpa", "eager", "flash_attention_2", "differential_triton"]}
OWN_FORMS = ("formula", "blocks", "two SDPA calls")
# (batch, tokens)
TEXT_SHAPES = [(8, 77), (64, 12), (1, 8)]


class Case:
    """One thing measured with every contender: its name, sizes, and the functions that run it."""

    def __init__(self, part: str, what: str, sizes: dict, reference: str, contenders: dict[str, Callable[[], object]]):
        self.part, self.what, self.sizes, self.reference, self.contenders = part, what, sizes, reference, contenders


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes, the mean of those in a tenth of a second, or what it says itself: a float."""
    synchronize()
    start = time.perf_counter()
    calls = 0
    while calls == 0 or time.perf_counter() - start < 0.1:
        own = function()
        if isinstance(own, float):
            return own
        synchronize()
        calls += 1
    return (time.perf_counter() - start) / calls


def measure(case: Case, budget: float) -> dict:
    """Run a case's contenders in turn."""
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    for function in case.contenders.values():
        function()
    draw = random.Random(0)
    start = time.perf_counter()
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < budget:
        # Another order each time: who runs after whom decides what memory the allocator has at hand.
        for name in draw.sample(list(times), len(times)):
            times[name].append(seconds(case.contenders[name]))
        rounds += 1
    results = {}
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[case.reference], strict=True)]
        first, middle, third = statistics.quantiles(ratios, n=4, method="inclusive")
        results[name] = {
            "median_ms": round(statistics.median(values) * 1e3, 3),
            "ratio": round(middle, 3),
            "middle_half_of_ratios": [round(first, 3), round(third, 3)],
        }
    found = {"part": case.part, "what": case.what, **case.sizes, "reference": case.reference, "rounds": rounds}
    if case.part == "core":
        fastest = min(OWN_FORMS, key=lambda name: statistics.median(times[name]))
        ratios = [value / base for value, base in zip(times["sdpa"], times[fastest], strict=True)]
        found["sdpa_to_fastest_form"] = {"form": fastest, "ratio": round(statistics.median(ratios), 3)}
    return found | {"results": results}


# Attention alone ---------------------------------------------------------------------------------------------------


class CoreModule(nn.Module):
    """What an attention function reads of its module."""

    def __init__(self, is_causal: bool):
        super().__init__()
        self.is_causal = is_causal


def core_cases(device: str, lengths: list[int] | None) -> Iterator[Case]:
    """Yield attention alone: plain SDPA, what `sdpa` does here, and our forms."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = [shape for shape in CORE_SHAPES if lengths is None or shape[1] in lengths]
    for batch, tokens, heads, width, causal in shapes:
        generator = torch.Generator().manual_seed(0)

        def draw(width, batch=batch, tokens=tokens, heads=heads, head_dim=width, generator=generator):
            states = torch.randn(batch, tokens, heads * head_dim, generator=generator).to(device, dtype)
            return states.unflatten(-1, (-1, width)).transpose(1, 2)

        query, key, value = draw(width), draw(width), draw(2 * width)
        plain_value = value.transpose(1, 2).flatten(2).unflatten(-1, (-1, width)).transpose(1, 2)
        lambda_value = torch.tensor(0.7, device=device)
        mask = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)[None, None]
        module = CoreModule(causal)

        def plain(query, key, value, lambda_value, causal=causal):
            output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
            return output.transpose(1, 2).contiguous()

        functions = {
            PLAIN_SDPA: (plain, plain_value),
            "sdpa": (ours("sdpa", module, None), value),
            "formula": (ours("eager", module, mask if causal else None), value),
            "blocks": (blocks(causal), value),
            "two SDPA calls": (two_calls(causal), value),
        }
        for training in (False, True):
            contenders = {
                name: core_run(function, (query, key, its_value, lambda_value), training)
                for name, (function, its_value) in functions.items()
            }
            sizes = {"batch": batch, "tokens": tokens, "heads": heads, "width": width, "causal": causal}
            what = "forward and backward" if training else "forward"
            yield Case("core", what, sizes, PLAIN_SDPA, contenders)


def ours(implementation: str, module: CoreModule, mask: torch.Tensor | None) -> Callable:
    """Return differential attention under one of our implementations."""

    def run(query, key, value, lambda_value):
        return differential_attention_forward(
            module, query, key, value, mask, lambda_value, 0.125, attn_implementation=implementation
        )[0]

    return run


def blocks(causal: bool) -> Callable:
    """Return differential attention block by block."""

    def run(query, key, value, lambda_value):
        form = blocked_differential_attention if torch.is_grad_enabled() else blocked_forward
        return form(query, key, value, None, lambda_value, 0.125, causal)

    return run


def two_calls(causal: bool) -> Callable:
    """Return differential attention by SDPA over each half of v."""

    def run(query, key, value, lambda_value):
        halves = [
            nn.functional.scaled_dot_product_attention(query, key, half.repeat_interleave(2, 1), is_causal=causal)
            for half in value.chunk(2, dim=-1)
        ]
        heads = torch.cat(halves, dim=-1)
        return (heads[:, 0::2] - lambda_value.to(heads.dtype) * heads[:, 1::2]).transpose(1, 2).contiguous()

    return run


def core_run(function: Callable, tensors: tuple, training: bool) -> Callable[[], object]:
    """Return a call of an attention function, with its gradients when training."""
    if not training:

        def forward():
            with torch.inference_mode():
                return function(*tensors)

        return forward

    def forward_backward():
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        output = function(*inputs)
        return torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)

    return forward_backward


def projection_cases(device: str) -> Iterator[Case]:
    """Yield the products that give q, k and v, at the sizes of the two towers; one has its weights ready."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for batch, tokens, width in ((1, 197, 768), (8, 197, 768), (1, 77, 512), (8, 77, 512)):
        states = torch.randn(batch, tokens, width, device=device, dtype=dtype)
        weights, biases = torch.randn(3, width, width).to(states), torch.randn(3, width).to(states)
        together, bias = weights.flatten(0, 1), biases.flatten()

        def three(states=states, weights=weights, biases=biases):
            with torch.inference_mode():
                return [nn.functional.linear(states, *pair) for pair in zip(weights, biases, strict=True)]

        def one(states=states, together=together, bias=bias, width=width):
            with torch.inference_mode():
                return nn.functional.linear(states, together, bias).split(width, dim=-1)

        sizes = {"batch": batch, "tokens": tokens, "width": width}
        yield Case("projections", "q, k, v", sizes, "three products", {"three products": three, "one product": one})


# Models -------------------------------------------------------------------------------------------------------------


def build(name: str, image_size: int, device: str) -> nn.Module:
    """Build a contender at ViT-B/16, with random weights."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if name.startswith("CLIPModel"):
        vision = {"hidden_size": 768, "intermediate_size": 3072, "patch_size": 16, "image_size": image_size}
        vision |= {} if name == QUICK_GELU else {"hidden_act": "gelu"}
        model = CLIPModel(CLIPConfig(vision_config=vision, projection_dim=512))
        model.set_attn_implementation("sdpa")
    else:
        model = DiffCLIPModel(DiffCLIPConfig(vision_config={"image_size": image_size}))
        model.set_attn_implementation(name.split()[0])
    return model.to(device, dtype).eval()


def inputs_of(model: nn.Module, batch: int, image_size: int, tokens: int = 77) -> dict[str, torch.Tensor]:
    """Return random images and texts for a model."""
    inputs = random_inputs(batch, image_size, tokens)
    pixel_values = inputs["pixel_values"].to(model.device, model.dtype)
    return {"input_ids": inputs["input_ids"].to(model.device), "pixel_values": pixel_values}


def image_cases(device: str, own: list[str], batches: list[int], image_sizes: list[int]) -> Iterator[Case]:
    """Yield the image tower's forward pass."""
    for image_size in image_sizes:
        models = {name: build(name, image_size, device) for name in (CLIP, QUICK_GELU, *own)}
        for batch in batches:
            inputs = inputs_of(models[CLIP], batch, image_size)
            runs = {name: tower_run(model, "image", inputs) for name, model in models.items()}
            yield Case("images", "image tower", {"batch": batch, "image_size": image_size}, CLIP, runs)


def text_cases(device: str, own: list[str]) -> Iterator[Case]:
    """Yield the text tower's forward pass."""
    models = {name: build(name, 224, device) for name in (CLIP, *own)}
    for batch, tokens in TEXT_SHAPES:
        inputs = inputs_of(models[CLIP], batch, 224, tokens)
        runs = {name: tower_run(model, "text", inputs) for name, model in models.items()}
        yield Case("texts", "text tower", {"batch": batch, "tokens": tokens}, CLIP, runs)


def compiled_cases(device: str) -> Iterator[Case]:
    """Yield the towers' forward pass, ours compiled."""
    models = {CLIP: build(CLIP, 224, device), "sdpa compiled": build("sdpa", 224, device)}
    models["sdpa compiled"].vision_model.compile(fullgraph=True)
    models["sdpa compiled"].text_model.compile(fullgraph=True)
    inputs = inputs_of(models[CLIP], 8, 224)
    for tower in ("image", "text"):
        runs = {name: tower_run(model, tower, inputs) for name, model in models.items()}
        yield Case("compiled", f"{tower} tower, compiled", {"batch": 8}, CLIP, runs)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run processes beside that multiply small matrices without end."""
    code = "import numpy\na = numpy.random.rand(64, 64)\nwhile True:\n    a = a @ a\n    a /= a.max()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(count)]
    try:
        time.sleep(2)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def busy_cases(device: str, own: list[str]) -> Iterator[Case]:
    """Yield the image tower's forward pass beside busy processes, which run while the case is measured."""
    models = {name: build(name, 224, device) for name in (CLIP, *own)}
    inputs = inputs_of(models[CLIP], 8, 224)
    runs = {name: tower_run(model, "image", inputs) for name, model in models.items()}
    for count in (1, 2):
        with busy_processes(count):
            yield Case("busy", f"image tower beside {count} busy", {"batch": 8, "image_size": 224}, CLIP, runs)


def tower_run(model: nn.Module, tower: str, inputs: dict) -> Callable[[], object]:
    """Return a forward pass of one tower."""

    def run():
        with torch.inference_mode():
            if tower == "image":
                return model.get_image_features(pixel_values=inputs["pixel_values"])
            return model.get_text_features(input_ids=inputs["input_ids"])

    return run


def training_run(model: nn.Module, batch: int, device: str) -> Callable[[], object]:
    """Return a whole training step, in bfloat16 by autocast on a GPU."""
    model.to(torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    inputs = inputs_of(model, batch, 224)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_cases(device: str, own: list[str], batches: list[int]) -> Iterator[Case]:
    """Yield whole training steps."""
    names = [CLIP, *own]
    for batch in batches:
        runs = {name: training_run(build(name, 224, device), batch, device) for name in names}
        yield Case("training", "training step", {"batch": batch}, CLIP, runs)


def peak_memory(part: str, name: str, batch: str, device: str) -> int:
    """Run a contender three times, and return the most memory it took, in bytes: this process's, or the GPU's."""
    model = build(name, 224, device)
    if part == "training":
        run = training_run(model, int(batch), device)
    else:
        run = tower_run(model, "image", inputs_of(model, int(batch), 224))
    for _ in range(3):
        run()
    return memory()["VmHWM"] if device == "cpu" else torch.cuda.max_memory_allocated()


def memory_results(device: str, sizes: list[tuple[str, int]]) -> list[dict]:
    """Return the peak memory of each contender."""
    results = []
    for part, batch in sizes:
        peaks = {name: run_child(__file__, part, name, batch, device) for name in (CLIP, "sdpa")}
        results.append(
            {
                "part": "memory",
                "what": f"peak memory, {part}",
                "batch": batch,
                "reference": CLIP,
                "results": {
                    name: {"bytes": peak, "ratio": round(peak / peaks[CLIP], 3)} for name, peak in peaks.items()
                },
            }
        )
    return results


# Start-up -----------------------------------------------------------------------------------------------------------


def startup_cases(folder: Path) -> Iterator[Case]:
    """Yield importing a model class, and a process's first loading of a folder without the import."""
    build("sdpa", 224, "cpu").save_pretrained(folder / "diffclip")
    build(CLIP, 224, "cpu").save_pretrained(folder / "clip")
    modules = {CLIP: ("transformers", "CLIPModel", "clip"), "sdpa": ("diffclip_hf", "DiffCLIPModel", "diffclip")}

    def process(code: str) -> str:
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    def load(module: str, cls: str, path: str) -> float:
        # Not again and again in one process: the names of all tensors are regular expressions to Transformers, and
        # Python keeps 512 of them, which ours are more than.
        return float(
            process(
                f"import time, torch; from {module} import {cls}; start = time.perf_counter(); "
                f"{cls}.from_pretrained({str(folder / path)!r}); print(time.perf_counter() - start)"
            )
        )

    imports = {
        name: (lambda module=module, cls=cls: process(f"from {module} import {cls}"))
        for name, (module, cls, _) in modules.items()
    }
    yield Case("startup", "import in a new process", {}, CLIP, imports)
    loads = {name: (lambda arguments=arguments: load(*arguments)) for name, arguments in modules.items()}
    yield Case("startup", "from_pretrained in a new process", {}, CLIP, loads)


# Output -------------------------------------------------------------------------------------------------------------


def shown(found: dict) -> str:
    """Return a ratio with the middle half of the rounds' ratios, if there were rounds."""
    first, third = found.get("middle_half_of_ratios", (None, None))
    return f"{found['ratio']:.2f}" + (f" ({first:.2f} to {third:.2f})" if first else "")


def table(results: list[dict]) -> str:
    """Return the measurements as a Markdown table, a line for each contender that isn't the reference."""
    lines = [
        "| case | reference | contender | reference's median | contender's | ratio (middle half of rounds) | rounds | "
        "measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        base = result["results"][result["reference"]]
        for name, found in result["results"].items():
            if name != result["reference"]:
                cells = [title(result), result["reference"], name, amount(base), amount(found), shown(found)]
                cells += [str(result.get("rounds", "")), result["measured"]["date"]]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def title(result: dict) -> str:
    """Return what a result measures, with its sizes."""
    fields = ("batch", "tokens", "heads", "width", "image_size")
    sizes = [f"{field.replace('_', ' ')} {result[field]}" for field in fields if field in result]
    return ", ".join([result["what"], *sizes, *(["causal"] if result.get("causal") else [])])


# The rows of the guide's table: what to call it, and the case's fields.
SUMMARY = [
    ("Image tower, batch 1", {"part": "images", "batch": 1, "image_size": 224}),
    ("Image tower, batch 8", {"part": "images", "batch": 8, "image_size": 224}),
    ("Image tower at 336 px, batch 1", {"part": "images", "batch": 1, "image_size": 336}),
    ("Image tower at 336 px, batch 8", {"part": "images", "batch": 8, "image_size": 336}),
    ("Image tower, batch 8, beside one busy process", {"what": "image tower beside 1 busy"}),
    ("Image tower, batch 8, beside two", {"what": "image tower beside 2 busy"}),
    ("Text tower, 8 × 77 tokens", {"part": "texts", "batch": 8, "tokens": 77}),
    ("Text tower, 64 × 12 tokens", {"part": "texts", "batch": 64, "tokens": 12}),
    ("Text tower, 1 × 8 tokens", {"part": "texts", "batch": 1, "tokens": 8}),
    ("Training step, batch 8", {"part": "training", "batch": 8}),
    ("Training step, batch 16", {"part": "training", "batch": 16}),
    ("Its peak memory, batch 8", {"part": "memory", "what": "peak memory, training", "batch": 8}),
    ("`import` in a new process", {"part": "startup", "what": "import in a new process"}),
    ("`from_pretrained` in a new process", {"part": "startup", "what": "from_pretrained in a new process"}),
]


def summary(results: list[dict]) -> str:
    """Return the guide's table: `sdpa` and `eager` against CLIPModel with the same activations, and QuickGELU's."""
    where = "not run on a GPU" if all(result["measured"]["device"] == "cpu" for result in results) else ""
    lines = [
        f"| {where} | CLIPModel | DiffCLIPModel, `sdpa` | ratio (middle half of rounds) | `eager`'s | "
        "CLIPModel's with QuickGELU |",
        "|---|---|---|---|---|---|",
    ]
    for name, fields in SUMMARY:
        for result in results:
            if fields.items() <= result.items():
                found = result["results"]
                others = [f"{found[other]['ratio']:.2f}" if other in found else "" for other in ("eager", QUICK_GELU)]
                cells = [
                    name,
                    amount(found[result["reference"]]),
                    amount(found["sdpa"]),
                    shown(found["sdpa"]),
                    *others,
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def core_summary(core: list[dict]) -> str:
    """Return the table of attention alone: the times to plain SDPA's, and `sdpa`'s to the fastest form's."""
    names = ("sdpa", *OWN_FORMS)
    lines = [
        f"| attention alone, ÷ plain SDPA | {' | '.join(names)} | `sdpa` ÷ the fastest form |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for result in core:
        fastest = result["sdpa_to_fastest_form"]
        ratios = [f"{result['results'][name]['ratio']:.2f}" for name in names]
        cells = [title(result), *ratios, f"{fastest['ratio']:.2f} ({fastest['form']})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def amount(found: dict) -> str:
    """Return a median time or a size for people."""
    return f"{found['bytes'] / MIB:,.0f} MiB" if "bytes" in found else f"{found['median_ms']:,.1f} ms"


def plot_core(results: list[dict], path: Path) -> None:
    """Draw attention alone over the number of tokens, if it was measured."""
    from matplotlib.figure import Figure

    core = [result for result in results if result["part"] == "core" and not result["causal"]]
    if not core:
        return
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, what in zip(axes, ("forward", "forward and backward"), strict=True):
        longest = {result["tokens"]: result for result in core if result["what"] == what}
        for name in core[0]["results"]:
            ratios = [result["results"][name]["ratio"] for result in longest.values()]
            axis.plot(list(longest), ratios, "o-", label=name)
        axis.set(xscale="log", xlabel="tokens", title=f"Attention alone, {what}")
        axis.set_xticks(list(longest), [str(tokens) for tokens in longest])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time ÷ plain SDPA's of the same width")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def plot_models(results: list[dict], path: Path) -> None:
    """Draw the whole models' ratios, if they were measured."""
    from matplotlib.figure import Figure

    whole = [result for result in results if result["part"] not in ("core", "projections")]
    if not whole:
        return
    labels = [title(result) for result in whole]
    figure = Figure(figsize=(9, 0.45 * len(whole) + 1.4), layout="constrained")
    axis = figure.subplots()
    for offset, name in enumerate(("sdpa", "eager", QUICK_GELU)):
        rows = [row for row, result in enumerate(whole) if name in result["results"]]
        places = [row + 0.27 * (offset - 1) for row in rows]
        ratios = [whole[row]["results"][name]["ratio"] for row in rows]
        axis.barh(places, ratios, height=0.25, label=name if name == QUICK_GELU else f"DiffCLIPModel {name}")
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(whole)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("÷ CLIPModel's with the same size and activations (less is better)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small")
    axis.set_ylim(len(whole) - 0.4, -1.3)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def same_case(result: dict) -> tuple:
    """Return what makes a case the same when it is measured again."""
    return tuple(
        (field, result.get(field)) for field in ("part", "what", "batch", "tokens", "heads", "image_size", "causal")
    )


def all_results(only: list[str], args: argparse.Namespace) -> Iterator[dict]:
    """Measure the parts that are asked for."""
    device, own = args.device, args.implementations or IMPLEMENTATIONS[args.device]
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "core": lambda: core_cases(device, args.core_tokens),
            "projections": lambda: projection_cases(device),
            "images": lambda: image_cases(
                device, own, args.batches or ([1, 8] if device == "cpu" else [1, 8, 64, 256]), args.image_sizes
            ),
            "texts": lambda: text_cases(device, own),
            "compiled": lambda: compiled_cases(device),
            "busy": lambda: busy_cases(device, own),
            "training": lambda: training_cases(device, own, args.training_batches),
            "startup": lambda: startup_cases(Path(folder)),
        }
        for part in only:
            if part == "memory":
                yield from memory_results(
                    device, [("forward", 8), *(("training", size) for size in args.training_batches)]
                )
                continue
            for case in tqdm(cases[part](), desc=part):
                yield measure(case, args.seconds)


def write_tables(output: Path, results: list[dict]) -> None:
    """Write the tables and the plots beside the measurements."""
    core = [result for result in results if result["part"] == "core"]
    tables = [summary(results), *([core_summary(core)] if core else []), table(results)]
    output.with_suffix(".md").write_text("\n".join(tables), encoding="utf-8")
    plot_core(results, output.with_name(f"{output.stem}_core.png"))
    plot_models(results, output.with_name(f"{output.stem}_model.png"))


def main() -> None:
    """Run the benchmark."""
    if (given := child_arguments()) is not None:
        tell_parent(peak_memory(*given))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=6, help="for each case, beyond its least number of rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="of ours, beside CLIPModel; all that run")
    parser.add_argument("--batches", nargs="+", type=int, help="of the image tower; 1 8, and 64 256 too on a GPU")
    parser.add_argument("--image-sizes", nargs="+", type=int, default=[224, 336], help="of the images part")
    parser.add_argument("--core-tokens", nargs="+", type=int, metavar="TOKENS", help="of the core's shapes; all")
    parser.add_argument("--training-batches", nargs="+", type=int, default=[8, 16])
    args = parser.parse_args()

    output: Path = args.output
    results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    where = {"date": today, "device": args.device, **measured_on("float32" if args.device == "cpu" else "bfloat16")}
    for found in all_results(args.only, args):
        logger.info("%s: %s", title(found), {name: shown(each) for name, each in found["results"].items()})
        results = [result for result in results if same_case(result) != same_case(found)]
        results.append(found | {"measured": where})
        results.sort(key=lambda result: PARTS.index(result["part"]))
        write_report(output, results)
        write_tables(output, results)


if __name__ == "__main__":
    main()
