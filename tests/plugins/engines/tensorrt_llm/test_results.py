"""However TensorRT-LLM updates its one result, each token is given exactly once."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import FinishReason, Request, SamplingParams
from trtserve.plugins.engines.tensorrt_llm.results import ResultNotUnderstood, ResultReader

EOS, STOP = 2, 7


def request(logprobs=None, **fields):
    sampling = SamplingParams(max_tokens=100, stop_token_ids=(STOP,), logprobs=logprobs)
    return Request(1, array("i", [5, 6]), sampling, (EOS, 3), **fields)


def result(token_ids, finish_reason=None, stop_reason=None, logprobs=None, cached_tokens=0):
    output = SimpleNamespace(
        token_ids=list(token_ids), finish_reason=finish_reason, stop_reason=stop_reason, logprobs=logprobs
    )
    return SimpleNamespace(outputs=[output], finished=finish_reason is not None, cached_tokens=cached_tokens)


def entries(token_ids, simple=False):
    """With another token that is more likely."""
    others = [{token: SimpleNamespace(logprob=-2.0 - token), token + 1000: SimpleNamespace(logprob=-1.0)}
              for token in token_ids]  # fmt: skip
    return [-2.0 - token for token in token_ids] if simple else others


ordinary = st.lists(st.integers(10, 20), max_size=12)


@st.composite
def generations(draw):
    """(request, tokens that the client has, tokens that it is to get, the token that ends them, snapshots)."""
    handed_over = draw(st.lists(st.integers(10, 12), max_size=3))
    said = draw(ordinary)
    end = draw(st.sampled_from([None, EOS, 3, STOP]))
    # Log probabilities; where they are missing for the prefill's tokens; whether a trimmed token keeps its own.
    wanted = draw(st.sampled_from([None, 0, 1, 2]))
    lacks, keeps, is_simple = draw(st.booleans()), draw(st.booleans()), wanted == 0 and draw(st.booleans())
    is_trimmed = end is not None and draw(st.booleans())
    is_split = draw(st.booleans())  # the end comes after the last token
    whole = [*handed_over, *said, *([end] if end is not None else [])]
    shown = whole[:-1] if is_trimmed else whole
    least = min(len(handed_over), len(shown))
    cuts = sorted(draw(st.lists(st.integers(0, len(shown)), max_size=6)))
    begin = len(handed_over) if lacks else 0

    def snapshot(count, **last):
        own = entries(whole[begin : max(begin, count)], is_simple)
        return result(whole[:count], logprobs=own if wanted is not None else [], cached_tokens=4, **last)

    snapshots = [snapshot(max(cut, least)) for cut in cuts] + ([snapshot(len(shown))] if is_split else [])
    reason = {"finish_reason": "length" if end is None else "stop", "stop_reason": None if end in (None, EOS) else end}
    last = snapshot(len(shown), **reason)
    if is_trimmed and keeps and wanted is not None:
        last.outputs[0].logprobs += entries([end], is_simple)
    # A trimmed token can be told without its log probability only where none are wanted.
    gives_end = end is not None and (not is_trimmed or wanted is None or (keeps and not (lacks and handed_over)))
    expected = [*said, *([end] if gives_end else [])]
    return request(wanted), handed_over, expected, end if gives_end else None, [*snapshots, last]


@given(generations())
def test_each_token_once(generation):
    asked, handed_over, expected, end, snapshots = generation
    reader = ResultReader(asked, num_skipped=len(handed_over))
    outputs = [output for snapshot in snapshots if (output := reader.read(snapshot)) is not None]
    assert [token for output in outputs for token in output.token_ids] == expected
    assert reader.num_tokens == len(expected) and reader.has_ended
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish_reason is (FinishReason.LENGTH if end is None and not outputs[-1].stop_token_id
                                         and snapshots[-1].outputs[0].finish_reason == "length"
                                         else FinishReason.STOP)  # fmt: skip
    assert outputs[-1].stop_token_id == end
    assert [output.cached_tokens for output in outputs] == [4, *[None] * (len(outputs) - 1)]
    wanted = asked.sampling.logprobs
    for output in outputs:
        if wanted is None or not output.token_ids:
            assert output.logprobs is None
            continue
        assert [own.token_id for own in output.logprobs] == output.token_ids
        assert all(own.logprob == -2.0 - own.token_id and len(own.top) <= wanted for own in output.logprobs)


def test_an_end_that_comes_after_its_token_is_not_given_twice():
    reader = ResultReader(request())
    assert reader.read(result([11, EOS])).token_ids == [11, EOS]
    last = reader.read(result([11, EOS], "stop"))
    assert (last.token_ids, last.stop_token_id) == ([], EOS)


def test_a_token_that_is_trimmed_after_it_was_read():
    reader = ResultReader(request())
    reader.read(result([11, STOP]))
    last = reader.read(result([11], "stop", STOP))
    assert (last.token_ids, last.stop_token_id) == ([], STOP)


def test_another_end_token_without_a_stop_reason():
    last = ResultReader(request()).read(result([11, 3], "stop"))
    assert (last.token_ids, last.stop_token_id) == ([11, 3], 3)


@pytest.mark.parametrize(
    ("reason", "expected", "error"),
    [
        ("length", FinishReason.LENGTH, None),
        ("not_finished", FinishReason.LENGTH, None),
        ("cancelled", FinishReason.CANCELLED, None),
        ("timeout", FinishReason.ERROR, "time limit"),
        ("of a later version", FinishReason.ERROR, "of a later version"),
    ],
)
def test_reasons(reason, expected, error):
    output = ResultReader(request()).read(result([11], reason))
    assert output.finish_reason is expected
    assert output.error is None if error is None else error in output.error


def test_likeliest_first_and_only_as_many_as_wanted():
    own = [{11: SimpleNamespace(logprob=-5.0), 12: SimpleNamespace(logprob=-1.0), 13: SimpleNamespace(logprob=-2.0)}]
    (logprob,) = ResultReader(request(2)).read(result([11], logprobs=own)).logprobs
    assert (logprob.logprob, logprob.top) == (-5.0, ((12, -1.0), (13, -2.0)))


@pytest.mark.parametrize("logprobs", [None, [], [{99: SimpleNamespace(logprob=-1.0)}], [{11: None}]])
def test_nonsense_ends_nothing_silently(logprobs):
    reader = ResultReader(request(1))
    with pytest.raises(ResultNotUnderstood):
        reader.read(result([11], "length", logprobs=logprobs))
    assert not reader.has_ended and reader.num_tokens == 0
