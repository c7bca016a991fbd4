"""One reader of pictures, whatever they come as: which are opened, how large they may be, and how they become RGB."""

import base64
import io
import os
import re
import struct
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from .image_fetching_diffclip import fetch_url, is_elsewhere, is_url, one_line, read_elsewhere


# Pillow's own limit against decompression bombs, of which it warns; from twice as many on it refuses by itself.
MAX_PIXELS = 89_478_485
# The whole resized picture is made before it is cut: 224 × 224 × 200 pixels take 30 MB.
MAX_ASPECT = 200
# Raster formats that Pillow decodes by itself: none that runs another program, as EPS does, and no mere stubs. TGA is
# last, for it has no signature. MPO is opened as JPEG. HEIF is there only with a plug-in.
RASTER_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "MPO", "PPM", "ICO", "ICNS"),
    *("DDS", "PCX", "PSD", "QOI", "SGI", "TGA"),
)
SIXTEEN_BIT_STEP = 257  # 65535 / 255
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TAKEN = "a path, an http(s) URL, base64 text, bytes, a file object or a Pillow image"
# Shorter texts are names; longer ones can't be.
_LEAST_BASE64, _LONGEST_NAME = 16, 255


class SizeError(ValueError):
    """A picture's size isn't allowed."""


class NoFileError(ValueError):
    """A text given as an image is neither a file's path nor anything else that has a picture."""


def check_size(width: int, height: int) -> None:
    """Check that a picture has pixels, not more than 89,478,485, and that no side is above 200 times the other.

    Raises:
        ValueError: It hasn't.
    """
    if height < 1 or width < 1:
        raise SizeError(f"An image has height {height} and width {width}; both must be at least 1 pixel.")
    if width * height > MAX_PIXELS:
        raise SizeError(
            f"An image has {width}×{height} pixels; it may have up to {MAX_PIXELS:,}. Make it smaller first."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise SizeError(
            f"An image has {width}×{height} pixels; a side may be up to {MAX_ASPECT} times the other. Crop it first."
        )


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1..8, and 1 where there's none or the metadata can't be read."""
    # Of broken metadata Pillow raises nearly anything, and the pixels are good without it.
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT_BY else 1


def _scale_transparent_level(image: Image.Image) -> None:
    """Put a PNG's transparent colour on the scale of its decoded pixels, of which Pillow tells nothing afterwards."""
    transparent, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    if image.format != "PNG" or not tiles or isinstance(transparent, (bytes, type(None))):
        return
    raw = tiles[0][3]
    if raw in ("L;2", "L;4"):
        # Of 2 and 4 bits, whose greatest levels become 255.
        image.info["transparency"] = transparent * 255 // (3 if raw == "L;2" else 15)
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in transparent)


def _decode(image: Image.Image) -> None:
    """Decode an image, and leave metadata that stands behind its pixels where it is broken."""
    tiles = list(getattr(image, "tile", ()))
    try:
        image.load()
    except Exception as error:
        # Nothing is left to decode, and what Pillow says of pixels is an OSError.
        done = isinstance(image, ImageFile.ImageFile) and not image.tile and not isinstance(error, OSError)
        if not done or image.format not in ("PNG", "TIFF"):
            if isinstance(image, ImageFile.ImageFile):
                # Else Pillow would take what it has decoded for the whole, the next time that the image is used.
                image.tile = tiles
            raise
        image.load()


