"""torch.compile, torch.export, inference mode and flex attention, against the eager model."""

import copy

import pytest
import torch
from tiny import tiny_model
from tolerances import EAGER_AGAINST_SDPA, relative_error


SIZES = [(4, 7), (2, 15), (5, 11), (3, 9)]


def batch(model, images: int, length: int) -> dict[str, torch.Tensor]:
    config = model.config
    torch.manual_seed(0)
    input_ids = torch.randint(2, 40, (images, length))
    input_ids[:, 0], input_ids[:, -1] = config.text_config.bos_token_id, config.text_config.eos_token_id
    size = config.vision_config.image_size
    return {"input_ids": input_ids, "pixel_values": torch.randn(images, 3, size, size)}


def both(attention_type: str, **kwargs):
    # One layer a tower: tracing is what takes the time.
    fields = {"attention_type": attention_type, "num_hidden_layers": 1}
    return tiny_model(text=fields, vision=fields, **kwargs)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# torch 2.13's inductor, of its own code.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("attention_type", "implementation", "backend"),
    [
        ("differential", "eager", "aot_eager"),
        ("differential", "sdpa", "aot_eager"),
        ("standard", "eager", "aot_eager"),
        ("standard", "sdpa", "aot_eager"),
        # Compiles C++ for half a minute.
        pytest.param("differential", "sdpa", "inductor", marks=pytest.mark.slow),
    ],
)
def test_one_graph_serves_every_batch_and_text_length(attention_type, implementation, backend):
    model = both(attention_type, attn_implementation=implementation)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for images, length in SIZES:
            inputs = batch(model, images, length)
            expected = model(**inputs).logits_per_image
            assert relative_error(compiled(**inputs).logits_per_image, expected) <= EAGER_AGAINST_SDPA


def test_a_compiled_training_step_has_the_same_gradients():
    model = both("differential", attn_implementation="sdpa")
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = batch(model, 4, 9)
    model(**inputs, return_loss=True).loss.backward()
    compiled(**inputs, return_loss=True).loss.backward()
    largest = max(parameter.grad.abs().max() for parameter in model.parameters())
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (twin.grad - parameter.grad).abs().max() <= EAGER_AGAINST_SDPA * largest, name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_export_keeps_batch_and_length_open(implementation):
    model = both("differential", attn_implementation=implementation)
    images, length = torch.export.Dim("images", max=64), torch.export.Dim("length", min=2, max=16)
    texts = torch.export.Dim("texts", max=64)
    exported = torch.export.export(
        model,
        (),
        {**batch(model, 4, 7), "pixel_values": batch(model, 3, 7)["pixel_values"]},
        dynamic_shapes={"input_ids": {0: texts, 1: length}, "pixel_values": {0: images}},
    )
    # Nothing in the graph is an operator of ours, which others couldn't load.
    assert {str(node.target).split(".")[0] for node in exported.graph.nodes if "::" in str(node.target)} <= {"aten"}
    assert not [node for node in exported.graph.nodes if "diffclip" in str(node.target)]
    for count, size in SIZES:
        inputs = batch(model, count, size)
        found, expected = exported.module()(**inputs), model(**inputs)
        assert relative_error(found["logits_per_image"], expected.logits_per_image) <= EAGER_AGAINST_SDPA


def test_inference_mode():
    model = both("differential", attn_implementation="sdpa")
    inputs = batch(model, 2, 9)
    expected = model(**inputs).logits_per_image
    with torch.inference_mode():
        found = model(**inputs).logits_per_image
    assert found.is_inference()
    assert relative_error(found.clone(), expected.detach()) <= EAGER_AGAINST_SDPA


@pytest.mark.parametrize("attention_type", ["differential", "standard"])
@pytest.mark.slow  # Compiles C++ for flex attention: half a minute
# What Transformers passes to make its mask.
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
def test_flex_attention_equals_eager(attention_type):
    """Forward: PyTorch's flex attention has no backward pass on the CPU."""
    model = both(attention_type, attn_implementation="flex_attention")
    inputs = batch(model, 3, 12)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 9:] = 0
    with torch.no_grad():
        found = model(**inputs, attention_mask=mask).logits_per_image
        model.set_attn_implementation("eager")
        assert relative_error(found, model(**inputs, attention_mask=mask).logits_per_image) <= EAGER_AGAINST_SDPA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cuda_graphs(implementation):
    model = both("differential", attn_implementation=implementation).cuda()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        torch.manual_seed(seed)
        inputs = {name: tensor.cuda() for name, tensor in batch(model, 4, 9).items()}
        with torch.no_grad():
            expected = model(**inputs).logits_per_image
            assert relative_error(compiled(**inputs).logits_per_image.clone(), expected) <= EAGER_AGAINST_SDPA
