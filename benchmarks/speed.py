"""Compare DiffCLIP's speed and memory with those of Transformers' CLIPModel at the same size, ViT-B/16.

python benchmarks/speed.py [--only PART …] [--seconds 30] [--device cuda] [--output benchmarks/speed.json]

Writes the measurements (JSON), a table (Markdown) and two plots (PNG) beside each other. Parts:

- core: differential attention alone against PyTorch's SDPA of the same width, forward, and forward and backward.
- projections: q, k and v as three matrix products, which the model does, and as one.
- towers: the image and the text tower, forward; also compiled.
- training: forward, contrastive loss, backward and AdamW.
- startup: importing the model class and loading a folder, each in a process of its own.

The contenders of a case run in turn in one process until its time is over, two or three rounds at least; reported are
medians, quartiles, and the ratio of the medians to the reference's. Peak memory is that of a process for each
contender. The weights are random. On a GPU the towers and the training run in bfloat16.
"""

import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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


logger = logging.getLogger("speed")
PARTS = ("core", "projections", "towers", "training", "startup")
CLIP = "CLIPModel sdpa"
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


class Case:
    """One thing measured with every contender: its name, sizes, and the functions that run it."""

    def __init__(self, part: str, what: str, sizes: dict, reference: str, contenders: dict[str, Callable[[], object]]):
        self.part, self.what, self.sizes, self.reference, self.contenders = part, what, sizes, reference, contenders


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes, or what it says itself, by returning a float."""
    synchronize()
    start = time.perf_counter()
    own = function()
    synchronize()
    return own if isinstance(own, float) else time.perf_counter() - start


def measure(case: Case, budget: float) -> dict:
    """Run a case's contenders in turn."""
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    for function in case.contenders.values():
        function()
    draw = random.Random(0)
    start = time.perf_counter()
    rounds = 0
    while rounds < 200 and (
        rounds < 2
        or time.perf_counter() - start < budget
        or (rounds < 3 and time.perf_counter() - start < 60 * rounds)
    ):
        # Another order each time: who runs after whom decides what memory the allocator has at hand.
        for name in draw.sample(list(times), len(times)):
            times[name].append(seconds(case.contenders[name]))
        rounds += 1
    reference = statistics.median(times[case.reference])
    results = {}
    for name, values in times.items():
        first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
        results[name] = {
            "median_ms": round(middle * 1e3, 3),
            "quartiles_ms": [round(first * 1e3, 3), round(third * 1e3, 3)],
            "ratio": round(middle / reference, 3),
        }
        if "batch" in case.sizes and case.part != "core":
            results[name]["items_per_second"] = round(case.sizes["batch"] / middle, 2)
    return {"part": case.part, "what": case.what, **case.sizes, "reference": case.reference, "rounds": rounds} | {
        "results": results
    }


# Attention alone ---------------------------------------------------------------------------------------------------


class CoreModule(nn.Module):
    """What an attention function reads of its module."""

    def __init__(self, is_causal: bool):
        super().__init__()
        self.is_causal = is_causal


def core_cases(device: str) -> Iterator[Case]:
    """Yield attention alone: plain SDPA, the formula, what `sdpa` does here, and two SDPA calls."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for batch, tokens, heads, width, causal in CORE_SHAPES:
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
        vision = {"patch_size": 16, "image_size": image_size}
        vision |= {"hidden_act": "gelu"} if name.endswith("gelu") else {}
        model = CLIPModel(
            CLIPConfig(vision_config={"hidden_size": 768, "intermediate_size": 3072, **vision}, projection_dim=512)
        )
        model.set_attn_implementation("sdpa")
    else:
        model = DiffCLIPModel(DiffCLIPConfig(vision_config={"image_size": image_size}))
        model.set_attn_implementation(name.split()[0])
    return model.to(device, dtype).eval()


def inputs_of(model: nn.Module, batch: int, image_size: int) -> dict[str, torch.Tensor]:
    """Return random images and texts of full length for a model."""
    inputs = random_inputs(batch, image_size, model.config.text_config.max_position_embeddings)
    pixel_values = inputs["pixel_values"].to(model.device, model.dtype)
    return {"input_ids": inputs["input_ids"].to(model.device), "pixel_values": pixel_values}


def implementations(device: str) -> list[str]:
    """Return our implementations that run here."""
    return ["sdpa", "eager"] if device == "cpu" else ["sdpa", "eager", "flash_attention_2", "differential_triton"]


def tower_cases(device: str, batches: list[int]) -> Iterator[Case]:
    """Yield the towers' forward passes."""
    for image_size in (224, 336):
        names = [CLIP, *implementations(device)]
        models = {name: build(name, image_size, device) for name in names}
        gelu = build("CLIPModel sdpa, gelu", image_size, device)
        compiled = build("sdpa", image_size, device)
        for batch in batches:
            inputs = inputs_of(models[CLIP], batch, image_size)
            contenders = dict(models)
            if batch == 8:
                contenders |= {"CLIPModel sdpa, gelu": gelu}
                compiled.vision_model.compile(fullgraph=True)
                compiled.text_model.compile(fullgraph=True)
                contenders |= {"sdpa compiled": compiled}
            towers = ["image"] if image_size != 224 else ["image", "text"]
            for tower in towers:
                runs = {name: tower_run(model, tower, inputs) for name, model in contenders.items()}
                sizes = {"batch": batch, "image_size": image_size} if tower == "image" else {"batch": batch}
                yield Case("towers", f"{tower} tower", sizes, CLIP, runs)


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


def training_cases(device: str, batches: list[int]) -> Iterator[Case]:
    """Yield whole training steps."""
    names = [CLIP, *(name for name in implementations(device) if name != "eager")]
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


