"""What a score loses where patches are hidden, against hand-worked scores, and patches' own values, written out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import both, tiny_inputs, tiny_model
from tolerances import CLOSED_FORM, relative_error
from torch import nn
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from diffclip_hf.visualization import against_others, image_occlusion, value_similarity
from diffclip_hf.visualization.occlusion import fill_of, window_masks


TEXTS = {"input_ids": torch.tensor([[97, 5, 98]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}


class Linear(nn.Module):
    """A CLIP-like model whose cosine similarity with the text is the sum of weights · pixels, by construction."""

    def __init__(self, weights: torch.Tensor, patch_size: int):
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.config = SimpleNamespace(
            vision_config=SimpleNamespace(num_channels=3, patch_size=patch_size),
            text_config=SimpleNamespace(max_position_embeddings=8),
        )
        self.dtype = weights.dtype
        self.batches: list[int] = []
        self.eval()

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return torch.tensor([[7.0, 0.0]]).expand(len(input_ids), 2)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixel_values))
        cosine = (self.weights * pixel_values).sum((1, 2, 3))
        return 3 * torch.stack([cosine, (1 - cosine.square()).sqrt()], dim=-1)


def linear_case(rows: int, columns: int, patch_size: int = 4) -> tuple[Linear, torch.Tensor, torch.Tensor]:
    """A model, an image on grey, and what each patch adds to the score beyond the grey."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, rows * patch_size, columns * patch_size)
    weights = torch.randn(shape, generator=generator) * 1e-3
    image = torch.full(shape, 0.5)
    image[:, 1:-1, 1:-1] = torch.rand((3, shape[1] - 2, shape[2] - 2), generator=generator)
    added = (weights * (image - 0.5)).reshape(3, rows, patch_size, columns, patch_size).sum((0, 2, 4))
    return Linear(weights, patch_size), image, added


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (14, 14)])
def test_of_a_linear_score_single_patches_lose_what_they_add(grid):
    model, image, added = linear_case(*grid)
    found = image_occlusion(model, image[None], **TEXTS, windows=[1], fill="border")
    assert (found.shape, found.dtype) == ((1, 1, *grid), np.float32)
    torch.testing.assert_close(torch.from_numpy(found[0, 0]), added, rtol=1e-3, atol=1e-6)


def test_of_larger_windows_a_patch_loses_the_mean_of_theirs():
    """In a row of three patches, windows of two hide (1), (1, 2), (2, 3) and (3), each above, on and below the row."""
    model, image, added = linear_case(1, 3)
    a, b, c = added[0]
    found = image_occlusion(model, image[None], **TEXTS, windows=[2], fill="border")[0, 0, 0]
    expected = torch.stack([a + (a + b), (a + b) + (b + c), (b + c) + c]) / 2
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-6)
    both_sizes = image_occlusion(model, image[None], **TEXTS, windows=[1, 2], fill="border")[0, 0, 0]
    torch.testing.assert_close(torch.from_numpy(both_sizes), (expected + added[0]) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("fill", "batch_size"), [("border", 1), ("mean", 7), ("blur", 1000)])
def test_images_one_by_one_and_batches_of_any_size_give_the_same(fill, batch_size):
    model, inputs = tiny_model(), tiny_inputs(texts=2, images=2)
    together = image_occlusion(model, **inputs, fill=fill)
    assert together.shape == (2, 2, 4, 4)
    texts = {name: inputs[name] for name in TEXTS}
    for number, image in enumerate(inputs["pixel_values"]):
        alone = image_occlusion(model, image[None], **texts, fill=fill, batch_size=batch_size)
        np.testing.assert_allclose(alone[0], together[number], atol=1e-6)


def test_no_more_images_than_a_batch_go_through_at_once():
    model, image, _ = linear_case(4, 4)
    image_occlusion(model, image[None], **TEXTS, windows=[2], batch_size=6)
    # One as it is, and 5 × 5 with a window.
    assert model.batches == [1, 6, 6, 6, 6, 1]


def test_what_a_window_shows():
    image = torch.zeros(3, 8, 8)
    image[:, 1:-1, 1:-1] = 1
    np.testing.assert_allclose(fill_of(image, "mean", 4).flatten(), 36 / 64)
    np.testing.assert_allclose(fill_of(image, "border", 4).flatten(), 0)
    # A blur keeps a plain image, and spreads a point as the normal density does.
    np.testing.assert_allclose(fill_of(torch.ones(3, 8, 12), "blur", 4), 1, rtol=1e-6)
    point = torch.zeros(1, 33, 33)
    point[0, 16, 16] = 1
    blurred = fill_of(point, "blur", 4)[0]
    np.testing.assert_allclose(blurred[16, 20] / blurred[16, 16], np.exp(-0.5), rtol=1e-5)


def test_windows_grow_with_the_grid_and_reach_every_patch():
    assert [masks.shape[0] for masks in window_masks(6, 6, None)] == [64, 25]
    assert [masks.shape[0] for masks in window_masks(14, 14, None)] == [49, 64]
    for masks in window_masks(5, 7, [1, 2, 4, 7]):
        assert (masks.sum(0) > 0).all()


def other_models() -> list[nn.Module]:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**size, "vocab_size": 99, "max_position_embeddings": 12, "bos_token_id": 97, "eos_token_id": 98}
    vision = {**size, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    return [
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval(),
        SiglipModel(SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=vision)).eval(),
    ]


