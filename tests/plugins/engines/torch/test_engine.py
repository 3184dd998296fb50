"""The engine step by step: ends, refusals, aborts, broken requests and numbers that add up."""

from __future__ import annotations

from array import array

import pytest
import torch

from trtserve.plugins.api import EngineConfig, FinishReason, Request, RequestId, RequestRefused, SamplingParams
from trtserve.plugins.engines.torch.engine import TorchEngine

PROMPT = [5, 6, 7, 8, 9]


def test_start_tells_what_the_engine_is(tiny_llama_folder):
    phases = []
    config = EngineConfig(str(tiny_llama_folder), dtype="float32", device="cpu", max_num_seqs=64, max_num_tokens=32)
    engine = TorchEngine(config)
    assert not engine.has_work()
    info = engine.start(phases.append)
    assert phases == ["loading weights", "allocating KV cache"]
    assert (info.vocab_size, info.max_seq_len, info.block_size) == (320, 512, 16)
    assert info.max_num_seqs == 32  # each gets a token into every pass
    assert info.num_blocks == 2**30 // (2 * 16 * 2 * 2 * 16 * 4)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="not running"):
        engine.step()


def test_length_is_exact(tiny_llama, runner_of):
    (answer,) = runner_of(tiny_llama).generate([PROMPT], max_tokens=7)
    assert len(answer.tokens) == 7
    assert answer.last.finish_reason is FinishReason.LENGTH
    assert answer.last.stop_token_id is None


def test_the_engines_longest_sequence_ends_a_request(tiny_llama, runner_of):
    (answer,) = runner_of(tiny_llama, max_seq_len=8).generate([PROMPT], max_tokens=100)
    assert len(answer.tokens) == 3
    assert answer.last.finish_reason is FinishReason.LENGTH


def test_a_sequence_may_fill_the_whole_cache(tiny_llama, runner_of):
    runner = runner_of(tiny_llama, num_blocks=2)
    first, second = runner.generate([PROMPT, [9, *PROMPT]], max_tokens=100)
    assert (len(first.tokens), len(second.tokens)) == (32 - 5, 32 - 6)
    assert runner.engine.stats().free_blocks == 2


def test_stop_tokens_and_end_of_sequence(tiny_llama, runner_of):
    runner = runner_of(tiny_llama)
    (free,) = runner.generate([PROMPT], max_tokens=10)
    stop = free.tokens[3]
    at = free.tokens.index(stop) + 1
    by_stop = runner.add(PROMPT, max_tokens=10, stop_token_ids=(stop,), ignore_eos=True)
    by_eos = runner.add(PROMPT, eos=(stop,), max_tokens=10)
    ignored = runner.add(PROMPT, eos=(stop,), max_tokens=10, ignore_eos=True)
    answers = runner.drain()
    for request_id in (by_stop, by_eos):
        assert answers[request_id].tokens == free.tokens[:at]
        assert answers[request_id].last.finish_reason is FinishReason.STOP
        assert answers[request_id].last.stop_token_id == stop
    assert answers[ignored].tokens == free.tokens
    assert answers[ignored].last.finish_reason is FinishReason.LENGTH


