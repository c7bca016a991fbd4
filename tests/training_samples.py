"""Pictures, captions and tar shards, and the tiny model and processor that take them, made on the spot."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tiny import tiny_config
from tokenizer_helper import BYTES, tiny_clip_tokenizer
from transformers import CLIPTokenizer

from diffclip_hf import DiffCLIPImageProcessorPil, DiffCLIPModel, DiffCLIPProcessor


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A picture of soft colours, each seed its own."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "JPEG", **options) -> bytes:
    """The bytes of a file with the image."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def sample(number: int, caption: str | bytes | None = "") -> dict[str, bytes]:
    """The files of a sample by their extensions; the caption is its number unless given, none for None."""
    files = {"jpg": encoded(picture(number))}
    if caption is not None:
        text = caption or f"picture {number}"
        files["txt"] = text if isinstance(text, bytes) else text.encode()
    return files


def rows(numbers, captions=None) -> list[dict]:
    """Rows of pictures as a source gives them, with their captions, `picture 0` and so on unless given."""
    return [
        {"image": {"bytes": sample(number)["jpg"], "path": None}, "caption": caption}
        for number, caption in zip(numbers, captions or map("picture {}".format, numbers), strict=True)
    ]


def pair_dataset(count: int = 6, image: str = "image", caption: str = "caption") -> datasets.Dataset:
    """Pictures with captions, and a column that is neither."""
    columns = {
        image: [row["image"] for row in rows(range(count))],
        caption: [f"picture {number}" for number in range(count)],
        "width": [48] * count,
    }
    features = {image: datasets.Image(), caption: datasets.Value("string"), "width": datasets.Value("int32")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_tar(path: Path, samples: Iterable[Mapping[str, bytes]], first: int = 0, mode: str = "w") -> Path:
    """Write samples under the keys `first`, `first` + 1 and so on, in nine digits as img2dataset does."""
    with tarfile.open(path, mode) as archive:
        for key, files in enumerate(samples, first):
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key:09d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, sizes: Iterable[int], stats: bool = True) -> list[Path]:
    """Write shards of so many samples, captioned `picture 0` and upwards, with img2dataset's file of numbers."""
    paths, first = [], 0
    for number, size in enumerate(sizes):
        path = write_tar(folder / f"{number:05d}.tar", map(sample, range(first, first + size)), first)
        if stats:
            path.with_name(f"{number:05d}_stats.json").write_text(json.dumps({"count": size + 3, "successes": size}))
        paths.append(path)
        first += size
    return paths


def tiny_processor(tokenizer_class: type[CLIPTokenizer] = CLIPTokenizer) -> DiffCLIPProcessor:
    """A processor for images of 32×32 pixels and texts of bytes."""
    image_processor = DiffCLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return DiffCLIPProcessor(image_processor, tiny_clip_tokenizer(tokenizer_class))


def tiny_pair_model() -> DiffCLIPModel:
    """A model that takes what `tiny_processor` makes, with the weights that a new one starts with."""
    return DiffCLIPModel(tiny_config(text=BYTES))