@pytest.mark.parametrize("model", other_models(), ids=["CLIP", "SigLIP"])
def test_other_models_under_any_implementation(model):
    inputs = tiny_inputs(texts=2, images=1)
    found = image_occlusion(model, **inputs, windows=[4], fill="mean")
    # The window in the middle of all hides the whole image, and a patch in the corner is below each window.
    embeds = normalize(model(**inputs).image_embeds.detach(), dim=-1)
    texts = normalize(model(**inputs).text_embeds.detach(), dim=-1)
    image = inputs["pixel_values"][0]
    costs = []
    for mask in window_masks(4, 4, [4])[0]:
        if mask[0, 0]:
            large = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
            hidden = torch.where(large, image.mean((1, 2), keepdim=True), image)
            changed = normalize(model(**{**inputs, "pixel_values": hidden[None]}).image_embeds.detach(), dim=-1)
            costs.append((embeds - changed) @ texts.t())
    torch.testing.assert_close(torch.from_numpy(found[0, :, 0, 0]), torch.cat(costs).mean(0), rtol=1e-3, atol=1e-5)


def test_against_others_is_the_map_of_the_scores_difference():
    maps = np.random.default_rng(0).normal(size=(2, 3, 2, 2)).astype(np.float32)
    found = against_others(maps, weight=1)
    np.testing.assert_allclose(found[:, 0], maps[:, 0] - (maps[:, 1] + maps[:, 2]) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(against_others(maps), (found + maps) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(against_others(maps, weight=0), maps)
    for wrong in (maps[:, :1], maps[0]):
        with pytest.raises(ValueError, match="of at least two texts"):
            against_others(wrong)


def values_by_formula(model: nn.Module, pixel_values: torch.Tensor, first_layer: int) -> torch.Tensor:
    """Every token's own values of the layers from the first, added up and embedded, (images, tokens, channels)."""
    x = model.vision_model.embeddings(pixel_values, interpolate_pos_encoding=True)
    total = torch.zeros_like(x)
    for number, layer in enumerate(model.vision_model.encoder.layers):
        attention = layer.self_attn
        if number >= first_layer:
            v = attention.v_proj(layer.layer_norm1(x))
            if hasattr(attention, "diff_norm"):
                pairs = v.unflatten(-1, (-1, 2 * attention.head_dim))
                pairs = pairs / (pairs.square().mean(-1, keepdim=True) + attention.diff_norm.eps).sqrt()
                v = (pairs * attention.diff_norm.weight * (1 - attention.lambda_init)).flatten(-2)
            total = total + attention.out_proj(v)
        x = layer(x)
    return normalize(model.visual_projection(model.vision_model.post_layernorm(total)), dim=-1)


@pytest.mark.parametrize("attention_type", ["differential", "standard"])
@pytest.mark.parametrize(("shape", "grid"), [((32, 32), (4, 4)), ((24, 48), (3, 6))])
def test_value_similarity_is_the_formula(attention_type, shape, grid):
    model, inputs = tiny_model(**both(attention_type)), tiny_inputs(texts=2)
    inputs["pixel_values"] = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    found = value_similarity(model, **inputs, interpolate_pos_encoding=True)
    assert (found.shape, found.dtype) == ((1, 2, *grid), np.float32)
    embeds = values_by_formula(model, inputs["pixel_values"], 1).detach()
    cosines = embeds[:, 1:] @ model.encode_text(inputs["input_ids"], inputs["attention_mask"]).t()
    expected = (cosines - cosines.mean(1, keepdim=True)).transpose(1, 2).unflatten(-1, grid)
    assert relative_error(torch.from_numpy(found), expected.detach()) <= CLOSED_FORM
    assert not any(module._forward_hooks for module in model.modules())
    sdpa = tiny_model(**both(attention_type), attn_implementation="sdpa")
    other = value_similarity(sdpa, **inputs, interpolate_pos_encoding=True)
    np.testing.assert_allclose(other, found, atol=1e-5)


def test_sizes_of_the_released_models():
    """77 tokens, and 197 of an image of 14 × 14 patches."""
    model = tiny_model(vision={"image_size": 56, "patch_size": 4})
    inputs = tiny_inputs(texts=1, images=1, length=77)
    inputs["pixel_values"] = torch.rand(1, 3, 56, 56)
    assert image_occlusion(model, **inputs).shape == (1, 1, 14, 14)
    assert value_similarity(model, **inputs).shape == (1, 1, 14, 14)
    assert value_similarity(other_models()[0], **tiny_inputs(texts=1)).shape == (3, 1, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": []}, r"windows is \[\]; it must hold sides in patches, from 1 to 4"),
        ({"windows": [5]}, r"windows is \[5\]"),
        ({"windows": [1.5]}, r"windows is \[1.5\]"),
        ({"windows": 2}, "windows is 2"),
        ({"fill": "red"}, "fill is 'red'; it must be one of 'border', 'mean', 'blur'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"pixel_values\[None\]"),
        ({"input_ids": torch.tensor([97, 5, 98]), "attention_mask": None}, r"input_ids\[None\]"),
        ({"pixel_values": torch.zeros(0, 3, 32, 32)}, "at least one image"),
    ],
)
def test_what_cannot_be_hidden(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        image_occlusion(tiny_model(), **{**tiny_inputs(), **options})
    assert "\n" not in str(raised.value)


def test_models_that_cannot_be_asked():
    inputs = tiny_inputs()
    for function in (image_occlusion, value_similarity):
        with pytest.raises(ValueError, match="training mode"):
            function(tiny_model().train(), **inputs)
        with pytest.raises(ValueError, match="on the meta device"):
            function(tiny_model().to("meta"), **inputs)
    with pytest.raises(ValueError, match="a Linear, which has no get_image_features and no get_text_features"):
        image_occlusion(nn.Linear(1, 1), **inputs)
    with pytest.raises(ValueError, match="a SiglipModel, which has no visual_projection"):
        value_similarity(other_models()[1], **inputs)
    with pytest.raises(ValueError, match="first_layer is 3; it must be from -3 to 2"):
        value_similarity(tiny_model(), **inputs, first_layer=3)
