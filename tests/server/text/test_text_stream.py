import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.server.text.text_stream import TextStream


def answer(stream, ids, sizes):
    parts, position = [], 0
    for size in [*sizes, len(ids) or 1]:
        parts.append(stream.push(ids[position : position + size]))
        position += size
    return "".join([*parts, stream.finish()])


def cut_at_first_stop(text, stops, include):
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@pytest.fixture(scope="module")
def byte_ids(tokenizer):
    return [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]


@st.composite
def token_lists(draw, tokenizer, byte_ids):
    """Encoded text of any kind, special tokens, and single bytes that need not be UTF-8."""
    text = st.one_of(
        st.text(max_size=8), st.sampled_from(["e\u0301", "👩\u200d👩\u200d👧", "日本", "aab", "\ufffd", "\n\n"])
    )
    encoded = text.map(lambda text: list(tokenizer.encode_inline(text, add_special_tokens=False)))
    single = st.one_of(st.sampled_from(byte_ids), st.integers(0, 16), st.integers(0, tokenizer.vocab_size - 1))
    parts = draw(st.lists(st.one_of(encoded, single.map(lambda token_id: [token_id])), max_size=20))
    return [token_id for part in parts for token_id in part]


@settings(max_examples=400)
@given(data=st.data(), include=st.booleans(), skip=st.booleans())
def test_streamed_equals_whole_equals_full_decode_cut_at_the_first_stop(tokenizer, byte_ids, data, include, skip):
    ids = data.draw(token_lists(tokenizer, byte_ids))
    full = tokenizer.decode(ids, skip)
    of_the_text = st.integers(0, len(full)).flatmap(
        lambda start: st.integers(1, 6).map(lambda length: full[start : start + length] or "x")
    )
    stops = data.draw(st.lists(st.one_of(of_the_text, st.text(min_size=1, max_size=4)), max_size=4))
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=40))

    def make():
        return TextStream(tokenizer, stops=stops, include_stop=include, skip_special_tokens=skip)

    streamed, whole = make(), make()
    expected, stop = cut_at_first_stop(full, stops, include)
    assert answer(streamed, ids, sizes) == expected
    assert answer(whole, ids, []) == expected
    assert streamed.stop_string == whole.stop_string == stop
    assert streamed.num_tokens_used == whole.num_tokens_used <= len(ids)


def test_what_was_shown_is_never_taken_back(tokenizer):
    stream = TextStream(tokenizer, stops=["STOP"])
    shown = [stream.push([token_id]) for token_id in tokenizer.encode_inline("go on STO no STOP never", False)]
    assert "".join(shown) == "go on STO no "
    assert stream.stop_string == "STOP"


def test_tokens_are_counted_up_to_the_stop(tokenizer):
    before = tokenizer.encode_inline("one two", False)
    ids = [*before, *tokenizer.encode_inline("###", False), *tokenizer.encode_inline(" three", False)]
    stream = TextStream(tokenizer, stops=["##"])
    assert stream.push(ids) + stream.finish() == "one two"
    assert len(before) < stream.num_tokens_used < len(ids)


def test_an_ending_token_stays_out_of_the_text(tokenizer):
    (end,) = tokenizer.encode_inline("!", False)
    ids = [*tokenizer.encode_inline("Hi", False), end]
    assert answer(TextStream(tokenizer, end_token_ids={end}), ids, []) == "Hi"
    assert answer(TextStream(tokenizer, end_token_ids={end}, include_stop=True), ids, []) == "Hi!"
    assert answer(TextStream(tokenizer), ids, []) == "Hi!"


def test_special_tokens_show_only_where_asked_for(tokenizer):
    ids = [*tokenizer.encode_inline("Hi", False), tokenizer.eos_token_id]
    assert answer(TextStream(tokenizer), ids, [1, 1]) == "Hi"
    assert answer(TextStream(tokenizer, skip_special_tokens=False), ids, [1, 1]) == "Hi<|im_end|>"
    ended = TextStream(tokenizer, skip_special_tokens=False, end_token_ids={tokenizer.eos_token_id})
    assert answer(ended, ids, [1, 1]) == "Hi"
    assert ended.num_tokens_used == len(ids)


def test_a_stop_string_in_the_broken_end_of_a_text_is_found(tokenizer, byte_ids):
    (lead,) = [token_id for token_id in byte_ids if tokenizer.token_bytes(token_id) == b"\xf0"]
    stream = TextStream(tokenizer, stops=["\ufffd"])
    assert answer(stream, [*tokenizer.encode_inline("a", False), lead], []) == "a"
    assert stream.stop_string == "\ufffd"


def test_a_sentencepiece_answer_goes_on_behind_its_prompt(sentencepiece_tokenizer):
    ids = sentencepiece_tokenizer.encode_inline("abc abc", False)
    stream = TextStream(sentencepiece_tokenizer, stops=["c"], prompt=ids)
    assert answer(stream, ids, [1] * len(ids)) == " ab"
