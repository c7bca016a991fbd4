"""Recall@K by hand, and against ranks counted one by one."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from diffclip_hf.data.retrieval_metrics import recall_at_k


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
