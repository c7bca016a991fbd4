"""The public classes in other libraries' hands, without code of ours between; see docs/guides/other_libraries.md."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config, tiny_inputs, tiny_model
from transformers import AutoModel, AutoProcessor

from diffclip_hf import DiffCLIPTextModelWithProjection, DiffCLIPVisionModelWithProjection


EMBEDDED = Path(__file__).parent.parent / "embedded"
FOLDER = EMBEDDED / "diffclip-emoji"
NAMES = ["pizza", "rocket", "guitar", "snowman"]
FILES = [EMBEDDED / "pictures" / f"{name}.png" for name in NAMES]


@pytest.fixture
def embedded() -> tuple:
    return AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)


# --- Transformers' exporters ----------------------------------------------------------------------------------------


# torch.export and torch.onnx warn of what they do inside.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("target", "tower"),
    [
        ("Onnx", "text"),
        # The guide exports the image tower so.
        pytest.param("Dynamo", "vision", marks=pytest.mark.slow),
        pytest.param("Dynamo", "text", marks=pytest.mark.slow),
        pytest.param("Onnx", "vision", marks=pytest.mark.slow),
    ],
)
def test_transformers_exports_the_towers(target, tower, tmp_path):
    """What it has saved gives the model's own embeddings for a batch of other sizes."""
    exporters = pytest.importorskip("transformers.exporters", reason="this Transformers has no exporters")
    if not hasattr(exporters, "ExportedModel"):
        pytest.skip("this Transformers can't load what its exporters write")
    whole = tiny_config(vision={"num_hidden_layers": 1}, text={"num_hidden_layers": 1})
    part = getattr(whole, f"{tower}_config")
    part.projection_dim = whole.projection_dim
    kind = DiffCLIPVisionModelWithProjection if tower == "vision" else DiffCLIPTextModelWithProjection
    names = ["pixel_values"] if tower == "vision" else ["input_ids", "attention_mask"]
    torch.manual_seed(0)
    model = kind(part).eval()
    given, other = tiny_inputs(), tiny_inputs(5, 5, length=9, seed=1)
    exporter, settings = getattr(exporters, f"{target}Exporter")(), getattr(exporters, f"{target}Config")(dynamic=True)
    exporter.export(model, {name: given[name] for name in names}, settings).save_pretrained(tmp_path)
    exported = exporters.ExportedModel.from_pretrained(tmp_path, trust_remote_code=True)
    other = {name: other[name] for name in names}
    with torch.no_grad():
        expected = model(**other)[0]
    torch.testing.assert_close(exported(**other)[0], expected, rtol=1e-4, atol=1e-5)


# --- accelerate -----------------------------------------------------------------------------------------------------


# accelerate warns of a parameter of the model's own in a device_map, and fails without it.
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
def test_dispatch_model_leaves_the_towers_on_disk(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate isn't installed")
    model, inputs = tiny_model(), tiny_inputs()
    with torch.no_grad():
        expected = model(**inputs)
    device_map = {"text_model": "disk", "vision_model": "disk"}
    device_map |= dict.fromkeys(("text_projection", "visual_projection", "logit_scale"), "cpu")
    spread = accelerate.dispatch_model(model, device_map, offload_dir=tmp_path, main_device="cpu", force_hooks=True)
    assert {parameter.device.type for parameter in spread.text_model.parameters()} == {"meta"}
    with torch.no_grad():
        found, images = spread(**inputs), spread.encode_image(inputs["pixel_values"])
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image)
    torch.testing.assert_close(images, expected.image_embeds)


# --- datasets -------------------------------------------------------------------------------------------------------


def test_datasets_maps_in_two_processes_and_finds_its_cache(embedded, tmp_path):
    """A model and a processor that are loaded again, or have been used, count as the same: nothing is redone."""
    datasets = pytest.importorskip("datasets", reason="datasets isn't installed")
    rows = datasets.Dataset.from_dict({"image": list(map(str, FILES))}).cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path)
    rows = datasets.load_from_disk(tmp_path)

    def add_embeddings(model, processor):
        def encode(batch):
            with torch.no_grad():
                return {
                    "embeds": model.encode_image(processor(images=batch["image"], return_tensors="pt")["pixel_values"])
                }

        return rows.map(encode, batched=True, batch_size=2, num_proc=2)

    model, processor = embedded
    made = add_embeddings(model, processor)
    files = sorted(tmp_path.glob("cache-*"))
    assert len(files) == 2
    texts = processor(text=["a", "a longer text"], padding=True, truncation=True, return_tensors="pt")
    pixel_values = processor(images=[Image.open(file) for file in FILES], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.encode_image(pixel_values)
        model.encode_text(**texts)
    torch.testing.assert_close(torch.tensor(made["embeds"][:]), expected, rtol=1e-5, atol=1e-6)
    for pair in (embedded, (AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER))):
        assert add_embeddings(*pair)["embeds"][:] == made["embeds"][:]
        assert sorted(tmp_path.glob("cache-*")) == files


# --- FiftyOne and sentence-transformers -----------------------------------------------------------------------------


def test_a_tool_that_knows_only_the_auto_classes(embedded):
    """As FiftyOne does it: AutoProcessor, then `get_image_features` and `get_text_features` of what it returns."""
    model, processor = embedded
    with torch.no_grad():
        images = model.get_image_features(
            **processor(images=[np.array(Image.open(f).convert("RGB")) for f in FILES], return_tensors="pt")
        )
        texts = model.get_text_features(**processor(text=NAMES, padding=True, return_tensors="pt"))
    assert (images.pooler_output @ texts.pooler_output.T).argmax(1).tolist() == [0, 1, 2, 3]


def test_sentence_transformers_trains_saves_and_loads(tmp_path):
    """An epoch on four pictures brings each nearer to its new name."""
    datasets = pytest.importorskip("datasets", reason="datasets isn't installed")
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    encoder = SentenceTransformer(str(FOLDER), device="cpu")
    captions = [f"number {number}" for number in range(4)]
    rows = datasets.Dataset.from_dict({"image": list(map(str, FILES)), "text": captions})
    rows = rows.cast_column("image", datasets.Image())

    def own_names(model) -> torch.Tensor:
        images = model.encode([Image.open(file) for file in FILES], convert_to_tensor=True)
        return model.similarity(images, model.encode(captions, convert_to_tensor=True)).softmax(1).diagonal().mean()

    before = own_names(encoder)
    arguments = SentenceTransformerTrainingArguments(
        tmp_path / "run",
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    SentenceTransformerTrainer(encoder, arguments, rows, loss=MultipleNegativesRankingLoss(encoder)).train()
    after = own_names(encoder)
    assert after > before
    encoder.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert type(again[0].auto_model).__name__ == "DiffCLIPModel"
    torch.testing.assert_close(own_names(again), after)
