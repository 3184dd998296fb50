"""A sequence's tokens become text once, in order, whole, and up to where it stops."""

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import EOS_TOKEN_ID, make_tiny_model
from trtserve.plugins.api import Finish, FinishReason, TokenLogprob
from trtserve.server.api.choice import Choice, Flusher
from trtserve.server.errors import EngineFailed, Internal, RequestCancelled
from trtserve.server.model.folder import ModelFolder
from trtserve.server.text.text_stream import TextStream
from trtserve.server.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    return load_tokenizer(ModelFolder(folder, "tiny"))


class Emitted:
    """An Emit that keeps what it is given; `short_cut` as a stream or a whole answer has it, or none."""

    def __init__(self, short_cut=True):
        self.pieces, self.logprobs, self.short_cut = [], [], short_cut

    def __call__(self, choice, text, logprobs):
        self.pieces.append(text)
        self.logprobs += logprobs

    def plain(self, choice, text):
        decode = text.plain_decoder()

        def emit(token_ids):
            if piece := decode(token_ids):
                self.pieces.append(piece)

        return emit if self.short_cut else None

    @property
    def text(self):
        return "".join(self.pieces)


class Answer:
    """A choice with everything around it."""

    def __init__(self, tokenizer, short_cut=True, stop_token_ids=(), **text):
        self.flusher, self.emitted = Flusher(), Emitted(short_cut)
        self.stops, self.failures = [], []
        self.choice = Choice(
            0,
            TextStream(tokenizer, **text),
            self.flusher,
            self.emitted,
            stop=lambda: self.stops.append(True),
            fail=self.failures.append,
            stop_token_ids=stop_token_ids,
        )

    def drain(self, *pushes, logprobs=False):
        """What one drain of the worker's socket brings."""
        for number, token_ids in enumerate(pushes, 1):
            if number == len(pushes):
                self.flusher.expect_no_more()
            made = [TokenLogprob(token_id, -0.5) for token_id in token_ids] if logprobs else None
            self.choice.push(token_ids, made)
        self.flusher.flush()


def tokens_of(tokenizer, text):
    return tokenizer.encode_inline(text, False).tolist()


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(deadline=None)
@given(text=ANY_TEXT, cuts=st.lists(st.integers(0, 60)), short_cut=st.booleans())
def test_however_tokens_arrive_the_text_is_the_same(tokenizer, text, cuts, short_cut):
    answer, tokens = Answer(tokenizer, short_cut), tokens_of(tokenizer, text)
    bounds = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    for start, end in pairwise(bounds):
        answer.drain(tokens[start:end])
    answer.choice.end(Finish(FinishReason.LENGTH))
    assert answer.emitted.text == text
    assert answer.choice.num_tokens == len(tokens)
    assert answer.choice.finish_reason == "length"
    assert all(answer.emitted.pieces), "an empty piece is an event for nothing"


def test_what_is_there_at_once_is_one_piece(tokenizer):
    answer = Answer(tokenizer)
    answer.drain(tokens_of(tokenizer, "ab"), tokens_of(tokenizer, "cd"), tokens_of(tokenizer, "e"))
    answer.drain(tokens_of(tokenizer, "f"))
    assert answer.emitted.pieces == ["abcde", "f"]


def test_tokens_that_wait_when_the_end_comes_are_not_lost(tokenizer):
    answer = Answer(tokenizer)
    answer.drain(tokens_of(tokenizer, "abc"))
    answer.choice.push(tokens_of(tokenizer, "def"), None)
    answer.choice.end(Finish(FinishReason.STOP))
    answer.flusher.flush()
    assert (answer.emitted.text, answer.choice.num_tokens, answer.choice.finish_reason) == ("abcdef", 6, "stop")


def test_half_a_character_waits_and_is_shown_broken_at_the_end(tokenizer):
    answer = Answer(tokenizer)
    first, *rest = tokens_of(tokenizer, "é")
    answer.drain([first])
    assert answer.emitted.pieces == []
    answer.drain(rest)
    answer.drain([first])
    answer.choice.end(Finish(FinishReason.LENGTH))
    assert answer.emitted.pieces == ["é", "\ufffd"]


@pytest.mark.parametrize(("include_stop", "text"), [(False, "one"), (True, "one two")])
def test_a_stop_string_ends_the_run_and_the_text(tokenizer, include_stop, text):
    answer = Answer(tokenizer, stops=(" two",), include_stop=include_stop)
    answer.drain(tokens_of(tokenizer, "one t"))
    assert answer.stops == []
    answer.drain(tokens_of(tokenizer, "wo th"))
    assert answer.stops == [True]
    answer.drain(tokens_of(tokenizer, "ree"))  # the worker has not heard of it yet
    answer.choice.end(Finish(FinishReason.STOP))
    assert (answer.emitted.text, answer.choice.stop_reason) == (text, " two")
    assert (answer.choice.num_tokens, answer.choice.finish_reason) == (7, "stop")


def test_a_stop_string_in_the_last_tokens_is_no_length(tokenizer):
    answer = Answer(tokenizer, stops=("d",))
    answer.choice.push(tokens_of(tokenizer, "abcd"), None)
    answer.choice.end(Finish(FinishReason.LENGTH))
    assert (answer.emitted.text, answer.choice.finish_reason, answer.choice.stop_reason) == ("abc", "stop", "d")


