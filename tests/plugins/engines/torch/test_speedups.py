"""The swapped layer and the packed linears: used where they help, left out where they would differ."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trtserve.plugins.engines.torch.layer_swap import RMSNorm, SwappedLayer, swap_layers
from trtserve.plugins.engines.torch.load_checks import AttentionProbe
from trtserve.plugins.engines.torch.model import prepare_model
from trtserve.plugins.engines.torch.options import TorchOptions
from trtserve.plugins.engines.torch.packed_linear import Linear, pack_linears, packing_works

CPU = torch.device("cpu")

SWAPPED = {
    "LlamaConfig": {"attention_bias": True},
    "MistralConfig": {"sliding_window": 20},
    "Qwen2Config": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    "Qwen3Config": {"head_dim": 24},
}


@pytest.mark.parametrize("config_class", SWAPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_shaped_layers_are_swapped(config_class, dtype, tiny_module):
    module = tiny_module(config_class, **SWAPPED[config_class]).to(dtype)
    model = prepare_model(module, dtype, CPU, TorchOptions())
    assert all(isinstance(layer, SwappedLayer) for layer in model.module.model.layers)
    assert model.lean is not None


@pytest.mark.parametrize("config_class", ["Gemma2Config", "Qwen3MoeConfig"])
def test_other_layers_stay(config_class, tiny_module):
    model = prepare_model(tiny_module(config_class), torch.float32, CPU, TorchOptions())
    assert not any(isinstance(layer, SwappedLayer) for layer in model.module.model.layers)
    assert model.lean is None


@pytest.mark.parametrize("config_class", SWAPPED)
def test_the_lean_forward_pass_gives_what_the_models_own_gives(config_class, tiny_module):
    model = prepare_model(tiny_module(config_class, **SWAPPED[config_class]), torch.float32, CPU, TorchOptions())
    ids, positions, rows = torch.tensor([[5, 9, 2, 7]]), torch.tensor([[0, 1, 2, 3]]), torch.tensor([3, 1])
    with torch.inference_mode():
        own, lean = (
            forward.forward(ids, positions, rows, AttentionProbe()) for forward in (replace(model, lean=None), model)
        )
    assert torch.allclose(lean, own, atol=1e-5, rtol=1e-5)


def test_a_forward_pass_that_does_more_stays(tiny_module, caplog):
    module = tiny_module("LlamaConfig")
    own = type(module).forward

    def scaled(*arguments, **rest):
        output = own(module, *arguments, **rest)
        output.logits = output.logits * 0.9
        return output

    module.forward = scaled
    model = prepare_model(module, torch.float32, CPU, TorchOptions())
    assert model.lean is None
    assert "the forward pass of LlamaForCausalLM stays" in caplog.text


def test_one_layer_that_stays_keeps_the_forward_pass(tiny_module):
    module = tiny_module("LlamaConfig")
    module.model.layers[2].mlp.config = copy.copy(module.config)
    module.model.layers[2].mlp.config.hidden_act = "gelu"
    assert prepare_model(module, torch.float32, CPU, TorchOptions()).lean is None


def test_options_turn_both_off(tiny_module):
    options = TorchOptions(layer_swap=False, packed_linears=False)
    model = prepare_model(tiny_module("LlamaConfig").bfloat16(), torch.bfloat16, CPU, options)
    assert not any(isinstance(part, (SwappedLayer, Linear)) for part in model.module.modules())
    assert model.lean is None


def test_a_layer_with_another_activation_stays(tiny_module):
    module = tiny_module("LlamaConfig", hidden_act="gelu")
    assert swap_layers(module, packed=False) == 0


@pytest.mark.parametrize("change", ["scaling", "norm", "rotation", "window"])
def test_a_layer_that_computes_something_else_stays(change, tiny_module, caplog):
    module = tiny_module("MistralConfig", sliding_window=20)
    module = prepare_model(module, torch.float32, CPU, TorchOptions(layer_swap=False)).module
    odd = module.model.layers[1]
    if change == "norm":
        odd.input_layernorm.forward = lambda x: nn.functional.layer_norm(x, x.shape[-1:])
    else:
        original = odd.self_attn.forward

        def forward(position_embeddings, **rest):
            if change == "rotation":
                position_embeddings = position_embeddings[::-1]
            elif change == "scaling":
                odd.self_attn.scaling = 0.9
            else:
                odd.self_attn.config = copy.copy(odd.self_attn.config)
                odd.self_attn.config.sliding_window = 30
            return original(position_embeddings=position_embeddings, **rest)

        odd.self_attn.forward = forward
    assert swap_layers(module, packed=False) == 3
    assert module.model.layers[1] is odd
    assert "layer 1 keeps the original MistralDecoderLayer" in caplog.text


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_linear_computes_the_same(rows, with_bias):
    if not packing_works(torch.bfloat16, CPU):
        pytest.skip("this torch does not pack linears")
    plain = nn.Linear(48, 80, bias=with_bias).bfloat16()
    parent = nn.Sequential(copy.deepcopy(plain))
    assert pack_linears(parent) == 1
    packed = parent[0]
    x, other = torch.randn(2, rows, 48).bfloat16(), torch.randn(2, rows, 80).bfloat16()
    with torch.inference_mode():
        product = plain(x)
        close = partial(torch.allclose, atol=0.04, rtol=0.02)
        assert torch.allclose(packed(x), product, atol=0.02, rtol=0.02)
        assert close(packed.silu(x), nn.functional.silu(product))
        assert close(packed.times(x, other), product * other)
        assert close(packed.plus(x, other), product + other)


@pytest.mark.parametrize("shape", [(7, 48), (40, 48), (7, 3, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_swapped_layers_norm_rounds_once(dtype, shape):
    norm = SimpleNamespace(weight=torch.randn(48).to(dtype), variance_epsilon=1e-5)
    x = 3 * torch.randn(shape).to(dtype)
    x[0] *= 1e-3  # so small that epsilon counts
    before = x.clone()
    got, exact = RMSNorm(norm)(x), nn.functional.rms_norm(x.double(), (48,), norm.weight.double(), 1e-5)
    assert torch.equal(x, before)
    assert got.dtype is dtype and torch.allclose(got, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_packing_is_for_bfloat16_on_the_cpu():
    assert not packing_works(torch.float32, CPU)
    assert not packing_works(torch.bfloat16, torch.device("cuda"))


def test_packing_needs_torchs_private_operations(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not packing_works(torch.bfloat16, CPU)
