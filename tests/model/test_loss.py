"""The contrastive loss in one process, by hand; test_distributed.py has it in several."""

import math

import pytest
import torch
from tiny import tiny_inputs, tiny_model

from diffclip_hf.model.loss_diffclip import image_text_contrastive_loss, symmetric_cross_entropy


def test_cross_entropies_by_hand():
    # Uniform logits tell nothing apart: the loss is log n.
    assert symmetric_cross_entropy(torch.zeros(5, 5)).item() == pytest.approx(math.log(5))
    # ((log(1 + e⁻²) + log(1 + e⁰)) / 2 + (log(1 + e⁻¹) + log(1 + e⁻¹)) / 2) / 2, rows then columns
    logits = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    expected = ((math.log1p(math.exp(-2)) + math.log(2)) / 2 + math.log1p(math.exp(-1))) / 2
    assert symmetric_cross_entropy(logits).item() == pytest.approx(expected)


def test_loss_by_hand():
    # Texts e₁ and e₂, both images e₁, and a scale of 3: logits ((3, 3), (0, 0)). Rows give log 2 twice, columns
    # log(1 + e⁻³) and log(1 + e³).
    text_embeds = torch.eye(2)
    image_embeds = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = image_text_contrastive_loss(text_embeds, image_embeds, torch.tensor(math.log(3)))
    columns = (math.log1p(math.exp(-3)) + math.log1p(math.exp(3))) / 2
    assert loss.item() == pytest.approx((math.log(2) + columns) / 2)


def test_one_image_for_each_text():
    with pytest.raises(ValueError, match=r"text_embeds is \(3, 8\) and image_embeds \(2, 8\)"):
        image_text_contrastive_loss(torch.zeros(3, 8), torch.zeros(2, 8), torch.tensor(1.0))
    with pytest.raises(ValueError, match="one image for each text"):
        tiny_model()(**tiny_inputs(texts=3, images=2), return_loss=True)
    assert tiny_model()(**tiny_inputs(texts=3, images=2)).loss is None
