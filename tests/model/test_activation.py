"""Activations that write over their input: the same numbers, and only where nobody can notice."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from diffclip_hf import DiffCLIPTextConfig
from diffclip_hf.model.activation_diffclip import activation_in_place
from diffclip_hf.model.layers_diffclip import DiffCLIPMLP


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
