"""The default model in float32: one ragged batch gives, token by token, what `generate` gives each prompt alone."""

from __future__ import annotations

import pytest
import torch

from trtserve.plugins.engines.torch.layer_swap import SwappedLayer
from trtserve.plugins.engines.torch.model import load_model
from trtserve.plugins.engines.torch.options import TorchOptions

pytestmark = pytest.mark.timeout(120)  # the first one waits for the reference


def tokens_of(answers):
    return [answer.tokens for answer in answers]


def test_the_layers_under_test_are_the_swapped_ones(fp32_model):
    assert all(isinstance(layer, SwappedLayer) for layer in fp32_model.module.model.layers)


def test_one_ragged_batch_and_again_from_the_prefix_cache(fp32_model, reference, runner_of):
    runner = runner_of(fp32_model, max_num_tokens=4096)
    first = runner.generate(reference.prompts)
    assert tokens_of(first) == reference.tokens
    assert [answer.cached_tokens for answer in first] == [0] * len(first)
    again = runner.generate(reference.prompts)
    assert tokens_of(again) == reference.tokens
    assert [answer.cached_tokens for answer in again] == [(len(prompt) - 1) // 16 * 16 for prompt in reference.prompts]


def test_chunks_mixed_with_decodes(fp32_model, reference, runner_of):
    runner = runner_of(fp32_model, max_num_tokens=37, max_num_seqs=32)
    assert tokens_of(runner.generate(reference.prompts)) == reference.tokens
    assert max(step.stats.prefill_tokens + step.stats.decode_sequences for step in runner.steps) <= 37


def test_preemption_in_a_small_cache(fp32_model, reference, runner_of):
    runner = runner_of(fp32_model, num_blocks=18, block_size=8)
    assert tokens_of(runner.generate(reference.prompts)) == reference.tokens
    assert runner.engine.stats().preemptions_total > 0


def test_bfloat16_stays_close(default_model, reference, fp32_model, runner_of):
    model = load_model(str(default_model), torch.bfloat16, torch.device("cpu"), TorchOptions())
    wanted = runner_of(fp32_model, max_num_tokens=4096).generate(reference.prompts, max_tokens=1, logprobs=20)
    given = runner_of(model, dtype="bfloat16", max_num_tokens=4096).generate(
        reference.prompts, max_tokens=1, logprobs=20
    )
    errors = []
    for exact, rounded in zip(wanted, given, strict=True):
        values = dict(rounded.logprobs[0].top)
        errors += [abs(value - values[token]) for token, value in exact.logprobs[0].top[:5] if token in values]
    assert sum(errors) / len(errors) < 0.1
    assert sum(a.tokens == b.tokens for a, b in zip(wanted, given, strict=True)) >= 0.8 * len(wanted)
