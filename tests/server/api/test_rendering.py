"""The bytes of answers: a chunk out of its ready-made envelope equals one rendered whole, whatever the text."""

import math
from dataclasses import dataclass

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import make_tiny_model
from trtserve.plugins.api import TokenLogprob
from trtserve.server.api.rendering import (
    TEXT_MARK,
    ChatShape,
    ChunkRenderer,
    CompletionShape,
    Envelope,
    StreamEmitter,
    Usage,
    WholeAnswer,
    finite,
)
from trtserve.server.model.folder import ModelFolder
from trtserve.server.text.tokenizer import load_tokenizer

ENVELOPE = Envelope("chatcmpl-1", 'the "model"\\', 1_700_000_000)
USAGE = Usage(10, 5, 4)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    [TEXT_MARK, '"', "\\", "\x00", "\u2028", "</script>", "data: [DONE]\n\n", "\r\n", "\U0001f600", '"}]}\n\n']
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    return load_tokenizer(ModelFolder(folder, "tiny"))


@dataclass
class EndedChoice:
    """What rendering reads of a choice."""

    index: int = 0
    finish_reason: str | None = "stop"
    stop_reason: str | int | None = None


class Stream:
    """Takes events as a client's stream does."""

    def __init__(self):
        self.written = b""

    def write(self, data):
        self.written += data

    def framed(self, prefix, suffix):
        return lambda piece: self.write(prefix + piece + suffix)


def shapes(tokenizer):
    return {"chat": ChatShape(tokenizer), "completion": CompletionShape(tokenizer, ["", "echo "])}


def events(data):
    """The objects of a stream's bytes."""
    assert data.endswith(b"\n\n")
    lines = data[:-2].split(b"\n\n")
    assert all(line.startswith(b"data: ") and b"\n" not in line for line in lines)
    return [orjson.loads(line.removeprefix(b"data: ")) for line in lines]


def text_chunk(kind, index, text):
    """The whole object, as the API says it, of a piece of text."""
    body = {"delta": {"content": text}} if kind == "chat" else {"text": text}
    choice = {"index": index, **body, "logprobs": None, "finish_reason": None}
    name = "chat.completion.chunk" if kind == "chat" else "text_completion"
    return {
        "id": ENVELOPE.id,
        "object": name,
        "created": ENVELOPE.created,
        "model": ENVELOPE.model,
        "choices": [choice],
    }


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("include_usage", [False, True])
@settings(deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), index=st.integers(0, 1))
def test_a_chunk_equals_its_full_rendering(tokenizer, kind, include_usage, texts, index):
    renderer, choice = ChunkRenderer(ENVELOPE, shapes(tokenizer)[kind], include_usage, None), EndedChoice(index)
    opening = renderer.open(choice)
    extra = {"usage": None} if include_usage else {}
    for text in texts:
        whole = b"data: " + orjson.dumps(text_chunk(kind, index, text) | extra) + b"\n\n"
        assert renderer.text(choice, text, ()) == whole
        prefix, suffix = renderer.frame(choice)
        assert prefix + orjson.dumps(text) + suffix == whole
    has_opening = kind == "chat" or index == 1
    assert len(events(opening)) == 1 if has_opening else opening == b""


