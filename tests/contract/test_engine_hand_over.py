"""Two TensorRT-LLM engines that hand KV over, on the stand-in: each token once, every end told, no rule broken."""

from __future__ import annotations

import time
from array import array
from contextlib import ExitStack

import pytest
from msgspec.structs import replace

from tests.models import EOS_TOKEN_ID, MAX_SEQ_LEN
from trtserve.plugins.api import EngineConfig, FinishReason, Request, Role, SamplingParams
from trtserve.plugins.conformance.sink import CollectingSink
from trtserve.plugins.engines.tensorrt_llm import generation, make_engine

PROMPT = array("i", range(10, 30))
DEADLINE_S = 20


class Side:
    """A started engine with what it says."""

    def __init__(self, engine, sink, info):
        self.engine, self.sink, self.info = engine, sink, info

    def run(self, request):
        """All outputs of a request, which ends."""
        self.engine.submit(request)
        return self.ended(request.id)

    def ended(self, request_id):
        self.sink.wait_ended([request_id], DEADLINE_S)
        outputs = self.sink.outputs_of(request_id)
        assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
        return outputs

    def is_idle(self):
        load = self.engine.stats()
        nothing = (load.running, load.waiting, load.free_blocks) == (0, 0, self.info.num_blocks)
        return nothing and not self.engine._serving._generation._live

    def wait_moving(self, request_id):
        """Until TensorRT-LLM has the request."""
        deadline = time.monotonic() + DEADLINE_S
        while (live := self.engine._serving._generation._live.get(request_id)) is None or live.result is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)


@pytest.fixture
def start(model_folder, import_trtllm, violations, monkeypatch):
    """Starts engines with the environment as it is then; all are closed, idle and without a broken rule."""
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_LENGTH", "never")
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_STEP_MS", "0")
    import_trtllm()
    sides = []
    with ExitStack() as stack:

        def make(role=Role.AGG, is_checked=True, **options):
            config = EngineConfig(
                model_path=str(model_folder), role=role, block_size=8, num_blocks=400, max_num_seqs=6,
                max_num_tokens=64, max_seq_len=MAX_SEQ_LEN, options={"warm_up_requests": 1, **options},
            )  # fmt: skip
            engine, sink = make_engine("tensorrt_llm", config), CollectingSink()
            stack.callback(engine.close)
            side = Side(engine, sink, engine.start(sink))
            if is_checked:
                sides.append(side)
            return side

        yield make
        for side in sides:
            assert side.is_idle()
            assert side.sink.failures == []
    assert violations() == []


def request(number, prompt=PROMPT, max_tokens=8, eos=(), logprobs=None, **fields):
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=not eos, logprobs=logprobs)
    return Request(number, prompt, sampling, eos, **fields)


def tokens_of(outputs):
    return [token for output in outputs for token in output.token_ids]


def handed_over(side, number, max_tokens=8, **fields):
    """The decode of a prompt that was prefilled there, and the tokens that the prefill gave."""
    (first,) = side.run(request(number, max_tokens=max_tokens, keeps_kv=True, **fields))
    assert first.finish_reason is FinishReason.LENGTH and first.kv_handle is not None
    resumed = PROMPT + array("i", first.token_ids)
    left = max_tokens - len(first.token_ids)
    decode = request(number, resumed, left, num_resumed=len(first.token_ids), kv_handle=first.kv_handle, **fields)
    return decode, list(first.token_ids)


@pytest.mark.parametrize("excludes", ["0", "1"])
@pytest.mark.parametrize("speculation", [None, {"decoding_type": "MTP", "num_nextn_predict_layers": 2}])
@pytest.mark.parametrize("finish", ["not_finished", "length"])
def test_each_token_once(start, monkeypatch, excludes, speculation, finish):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_EXCLUDE_FIRST_TOKENS", excludes)
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_CONTEXT_FINISH", finish)
    options = {"llm_args": {"speculative_config": speculation}} if speculation else {}
    prefill, decode, alone = start(Role.PREFILL, **options), start(Role.DECODE, **options), start()
    whole = alone.run(request(1, max_tokens=24, logprobs=1))
    for number in (1, 2):  # guessed, then learnt
        taken, first = handed_over(prefill, number, max_tokens=24, logprobs=1)
        outputs = decode.run(taken)
        assert first + tokens_of(outputs) == tokens_of(whole)
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert all(len(output.logprobs) == len(output.token_ids) for output in outputs if output.token_ids)
    load = decode.engine.stats()
    assert load.accepted_tokens_total <= load.drafted_tokens_total
    assert bool(load.accepted_tokens_total) is (speculation is not None)


