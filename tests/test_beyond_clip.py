"""The towers inside other models: LLaVA and sentence-transformers."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import TOWER, both, randomised
from transformers import AutoModel, AutoProcessor, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from diffclip_hf import DiffCLIPVisionConfig, DiffCLIPVisionModel


EMBEDDED = Path(__file__).parent.parent / "embedded"
IMAGE_TOKEN, PATCHES = 99, 16


def tiny_llava(attention_type: str) -> LlavaForConditionalGeneration:
    """A LLaVA with a DiffCLIP image tower of 16 patches, random weights in all of it."""
    vision = DiffCLIPVisionConfig(**TOWER, image_size=32, patch_size=8, **both(attention_type)["vision"])
    language = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        pad_token_id=0,
        eos_token_id=1,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=IMAGE_TOKEN, image_seq_length=PATCHES
    )
    return randomised(LlavaForConditionalGeneration(config))


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(2, 90, (2, 24), generator=generator)
    input_ids[:, 3 : 3 + PATCHES] = IMAGE_TOKEN
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
    }


@pytest.mark.parametrize("attention_type", ["differential", "standard"])
def test_llava_reads_the_image_tower(attention_type):
    """Its logits are those of the language model on the second-last block's patch tokens, put in by hand."""
    model, given = tiny_llava(attention_type), inputs()
    assert isinstance(model.model.vision_tower, DiffCLIPVisionModel)
    with torch.no_grad():
        found = model(**given).logits
        hidden = model.model.vision_tower(given["pixel_values"], output_hidden_states=True).hidden_states[-2]
        embeds = model.get_input_embeddings()(given["input_ids"])
        embeds[:, 3 : 3 + PATCHES] = model.model.multi_modal_projector(hidden[:, 1:])
        expected = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_llava_trains_generates_and_loads_again(tmp_path):
    model, given = tiny_llava("differential"), inputs()
    model(**given, labels=given["input_ids"]).loss.backward()
    blocks = model.model.vision_tower.encoder.layers
    # The last block comes after the tokens that are read.
    for block in blocks[:-1]:
        assert block.self_attn.lambda_q1.grad.abs().max() > 0
    assert blocks[-1].self_attn.lambda_q1.grad is None
    generated = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 27)
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)


def test_sentence_transformers_encode_texts_and_images():
    from sentence_transformers import SentenceTransformer

    folder = EMBEDDED / "diffclip-emoji"
    encoder = SentenceTransformer(str(folder), model_kwargs={"dtype": "float32"}, device="cpu")
    texts, image = ["pizza", "a very small rocket"], Image.open(EMBEDDED / "pictures" / "pizza.png")
    found = encoder.similarity(encoder.encode([image]), encoder.encode(texts))
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    given = AutoProcessor.from_pretrained(folder)(text=texts, images=image, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**given)
    torch.testing.assert_close(found, outputs.image_embeds @ outputs.text_embeds.t(), rtol=1e-5, atol=1e-5)
