"""Another form of a tokenizer gives the same ids, for every character and any mixture of them."""

import json
from array import array
from itertools import pairwise

import fastokens
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from trtserve.server.text.numeral_split import faster_form


@pytest.fixture(scope="module")
def fast(reference):
    return fastokens.Tokenizer.from_json_str(faster_form(reference))


def ids(fast, texts):
    flat, offsets = fast.encode_batch_flat(texts, False)
    flat, offsets = array("I", flat), array("Q", offsets)
    return [list(flat[begin:end]) for begin, end in pairwise(offsets)]


def expected(reference, texts):
    return [encoding.ids for encoding in reference.encode_batch_fast(texts, add_special_tokens=False)]


@pytest.mark.parametrize("form", ["x  {}1", "  {}{}a", "!{}?"])
def test_every_character_of_the_first_two_planes(fast, reference, form):
    characters = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]
    texts = [form.replace("{}", character) for character in characters]
    different = [
        hex(ord(character))
        for character, one, other in zip(characters, ids(fast, texts), expected(reference, texts), strict=True)
        if one != other
    ]
    assert not different


SOME = st.text("ab1 2½\n\t'sdmlrve  é日٣Ⅷ<>.,!\r\u00a0\u180e\u2003\u3000\U00011de0|_", max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(SOME | st.text(max_size=8), min_size=1, max_size=6).map("".join))
def test_any_text(fast, reference, text):
    assert ids(fast, [text]) == expected(reference, [text])


def test_a_text_that_goes_on_where_another_one_ended(fast, reference):
    """Longer than what fastokens compares with the text before."""
    start = "word of the 7 days " * 400
    for end, more in (
        ("ba", "r baz"),
        ("12", "34"),
        ("   ", "  x"),
        ("a ", "  "),
        ("don", "'t"),
        ("\n", "\n\ny"),
        (" ", "1"),
    ):
        for text in (start + end, start + end + more):
            assert ids(fast, [text]) == expected(reference, [text])


def test_the_tokenizer_itself_stays_as_it_was(reference):
    before = reference.to_str()
    assert json.loads(faster_form(reference))["pre_tokenizer"] != json.loads(before)["pre_tokenizer"]
    assert reference.to_str() == before


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "steps",
    [
        None,
        BYTES,
        pre_tokenizers.Sequence([BYTES, pre_tokenizers.Digits(individual_digits=True)]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTES]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES, pre_tokenizers.Whitespace()]),
    ],
)
def test_others_have_no_such_form(steps):
    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    if steps is not None:
        other.pre_tokenizer = steps
    assert faster_form(other) is None
