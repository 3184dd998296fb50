"""Models that would answer wrongly are refused, with a sentence that names the reason."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from trtserve.plugins.engines.torch.load_checks import AttentionProbe, ModelRefused, check_class, check_config
from trtserve.plugins.engines.torch.model import choose_device, choose_dtype, load_model, prepare_model
from trtserve.plugins.engines.torch.options import TorchOptions

CPU = torch.device("cpu")

REFUSED = {
    "dynamic_rope": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen3_next": ("Qwen3NextConfig", {}),
    "olmo_hybrid": ("OlmoHybridConfig", {}),
    "minimax": ("MiniMaxConfig", {}),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "attention_chunk_size": 24, "head_dim": 16, "intermediate_size_mlp": 96},
    ),
    "bloom": ("BloomConfig", {}),
    "falcon": ("FalconConfig", {}),
    "mamba": ("MambaConfig", {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_family_is_refused(name, tiny_module):
    config_class, config = REFUSED[name]
    module = tiny_module(config_class, **config)
    with pytest.raises(ModelRefused) as refusal:
        prepare_model(module, torch.float32, CPU, TorchOptions())
    assert "nother" in str(refusal.value)


def test_nested_longrope_is_found():
    config = transformers.LlamaConfig()
    config.rope_parameters = {
        "full_attention": {"rope_type": "longrope", "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    with pytest.raises(ModelRefused, match="'longrope' depends on the longest sequence"):
        check_config(config)


def test_quantized_checkpoints_are_refused():
    config = transformers.LlamaConfig()
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelRefused, match="quantized"):
        check_config(config)


def test_stateful_classes_are_refused():
    class Stateful:
        _supports_attention_backend = True
        _is_stateful = True

    with pytest.raises(ModelRefused, match="Stateful keeps state"):
        check_class(Stateful)


@pytest.mark.parametrize("calls", [[], [0, 1, 1], [0, 2], [1, 2]])
def test_a_trial_in_which_layers_do_not_call_once_each_is_refused(calls):
    probe = AttentionProbe()
    probe.calls.update(calls)
    with pytest.raises(ModelRefused, match="exactly once"):
        probe.layer_shapes()


def test_a_layer_without_attention_is_refused(tiny_module):
    module = tiny_module("LlamaConfig")
    module.model.layers[3].self_attn.forward = lambda hidden_states, **rest: (hidden_states, None)
    with pytest.raises(ModelRefused, match="3 of 4 layers use attention"):
        prepare_model(module, torch.float32, CPU, TorchOptions(layer_swap=False))


def test_missing_weights_are_not_made_up(tiny_llama_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_llama_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_llama_folder / "config.json").read_text())
    with pytest.raises(ModelRefused, match=r"1 weights are missing, first 'model.layers.1.mlp.up_proj.weight'"):
        load_model(str(tmp_path), torch.float32, CPU, TorchOptions())


def test_a_model_that_does_not_generate_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelRefused, match="vit is not a text generation model"):
        load_model(str(tmp_path), torch.float32, CPU, TorchOptions())


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(str(tmp_path), torch.float32, CPU, TorchOptions())


def test_devices_and_dtypes_by_name():
    assert choose_dtype("auto") is torch.bfloat16
    assert choose_dtype("float32") is torch.float32
    with pytest.raises(ValueError, match="dtype 'int3' is not known"):
        choose_dtype("int3")
    assert choose_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert choose_device("auto") == CPU
        with pytest.raises(ValueError, match="no CUDA device"):
            choose_device("cuda")
