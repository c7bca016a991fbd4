import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline
from transformers.image_utils import SizeDict
from transformers.utils import is_torchvision_available

from diffclip_hf import (
    DiffCLIPConfig,
    DiffCLIPForImageClassification,
    DiffCLIPImageProcessor,
    DiffCLIPImageProcessorPil,
)
from diffclip_hf.model.image_processing_diffclip import array_to_rgb
from diffclip_hf.model.image_reading_diffclip import to_rgb


# Of normalised values, which are within ±2.7; CPU, Pillow 13.0, torchvision 0.29.1.
PILLOW_TRANSFORM = 1e-6  # 0
TORCHVISION_TRANSFORM = 2e-6  # 8.4e-7: the mean and deviation are multiplied by 255 instead
FLOAT_RESIZE = 5e-4  # 4.7e-5
# Of the 255 levels, on random noise.
BACKENDS_LEVELS = 2.001  # 1.0, and 2 seen on other noise
BACKENDS_SHARE = 0.02  # 0.0091 of the values differ at all
ROUNDING_LEVELS = 1.001  # 0.992, of 8-bit against float resizing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [
    *[(1000, 37), (3, 500), (1, 1), (5, 7), (225, 224), (224, 225), (301, 457), (224, 224), (640, 480)],
    *[(227, 224), (224, 229), (231, 224), (97, 1000), (2, 150), (449, 448), (333, 250)],
]
needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision isn't installed")
BACKENDS = [
    pytest.param(DiffCLIPImageProcessorPil, id="pil"),
    pytest.param(DiffCLIPImageProcessor, id="torchvision", marks=needs_torchvision),
]
ONE_BY_ONE = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}


def noise(size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """Random bytes, (height, width, channels), of an image whose size is (width, height)."""
    return np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)


def pixels(processor, image, **kwargs) -> torch.Tensor:
    return processor(image, return_tensors="pt", **kwargs)["pixel_values"]


def halves(number: int) -> tuple[int, int]:
    return number // 2, number - number // 2