def _check_opened(image: Image.Image) -> None:
    """Check an image that Pillow has opened without us."""
    check_size(*image.size)
    if image.format not in (None, *RASTER_FORMATS):
        raise ValueError(f"The image's format is {image.format}; it must be one of {', '.join(RASTER_FORMATS)}.")


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a Pillow image of any mode into an upright 8-bit RGB image without metadata.

    The EXIF orientation is applied, if it can be read. Whatever is transparent (RGBA, LA, PA, or a transparent colour
    of a palette or of a PNG) is laid over white. 16-bit greyscale (I;16, and I with values up to 65535) is divided by
    257 and rounded, where Pillow would clip it at 255. 1-bit, L, P, CMYK, YCbCr, LAB and HSV are converted as Pillow
    does, without colour profiles.

    Args:
        image: Any size that `check_size` allows. Of a file not yet decoded, the first frame or page.

    Raises:
        ValueError: The size isn't allowed; the image was opened from a file that isn't a raster picture, such as EPS;
            its mode is F, whose range isn't known; or its mode is I and a value is outside 0..65535.
    """
    _check_opened(image)
    _scale_transparent_level(image)
    _decode(image)
    # Only now is it known of formats that hold pictures in a frame, as ICO does.
    check_size(*image.size)
    turn = _UPRIGHT_BY.get(orientation(image))
    rgb = _without_alpha(image if turn is None else image.transpose(turn))
    # What it says of orientation and transparency is done.
    rgb.info = {}
    return rgb


def _without_alpha(image: Image.Image) -> Image.Image:
    """Return 8-bit RGB, what is transparent over white."""
    if image.mode == "F":
        raise ValueError(
            "The image's mode is F, floating point, which says nothing of its range; scale it to 0..255 and convert "
            "it to L or RGB first."
        )
    if image.mode in SIXTEEN_BIT_MODES:
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise ValueError(
                f"The image's mode is {image.mode} and its values are {samples.min()}..{samples.max()}; they must be "
                "in 0..65535."
            )
        levels = (samples + SIXTEEN_BIT_STEP // 2) // SIXTEEN_BIT_STEP
        if isinstance(image.info.get("transparency"), int):
            levels[samples == image.info["transparency"]] = 255
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, _to_rgba(image)).convert("RGB")
    return image.convert("RGB")


def _to_rgba(image: Image.Image) -> Image.Image:
    """Return RGBA, opaque where the transparent colour that the metadata names is none."""
    try:
        return image.convert("RGBA")
    except (TypeError, ValueError):
        if "transparency" not in image.info:
            raise
        opaque = image.copy()
        del opaque.info["transparency"]
        return opaque.convert("RGBA")


def _without_metadata(data: bytes, keep_used: bool) -> bytes | None:
    """Return a PNG or JPEG without the metadata that Pillow reads beside the pixels, or None for other formats.

    With `keep_used`, what `to_rgb` uses is kept: the EXIF data and a PNG's transparent colours.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kept, at = [data[:8]], 8
        while at + 8 <= len(data):
            (length,) = struct.unpack(">I", data[at : at + 4])
            kind = data[at + 4 : at + 8]
            # A capital letter means that the chunk is needed for the pixels.
            if kind[:1].isupper() or (keep_used and kind in (b"tRNS", b"eXIf")):
                kept.append(data[at : at + 12 + length])
            at += 12 + length
        return b"".join(kept)
    if data.startswith(b"\xff\xd8"):
        kept, at = [data[:2]], 2
        while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
            (length,) = struct.unpack(">H", data[at + 2 : at + 4])
            # Of application segments, Adobe's says how colours are coded.
            adobe = data[at + 1] == 0xEE and length >= 14
            exif = keep_used and data[at + 1] == 0xE1 and data[at + 4 : at + 8] == b"Exif"
            if not 0xE0 <= data[at + 1] <= 0xEF or adobe or exif:
                kept.append(data[at : at + 2 + length])
            at += 2 + length
        return b"".join([*kept, data[at:]])
    return None


def _open_raster(encoded: str | bytes) -> Image.Image:
    """Open a file, given by its path or content, if it is of an allowed format."""
    Image.init()
    file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    image = Image.open(file, formats=[name for name in RASTER_FORMATS if name in Image.OPEN])
    try:
        check_size(*image.size)
    except SizeError:
        image.close()
        raise
    return image