def test_a_prefill_that_ends_leaves_nothing(start, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_LENGTH", "0")
    prefill = start(Role.PREFILL)
    (only,) = prefill.run(request(1, eos=(EOS_TOKEN_ID,), keeps_kv=True))
    assert (only.finish_reason, only.stop_token_id, only.kv_handle) == (FinishReason.STOP, EOS_TOKEN_ID, None)


def test_transfers_that_fail_are_told_as_lost(start, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_TRANSFER_FAILURES", "1")
    prefill, decode = start(Role.PREFILL), start(Role.DECODE)
    (failed,) = decode.run(handed_over(prefill, 1)[0])
    assert failed.finish_reason is FinishReason.ERROR and failed.kv_lost and "transfer fails" in failed.error
    taken, _ = handed_over(prefill, 2)
    assert decode.run(taken)[-1].finish_reason is FinishReason.LENGTH
    (again,) = decode.run(replace(taken, id=3))  # a handle is good for one
    assert again.kv_lost


@pytest.mark.parametrize("change", [{"descriptor": b"junk"}, {"descriptor": b""}])
def test_a_handle_that_is_none_is_refused_as_lost(start, change):
    prefill, decode = start(Role.PREFILL), start(Role.DECODE)
    taken, _ = handed_over(prefill, 1)
    (refused,) = decode.run(replace(taken, kv_handle=replace(taken.kv_handle, **change)))
    assert refused.finish_reason is FinishReason.ERROR and refused.kv_lost


def test_an_engine_that_moves_no_kv_does_not_pretend_to(start):
    prefill, alone = start(Role.PREFILL), start()
    (refused,) = alone.run(handed_over(prefill, 1)[0])
    assert refused.finish_reason is FinishReason.ERROR and refused.kv_lost


def test_a_prefill_cancelled_in_its_context_phase(start, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_STEP_MS", "20")
    prefill = start(Role.PREFILL)
    prompt = array("i", [token % 900 + 50 for token in range(500)])  # takes eight passes
    prefill.engine.submit(request(1, prompt, keeps_kv=True))
    prefill.wait_moving(1)
    prefill.engine.cancel(1)
    (only,) = prefill.ended(1)
    assert (only.finish_reason, only.kv_handle, list(only.token_ids)) == (FinishReason.CANCELLED, None, [])
    prefill.engine.cancel(1)


def test_a_decode_cancelled_while_its_kv_is_under_way(start, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_TRANSFER_MS", "150")
    prefill, decode = start(Role.PREFILL), start(Role.DECODE)
    taken, _ = handed_over(prefill, 1, max_tokens=3000)
    decode.engine.submit(taken)
    decode.wait_moving(1)
    decode.engine.cancel(1)
    decode.engine.cancel(1)
    assert decode.ended(1)[-1].finish_reason is FinishReason.CANCELLED
    prefill.engine.cancel(1)  # as at the end of every hand-over: it was taken
    assert prefill.run(request(2))[-1].finish_reason is FinishReason.LENGTH


def test_a_transfer_that_never_ends_breaks_the_engine(start, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_TRANSFER_MS", "1500")
    monkeypatch.setattr(generation, "_REAP_GRACE_S", 0.05)
    prefill, decode = start(Role.PREFILL), start(Role.DECODE, is_checked=False, kv_transfer_timeout_ms=100)
    decode.engine._serving._executor.llm._engine.abort = lambda request_id: None  # deaf as well
    decode.engine.submit(handed_over(prefill, 1)[0])
    assert isinstance(decode.sink.wait_failure(DEADLINE_S), generation.TransferHung)
