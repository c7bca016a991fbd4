import base64
import contextlib
import errno
import http.server
import io
import os
import struct
import threading
import time
import urllib.parse
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, TiffImagePlugin
from transformers.utils import is_torchvision_available

from diffclip_hf import DiffCLIPImageProcessor, DiffCLIPImageProcessorPil
from diffclip_hf.model import image_fetching_diffclip
from diffclip_hf.model.image_reading_diffclip import (
    check_size,
    is_at_hand,
    open_image,
    read_encoded,
    read_image,
    to_rgb,
)


BACKENDS = [DiffCLIPImageProcessorPil] + [DiffCLIPImageProcessor] * is_torchvision_available()
AS_IT_IS = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOURS = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def over_white() -> tuple[bytes, np.ndarray]:
    rgba = np.dstack([COLOURS, np.where(GREY > 100, 255, 0).astype(np.uint8)])
    return encoded(Image.fromarray(rgba)), np.where((GREY > 100)[..., None], COLOURS, 255)


def sixteen_bits() -> tuple[bytes, np.ndarray]:
    return encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), np.stack([GREY] * 3, axis=-1)


def on_its_side() -> tuple[bytes, np.ndarray]:
    # 6: the stored picture's first row is the upright one's right column.
    return encoded(Image.fromarray(COLOURS), exif=turned(6)), COLOURS.transpose(1, 0, 2)[:, ::-1]


PICTURE = encoded(Image.fromarray(COLOURS))


class Pages(http.server.BaseHTTPRequestHandler):
    """Answers each path in a way of its own."""

    pages: dict[str, tuple[int, bytes, dict[str, str]]] = {}

    def do_GET(self):
        with contextlib.suppress(ConnectionError):
            self.answer(self.path)

    def answer(self, path):
        if path == "/endless":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(bytes(1 << 16))
        if path in ("/slow-body", "/slow-head"):
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if path == "/slow-body" else b""))
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)
        status, body, headers = self.pages[path]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    Pages.pages = {
        "/picture": (200, PICTURE, {}),
        "/a%20b%C3%BC.png": (200, PICTURE, {}),
        "/moved": (302, b"", {"Location": "/picture"}),
        "/not-found": (404, PICTURE, {}),
        "/part": (206, PICTURE, {}),
        "/broken": (500, PICTURE, {}),
        "/page": (200, b"<!DOCTYPE html><html></html>", {"Content-Type": "image/png"}),
        "/loop": (302, b"", {"Location": "/loop"}),
        "/to-file": (302, b"", {"Location": f"file://{__file__}"}),
        "/to-ftp": (302, b"", {"Location": "ftp://127.0.0.1/picture"}),
        "/short": (200, PICTURE[:50], {"Content-Length": str(len(PICTURE))}),
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("make", [over_white, sixteen_bits, on_its_side])
def test_every_door_gives_the_same_pixels(make, server, tmp_path):
    data, expected = make()
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("in/picture.png", data)
    in_zip = f"zip://in/picture.png::{tmp_path / 'pictures.zip'}"
    Pages.pages["/door"] = (200, data, {})
    text = base64.b64encode(data).decode()
    doors = {
        "path": path,
        "path as text": str(path),
        "bytes": data,
        "memoryview": memoryview(data),
        "base64": text,
        "base64 in lines": base64.encodebytes(data).decode(),
        "base64 of URLs": base64.urlsafe_b64encode(data).decode().rstrip("="),
        "data URL": f"data:image/png;base64,{text}",
        "URL": f"{server}/door",
        "file URL": path.as_uri(),
        "zip": in_zip,
        "mapping of bytes": {"bytes": data, "path": "nowhere.png"},
        "mapping of a path": {"bytes": None, "path": in_zip},
        "file object": io.BytesIO(data),
    }
    for name, source in doors.items():
        rgb = read_image(source)
        assert (rgb.mode, rgb.info) == ("RGB", {}), name
        np.testing.assert_array_equal(np.asarray(rgb), expected, err_msg=name)
        if isinstance(source, str):
            assert read_encoded({"bytes": None, "path": source}) == data, name
            assert is_at_hand(source), name
    for backend in BACKENDS:
        for name, source in doors.items():
            values = backend()(source, return_tensors="pt", **AS_IT_IS)["pixel_values"][0]
            np.testing.assert_array_equal(values.permute(1, 2, 0), expected, err_msg=name)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(read_image(image)), expected)
    # What has been turned isn't turned again.
    np.testing.assert_array_equal(np.asarray(read_image(read_image(path))), expected)


