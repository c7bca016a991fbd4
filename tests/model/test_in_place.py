"""What writes over its input without gradients: the same numbers, and only where nobody can notice."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from diffclip_hf import DiffCLIPTextConfig
from diffclip_hf.model.in_place_diffclip import activation_in_place
from diffclip_hf.model.layers_diffclip import DiffCLIPEncoderLayer, DiffCLIPMLP


def mlp(hidden_act: str) -> DiffCLIPMLP:
    torch.manual_seed(0)
    return DiffCLIPMLP(DiffCLIPTextConfig(hidden_size=16, intermediate_size=48, hidden_act=hidden_act))


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu", "relu"])
def test_without_gradients_the_output_is_the_same(hidden_act):
    module, states = mlp(hidden_act), torch.randn(3, 5, 16)
    kept = states.clone()
    with torch.no_grad():
        found = module(states)
    torch.testing.assert_close(found, module(states).detach())
    assert torch.equal(states, kept)


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("part", ["fc1", "activation_fn"])
def test_what_a_hook_has_seen_stays(hidden_act, part):
    module, states, seen = mlp(hidden_act), torch.randn(3, 5, 16), []
    getattr(module, part).register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    with torch.no_grad():
        module(states)
        hidden = nn.functional.linear(states, module.fc1.weight, module.fc1.bias)
        expected = [states, hidden] if part == "fc1" else [hidden, ACT2FN[hidden_act](hidden)]
    assert len(seen) == 2
    for found, value in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, value)


def test_only_a_linear_layers_output_is_written_over():
    assert activation_in_place(ACT2FN["gelu"], nn.Linear(2, 2)) is None
    with torch.no_grad():
        assert activation_in_place(ACT2FN["gelu"], nn.Linear(2, 2)) is not None
        assert activation_in_place(ACT2FN["gelu"], nn.Identity()) is None
        assert activation_in_place(nn.ReLU(), nn.Linear(2, 2)) is None


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
def test_gradients_are_untouched(hidden_act):
    module, states = mlp(hidden_act), torch.randn(3, 5, 16)
    module(states).square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    hidden = nn.functional.linear(states, module.fc1.weight, module.fc1.bias)
    nn.functional.linear(ACT2FN[hidden_act](hidden), module.fc2.weight, module.fc2.bias).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def block(attention_type: str = "differential") -> DiffCLIPEncoderLayer:
    torch.manual_seed(0)
    config = DiffCLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, attention_type=attention_type
    )
    return DiffCLIPEncoderLayer(config, 0).apply(
        lambda module: [nn.init.normal_(parameter, std=0.3) for parameter in module.parameters(recurse=False)]
    )


@pytest.mark.parametrize("attention_type", ["differential", "standard"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_block_without_gradients_gives_the_same_and_keeps_its_input(attention_type, implementation):
    module, states = block(attention_type), torch.randn(2, 19, 32)
    kept = states.clone()
    expected = module(states, attn_implementation=implementation).detach()
    with torch.no_grad():
        torch.testing.assert_close(module(states, attn_implementation=implementation), expected)
    assert torch.equal(states, kept)


@pytest.mark.parametrize("part", ["self_attn", "self_attn.out_proj", "self_attn.diff_norm", "mlp", "mlp.fc2"])
def test_what_a_hook_of_a_block_has_seen_stays(part):
    module, states, seen, copies = block(), torch.randn(2, 19, 32), [], []

    def hook(_, inputs, output):
        tensors = [*inputs[:1], output[0] if isinstance(output, tuple) else output]
        seen.extend(tensors)
        copies.extend(tensor.clone() for tensor in tensors)

    module.get_submodule(part).register_forward_hook(hook)
    with torch.no_grad():
        module(states, attn_implementation="sdpa")
    assert len(seen) == 2
    assert all(torch.equal(*pair) for pair in zip(seen, copies, strict=True))


class Stored(nn.Module):
    """Returns a tensor that it keeps, as its `forward` or as another module's."""

    def __init__(self, *returned):
        super().__init__()
        self.returned = returned

    def forward(self, *args, **kwargs):
        return self.returned if len(self.returned) > 1 else self.returned[0]


@pytest.mark.parametrize("as_forward", [False, True])
@pytest.mark.parametrize("part", ["self_attn", "mlp", "self_attn.out_proj", "mlp.fc2"])
def test_what_another_module_returns_stays(part, as_forward):
    module, states = block(), torch.randn(2, 19, 32)
    returned = torch.randn(2, 19, 32)
    stored = Stored(returned, None) if part == "self_attn" else Stored(returned)
    if as_forward:
        module.get_submodule(part).forward = stored.forward
    else:
        module.set_submodule(part, stored)
    copy = returned.clone()
    with torch.no_grad():
        module(states, attn_implementation="sdpa")
    assert torch.equal(returned, copy)
