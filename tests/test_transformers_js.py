"""What the ONNX export writes, loaded by transformers.js in Node as its users load it, against PyTorch."""

import functools
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from test_docs import commands, one_block
from transformers import AutoProcessor
from transformers_js import PACKAGES, run_node

from diffclip_hf import DiffCLIPImageProcessorPil, DiffCLIPModel, export_onnx


ROOT = Path(__file__).parent.parent
PAGE = "docs/guides/deploy.md"
EMBEDDED = ROOT / "embedded" / "diffclip-emoji"
PICTURES = sorted((ROOT / "embedded" / "pictures").glob("*.png"))
LABELS = [path.stem.replace("-", " ") for path in PICTURES]
# Capitals, marks, digits, spaces and line breaks, other scripts, an emoji, and more tokens than the model takes.
TEXTS = [
    *LABELS,
    "a photo of a cat",
    "Two dogs, one ball.",
    "It's 12 o'clock!",
    "a very big house " * 30,
    "Größe & café",
    "火箭",
    "🚀 to the moon",
    "red  car\n on a road",
    "UPPER CASE",
    "x",
    "<b>bold</b> 100%",
    "a drawing of a yellow flower in a green field, under a blue sky with three clouds",
]


# A picture is whatever has these four fields.
FIT = """
import { readFile } from "node:fs/promises";
import { fit } from "./fit.mjs";

class Picture {
  constructor(data, width, height, channels) {
    Object.assign(this, { data, width, height, channels });
  }
}
const jobs = JSON.parse(await readFile("jobs.json", "utf8"));
const fitted = jobs.map(({ data, width, height, channels, options }) =>
  Array.from(fit(new Picture(Uint8Array.from(data), width, height, channels), options).data),
);
console.log(JSON.stringify(fitted));
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the guide's command was run, on the embedded model."""
    folder = tmp_path_factory.mktemp("onnx")
    (folder / "embedded").symlink_to(ROOT / "embedded")
    (words,) = (words for _, words in commands(PAGE) if words[:2] == ["-m", "diffclip_hf.export_onnx"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert export_onnx.main([*words[2:], "--runs", "0"]) == 0
    return folder


def cosines(found: list[list[float]], expected: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(torch.tensor(found, dtype=torch.float64), expected.double())


@torch.inference_mode()
def test_embeddings_and_scores_in_node_are_pytorchs(folder, tmp_path):
    assert (len(PICTURES), len(TEXTS)) == (8, 20)
    model, processor = DiffCLIPModel.from_pretrained(EMBEDDED), AutoProcessor.from_pretrained(EMBEDDED)
    images = [Image.open(path) for path in PICTURES]
    inputs = processor(text=TEXTS, images=images, return_tensors="pt", truncation=True)
    pixels = inputs["pixel_values"]
    job = {
        "models": str(folder / "build"),
        "name": "emoji-onnx",
        "texts": TEXTS,
        "labels": LABELS,
        "pictures": [str(path) for path in PICTURES],
        "pixels": {"data": pixels.flatten().tolist(), "dims": list(pixels.shape)},
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    code = (Path(__file__).parent / "transformers_js.mjs").read_text(encoding="utf-8")
    found = json.loads(run_node(code, tmp_path, "job.json"))

    # transformers.js cuts the end of a long text off, and the graph puts it back.
    ids, width = inputs["input_ids"], inputs["input_ids"].shape[1]
    whole = [row for row, text in enumerate(TEXTS) if len(text) < 100]
    assert len(whole) == 19
    assert [found["input_ids"][row][:width] for row in whole] == ids[whole].tolist()
    text_embeds = model.get_text_features(ids, inputs["attention_mask"]).pooler_output
    image_embeds = model.get_image_features(pixels).pooler_output
    own = torch.tensor(found["pixel_values"]).view(pixels.shape)
    own_embeds = model.get_image_features(own).pooler_output
    for dtype, least in (("fp32", 0.999), ("q8", 0.99)):
        outputs = found[dtype]
        assert cosines(outputs["text_embeds"], text_embeds).min() >= least
        assert cosines(outputs["same"], image_embeds).min() >= least
        assert cosines(outputs["fitted"], image_embeds).min() >= least
        assert cosines(outputs["own"], own_embeds).min() >= least
        # It resizes by an interpolation of its own, without antialiasing.
        assert cosines(outputs["own"], image_embeds).min() >= 0.95
    expected = model(pixel_values=own, **processor(text=LABELS, return_tensors="pt")).logits_per_image.softmax(-1)
    for dtype, most in (("fp32", 1e-4), ("q8", 0.1)):
        for row, scores in zip(expected.tolist(), found[dtype]["scores"], strict=True):
            by_label = {score["label"]: score["score"] for score in scores}
            assert [by_label[label] for label in LABELS] == pytest.approx(row, abs=most)


def test_pictures_are_fitted_in_node_as_in_python(tmp_path):
    """Of noise, where every pixel counts: made smaller and larger, wide and high, of 1, 3 and 4 channels."""
    generator = np.random.default_rng(0)
    sizes = [(200, 133), (97, 301), (30, 40), (48, 48), (49, 48), (640, 427)]
    modes = ["RGB", "RGB", "RGBA", "L", "RGB", "RGBA"]
    jobs, expected = [], []
    for (width, height), mode in zip(sizes, modes, strict=True):
        channels = len(mode)
        pixels = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
        image = Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)
        for resample in (2, 3):
            options = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}, "resample": resample}
            fitted = DiffCLIPImageProcessorPil(**options, do_rescale=False, do_normalize=False)(image)
            expected.append(np.moveaxis(np.asarray(fitted["pixel_values"][0]), 0, -1))
            shape = {"width": width, "height": height, "channels": channels}
            jobs.append({"data": pixels.flatten().tolist(), **shape, "options": {**options, "do_center_crop": True}})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    shutil.copyfile(export_onnx.PAGE_FOLDER / "fit.mjs", tmp_path / "fit.mjs")
    found = json.loads(run_node(FIT, tmp_path))
    for row, wanted, job in zip(found, expected, jobs, strict=True):
        difference = np.abs(np.reshape(row, wanted.shape) - wanted)
        # Pillow 13 resizes the height of tall pictures first, and all of them round in between.
        height_first = int(PIL.__version__.split(".")[0]) >= 13 and job["height"] > job["width"]
        # Python's weights are rounded to 22 bits.
        most, share = (5, 0.25) if height_first else (1, 0.01)
        assert difference.max() <= most
        assert (difference > 0).mean() <= share


def test_the_guides_snippet_of_python(folder, warm_python):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    printed = warm_python.run("-c", one_block(PAGE, "onnxruntime"), folder=folder, environment=environment)
    similarities = [float(number) for number in re.findall(r"[-\d.]+", printed)]
    assert similarities[0] > similarities[1], "a pizza is more like 'pizza' than like 'rocket'"


def test_the_guides_snippet_for_node(folder):
    (code,) = re.findall(r"```js\n(.*?)```", (ROOT / PAGE).read_text(encoding="utf-8"), re.DOTALL)
    assert run_node(code, folder).splitlines() == re.findall(r"^// (.*)", code, re.MULTILINE)


@pytest.fixture
def site(folder, tmp_path) -> Iterator[str]:
    """The address of a server of what was exported, with the library and the runtime beside it."""
    served = tmp_path / "site"
    shutil.copytree(folder / "build" / "emoji-onnx", served)
    page = (served / "index.html").read_text()
    # As the guide says it's done by hand.
    for name, value in {"library": "./library/transformers.min.js", "runtime": "./runtime/"}.items():
        page, changed = re.subn(f'data-{name}="[^"]*"', f'data-{name}="{value}"', page)
        assert changed == 1
    (served / "index.html").write_text(page)
    (served / "library").symlink_to(PACKAGES / "@huggingface" / "transformers" / "dist")
    (served / "runtime").symlink_to(PACKAGES / "onnxruntime-web" / "dist")
    handler = functools.partial(QuietHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.slow
@torch.inference_mode()
def test_the_page_classifies_in_the_browser_alone(request, tmp_path):
    browser = pytest.importorskip("demo_browser", reason="it drives the browser, and the extra `dev` has Selenium")
    if None in (browser.CHROMIUM, browser.DRIVER) or not PACKAGES.is_dir():
        pytest.skip("chromium, chromedriver or the npm package @huggingface/transformers is missing")
    url = request.getfixturevalue("site")
    large = Image.open(PICTURES[4]).resize((400, 300)).convert("RGBA")
    large.putalpha(128)
    large.save(tmp_path / "pizza.png")
    (tmp_path / "words.txt").write_text("no picture")
    model, processor = DiffCLIPModel.from_pretrained(EMBEDDED), AutoProcessor.from_pretrained(EMBEDDED)

    def expected(path: Path, labels: list[str]) -> dict[str, float]:
        logits = model(**processor(text=labels, images=Image.open(path), return_tensors="pt")).logits_per_image
        return dict(zip(labels, (100 * logits.softmax(-1)[0]).tolist(), strict=True))

    with browser.chromium(1280, 900) as driver:
        page = browser.DemoPage(driver, url, "#status")

        def shown() -> dict[str, float]:
            rows = [words.split("\n") for words in page.read("#scores li", "element.innerText")]
            return {label: float(score.removesuffix(" %")) for label, score in rows}

        def write(field: str, value: str) -> None:
            page.find(f"#{field}")[0].clear()
            page.find(f"#{field}")[0].send_keys(value)

        def says(words: str) -> None:
            page.wait(lambda: words in page.find("#status")[0].text)

        says("Choose a picture.")
        write("labels", "guitar, rocket,, pizza\nguitar")
        for path in (PICTURES[2], tmp_path / "pizza.png"):
            page.find("#file")[0].send_keys(str(path))
            # int8 against float32, of a model whose logits are large.
            of_picture = pytest.approx(expected(path, ["guitar", "rocket", "pizza"]), abs=10)
            page.wait(lambda of_picture=of_picture: shown() == of_picture)
            assert list(shown().values()) == sorted(shown().values(), reverse=True)
            write("labels", "rocket, pizza, guitar")
            page.wait(lambda: len(shown()) == 3)
            # What is shown goes as soon as another picture is chosen, not when that one is read.
            choose = "document.querySelector('#file').dispatchEvent(new Event('change'))"
            assert driver.execute_script(f"{choose}; return document.querySelectorAll('#scores li').length") == 0
        page.find("#file")[0].send_keys(str(tmp_path / "words.txt"))
        says("can't be read as a picture")
        assert page.find("#shown")[0].text == "Choose a picture, drop one here, or paste one."
        write("labels", " ,")
        page.find("#file")[0].send_keys(str(PICTURES[0]))
        says("Write at least one label.")
        write("template", "a drawing")
        write("labels", "pizza")
        says("The sentence needs {}")
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        asked = {
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        }
        assert {address for address in asked if address.startswith("http") and not address.startswith(url)} == set()