def test_an_image_stays_undecoded_and_the_callers_own_stay_open(tmp_path):
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (800, 600), "red").save(path)
    with open_image(path) as image:
        image.draft("RGB", (100, 75))
        assert to_rgb(image).size == (100, 75)
    with path.open("rb") as file:
        file.read(7)
        assert read_image(file).size == (800, 600)
        assert not file.closed
    with Image.open(path) as image:
        with open_image(image) as same:
            assert same is image
        assert image.getpixel((0, 0))[0] > 250
    reading, writing = os.pipe()
    os.write(writing, PICTURE)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert read_image(pipe).size == (4, 3)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(kind: bytes, data: bytes, behind: bool = False) -> bytes:
    """The picture with a chunk behind its header (8 + 25 bytes) or before its end (12 bytes)."""
    place = len(PICTURE) - 12 if behind else 33
    return PICTURE[:place] + chunk(kind, data) + PICTURE[place:]


def jpeg_with(marker: int, data: bytes, **options) -> bytes:
    jpeg = encoded(Image.fromarray(COLOURS), "JPEG", quality=95, **options)
    return jpeg[:20] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + jpeg[20:]


def tiff_with_text_as_xmp() -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700] = TiffImagePlugin.TiffTags.ASCII
    tags[700] = "text"
    return encoded(Image.fromarray(COLOURS), "TIFF", tiffinfo=tags)