def _open_bare(encoded: str | bytes) -> Image.Image | None:
    """Open a file without its metadata, but for its orientation, or return None where that doesn't help."""
    for keep_used in (True, False):
        # The caller raises what Pillow said of the whole file.
        try:
            data = encoded if isinstance(encoded, bytes) else Path(encoded).read_bytes()
            if (bare := _without_metadata(data, keep_used)) is not None:
                return _open_raster(bare)
        except Exception:
            continue
    return None


def _open_encoded(encoded: str | bytes, name: str) -> Image.Image:
    """Open a file, without its metadata where that is broken; `name` says which picture it is."""
    # Of a damaged file Pillow and its plug-ins raise nearly anything.
    try:
        return _open_raster(encoded)
    except SizeError as error:
        raise SizeError(f"{name} can't be read: {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SizeError(
            f"{name} can't be read: it has too many pixels; it may have up to {MAX_PIXELS:,}. Make it smaller first."
        ) from error
    except Exception as error:
        if (image := _open_bare(encoded)) is not None:
            return image
        if not isinstance(error, UnidentifiedImageError):
            raise ValueError(f"{name} can't be read: {one_line(error, 300)}") from error
        raise ValueError(
            f"{name} isn't a picture of a format that is read, such as JPEG, PNG, WebP, GIF, BMP or TIFF."
        ) from error


def _is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


def _data_url(text: str) -> bytes:
    """Return what a data URL holds."""
    head, comma, body = text.partition(",")
    if not comma:
        raise ValueError(f"The data URL {text!r:.80} has no comma, behind which its data would be.")
    if not head.lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    data = _base64(urllib.parse.unquote(body))
    if data is None:
        raise ValueError(f"The data URL {text!r:.80} isn't base64.")
    return data


def _base64(text: str) -> bytes | None:
    """Return what base64 text holds, of the usual or the URL's alphabet, or None if it isn't any."""
    packed = re.sub(r"\s+", "", text).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except ValueError:
        return None


def _in_text(text: str) -> bytes | None:
    """Return the picture that base64 text holds, or None where it's something else, such as a path."""
    if len(text) < _LEAST_BASE64 or os.path.exists(text) or (data := _base64(text)) is None:
        return None
    try:
        _open_encoded(data, "The base64 text").close()
    except ValueError as error:
        # What isn't a picture may be the name of a file that isn't there.
        if len(text) > _LONGEST_NAME or not isinstance(error.__cause__, UnidentifiedImageError):
            raise
        return None
    return data


def _find(text: str) -> tuple[str | bytes, str]:
    """Return the file that a path, a URL or base64 text means, as its path or what it holds, and a name for errors."""
    if is_url(text):
        return fetch_url(text), f"What the URL {text!r:.200} gives"
    if _is_data_url(text):
        return _data_url(text), "The data URL"
    if (data := _in_text(text)) is not None:
        return data, "The base64 text"
    if is_elsewhere(text):
        return read_elsewhere(text), f"The file {text!r:.200}"
    if not os.path.exists(text):
        raise NoFileError(f"There is no file {text!r:.200}; an image is given as {_TAKEN}.")
    _check_file(text)
    return text, f"The file {text!r:.200}"


def _open_path(path: str) -> Image.Image:
    _check_file(path)
    return _open_encoded(path, f"The file {path!r:.200}")


def _check_file(path: str) -> None:
    """Check that there is a file, rather than a folder, a pipe or a device."""
    if not os.path.exists(path):
        raise ValueError(f"There is no file {path!r:.200}.")
    if not os.path.isfile(path):
        raise ValueError(f"{path!r:.200} isn't a file{' but a folder' if os.path.isdir(path) else ''}.")
    if not os.path.getsize(path):
        raise ValueError(f"The file {path!r:.200} is empty.")


def is_at_hand(path: str) -> bool:
    """Say whether there's a file of that path, or, of a URL, another file system or base64 text, whether there may be.

    Args:
        path: Of a picture, as `datasets` holds it undecoded. Nothing is fetched.
    """
    if is_url(path) or _is_data_url(path) or os.path.isfile(path) or is_elsewhere(path):
        return True
    # What is base64 of a picture that can't be read is there too.
    try:
        return _in_text(path) is not None
    except ValueError:
        return True


