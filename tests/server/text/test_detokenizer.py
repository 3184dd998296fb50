import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.server.text.detokenizer import StreamDetokenizer


def in_chunks(ids, sizes):
    position = 0
    while position < len(ids):
        size = next(sizes)
        yield ids[position : position + size]
        position += size


def stream(detokenizer, ids, sizes=None):
    chunks = in_chunks(ids, iter(sizes)) if sizes else ([token_id] for token_id in ids)
    return "".join(map(detokenizer.push, chunks)) + detokenizer.finish()


chunk_sizes = st.lists(st.integers(1, 7), min_size=100, max_size=100)
skips = st.booleans()


@pytest.fixture(scope="module")
def byte_ids(tokenizer):
    """The tokens of single bytes, for broken UTF-8 of every kind."""
    ids = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    assert len(ids) > 200
    return ids


@settings(max_examples=300)
@given(data=st.data(), skip=skips, sizes=chunk_sizes)
def test_any_byte_level_tokens_join_to_the_full_decode(tokenizer, byte_ids, data, skip, sizes):
    token = st.one_of(st.integers(0, tokenizer.vocab_size + 5), st.sampled_from(byte_ids), st.integers(0, 16))
    ids = data.draw(st.lists(token, max_size=60))
    assert stream(tokenizer.detokenizer(skip), ids, sizes) == tokenizer.decode(ids, skip)


@settings(max_examples=300)
@given(data=st.data(), skip=skips, sizes=chunk_sizes)
def test_as_json_the_text_is_the_same(tokenizer, byte_ids, data, skip, sizes):
    token = st.one_of(st.integers(0, tokenizer.vocab_size + 5), st.sampled_from(byte_ids), st.integers(0, 16))
    ids = data.draw(st.lists(token, max_size=60))
    for size_of_chunks in (sizes, [1] * 100):
        detokenizer = tokenizer.detokenizer(skip)
        pieces = [detokenizer.push_json(chunk) for chunk in in_chunks(ids, iter(size_of_chunks))]
        text = orjson.loads(b'"' + b"".join(pieces) + b'"') + detokenizer.finish()
        assert text == tokenizer.decode(ids, skip)


def test_as_json_of_the_library_stream(sentencepiece_tokenizer):
    text = 'say "hé" \\ 日'
    ids = sentencepiece_tokenizer.encode_inline(text, add_special_tokens=False)
    detokenizer = sentencepiece_tokenizer.detokenizer(True)
    data = b"".join(detokenizer.push_json([token_id]) for token_id in ids)
    assert orjson.loads(b'"' + data + b'"') + detokenizer.finish() == sentencepiece_tokenizer.decode(ids, True)


@given(text=st.text(), sizes=chunk_sizes)
def test_any_text_comes_back(tokenizer, text, sizes):
    ids = tokenizer.encode_inline(text, add_special_tokens=False)[:100]
    assert stream(tokenizer.detokenizer(False), ids, sizes) == tokenizer.decode(ids, False)


@given(text=st.text(), sizes=chunk_sizes)
def test_the_library_stream_gives_the_same_on_byte_level_tokens(tokenizer, reference, text, sizes):
    ids = tokenizer.encode_inline(text, add_special_tokens=False)[:100]
    assert stream(StreamDetokenizer(reference, False), ids, sizes) == tokenizer.decode(ids, False)


@given(text=st.text(st.sampled_from("abcdefgh é日🙂\ufffd"), max_size=30), sizes=chunk_sizes)
def test_sentencepiece_text_comes_back(sentencepiece_tokenizer, text, sizes):
    ids = sentencepiece_tokenizer.encode_inline(text, add_special_tokens=False)[:100]
    assert stream(sentencepiece_tokenizer.detokenizer(True), ids, sizes) == sentencepiece_tokenizer.decode(ids, True)


@given(
    prompt=st.text(st.sampled_from("abc é日"), min_size=1, max_size=12),
    text=st.text(st.sampled_from("abc é日"), max_size=12),
)
def test_sentencepiece_text_goes_on_behind_the_prompt(sentencepiece_tokenizer, prompt, text):
    whole = sentencepiece_tokenizer.encode_inline(prompt + "d" + text, add_special_tokens=False)
    split = max(i for i, token_id in enumerate(whole) if sentencepiece_tokenizer.token_text(token_id) == "d") + 1
    assert stream(sentencepiece_tokenizer.detokenizer(True, whole[:split]), whole[split:]) == text


def test_a_prompt_that_ends_in_a_special_token_is_no_context(sentencepiece_tokenizer):
    prompt = [*sentencepiece_tokenizer.encode_inline("abc", False), sentencepiece_tokenizer.eos_token_id]
    ids = sentencepiece_tokenizer.encode_inline("a", add_special_tokens=False)
    assert stream(sentencepiece_tokenizer.detokenizer(True, prompt), ids) == "a"


def test_a_prompt_that_ends_within_a_character_is_not_repeated(sentencepiece_tokenizer):
    a, b, begin, end = map(sentencepiece_tokenizer.token_id, ("a", "b", "<0xC3>", "<0xA9>"))
    assert stream(sentencepiece_tokenizer.detokenizer(True, [a, begin]), [end, b]) == "\ufffdb"


@given(tokens=st.lists(st.sampled_from(["<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "a", "\u2581a", "</s>"]), max_size=200))
def test_broken_bytes_with_byte_fallback_never_stop_the_stream(sentencepiece_tokenizer, tokens):
    ids = [sentencepiece_tokenizer.token_id(token) for token in tokens]
    text = stream(sentencepiece_tokenizer.detokenizer(True), [sentencepiece_tokenizer.token_id("b"), *ids])
    assert text.startswith("b")
    assert text.count("a") == sum("a" in token for token in tokens)


def test_a_character_is_held_back_until_it_is_whole(tokenizer, byte_ids):
    of_byte = {tokenizer.token_bytes(token_id): token_id for token_id in byte_ids}
    detokenizer = tokenizer.detokenizer(True)
    pushed = [detokenizer.push([of_byte[bytes([byte])]]) for byte in "🙂".encode()]
    assert pushed == ["", "", "", "🙂"]
    assert detokenizer.push([of_byte[b"\xf0"]]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
