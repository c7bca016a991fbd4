"""Recall@K and ranks among labels by hand, against ranks counted one by one, and against NumPy's sorted matrix."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from diffclip_hf.data.ranks import label_ranks
from diffclip_hf.data.retrieval_metrics import counts_before, recall_at_k


def plane(*degrees: float) -> torch.Tensor:
    """Unit vectors at angles, whose similarity falls with the angle between them."""
    return torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees])


def test_by_hand():
    # From the texts' side: 0° is nearest to its image; 25° is nearer to 10° than to 60°; 100° nearer to 60° than to
    # 150°. From the images': 10° is nearest to 0°; 60° to 25° before 100°; 150° to 100°.
    recall = recall_at_k(plane(0, 25, 100), plane(10, 60, 150), ks=(1, 2))
    assert recall == {
        "image_to_text_recall@1": 1.0,
        "image_to_text_recall@2": 1.0,
        "text_to_image_recall@1": pytest.approx(1 / 3),
        "text_to_image_recall@2": 1.0,
    }


def test_several_texts_of_an_image_by_hand():
    # Image 0 (0°) has texts at 80° and 5°, image 1 (60°) has one at 20°. The best of image 0's is its nearest. Image
    # 1's nearest is 80°, so its own comes second or, since 5° is further, no later. Texts: 80° and 20° miss.
    recall = recall_at_k(plane(80, 5, 20), plane(0, 60), torch.tensor([0, 0, 1]), ks=(1, 2))
    assert recall == {
        "image_to_text_recall@1": 0.5,
        "image_to_text_recall@2": 1.0,
        "text_to_image_recall@1": pytest.approx(1 / 3),
        "text_to_image_recall@2": 1.0,
    }


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_embeddings_that_are_all_alike_or_broken_recall_nothing(value):
    embeds = torch.full((4, 2), value)
    assert set(recall_at_k(embeds, embeds, ks=(1, 3)).values()) == {0.0}
    assert set(recall_at_k(embeds, embeds, ks=(4,)).values()) == {1.0}


def test_blocks_change_nothing_and_ranks_are_those_counted_one_by_one():
    generator = torch.Generator().manual_seed(0)
    text_embeds = normalize(torch.randn(37, 5, generator=generator, dtype=torch.float64), dim=-1)
    image_embeds = normalize(torch.randn(11, 5, generator=generator, dtype=torch.float64), dim=-1)
    owner = torch.cat([torch.arange(11), torch.randint(11, (26,), generator=generator)])
    scores = text_embeds @ image_embeds.t()
    text_ranks = [sum(s > row[own] for s in row).item() for row, own in zip(scores, owner, strict=True)]
    image_ranks = [
        sum(s > max(column[owner == image]) for s in column[owner != image]).item()
        for image, column in enumerate(scores.t())
    ]
    expected = {
        f"{name}_recall@{k}": pytest.approx(sum(rank < k for rank in ranks) / len(ranks))
        for name, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks))
        for k in (1, 5, 10)
    }
    for block_size in (3, 1000):
        assert recall_at_k(text_embeds, image_embeds, owner, block_size=block_size) == expected


def test_refused():
    embeds = plane(0, 10, 20)
    with pytest.raises(ValueError, match="one text for each image"):
        recall_at_k(embeds, embeds[:2])
    with pytest.raises(ValueError, match="each of the 3 images"):
        recall_at_k(embeds, embeds, torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="one index for each of 3 texts"):
        recall_at_k(embeds, embeds, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"\(3, 2\) and image_embeds \(3, 1\)"):
        recall_at_k(embeds, embeds[:, :1])
    with pytest.raises(ValueError, match=r"ks is \(0, 1\)"):
        recall_at_k(embeds, embeds, ks=(0, 1))
    with pytest.raises(ValueError, match="There are 0 texts"):
        recall_at_k(embeds[:0], embeds)


def direct(text_embeds: torch.Tensor, image_embeds: torch.Tensor, owner: torch.Tensor, k: int) -> tuple[float, float]:
    """Recall@K from NumPy's whole sorted matrix, float64, image to text and text to image; ties count against."""
    scores = text_embeds.double().numpy() @ image_embeds.double().numpy().T
    own = np.arange(scores.shape[1]) == owner.numpy()[:, None]
    found = []
    for matrix, match in ((scores.T, own.T), (scores, own)):
        # By score, and of equal ones those that don't match first.
        order = np.lexsort((match, -matrix.round(12)))
        found.append(np.take_along_axis(match, order, 1)[:, :k].any(1).mean())
    return found[0], found[1]


