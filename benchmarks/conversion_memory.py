"""Measure the memory that a conversion takes, for a ViT-B/16 inside a checkpoint with its optimizer's state.

python benchmarks/conversion_memory.py [--variant diffclip] [--output benchmarks/conversion_memory.json]

The weights are the formula of the tests, the optimizer's state as large as AdamW's: two numbers a parameter. The
conversion runs in a process of its own, whose memory is that of the process at its highest (VmHWM: code, heap and
every page of a mapped file that is in memory) less what it was when everything had been imported.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import MIB, child_arguments, make_parser, measured_on, memory, run_child, tell_parent, write_report


ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
LIMIT = 1.3

logger = logging.getLogger("conversion_memory")


def write_checkpoint(path: Path, variant: str) -> int:
    """Write a checkpoint as SLIP's trainer does; return the bytes of its weights."""
    from parity_models import formula_state_dict

    weights = {f"module.{key}": tensor for key, tensor in formula_state_dict(variant).items()}
    moments = {
        i: {"step": torch.tensor(1.0), "exp_avg": 0.1 * tensor, "exp_avg_sq": tensor.square()}
        for i, tensor in enumerate(weights.values())
    }
    optimizer = {"state": moments, "param_groups": [{"lr": 5e-4, "params": list(moments)}]}
    args = argparse.Namespace(model=variant)
    torch.save({"epoch": 40, "state_dict": weights, "optimizer": optimizer, "best_acc1": 0.0, "args": args}, path)
    return sum(tensor.nbytes for tensor in weights.values())


def convert(arguments: Sequence[str]) -> int:
    """Convert in this process, and tell its memory before and after."""
    from diffclip_hf.conversion import convert_original_checkpoint

    before = memory()
    code = convert_original_checkpoint.main(list(arguments))
    tell_parent({"before": before, "after": memory()})
    return code


def measure(variant: str) -> dict:
    """Return the measurement, with the machine that it was taken on."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint_best.pt"
        weights = write_checkpoint(checkpoint, variant)
        arguments = ["--checkpoint", str(checkpoint), "--output-dir", f"{folder}/out", "--variant", variant]
        found = run_child(__file__, *arguments)
        size = checkpoint.stat().st_size
        report = json.loads((Path(folder) / "out" / "conversion_report.json").read_text())
    peak = found["after"]["VmHWM"] - found["before"]["VmRSS"]
    return {
        "variant": variant,
        "checkpoint_bytes": size,
        "weights_bytes": weights,
        "imports_bytes": found["before"]["VmRSS"],
        "peak_bytes": found["after"]["VmHWM"],
        "peak_less_imports_bytes": peak,
        "peak_less_imports_over_weights": round(peak / weights, 3),
        "limit": LIMIT,
        "gate_largest_error": report["gate"]["largest_error"],
        "gate_inputs": list(report["gate"]["errors"]),
        # The conversion's versions are of more packages.
        **measured_on(),
        "versions": report["versions"],
    }


def main() -> int:
    """Run the measurement; return 1 where it is over the limit."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if (given := child_arguments()) is not None:
        return convert(given)
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--variant", action="append", help="may be given again (default: diffclip and clip)")
    args = parser.parse_args()
    results = [measure(variant) for variant in args.variant or ["diffclip", "clip"]]
    write_report(args.output, results)
    for result in results:
        sys.stdout.write(
            f"{result['variant']}: {result['peak_less_imports_bytes'] / MIB:.0f} MiB at the highest beyond imports "
            f"({result['imports_bytes'] / MIB:.0f} MiB), {result['peak_less_imports_over_weights']} x the weights "
            f"({result['weights_bytes'] / MIB:.0f} MiB), from a checkpoint of {result['checkpoint_bytes'] / MIB:.0f} "
            "MiB\n"
        )
    return int(any(result["peak_less_imports_over_weights"] > LIMIT for result in results))


if __name__ == "__main__":
    sys.exit(main())