def test_a_choice_opens_once(tokenizer):
    renderer, choice = ChunkRenderer(ENVELOPE, ChatShape(tokenizer), False, None), EndedChoice()
    first, second = events(renderer.text(choice, "a", ()) + renderer.text(choice, "b", ()))[:2]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert second["choices"][0]["delta"] == {"content": "a"}
    (end,) = events(renderer.end(choice))
    assert end["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("index", [0, 1])
def test_what_is_prepared_is_what_is_sent(tokenizer, kind, index):
    """And tells as many tokens as there are when it is sent."""
    prepared, unprepared = (ChunkRenderer(ENVELOPE, shapes(tokenizer)[kind], True, None) for _ in range(2))
    prepared.prepare(index)
    assert prepared.frame(EndedChoice(index)) is None
    for text in ("a", "b"):
        assert prepared.text(EndedChoice(index), text, ()) == unprepared.text(EndedChoice(index), text, ())
    tokens = 0
    telling = ChunkRenderer(ENVELOPE, shapes(tokenizer)[kind], True, lambda: Usage(10, tokens, 0))
    telling.prepare(index)
    tokens = 3
    usages = {event["usage"]["completion_tokens"] for event in events(telling.text(EndedChoice(index), "a", ()))}
    assert usages == {3}


def test_a_choice_that_says_nothing_opens_at_its_end(tokenizer):
    renderer = ChunkRenderer(ENVELOPE, ChatShape(tokenizer), False, None)
    opening, end = events(renderer.end(EndedChoice(finish_reason="length", stop_reason=5)))
    assert opening["choices"][0]["delta"]["role"] == "assistant"
    assert (end["choices"][0]["finish_reason"], end["choices"][0]["stop_reason"]) == ("length", 5)


def test_an_echo_goes_first(tokenizer):
    renderer = ChunkRenderer(ENVELOPE, CompletionShape(tokenizer, ["the prompt"]), False, None)
    texts = [event["choices"][0]["text"] for event in events(renderer.text(EndedChoice(), " goes on", ()))]
    assert texts == ["the prompt", " goes on"]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_usage_in_every_chunk(tokenizer, kind):
    tokens = iter(range(100))
    renderer = ChunkRenderer(ENVELOPE, shapes(tokenizer)[kind], True, lambda: Usage(10, next(tokens), 0))
    choice = EndedChoice()
    data = renderer.text(choice, "a", ()) + renderer.text(choice, "b", ()) + renderer.end(choice)
    seen = [event["usage"]["completion_tokens"] for event in events(data)]
    assert seen == sorted(set(seen))
    assert renderer.frame(choice) is None


def test_the_last_usage_has_no_choices(tokenizer):
    renderer = ChunkRenderer(ENVELOPE, ChatShape(tokenizer), True, None)
    (event,) = events(renderer.usage(USAGE))
    assert event["choices"] == []
    assert event["usage"] == {
        "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip


LOGPROBS = [TokenLogprob(5, -0.5, ((5, -0.5), (6, -1.5))), TokenLogprob(7, -math.inf)]


def test_log_probabilities_of_chat(tokenizer):
    renderer = ChunkRenderer(ENVELOPE, ChatShape(tokenizer), False, None)
    _, event = events(renderer.text(EndedChoice(), "ab", LOGPROBS))
    first, second = event["choices"][0]["logprobs"]["content"]
    assert first["token"].encode() == bytes(first["bytes"]) == tokenizer.token_bytes(5)
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -1.5]
    assert (second["logprob"], second["top_logprobs"]) == (-9999.0, [])
    assert event["choices"][0]["delta"] == {"content": "ab"}


def completion_logprobs(tokenizer, echo, *pieces):
    """text_offset of tokens that come in these pieces, and the rest of the last piece's logprobs."""
    shape = CompletionShape(tokenizer, [echo], lambda index: tokenizer.detokenizer(skip_special_tokens=True))
    rendered = [shape.logprobs(EndedChoice(), [TokenLogprob(token_id, -1.0) for token_id in ids]) for ids in pieces]
    return [offset for each in rendered for offset in each["text_offset"]], rendered[-1]


@pytest.mark.parametrize("cut", range(10))
async def test_log_probabilities_of_completions_count_characters(tokenizer, cut):
    ids = list(await tokenizer.encode("a\U0001f600é b", False))
    assert len(ids) == 9  # the tiny model knows bytes
    offsets, last = completion_logprobs(tokenizer, "echo", ids[:cut], ids[cut:])
    assert [offset - 4 for offset in offsets] == [0, 1, 1, 1, 1, 2, 2, 3, 4]
    assert len(last["tokens"]) == len(last["token_logprobs"]) == len(last["top_logprobs"]) == 9 - cut


def test_special_tokens_that_are_not_shown_take_no_place(tokenizer):
    special = min(tokenizer.special_ids)
    offsets, _ = completion_logprobs(tokenizer, "", [5, special, 6])
    assert offsets == [0, 1, 1]


def test_the_chosen_token_is_among_the_top_ones(tokenizer):
    shape = CompletionShape(tokenizer, [""], lambda index: tokenizer.detokenizer(skip_special_tokens=True))
    likely = TokenLogprob(9, -3.0, ((5, -0.5), (6, -1.5)))
    rendered = shape.logprobs(EndedChoice(), [*LOGPROBS, likely])
    assert rendered["token_logprobs"] == [-0.5, -9999.0, -3.0]
    assert [list(top.values()) for top in rendered["top_logprobs"]] == [[-0.5, -1.5], [-9999.0], [-0.5, -1.5, -3.0]]
    for token, logprob, top in zip(
        *(rendered[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert top[token] == logprob


class GivenText:
    """A plain text stream whose tokens are texts."""

    def plain_decoder(self):
        return "".join

    def plain_json(self):
        return lambda tokens: orjson.dumps("".join(tokens))[1:-1]


@pytest.mark.parametrize("kind", ["chat", "completion"])
@settings(deadline=None)
@given(texts=st.lists(TEXTS, max_size=5))
def test_a_whole_answer_is_its_pieces_joined(tokenizer, kind, texts):
    whole, choice = WholeAnswer(ENVELOPE, shapes(tokenizer)[kind]), EndedChoice(stop_reason="END")
    for number, text in enumerate(texts):
        if number:
            whole.plain(choice, GivenText())([text])
        else:
            whole(choice, text, ())
    answer = orjson.loads(whole.body([choice], USAGE))
    (only,) = answer["choices"]
    assert (only["message"]["content"] if kind == "chat" else only["text"]) == "".join(texts)
    assert (only["finish_reason"], only["stop_reason"], only["logprobs"]) == ("stop", "END", None)
    assert answer["usage"]["total_tokens"] == 15
    assert answer["object"] == ("chat.completion" if kind == "chat" else "text_completion")


@settings(deadline=None)
@given(texts=st.lists(TEXTS.filter(bool), min_size=1, max_size=6))
def test_the_short_way_to_a_stream_writes_the_same(tokenizer, texts):
    written = []
    for short in (False, True):
        stream, choice = Stream(), EndedChoice()
        emit = StreamEmitter(ChunkRenderer(ENVELOPE, ChatShape(tokenizer), False, None), stream)
        emit(choice, texts[0], ())
        plain = emit.plain(choice, GivenText())
        for text in texts[1:]:
            plain([text]) if short else emit(choice, text, ())
        written.append(stream.written)
    assert written[0] == written[1]


@pytest.mark.parametrize(("logprob", "shown"), [(-1.5, -1.5), (0.0, 0.0), (-math.inf, -9999.0)])
def test_json_has_no_infinity(logprob, shown):
    assert finite(logprob) == shown
