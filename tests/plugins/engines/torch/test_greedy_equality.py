"""The default model in float32: one ragged batch gives, token by token, what `generate` gives each prompt alone,
and so do two engines of which one goes on where the other stopped."""

from __future__ import annotations

from array import array

import pytest
import torch

from tests.plugins.engines.torch.conftest import REFERENCE_TOKENS
from trtserve.plugins.conformance.engine_kv import host_rows
from trtserve.plugins.engines.torch.layer_swap import SwappedLayer
from trtserve.plugins.engines.torch.model import load_model
from trtserve.plugins.engines.torch.options import TorchOptions

_NUM_ROWS = 16

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


SAMPLING = {
    "greedy": {},
    "seeded, penalised": {
        "temperature": 1.0,
        "top_p": 0.9,
        "seed": 5,
        "presence_penalty": 0.8,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.1,
    },
}


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_prefill_here_and_the_rest_there_says_what_one_engine_says(
    sampling, fp32_model, default_model, reference, runner_of
):
    num_tokens = 6 if sampling else REFERENCE_TOKENS
    agg = runner_of(fp32_model)
    whole = [answer.tokens for answer in agg.generate(reference.prompts, **sampling, max_tokens=num_tokens)]
    if not sampling:
        assert whole == reference.tokens
    prefill, decode = runner_of(fp32_model, default_model), runner_of(fp32_model, default_model)
    rows = host_rows(prefill.engine.kv_layout(), _NUM_ROWS)
    for runner in (prefill, decode):
        runner.engine.attach_rows(rows)
    firsts = [answer.tokens for answer in prefill.generate(reference.prompts, **sampling, max_tokens=1)]
    ids = []
    for number, prompt in enumerate(reference.prompts):
        tokens, count = array("i", prompt), len(prompt) // 16
        assert prefill.engine.read_kv(tokens, "", 0, range(count)) == count
        assert decode.engine.write_kv(tokens, "", 0, range(count)) == count
        # every third one comes later, with more of its answer done elsewhere
        done = whole[number][:4] if number % 3 == 0 else firsts[number]
        left = num_tokens - len(done)
        ids.append((decode.add(prompt + done, num_resumed=len(done), **sampling, max_tokens=left), done, count))
    answers = decode.drain()
    assert [done + answers[request_id].tokens for request_id, done, _ in ids] == whole
    assert [answers[request_id].cached_tokens for request_id, _, _ in ids] == [16 * count for _, _, count in ids]