def test_the_beginning_of_a_stop_string_is_given_out_at_the_end(tokenizer):
    answer = Answer(tokenizer, stops=("xyz",))
    answer.drain(tokens_of(tokenizer, "abxy"))
    assert answer.emitted.text == "ab"
    answer.choice.end(Finish(FinishReason.LENGTH))
    assert (answer.emitted.text, answer.choice.finish_reason) == ("abxy", "length")


def test_a_stop_token_of_the_clients_is_told_and_not_shown(tokenizer):
    (stop,) = tokens_of(tokenizer, "z")
    answer = Answer(tokenizer, stop_token_ids=(stop,), end_token_ids={EOS_TOKEN_ID, stop})
    answer.drain(tokens_of(tokenizer, "abz"))
    answer.choice.end(Finish(FinishReason.STOP, stop_token_id=stop))
    assert answer.emitted.text == "ab"
    assert (answer.choice.stop_reason, answer.choice.num_tokens, answer.choice.finish_reason) == (stop, 3, "stop")


def test_the_end_of_a_sequence_is_no_reason_to_name(tokenizer):
    answer = Answer(tokenizer, stop_token_ids=(7,), end_token_ids={EOS_TOKEN_ID, 7})
    answer.drain([*tokens_of(tokenizer, "ab"), EOS_TOKEN_ID])
    answer.choice.end(Finish(FinishReason.STOP, stop_token_id=EOS_TOKEN_ID))
    assert (answer.emitted.text, answer.choice.stop_reason, answer.choice.finish_reason) == ("ab", None, "stop")


@settings(deadline=None)
@given(text=ANY_TEXT, size=st.integers(1, 7))
def test_every_token_has_its_log_probability_once(tokenizer, text, size):
    answer, tokens = Answer(tokenizer), tokens_of(tokenizer, text)
    for start in range(0, len(tokens), size):
        answer.drain(tokens[start : start + size], logprobs=True)
    answer.choice.end(Finish(FinishReason.LENGTH))
    assert [entry.token_id for entry in answer.emitted.logprobs] == tokens
    assert answer.emitted.text == text


def test_log_probabilities_end_where_the_text_does(tokenizer):
    answer = Answer(tokenizer, stops=("cd",))
    answer.drain(tokens_of(tokenizer, "ab"), logprobs=True)
    answer.drain(tokens_of(tokenizer, "cdef"), logprobs=True)
    answer.drain(tokens_of(tokenizer, "gh"), logprobs=True)
    answer.choice.end(Finish(FinishReason.STOP))
    assert [entry.token_id for entry in answer.emitted.logprobs] == tokens_of(tokenizer, "abcd")


def test_an_engine_that_gave_up_is_an_error(tokenizer):
    with pytest.raises(EngineFailed, match="no room for it"):
        Answer(tokenizer).choice.end(Finish(FinishReason.ERROR, error="no room for it"))
    with pytest.raises(EngineFailed, match="gave up"):
        Answer(tokenizer).choice.end(Finish(FinishReason.ERROR))
    with pytest.raises(RequestCancelled):
        Answer(tokenizer).choice.end(Finish(FinishReason.CANCELLED))


def test_times_and_cached_tokens(tokenizer):
    answer = Answer(tokenizer)
    answer.choice.cached(12)
    answer.choice.push([5], None)
    answer.choice.flush(100.0)
    answer.choice.push([6], None)
    answer.choice.flush(101.5)
    before_s = time.monotonic()
    answer.choice.end(Finish(FinishReason.LENGTH))
    choice = answer.choice
    assert (choice.cached_tokens, choice.first_token_s) == (12, 100.0)
    assert choice.last_token_s >= before_s


def test_tokens_of_the_last_message_go_straight_through(tokenizer):
    answer = Answer(tokenizer)
    answer.drain(tokens_of(tokenizer, "a"))
    answer.flusher.expect_no_more()
    answer.choice.push(tokens_of(tokenizer, "b"), None)
    assert answer.emitted.text == "ab" and answer.flusher.dirty == [] and answer.choice.num_tokens == 2
    answer.flusher.flush()
    answer.choice.push(tokens_of(tokenizer, "c"), None)
    assert answer.emitted.text == "ab"  # not known to be the last
    answer.flusher.expect_no_more()
    answer.choice.push(tokens_of(tokenizer, "d"), None)
    assert answer.emitted.text == "ab"  # behind one that waits
    answer.flusher.flush()
    assert answer.emitted.pieces == ["a", "b", "cd"]


def test_a_defect_on_the_straight_way_is_the_request_s_own(tokenizer, caplog):
    answer = Answer(tokenizer)
    answer.drain(tokens_of(tokenizer, "a"))
    answer.choice._emit_plain = lambda token_ids: 1 / 0
    answer.flusher.expect_no_more()
    answer.choice.push(tokens_of(tokenizer, "b"), None)
    assert isinstance(answer.failures[0], Internal) and "ZeroDivisionError" in caplog.text


def test_a_defect_of_one_choice_does_not_hurt_the_others(tokenizer, caplog):
    bad, good = Answer(tokenizer), Answer(tokenizer)
    good.choice._flusher = bad.flusher

    def fail(*_):
        raise ZeroDivisionError

    bad.choice._emit = fail
    for answer in (bad, good):
        answer.choice.push(tokens_of(tokenizer, "a"), None)
    bad.flusher.flush()
    assert isinstance(bad.failures[0], Internal) and good.emitted.text == "a"
    assert "ZeroDivisionError" in caplog.text