REFUSED = {
    "no tokens": ([], {}),
    "16 tokens": ([1] * 16, {}),
    "token id 320": ([1, 320], {}),
    "token id -1": ([-1], {}),
    "logit_bias names token id 999": ([1], {"logit_bias": ((999, 1.0),)}),
    "at most 20": ([1], {"logprobs": 21}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_impossible_requests_are_refused_and_leave_nothing(words, tiny_llama, runner_of):
    prompt, sampling = REFUSED[words]
    runner = runner_of(tiny_llama, max_seq_len=16)
    with pytest.raises(RequestRefused, match=words):
        runner.add(prompt, **sampling)
    assert not runner.engine.has_work()


def test_an_id_in_use_is_refused(tiny_llama, runner_of):
    runner = runner_of(tiny_llama)
    request = Request(RequestId(1), array("i", PROMPT), SamplingParams(max_tokens=3, temperature=0))
    runner.engine.add(request)
    with pytest.raises(RequestRefused, match="id 1 is in use"):
        runner.engine.add(request)


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_abort_frees_at_once_and_is_reported_once(passes, tiny_llama, runner_of):
    runner = runner_of(tiny_llama, max_num_tokens=4, max_num_seqs=4)
    gone, stays = runner.add(PROMPT, max_tokens=20), runner.add(PROMPT[::-1], max_tokens=20)
    for _ in range(passes):
        runner.step()
    runner.engine.abort(gone)
    runner.engine.abort(gone)
    runner.engine.abort(RequestId(77))
    assert runner.engine.stats().running + runner.engine.stats().waiting == 1
    answers = runner.drain()
    assert answers[gone].last.finish_reason is FinishReason.CANCELLED
    assert sum(output.finish_reason is not None for output in answers[gone].outputs) == 1
    assert len(answers[stays].tokens) == 20
    assert runner.engine.stats().free_blocks == 256


def test_aborting_the_only_request_leaves_something_to_report(tiny_llama, runner_of):
    runner = runner_of(tiny_llama)
    request_id = runner.add(PROMPT)
    runner.engine.abort(request_id)
    assert runner.engine.has_work()
    step = runner.step()
    assert step.stats is None
    assert [output.finish_reason for output in step.outputs] == [FinishReason.CANCELLED]
    assert not runner.engine.has_work()


def test_a_broken_request_fails_alone_and_spoils_nothing(tiny_llama, runner_of):
    poison = 33
    weight = tiny_llama.module.get_input_embeddings().weight
    weight.data[poison] = torch.nan
    runner = runner_of(tiny_llama, num_blocks=8)
    (wanted,) = runner_of(tiny_llama).generate([PROMPT * 8], max_tokens=20)
    bad, good = runner.add([poison] * 40), runner.add(PROMPT * 8, max_tokens=20)
    answers = runner.drain()
    assert answers[bad].last.finish_reason is FinishReason.ERROR
    assert "no finite probabilities" in answers[bad].last.error
    assert answers[bad].tokens == []
    assert answers[good].tokens == wanted.tokens
    # the broken request's blocks serve others now, who also look at slots that they have not written
    for prompt in ([7] * 30, [8] * 61, [9] * 40):
        (alone,) = runner_of(tiny_llama).generate([prompt], max_tokens=8)
        (reused,) = runner.generate([prompt], max_tokens=8)
        assert reused.tokens == alone.tokens


def test_a_request_that_breaks_while_it_decodes_leaves_a_clean_row(tiny_llama, runner_of):
    poison = 33
    tiny_llama.module.get_input_embeddings().weight.data[poison] = torch.nan
    runner = runner_of(tiny_llama)
    longer = runner.add([7] * 60, max_tokens=30, logit_bias=((8, 1e4),))
    bad = runner.add(PROMPT * 8, max_tokens=20, logit_bias=((poison, 1e4),))
    while bad not in runner.answers() or runner.answers()[bad].last.finish_reason is None:
        runner.step()
    assert runner.answers()[bad].tokens == [poison]
    assert runner.answers()[bad].last.finish_reason is FinishReason.ERROR
    # the next one's row is read as far as the longer one's, past its own end and over what the broken one wrote
    (alone,) = runner_of(tiny_llama, options={"decode_rows_share": 0}).generate([PROMPT], max_tokens=8)
    (reused,) = runner.generate([PROMPT], max_tokens=8)
    assert reused.tokens == alone.tokens
    assert runner.answers()[longer].tokens == [8] * 30


@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_answers_do_not_depend_on_the_memory_for_rows(share, tiny_llama, runner_of):
    prompts = [[number + 3] * length for number, length in enumerate((5, 90, 17, 40, 33, 2, 64))]
    wanted = [runner_of(tiny_llama).generate([prompt], max_tokens=25)[0].tokens for prompt in prompts]
    runner = runner_of(tiny_llama, num_blocks=30, max_num_tokens=40, options={"decode_rows_share": share})
    assert [answer.tokens for answer in runner.generate(prompts, max_tokens=25)] == wanted


def test_numbers_add_up(tiny_llama, runner_of):
    runner = runner_of(tiny_llama, max_num_tokens=16, max_num_seqs=4)
    prompts = [[token] * length for token, length in ((3, 20), (4, 33), (5, 2))]
    runner.generate(prompts, max_tokens=5)
    runner.generate(prompts[:2], max_tokens=5)
    load = runner.engine.stats()
    assert (load.prompt_tokens_total, load.cached_tokens_total) == (55 + 53, 16 + 32)
    assert load.generated_tokens_total == 25
    assert (load.running, load.waiting, load.free_blocks) == (0, 0, 256)
    passes = [step.stats for step in runner.steps]
    assert sum(stats.prefill_tokens for stats in passes) == 108 - 48
    assert sum(stats.decode_sequences for stats in passes) == 5 * 4
    assert all(stats.duration_s > 0 for stats in passes)
    lengths = [len(prompt) for prompt in prompts + prompts[:2]]
    assert sum(stats.context_tokens for stats in passes) == sum(n + k for n in lengths for k in range(1, 5))


@pytest.mark.parametrize("caching", [True, False])
def test_sampling_does_not_depend_on_company_or_preemption(caching, tiny_llama, runner_of):
    sampling = {"temperature": 1.2, "top_p": 0.9, "seed": 11, "max_tokens": 30}
    (alone,) = runner_of(tiny_llama).generate([PROMPT], **sampling)
    runner = runner_of(tiny_llama, num_blocks=6, enable_prefix_caching=caching)
    first = runner.add([1] * 20, max_tokens=40)
    request_id = runner.add(PROMPT, **sampling)
    answers = runner.drain()
    assert len(answers[first].tokens) == 40
    assert runner.engine.stats().preemptions_total > 0
    assert answers[request_id].tokens == alone.tokens


def test_cached_tokens_are_told_once_with_the_first_output(tiny_llama, runner_of):
    runner = runner_of(tiny_llama)
    runner.generate([[3] * 40])
    (answer,) = runner.generate([[3] * 40])
    assert [output.cached_tokens for output in answer.outputs] == [32] + [None] * 9


def test_nothing_is_cached_when_caching_is_off(tiny_llama, runner_of):
    runner = runner_of(tiny_llama, enable_prefix_caching=False)
    runner.generate([[3] * 40])
    (answer,) = runner.generate([[3] * 40])
    assert answer.cached_tokens == 0
    assert runner.events == []