def table(results: list[dict]) -> str:
    """Return the measurements as a Markdown table, a line for each contender that isn't the reference."""
    lines = [
        "| case | reference | contender | reference's median | contender's | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        sizes = ", ".join(
            f"{key.replace('_', ' ')} {result[key]}"
            for key in ("batch", "tokens", "heads", "width", "image_size")
            if key in result
        )
        causal = ", causal" if result.get("causal") else ""
        base = result["results"][result["reference"]]
        for name, found in result["results"].items():
            if name != result["reference"]:
                case = f"{result['what']}{', ' if sizes else ''}{sizes}{causal}"
                lines.append(
                    f"| {case} | {result['reference']} | {name} | {amount(base)} | {amount(found)} | "
                    f"{found['ratio']:.2f} |"
                )
    return "\n".join(lines) + "\n"


# The README's rows: what to call it, and the case's fields.
SUMMARY = [
    ("Image tower, batch 8", {"part": "towers", "what": "image tower", "batch": 8, "image_size": 224}),
    ("Image tower at 336 px, batch 8", {"part": "towers", "what": "image tower", "batch": 8, "image_size": 336}),
    ("Text tower, batch 8", {"part": "towers", "what": "text tower", "batch": 8}),
    ("Training step, batch 8", {"part": "training", "batch": 8}),
    ("Its peak memory", {"part": "memory", "what": "peak memory, training", "batch": 8}),
    ("Attention alone, 8 × 197 tokens", {"part": "core", "what": "forward", "tokens": 197, "batch": 8}),
    ("Attention alone, 1 × 1,025 tokens", {"part": "core", "what": "forward", "tokens": 1025}),
    (
        "Attention alone, 8 × 77 tokens, causal",
        {"part": "core", "what": "forward", "tokens": 77, "causal": True, "batch": 8},
    ),
    ("`import` in a new process", {"part": "startup", "what": "import in a new process"}),
    ("`from_pretrained` in a new process", {"part": "startup", "what": "from_pretrained in a new process"}),
]


def summary(described: dict) -> str:
    """Return the README's table: `sdpa` and `eager` against CLIPModel, or against plain SDPA for attention alone."""
    lines = ["| | CLIPModel | DiffCLIPModel, `sdpa` | ratio | `eager`'s ratio |", "|---|---|---|---|---|"]
    for name, fields in SUMMARY:
        for result in described["results"]:
            if fields.items() <= result.items():
                found = result["results"]
                eager = found.get("eager", found.get("formula"))
                lines.append(
                    f"| {name} | {amount(found[result['reference']])} | {amount(found['sdpa'])} | "
                    f"{found['sdpa']['ratio']:.2f} | {format(eager['ratio'], '.2f') if eager else ''} |"
                )
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

    whole = [result for result in results if result["part"] in ("towers", "training", "memory", "startup")]
    if not whole:
        return
    labels = [
        f"{result['what']}"
        + (f", {result['image_size']} px" if "image_size" in result else "")
        + (f", batch {result['batch']}" if "batch" in result else "")
        for result in whole
    ]
    figure = Figure(figsize=(9, 0.45 * len(whole) + 1.4), layout="constrained")
    axis = figure.subplots()
    for offset, name in enumerate(("sdpa", "eager", "sdpa compiled")):
        rows = [row for row, result in enumerate(whole) if name in result["results"]]
        places = [row + 0.27 * (offset - 1) for row in rows]
        ratios = [whole[row]["results"][name]["ratio"] for row in rows]
        axis.barh(places, ratios, height=0.25, label=f"DiffCLIPModel {name}")
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(whole)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("÷ CLIPModel sdpa's of the same size (less is better)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small")
    axis.set_ylim(len(whole) - 0.4, -1.3)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the benchmark."""
    if (given := child_arguments()) is not None:
        tell_parent(peak_memory(*given))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=30, help="for each case, beyond its least number of rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batches", nargs="+", type=int, help="of the towers; 1 8 64, and 128 256 on a GPU")
    parser.add_argument("--training-batches", nargs="+", type=int, help="8 16; 64 256 on a GPU")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    batches = args.batches or ([1, 8, 64] if on_cpu else [1, 8, 64, 128, 256])
    training_batches = args.training_batches or ([8, 16] if on_cpu else [64, 256])

    output: Path = args.output
    before = json.loads(output.read_text())["results"] if output.exists() else []
    kept = {"memory": "training"}
    results = [result for result in before if kept.get(result["part"], result["part"]) not in args.only]
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "core": lambda: core_cases(args.device),
            "projections": lambda: projection_cases(args.device),
            "towers": lambda: tower_cases(args.device, batches),
            "training": lambda: training_cases(args.device, training_batches),
            "startup": lambda: startup_cases(Path(folder)),
        }
        for part in args.only:
            for case in tqdm(parts[part](), desc=part):
                results.append(measure(case, args.seconds))
                logger.info("%s", {name: found["ratio"] for name, found in results[-1]["results"].items()})
    if "training" in args.only:
        results += memory_results(args.device, [("forward", 8), *(("training", batch) for batch in training_batches)])
    results.sort(key=lambda result: [*PARTS, "memory"].index(result["part"]))
    described = {**measured_on("float32" if on_cpu else "bfloat16"), "results": results}
    write_report(output, described)
    output.with_suffix(".md").write_text(f"{summary(described)}\n{table(results)}")
    plot_core(results, output.with_name(f"{output.stem}_core.png"))
    plot_models(results, output.with_name(f"{output.stem}_model.png"))


if __name__ == "__main__":
    main()