def levels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation, to 0..255."""
    return (pixel_values * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pil_equals_pillow_by_hand(size):
    image = Image.fromarray(noise(size))
    resized = image.resize(tuple(224 if side == min(size) else int(side * 224 / min(size)) for side in size), 2)
    left, top = (round((side - 224) / 2) for side in resized.size)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224))) / 255
    expected = ((expected - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels(DiffCLIPImageProcessorPil(), image)[0], expected, rtol=0, atol=PILLOW_TRANSFORM)


@needs_torchvision
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_torchvisions_transform(size):
    from torchvision import transforms
    from torchvision.transforms import v2

    image = Image.fromarray(noise(size))
    expected = transforms.Compose(
        [transforms.Resize(224), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )(image)
    pil = pixels(DiffCLIPImageProcessorPil(), image)[0]
    assert pil.dtype == torch.float32
    torch.testing.assert_close(pil, expected, rtol=0, atol=PILLOW_TRANSFORM)

    expected_on_tensors = v2.Compose(
        [v2.Resize(224), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    tensor = pixels(DiffCLIPImageProcessor(), image)[0]
    torch.testing.assert_close(tensor, expected_on_tensors, rtol=0, atol=TORCHVISION_TRANSFORM)

    difference = levels(tensor) - levels(pil)
    assert difference.abs().max() <= BACKENDS_LEVELS
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert (difference.abs() > 0.5).float().mean() <= BACKENDS_SHARE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(50, 60), (3, 8), (33, 4)], ids=str)
def test_crop_larger_than_the_image_pads_with_black(backend, size):
    image = Image.fromarray(noise(size))
    cropped = pixels(backend(), image, **{**ONE_BY_ONE, "do_center_crop": True}, crop_size=21)[0]
    # An odd row or column of padding goes below or to the right.
    (left_pad, right_pad), (top_pad, bottom_pad) = (halves(max(21 - side, 0)) for side in size)
    padded = image.crop((-left_pad, -top_pad, image.width + right_pad, image.height + bottom_pad))
    left, top = (round((side - 21) / 2) for side in padded.size)
    np.testing.assert_array_equal(cropped.permute(1, 2, 0), np.asarray(padded.crop((left, top, left + 21, top + 21))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fields_can_be_changed(backend):
    processor = backend(size={"height": 30, "width": 40}, crop_size=20, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    values = pixels(processor, Image.new("RGB", (9, 9), (255, 0, 51)))
    assert values.shape == (1, 3, 20, 20)
    np.testing.assert_allclose(values[0, :, 7, 7], [1, 0, 0.2], atol=PILLOW_TRANSFORM)


# Modes: the image, and the one RGB pixel that must come of it.
def palette(transparency=None) -> Image.Image:
    image = Image.new("P", (1, 1), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def sixteen_bit(value: int, mode: str = "I;16") -> Image.Image:
    image = Image.fromarray(np.array([[value]], dtype=np.uint16))
    return image if mode == "I;16" else image.convert(mode)


def with_transparent_colour(mode: str, colour, transparent) -> Image.Image:
    image = Image.new(mode, (1, 1), colour)
    image.info["transparency"] = transparent
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
        (Image.new("L", (1, 1), 77), (77, 77, 77)),
        (Image.new("1", (1, 1), 1), (255, 255, 255)),
        (Image.new("1", (1, 1), 0), (0, 0, 0)),
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), (0, 255, 255)),
        (Image.new("YCbCr", (1, 1), (90, 128, 128)), (90, 90, 90)),
        (Image.new("HSV", (1, 1), (0, 255, 255)), (255, 0, 0)),
        # Over white: c·a + 255·(1 − a), with a = 51/255 = 0.2.
        (Image.new("RGBA", (1, 1), (200, 100, 0, 51)), (244, 224, 204)),
        (Image.new("RGBA", (1, 1), (200, 100, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (1, 1), (200, 100, 0, 255)), (200, 100, 0)),
        (Image.new("LA", (1, 1), (100, 51)), (224, 224, 224)),
        (palette(), (200, 100, 50)),
        (palette(1), (255, 255, 255)),
        (palette(0), (200, 100, 50)),
        (palette(bytes([255, 51])), (244, 224, 214)),
        (palette(bytes(300)), (200, 100, 50)),  # more than the 256 that there can be
        (palette().convert("PA"), (200, 100, 50)),
        (with_transparent_colour("RGB", (5, 6, 7), (5, 6, 7)), (255, 255, 255)),
        (with_transparent_colour("RGB", (5, 6, 8), (5, 6, 7)), (5, 6, 8)),
        (with_transparent_colour("L", 5, 5), (255, 255, 255)),
        # Sixteen bits by 257: 65535 → 255, 128 → 0.498, 129 → 0.502, 25700 → 100.
        (sixteen_bit(65535), (255, 255, 255)),
        (sixteen_bit(128), (0, 0, 0)),
        (sixteen_bit(129), (1, 1, 1)),
        (sixteen_bit(25700), (100, 100, 100)),
        (sixteen_bit(25700, "I"), (100, 100, 100)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "-".join(map(str, value)),
)
def test_every_mode_becomes_rgb(image, expected):
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.getpixel((0, 0)) == expected
    for backend in [DiffCLIPImageProcessorPil] + [DiffCLIPImageProcessor] * is_torchvision_available():
        values = pixels(backend(), image, **ONE_BY_ONE)
        assert tuple(values.flatten().tolist()) == expected


def test_lab_becomes_rgb():
    # Lightness 100 % without colour; Pillow's own rounding may be off by one level.
    white = to_rgb(Image.new("LAB", (1, 1), (255, 128, 128)))
    assert white.mode == "RGB"
    assert min(white.getpixel((0, 0))) >= 254


def test_sixteen_bit_transparent_colour_is_white():
    image = with_transparent_colour("I;16", 25700, 25700)
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(backend, orientation, tmp_path):
    # Where the stored image's pixels go: EXIF says which side of the upright image its row 0 and column 0 are.
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }[orientation]
    stored = noise((2, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "image.png", exif=exif)
    with Image.open(tmp_path / "image.png") as image:
        for given in (image, str(tmp_path / "image.png"), tmp_path / "image.png"):
            values = pixels(backend(), given, **ONE_BY_ONE)[0]
            np.testing.assert_array_equal(values.permute(1, 2, 0), upright(stored))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layout_of_an_array_gives_the_same(backend):
    processor = backend()
    array = noise((60, 50))
    expected = pixels(processor, Image.fromarray(array))
    frozen = array.copy()
    frozen.flags.writeable = False
    given = {
        "last": array,
        "first": array.transpose(2, 0, 1),
        "read-only": frozen,
        "reversed twice": array[::-1].copy()[::-1],
        "int64": array.astype(np.int64),
        "uint16": array.astype(np.uint16) * 257,
        "uint32": array.astype(np.uint32),
        "uint64": array.astype(np.uint64),
        "another byte order": array.astype(">i4"),
        "opaque": np.concatenate([array, np.full((50, 60, 1), 255, np.uint8)], axis=-1),
        "tensor first": torch.from_numpy(array).permute(2, 0, 1),
        "tensor last": torch.from_numpy(array),
        "batch": array[None],
        "tensor batch": torch.from_numpy(array).permute(2, 0, 1)[None],
        "list": [array],
        "nest": [[array]],
    }
    for name, image in given.items():
        assert torch.equal(pixels(processor, image), expected), name
    floats = pixels(processor, array.astype(np.float64))
    assert torch.equal(pixels(processor, array.astype(">f8")), floats)
    assert torch.equal(pixels(processor, torch.from_numpy(array).double().requires_grad_()), floats)
    with pytest.raises(ValueError, match="complex128; its values must be real numbers"):
        processor(array.astype(complex))
    with pytest.raises(ValueError, match="values above 2⁶³"):
        processor(np.full((9, 9, 3), 2**64 - 1, np.uint64))
    assert (levels(floats) - levels(expected)).abs().max() <= ROUNDING_LEVELS
    torch.testing.assert_close(pixels(processor, array / 255, do_rescale=False), floats, rtol=0, atol=FLOAT_RESIZE)
    torch.testing.assert_close(
        pixels(processor, torch.from_numpy(array / 255), do_rescale=False), floats, rtol=0, atol=FLOAT_RESIZE
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_greyscale_arrays(backend):
    processor = backend()
    grey = noise((60, 50), 1)
    expected = pixels(processor, Image.fromarray(grey[..., 0]))
    for image in (grey, grey[..., 0], torch.from_numpy(grey[..., 0]), [grey[..., 0]], torch.from_numpy(grey)):
        assert torch.equal(pixels(processor, image), expected)
    mask = grey[..., 0] > 127
    assert torch.equal(pixels(processor, mask), pixels(processor, Image.fromarray(mask)))


def test_alpha_of_arrays_is_that_of_images():
    colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.stack([colour, 255 - colour, colour // 2, alpha], axis=-1)
    expected = np.asarray(to_rgb(Image.fromarray(rgba)))
    blended = np.floor((rgba[..., :3] * (alpha[..., None] / 255) + 255 - alpha[..., None]) + 0.5)
    assert np.abs(expected - blended).max() <= 1
    np.testing.assert_array_equal(array_to_rgb(rgba).permute(1, 2, 0), expected)
    floats = array_to_rgb(rgba / 255, do_rescale=False).permute(1, 2, 0) * 255
    np.testing.assert_allclose(floats, expected, rtol=0, atol=0.501)


@needs_torchvision
def test_float_images_agree_between_backends():
    image = noise((301, 457)).astype(np.float32)
    pil, tensor = (pixels(backend(), image) for backend in (DiffCLIPImageProcessorPil, DiffCLIPImageProcessor))
    torch.testing.assert_close(tensor, pil, rtol=0, atol=FLOAT_RESIZE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_mixed_sizes_and_types(backend):
    processor = backend()
    images = [
        Image.fromarray(noise((60, 50))),
        noise((33, 40)),
        torch.from_numpy(noise((60, 50))).permute(2, 0, 1),
        Image.new("L", (1, 1), 5),
        noise((61, 50)).astype(np.float32),
    ]
    together = pixels(processor, images)
    assert together.shape == (5, 3, 224, 224)
    for row, image in enumerate(images):
        torch.testing.assert_close(together[row], pixels(processor, image)[0], rtol=0, atol=TORCHVISION_TRANSFORM)
    assert isinstance(processor(images, return_tensors="np")["pixel_values"], np.ndarray)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_rescale": False},
        {"do_resize": False},
        {"resample": 3, "rescale_factor": 1 / 127.5},
        {"size": {"shortest_edge": 50, "longest_edge": 90}},
        {"size": {"max_height": 90, "max_width": 60}},
    ],
    ids=str,
)
def test_one_image_alone_is_what_transformers_makes_of_it_bit_for_bit(backend, options):
    """A Pillow image is resized as it is, and an array by Transformers' own code."""
    image, processor = Image.fromarray(noise((250, 303))), backend()

    # An array, which is resized as such.
    expected = processor(np.asarray(image), **options)["pixel_values"]
    found = processor(image, **options)["pixel_values"]
    assert isinstance(found, list)
    assert type(found[0]) is type(expected[0])
    assert found[0].dtype == expected[0].dtype
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(processor(image, return_tensors="pt", **options)["pixel_values"][0], expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_arrays_have_their_channels_where_usual(backend):
    assert pixels(backend(), np.array([[[1, 2, 3]]], dtype=np.uint8), **ONE_BY_ONE).flatten().tolist() == [1, 2, 3]
    tensor = torch.tensor([1, 2, 3], dtype=torch.uint8).reshape(3, 1, 1)
    assert pixels(backend(), tensor, **ONE_BY_ONE).flatten().tolist() == [1, 2, 3]
    first = pixels(backend(), tensor.numpy(), **ONE_BY_ONE, input_data_format="channels_first")
    assert first.flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_black_float_image_is_the_same_at_either_scale(backend):
    black = np.zeros((9, 9, 3), dtype=np.float32)
    assert torch.equal(pixels(backend(), black), pixels(backend(), black, do_rescale=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("image", "kwargs", "message"),
    [
        (Image.new("RGB", (0, 5)), {}, r"height 5 and width 0"),
        (np.zeros((0, 5, 3), dtype=np.uint8), {}, r"height 0 and width 5"),
        (Image.new("F", (2, 2)), {}, r"mode is F"),
        (Image.fromarray(np.array([[70000]], dtype=np.int32)), {}, r"mode is I .*70000.*0\.\.65535"),
        (np.full((9, 9, 3), 0.5), {}, r"0\.5\.\.0\.5.*do_rescale=False"),
        (np.full((9, 9, 3), 256.0), {}, r"256\.\.256.*0\.\.255"),
        (np.full((9, 9, 3), -0.1), {"do_rescale": False}, r"-0\.1.*0\.\.1"),
        (np.full((9, 9, 3), np.nan), {}, r"nan"),
        (np.full((9, 9, 3), 256), {}, r"256\.\.256.*0\.\.255"),
        (np.full((9, 9, 3), -1), {}, r"-1\.\.-1.*0\.\.255"),
        (np.zeros((9, 9, 2), dtype=np.uint8), {}, r"\(9, 9, 2\).*1, 3, 4"),
        (np.zeros((2, 9, 9), dtype=np.uint8), {"input_data_format": "channels_first"}, r"2 channels.*1, 3, 4"),
        (np.zeros(9, dtype=np.uint8), {}, r"\(9,\).*2 or 3 dimensions"),
        (np.zeros((1, 1, 9, 9, 3), dtype=np.uint8), {}, r"2 or 3 dimensions"),
        ([], {}, r"at least one"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(backend, image, kwargs, message):
    with pytest.raises(ValueError, match=message):
        backend()(image, return_tensors="pt", **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_an_image(backend):
    with pytest.raises(TypeError, match="type int"):
        backend()([1, 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_unconverted_images_stay_as_they_are(backend):
    values = pixels(backend(), Image.new("L", (20, 30), 7), **ONE_BY_ONE, do_convert_rgb=False)
    assert values.shape == (1, 1, 30, 20)


def test_needs_torchvision(monkeypatch):
    monkeypatch.setattr(
        sys.modules[DiffCLIPImageProcessor.__module__],
        "requires_backends",
        lambda processor, backends: (_ for _ in ()).throw(ImportError(f"{type(processor).__name__} {backends}")),
    )
    with pytest.raises(ImportError, match=r"DiffCLIPImageProcessor \['torchvision'\]"):
        DiffCLIPImageProcessor()


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_and_loads(backend, tmp_path):
    backend(size={"shortest_edge": 40}, crop_size=32).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "DiffCLIPImageProcessor"
    assert (saved["size"], saved["crop_size"]) == ({"shortest_edge": 40}, {"height": 32, "width": 32})
    assert (tuple(saved["image_mean"]), tuple(saved["image_std"]), saved["resample"]) == (MEAN, STD, 2)
    default = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(default) is (DiffCLIPImageProcessor if is_torchvision_available() else DiffCLIPImageProcessorPil)
    assert default.to_dict() == backend.from_pretrained(tmp_path).to_dict()
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")) is DiffCLIPImageProcessorPil


@pytest.mark.parametrize("backend", BACKENDS)
def test_auto_map_names_both_backends_where_the_code_travels(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "_auto_class", "AutoImageProcessor")
    backend().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "image_fetching_diffclip.py",
        "image_processing_diffclip.py",
        "image_reading_diffclip.py",
        "preprocessor_config.json",
    ]
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"]["AutoImageProcessor"] == {
        "torchvision": "image_processing_diffclip.DiffCLIPImageProcessor",
        "pil": "image_processing_diffclip.DiffCLIPImageProcessorPil",
    }
    monkeypatch.undo()
    backend.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())


def test_image_classification_pipeline_with_only_an_image_processor(tmp_path):
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = DiffCLIPConfig(
        text_config={**tower, "vocab_size": 9, "bos_token_id": 7, "eos_token_id": 8},
        vision_config={**tower, "image_size": 32},
        num_labels=3,
    )
    DiffCLIPForImageClassification(config).save_pretrained(tmp_path)
    DiffCLIPImageProcessorPil(size=32, crop_size=32).save_pretrained(tmp_path)
    answers = pipeline("image-classification", model=str(tmp_path))(Image.new("RGB", (50, 40), "red"))
    assert len(answers) == 3
    assert sum(answer["score"] for answer in answers) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_open_image_that_is_damaged_is_refused_each_time(backend):
    """Pillow takes what it could decode for the whole picture, from the second time on."""
    file = io.BytesIO()
    Image.fromarray(noise((90, 80))).save(file, "PNG")
    whole = file.getvalue()
    for damaged in (whole[: len(whole) // 2], whole[:5000] + b"\xff" * 50 + whole[5050:]):
        image = Image.open(io.BytesIO(damaged))
        for _ in range(3):
            with pytest.raises(ValueError, match="The picture is damaged: "):
                backend()(image)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": -1}, "size has shortest_edge -1; it must be from 1 to 9459 pixels"),
        ({"size": {"shortest_edge": 0}}, "size has shortest_edge 0"),
        ({"size": {"height": 10**6, "width": 9}}, "size has height 1000000"),
        ({"crop_size": 0}, "crop_size has height 0"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"image_std is .*; it must be finite, and not 0"),
        ({"image_mean": [math.nan] * 3}, r"image_mean is .*; it must be finite"),
        ({"rescale_factor": math.inf}, "rescale_factor is inf; it must be finite, and not 0"),
    ],
)
def test_numbers_of_which_no_pixel_values_come_are_refused(backend, options, message):
    image = Image.fromarray(noise((9, 9)))
    with pytest.raises(ValueError, match=message):
        backend()(image, **options)
    with pytest.raises(ValueError, match=message):
        backend(**options)(image)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_crop_needs_both_sides(backend):
    with pytest.raises(ValueError, match=r"crop_size is .*; it must have height and width"):
        backend()(Image.fromarray(noise((9, 9))), crop_size={"shortest_edge": 5})


def test_float_images_take_both_sides_of_a_size():
    plane = np.array([[0.0, 0.25], [0.5, 1.0]], dtype=np.float32)
    found = DiffCLIPImageProcessorPil().resize(plane[None], SizeDict(height=4, width=6), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(found[0], plane.repeat(2, axis=0).repeat(3, axis=1))
    with pytest.raises(ValueError, match="it must have shortest_edge, or height and width"):
        DiffCLIPImageProcessorPil().resize(plane[None], SizeDict(max_height=4, max_width=4))
