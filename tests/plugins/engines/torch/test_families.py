"""Model families through the engine, unchanged: the same greedy tokens and log probabilities as transformers."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from trtserve.plugins.engines.torch.model import prepare_model
from trtserve.plugins.engines.torch.options import TorchOptions

CPU = torch.device("cpu")
TOLERANCE = 1e-3
NEW_TOKENS = 14
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ROPE = {"rope_theta": 10000.0}

FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama3_rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_sliding": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "mistral_sliding": ("MistralConfig", {"sliding_window": 20}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, **EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 16,
            "sliding_window": 20,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                **ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 128,
                "truncate": False,
            },
        },
    ),
}


@pytest.fixture(params=FAMILIES)
def original(request, tiny_module):
    config_class, config = FAMILIES[request.param]
    return tiny_module(config_class, **config)


@pytest.fixture
def model(original):
    return prepare_model(copy.deepcopy(original), torch.float32, CPU, TorchOptions())


def prompts():
    chance = random.Random(3)
    return [[chance.randrange(3, 320) for _ in range(length)] for length in (1, 7, 29, 75)]


def test_family_gives_the_tokens_of_generate(original, model, runner_of, generate_with):
    wanted = [generate_with(original, prompt, NEW_TOKENS) for prompt in prompts()]
    runner = runner_of(model, max_num_tokens=11, max_num_seqs=11)
    first = runner.generate(prompts(), max_tokens=NEW_TOKENS)
    again = runner.generate(prompts(), max_tokens=NEW_TOKENS)
    assert [answer.tokens for answer in first] == wanted
    assert [answer.tokens for answer in again] == wanted
    assert again[-1].cached_tokens == 64


def test_family_gives_the_log_probabilities_of_a_full_forward(original, model, runner_of):
    runner = runner_of(model, max_num_tokens=11, max_num_seqs=11)
    # drawn and not greedy: a random walk visits more of a model than its favourite loop does
    sampling = {"temperature": 1.5, "logprobs": 20, "max_tokens": NEW_TOKENS}
    for seed in (1, 1, 2):
        for prompt, answer in zip(prompts(), runner.generate(prompts(), seed=seed, **sampling), strict=True):
            assert worst_logprob(original, prompt, answer) < TOLERANCE


def worst_logprob(original, prompt, answer):
    with torch.inference_mode():
        logits = original(input_ids=torch.tensor([prompt + answer.tokens]), use_cache=False).logits[0]
    wanted = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1)
    worst = 0.0
    for row, token, given in zip(wanted, answer.tokens, answer.logprobs, strict=True):
        ids, values = zip((token, given.logprob), *given.top, strict=True)
        worst = max(worst, (row[list(ids)] - torch.tensor(values)).abs().max().item())
    return worst