def read_encoded(image: Mapping[str, Any] | None) -> bytes:
    """Return the bytes of a picture as `datasets` holds it undecoded, wherever they are, as `open_image` finds them.

    Args:
        image: A mapping with `bytes`, or with a `path` of a file, an http(s) URL, base64 text or what fsspec opens.

    Raises:
        ValueError: There are none, or they can't be read.
    """
    if image is None or (image.get("bytes") is None and not image.get("path")):
        raise ValueError("There is no image.")
    if image.get("bytes") is not None:
        return image["bytes"]
    found, name = _find(os.fspath(image["path"]))
    if isinstance(found, bytes):
        return found
    try:
        return Path(found).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} can't be read: {error.strerror}.") from error


def _read_whole(file: Any) -> bytes:
    """Return what a file object holds from its start, or from where it stands if it can't go back."""
    # Such as a closed file's, or a connection's.
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)
        data = file.read()
    except Exception as error:
        raise ValueError(f"The file object can't be read: {one_line(error, 300)}") from error
    if not isinstance(data, bytes):
        raise ValueError(f"The file object gives a {type(data).__name__}; it must be opened as binary, by mode 'rb'.")
    return data


def _open_bytes(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ValueError(f"{name} is empty.")
    return _open_encoded(data, name)


def _open_any(source: Any) -> Image.Image:
    if isinstance(source, Mapping):
        if not {"bytes", "path"} & source.keys():
            raise ValueError(f"An image is a mapping of {', '.join(map(repr, source))}; it must have bytes or path.")
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise ValueError("There is no image: it is None.")
    if isinstance(source, str):
        return _open_encoded(*_find(source))
    if isinstance(source, os.PathLike):
        return _open_path(os.fsdecode(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(source), "What is given as bytes")
    if hasattr(source, "read"):
        return _open_bytes(_read_whole(source), "The file object")
    raise ValueError(f"An image is of type {type(source).__name__}; it must be {_TAKEN}.")


@contextmanager
def open_image(source: Any) -> Iterator[Image.Image]:
    """Open a picture for as long as the context lasts, after its size is checked, and mostly not yet decoded.

    Args:
        source: A path; an http(s) URL, which has 30 seconds, 50 MB and 5 redirects; base64 text, also as a data URL;
            a path that fsspec opens, such as `zip://a.png::pictures.zip`; bytes; a binary file object; what `datasets`
            holds undecoded, a mapping with bytes or path; or a Pillow image, which stays open.

    Raises:
        ValueError: In one line: there's nothing there; it can't be read, or isn't a picture of `RASTER_FORMATS`; or
            `check_size` refuses its size.
    """
    if isinstance(source, Image.Image):
        _check_opened(source)
        yield source
        return
    with _open_any(source) as image:
        yield image


def read_image(source: Any) -> Image.Image:
    """Read a picture and turn it into an upright 8-bit RGB image, by `to_rgb`.

    Args:
        source: As in `open_image`.

    Raises:
        ValueError: As `open_image` and `to_rgb` raise, or the picture is damaged.
    """
    with open_image(source) as image:
        try:
            return to_rgb(image)
        except ValueError:
            raise
        # Of a damaged file Pillow and its plug-ins raise nearly anything.
        except Exception as error:
            raise ValueError(f"The picture is damaged: {one_line(error, 300)}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Return what `read_image` makes of a Pillow image, and the image itself where it's upright RGB already.

    Raises:
        ValueError: As `read_image` raises.
    """
    if type(image) is Image.Image and image.mode == "RGB" and not image.info and orientation(image) == 1:
        check_size(*image.size)
        return image
    return read_image(image)


__all__ = ["as_rgb", "check_size", "is_at_hand", "open_image", "orientation", "read_encoded", "read_image", "to_rgb"]
