"""Client processes against the tests' Hub, and the tiny model that they load."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from hub_server import HubServer
from PIL import Image
from training_samples import tiny_pair_model, tiny_processor

from diffclip_hf import DiffCLIPTokenizer


# A later import of the package fails as if it weren't installed.
WITHOUT_PACKAGE = "import sys; sys.modules['diffclip_hf'] = None\n"
# What a client that has the package runs of it is measured, up to the process's end.
_MEASURED = f"""
import atexit, contextlib, sys
sys.path.append({str(Path(__file__).parent)!r})
from measuring import measured
_measuring = contextlib.ExitStack()
_measuring.enter_context(measured())
atexit.register(_measuring.close)
"""
# Answers a line of JSON, {"result"} or {"error"}, to every line of JSON, a string of code.
_LOOP = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sleeps, sleep = [], time.sleep
def short_sleep(seconds):
    sleeps.append(seconds)
    sleep(min(seconds, 0.02))
time.sleep = short_sleep
for line in sys.stdin:
    names = {"sleeps": sleeps}
    sleeps.clear()
    try:
        exec(json.loads(line), names)
        answer = {"result": names.get("result")}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    names.clear()
    answers.write(json.dumps(answer) + "\\n")
    answers.flush()
"""


class ClientError(Exception):
    """What the code in the client process raised."""


class Client:
    """A Python process, with the Hub's environment, that runs code line by line; its waits are cut short.

    Code finds in `sleeps` how long the client's own code wanted to wait, and gives back what it assigns to `result`.
    """

    def __init__(self, hub: HubServer, folder: Path, prelude: str = ""):
        self.home, self.log = folder / "home", folder / "log"
        folder.mkdir(parents=True, exist_ok=True)
        measuring = "" if prelude.startswith(WITHOUT_PACKAGE) else _MEASURED
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", measuring + prelude + _LOOP],
                cwd=folder,
                env=hub.environment(self.home),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __call__(self, code: str):
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ClientError(f"The client ended: {self.log.read_text()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def left_over(self) -> list[Path]:
        """Return the unfinished downloads in the cache."""
        return list(self.home.rglob("*.incomplete"))


def save_tiny(folder: Path) -> list[list[float]]:
    """Save a tiny model and its processor, without code; return the logits of two texts for `picture()`."""
    torch.manual_seed(0)
    model, processor = tiny_pair_model().eval(), tiny_processor(DiffCLIPTokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with torch.no_grad():
        inputs = processor(text=["a cat", "a dog"], images=picture(), return_tensors="pt")
        return model(**inputs).logits_per_image.tolist()


def picture() -> Image.Image:
    return Image.effect_mandelbrot((60, 50), (-2, -1.5, 1, 1.5), 50).convert("RGB")