TEXT_BOMB = b"Comment\0\0" + zlib.compress(bytes(5_000_000))
BROKEN = {
    "png-exif": png_with(b"eXIf", b"\xa8 not exif"),
    "png-raw-exif": png_with(b"tEXt", b"Raw profile type exif\0\nexif\n 20\nnot hexadecimal\n"),
    "png-text-bomb": png_with(b"zTXt", TEXT_BOMB),
    "png-text-bomb-behind": png_with(b"zTXt", TEXT_BOMB, behind=True),
    "png-profile": png_with(b"iCCP", b""),
    "png-resolution": png_with(b"pHYs", b"\0"),
    "png-resolution-behind": png_with(b"pHYs", b"\0", behind=True),
    "png-gamma": png_with(b"gAMA", b"\0"),
    "png-transparency": png_with(b"tRNS", b"\0"),
    "png-animation": png_with(b"acTL", bytes(8)),
    "jpeg-exif": jpeg_with(0xE1, b"Exif\0\0\xa8 not exif"),
    "jpeg-exif-cut": jpeg_with(0xE1, b"Exif\0\0" + turned(6).tobytes()[6:-9]),
    "jpeg-profile": jpeg_with(0xE2, b"ICC_PROFILE\0\1"),
    "jpeg-index": jpeg_with(0xE2, b"MPF\0II*\0"),
    "jpeg-xmp": jpeg_with(0xE1, b'http://ns.adobe.com/xap/1.0/\0tiff:Orientation="9" \xff'),
    "jpeg-adobe": jpeg_with(0xEE, b"Adobe"),
    "webp-exif": encoded(Image.fromarray(COLOURS), "WEBP", lossless=True, exif=b"Exif\0\0II*\0\xff"),
    "tiff-xmp": tiff_with_text_as_xmp(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_metadata_never_costs_the_picture(kind, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(BROKEN[kind])
    # JPEG is what Pillow makes of the same picture without the segment.
    expected = COLOURS
    if kind.startswith("jpeg"):
        with Image.open(io.BytesIO(encoded(Image.fromarray(COLOURS), "JPEG", quality=95))) as image:
            expected = np.asarray(image)
    for source in (path, BROKEN[kind]):
        np.testing.assert_array_equal(np.asarray(read_image(source)), expected)


@pytest.mark.parametrize("kind", ["png-raw-exif", "png-resolution-behind", "jpeg-exif", "tiff-xmp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_images_with_broken_metadata_are_processed(kind, backend):
    with Image.open(io.BytesIO(BROKEN[kind])) as image:
        assert backend()(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)
        copied = image.convert("RGB")
    assert backend()(copied, return_tensors="pt", **AS_IT_IS)["pixel_values"].shape == (1, 3, 3, 4)


def test_the_orientation_stays_where_other_metadata_is_broken():
    profile = jpeg_with(0xE2, b"ICC_PROFILE\0\1", exif=turned(6))
    assert read_image(profile).size == (3, 4)
    resolution = encoded(Image.fromarray(COLOURS), exif=turned(6))
    resolution = resolution[:33] + chunk(b"pHYs", b"\0") + resolution[33:]
    assert read_image(resolution).size == (3, 4)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


@pytest.mark.parametrize("name", ["picture.png", "picture.eps", "picture"])
@pytest.mark.parametrize(
    "content",
    [EPS, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89HDF\r\n\x1a\n" + bytes(99), b"%PDF-1.4\n", b"GIF"],
    ids=["eps", "svg", "hdf", "pdf", "gif"],
)
def test_only_raster_pictures_are_opened(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    for source in (path, content, "data:image/png;base64," + base64.b64encode(content).decode()):
        with pytest.raises(ValueError, match="isn't a picture of a format that is read"):
            read_image(source)


def test_an_opened_postscript_file_is_not_run(monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was run"))
    with Image.open(io.BytesIO(EPS)) as image:
        with pytest.raises(ValueError, match="format is EPS"), open_image(image):
            pass
        for process in (to_rgb, read_image, *(backend() for backend in BACKENDS)):
            with pytest.raises(ValueError, match="format is EPS; it must be one of JPEG, PNG"):
                process(image)


def test_sizes_have_limits():
    check_size(1, 1)
    check_size(1, 200)
    check_size(10_000, 8_947)  # 89,470,000
    with pytest.raises(ValueError, match="height 0 and width 3"):
        check_size(3, 0)
    with pytest.raises(ValueError, match=r"201×1 pixels; a side may be up to 200 times"):
        check_size(201, 1)
    with pytest.raises(ValueError, match=r"10000×8948 pixels; it may have up to 89,478,485"):
        check_size(10_000, 8_948)


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
def test_too_long_pictures_are_refused_at_every_door(size):
    image = Image.new("RGB", size)
    data = encoded(image)
    with open_image(PICTURE) as allowed:
        assert allowed.size == (4, 3)
    for source in (data, base64.b64encode(data).decode(), image):
        with pytest.raises(ValueError, match="200 times"), open_image(source):
            pass
    array = np.array(image)
    for backend in BACKENDS:
        for given in (data, image, array, torch.from_numpy(array).permute(2, 0, 1)):
            with pytest.raises(ValueError, match="200 times"):
                backend()(given, return_tensors="pt")
        with pytest.raises(ValueError, match="200 times"):
            backend()(image, return_tensors="pt", do_convert_rgb=False)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_bombs_are_refused_before_they_are_decoded(side):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = PICTURE[:8] + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="many pixels; it may have up to 89,478,485"):
        read_image(bomb)


def test_urls(server):
    for path in ("/picture", "/moved", "/a bü.png"):
        np.testing.assert_array_equal(np.asarray(read_image(server + path)), COLOURS)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/not-found", "status 404 Not Found"),
        ("/part", "status 206 Partial Content"),
        ("/broken", "status 500"),
        ("/page", "isn't a picture of a format that is read"),
        ("/loop", "redirected more than 5 times"),
        ("/to-file", "leads to 'file:.*isn't an http"),
        ("/to-ftp", "leads to 'ftp:.*isn't an http"),
        ("/short", "bytes too early"),
        ("/endless", "larger than 1 MB"),
        ("/slow-body", "longer than 0.3 seconds"),
        ("/slow-head", "longer than 0.3 seconds"),
    ],
)
def test_urls_that_give_no_picture(path, message, server, monkeypatch):
    monkeypatch.setattr(image_fetching_diffclip, "URL_MEGABYTES", 1)
    if path.startswith("/slow"):
        monkeypatch.setattr(image_fetching_diffclip, "URL_SECONDS", 0.3)
    with pytest.raises(ValueError, match=message) as raised:
        read_image(server + path)
    assert server + path in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.png", "There is no file 'nowhere.png'; an image is given as"),
        ("a photo of a dog", "There is no file 'a photo of a dog'"),
        ("NowhereButLettersThatBase64Has", "There is no file"),
        ({"bytes": None, "path": "nowhere.png"}, "There is no file 'nowhere.png'"),
        ("zip://nowhere.png::nowhere.zip", "There is no file 'zip://"),
        ("strange://nowhere.png", "Protocol not known: strange"),
        (os.curdir, "isn't a file but a folder"),
        (os.devnull, "isn't a file"),
        ("A" * 400, "The base64 text isn't a picture"),
        ("data:image/png;base64,!", "isn't base64"),
        ("data:image/png;base64", "no comma"),
        ("\ud83c", r"There is no file '\\ud83c'"),
        ("http://127.0.0.1:1/picture.png", "can't be read: .*refused"),
        (b"", "is empty"),
        (b"hello", "isn't a picture"),
        (PICTURE[:-30], "damaged"),
        (None, "There is no image: it is None"),
        ({"bytes": None, "path": None}, "There is no image: it is None"),
        ({"image": 1}, "a mapping of 'image'; it must have bytes or path"),
        (io.StringIO("hello"), "opened as binary"),
        (np.zeros((3, 4, 3), np.uint8), "type ndarray"),
        (5, "type int"),
    ],
    ids=lambda value: repr(value).split(" object at ")[0][:30],
)
def test_one_line_says_what_is_wrong(source, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_image(source)
    assert "\n" not in str(raised.value)
    if isinstance(source, str):
        with pytest.raises(ValueError, match=message):
            read_encoded({"bytes": None, "path": source})


@pytest.mark.parametrize("path", ["nowhere.png", "NowhereButLettersThatBase64Has", os.curdir, "a photo of a dog"])
def test_what_is_not_at_hand(path):
    assert not is_at_hand(path)


def test_a_picture_that_cannot_be_read_is_at_hand():
    """What is damaged is said when it's read, rather than that it isn't there."""
    damaged = base64.b64encode(PICTURE[:-30]).decode()
    assert is_at_hand(damaged)
    with pytest.raises(ValueError, match="damaged"):
        read_image(damaged)
    # Too long for a file's name.
    assert is_at_hand("A" * 400)


def test_a_data_url_without_base64():
    np.testing.assert_array_equal(read_image("data:image/png," + urllib.parse.quote(PICTURE)), COLOURS)


def test_files_that_give_nothing(tmp_path, monkeypatch):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"The file '.*empty\.png' is empty"):
        read_image(tmp_path / "empty.png")
    closed = io.BytesIO(PICTURE)
    closed.close()
    with pytest.raises(ValueError, match=r"The file object can't be read: .*closed file"):
        read_image(closed)
    (tmp_path / "a.png").write_bytes(PICTURE)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(ValueError, match=r"a\.png' can't be read: Input/output error\."):
        read_encoded({"bytes": None, "path": str(tmp_path / "a.png")})


@pytest.mark.parametrize(
    ("bits", "kind", "row", "transparent", "expected"),
    [
        # The levels 0, 1, 2 and 3, of which 1 is transparent.
        (2, 0, b"\x1b", (1,), [[0] * 3, [255] * 3, [170] * 3, [255] * 3]),
        # 0, 5, 10 and 15, of which 10 is.
        (4, 0, b"\x05\xaf", (10,), [[0] * 3, [85] * 3, [255] * 3, [255] * 3]),
        # Two colours, of which the first is.
        (16, 2, struct.pack(">6H", 1000, 2000, 3000, 257, 514, 771), (1000, 2000, 3000), [[255] * 3, [1, 2, 3]]),
    ],
    ids=["2 bits", "4 bits", "16 bits"],
)
def test_a_transparent_colour_of_other_than_8_bits(bits, kind, row, transparent, expected):
    """Pillow scales the pixels to 8 bits and leaves the colour that is transparent as it was."""
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            chunk(b"IHDR", struct.pack(">IIBBBBB", len(expected), 1, bits, kind, 0, 0, 0)),
            chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
            chunk(b"IDAT", zlib.compress(b"\0" + row)),
            chunk(b"IEND", b""),
        )
    )
    image = Image.open(io.BytesIO(data))
    for source in (data, image, image):
        assert np.asarray(read_image(source)).tolist() == [expected]
