"""Measure the server of docs/guides/deploy.md: requests a second and latencies, beside CLIPModel's, at ViT-B/16.

python benchmarks/serving.py [--clients 1 8 32] [--seconds 10] [--output benchmarks/serving.json]

Each server is the guide's own code in a process of its own. A client is a thread of this process that posts a JPEG
picture of 640×480 pixels, and the next once it has the answer. The contenders take turns at each number of clients:

- DiffCLIP: as in the guide.
- DiffCLIP, one by one: with batches of one.
- CLIPModel: Transformers', of the same size and with the same activations, SDPA attention too.

The weights are random. Requests still under way when the time is up are waited for, and count. A table (Markdown)
for the guide is written beside the JSON.
"""

import http.client
import io
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import uvicorn
from measuring import CHILD, child_arguments, clip_processor, make_parser, measured_on, tell_parent, write_report
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel

from diffclip_hf import DiffCLIPConfig, DiffCLIPModel


GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "deploy.md"
CONTENDERS = ("DiffCLIP", "DiffCLIP, one by one", "CLIPModel")


class EncodingCLIP(CLIPModel):
    """CLIPModel with the two methods of DiffCLIPModel that the guide's server calls."""

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return images' embeddings of length 1."""
        return nn.functional.normalize(self.get_image_features(pixel_values).pooler_output, dim=-1)

    def encode_text(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Return texts' embeddings of length 1."""
        return nn.functional.normalize(self.get_text_features(**inputs).pooler_output, dim=-1)


def build(contender: str) -> nn.Module:
    """Build a contender's model with random weights."""
    torch.manual_seed(0)
    if contender == "CLIPModel":
        vision = {"hidden_size": 768, "intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu"}
        model = EncodingCLIP(CLIPConfig(vision_config=vision, projection_dim=512))
        model.set_attn_implementation("sdpa")
        return model.eval()
    return DiffCLIPModel(DiffCLIPConfig()).eval()


def serve(contender: str) -> None:
    """Run the guide's server with a contender's model, on a port that is told to the parent, until it is ended."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "FastAPI()" in block)
    names: dict[str, Any] = {"__name__": "serve"}
    with (
        mock.patch.object(AutoModel, "from_pretrained", return_value=build(contender)),
        mock.patch.object(AutoProcessor, "from_pretrained", return_value=clip_processor()),
    ):
        exec(compile(code, str(GUIDE), "exec"), names)
    if contender.endswith("one by one"):
        names["images"].largest = 1
    listening = socket.create_server(("127.0.0.1", 0))
    tell_parent(listening.getsockname()[1])
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(names["app"], log_level="error")).run([listening])


def make_picture() -> bytes:
    """Return a JPEG picture of 640×480 pixels, smooth as a photograph rather than noise."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def post_until(port: int, picture: bytes, end: float) -> list[float]:
    """Post a picture again and again until a time; return each request's seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    latencies = []
    while (start := time.perf_counter()) < end:
        connection.request("POST", "/image", picture, {"Content-Type": "image/jpeg"})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"The server answered {answer.status}: {body[:200]!r}")
        latencies.append(time.perf_counter() - start)
    connection.close()
    return latencies


def cpu_seconds(process: int) -> float:
    """Return what a process has used of the processor's time, as Linux counts it."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(server: int, port: int, picture: bytes, clients: int, seconds: float) -> dict[str, float]:
    """Return the requests a second of a number of clients, their latencies, and the server's processor time."""
    start, used = time.perf_counter(), cpu_seconds(server)
    with ThreadPoolExecutor(clients) as threads:
        each = list(threads.map(lambda _: post_until(port, picture, start + seconds), range(clients)))
    took, used = time.perf_counter() - start, cpu_seconds(server) - used
    latencies = sorted(latency for found in each for latency in found)
    return {
        "requests": len(latencies),
        "requests_per_second": round(len(latencies) / took, 2),
        "median_latency_ms": round(1000 * statistics.median(latencies), 1),
        "p95_latency_ms": round(1000 * float(np.quantile(latencies, 0.95)), 1),
        "cpu_ms_per_request": round(1000 * used / len(latencies), 1),
    }


def make_table(results: list[dict[str, Any]]) -> str:
    """Return the guide's table."""
    rows = ["| clients | model | requests/s | median | 95% within | processor time |", "|---|---|---|---|---|---|"]
    for row in results:
        times = (f"{row[name]:.0f} ms" for name in ("median_latency_ms", "p95_latency_ms", "cpu_ms_per_request"))
        rows.append(f"| {row['clients']} | {row['model']} | {row['requests_per_second']:.1f} | {' | '.join(times)} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Run the measurement."""
    if contender := child_arguments():
        serve(*contender)
        return 0
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    args = parser.parse_args()
    commands = [[sys.executable, __file__, CHILD, contender] for contender in CONTENDERS]
    servers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    picture, results = make_picture(), []
    try:
        ports = [int(server.stdout.readline()) for server in servers]
        for server, port in zip(servers, ports, strict=True):
            measure(server.pid, port, picture, 2, 1)
        for clients in args.clients:
            for contender, server, port in zip(CONTENDERS, servers, ports, strict=True):
                found = measure(server.pid, port, picture, clients, args.seconds)
                results.append({"model": contender, "clients": clients, **found})
                sys.stdout.write(f"{results[-1]}\n")
                sys.stdout.flush()
    finally:
        for server in servers:
            server.terminate()
    versions = measured_on(packages=("fastapi", "uvicorn"))
    write_report(args.output, {"picture": "JPEG, 640x480", "size": "ViT-B/16", "results": results, **versions})
    args.output.with_suffix(".md").write_text(make_table(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