def test_ties_near_ties_and_duplicates_are_those_of_the_whole_matrix_for_any_blocks():
    generator = torch.Generator().manual_seed(1)
    base = normalize(torch.randn(40, 24, generator=generator), dim=-1)
    # Each image twice, to the last bit; and again off by less than float32's products are.
    image_embeds = torch.cat([base, base[:20], normalize(base[20:] + 1e-7, dim=-1)])
    owner = torch.cat([torch.arange(80), torch.randint(80, (53,), generator=generator)])
    noise = torch.randn(133, 24, generator=generator) * torch.rand(133, 1, generator=generator)
    text_embeds = normalize(image_embeds[owner] + noise / 3, dim=-1)
    expected = {k: direct(text_embeds, image_embeds, owner, k) for k in (1, 2, 10)}
    assert 0 < expected[1][0] < expected[2][0] < 1
    assert 0 < expected[1][1] < expected[2][1] < 1
    for block_size in (7, 64, None):
        found = recall_at_k(text_embeds, image_embeds, owner, ks=(1, 2, 10), block_size=block_size)
        for k, (of_images, of_texts) in expected.items():
            assert found[f"image_to_text_recall@{k}"] == pytest.approx(of_images, abs=1e-12), (block_size, k)
            assert found[f"text_to_image_recall@{k}"] == pytest.approx(of_texts, abs=1e-12), (block_size, k)


def test_embeddings_that_nearly_all_agree_are_still_told_apart():
    # All cosines are within 1e-9 of 1, where float32's products can't tell them apart.
    generator = torch.Generator().manual_seed(2)
    image_embeds = normalize(torch.ones(30, 16) + 3e-5 * torch.randn(30, 16, generator=generator), dim=-1)
    text_embeds = image_embeds.flip(0).roll(1, 0)
    owner = torch.arange(30).flip(0).roll(1, 0)
    expected = direct(text_embeds, image_embeds, owner, 5)
    found = recall_at_k(text_embeds, image_embeds, owner, ks=(5,), block_size=8)
    assert (found["image_to_text_recall@5"], found["text_to_image_recall@5"]) == pytest.approx(expected)
    assert 0 < expected[0] < 1


def test_parts_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(3)
    text_embeds, image_embeds = (normalize(torch.randn(50, 8, generator=generator), dim=-1) for _ in range(2))
    text_embeds[7] = math.nan
    owner = torch.arange(50)
    whole = counts_before(text_embeds, image_embeds, owner, most=100)
    parts = [counts_before(text_embeds, image_embeds, owner, 100, block_size=6, part=(rank, 3)) for rank in range(3)]
    scores = text_embeds @ image_embeds.t()
    expected = (~(scores < scores.diagonal()[:, None])).sum(1) - 1
    for name in whole:
        assert torch.equal(sum(part[name] for part in parts), whole[name])
    assert torch.equal(whole["text_to_image"], expected)
    # The broken text is before all images' own, and its image's own is broken.
    expected = (~(scores < scores.diagonal())).sum(0) - 1
    assert torch.equal(whole["image_to_text"], expected)


def test_reduced_precision_that_is_allowed_elsewhere_changes_nothing():
    generator = torch.Generator().manual_seed(4)
    image_embeds = normalize(torch.ones(200, 64) + 0.01 * torch.randn(200, 64, generator=generator), dim=-1)
    text_embeds = normalize(image_embeds + 0.002 * torch.randn(200, 64, generator=generator), dim=-1)
    expected = recall_at_k(text_embeds, image_embeds)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert recall_at_k(text_embeds, image_embeds) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert direct(text_embeds, image_embeds, torch.arange(200), 1)[0] == expected["image_to_text_recall@1"] < 1


@pytest.mark.parametrize("block_size", [5, None])
def test_label_ranks_are_those_of_a_stable_sort(block_size):
    generator = torch.Generator().manual_seed(5)
    labels = normalize(torch.randn(23, 6, generator=generator), dim=-1)
    labels[11], labels[22] = labels[3], labels[3]  # as two names that are alike are
    images = normalize(torch.randn(60, 6, generator=generator), dim=-1)
    own = torch.randint(23, (60,), generator=generator)
    own[:9] = torch.tensor([3, 11, 22] * 3)
    order = np.argsort(-(images.double() @ labels.double().t()).numpy().round(12), axis=1, kind="stable")
    expected = np.argmax(order == own.numpy()[:, None], axis=1)
    assert label_ranks(images, labels, own, block_size).tolist() == expected.tolist()
    capped = label_ranks(images, labels, own, block_size, most=5)
    assert (capped < 5).tolist() == (expected < 5).tolist()
    assert (capped < 1).tolist() == (expected < 1).tolist()
