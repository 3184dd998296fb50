import asyncio
import random
import subprocess
import sys
import threading
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.server.errors import InvalidRequest
from trtserve.server.model.errors import ModelError
from trtserve.server.model.folder import ModelFolder
from trtserve.server.text.probes import PROBES
from trtserve.server.text.tokenizer import INLINE_CHARACTERS, Tokenizer, load_tokenizer


def test_the_default_model_is_encoded_fast(tokenizer):
    assert tokenizer.is_fast
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_id == 2
    assert tokenizer.special_ids == frozenset(range(17))
    assert tokenizer.named_special_tokens["bos_token"] == "<|im_start|>"
    assert tokenizer.token_id("nothing like this") is None


@pytest.fixture(scope="module")
def known_bytes(tokenizer):
    """This vocabulary has no token for some bytes that no assigned character begins with, such as 0xF1."""
    return {tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)}


@given(text=st.text(max_size=60))
def test_encoding_agrees_with_tokenizers_and_decodes_back(tokenizer, reference, known_bytes, text):
    ids = tokenizer.encode_inline(text, add_special_tokens=False)
    assert isinstance(ids, array) and ids.typecode == "i"
    assert list(ids) == reference.encode(text, add_special_tokens=False).ids
    if all(bytes([byte]) in known_bytes for byte in text.encode()):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_are_tokens_of_their_own(tokenizer):
    ids = tokenizer.encode_inline("1234", add_special_tokens=False)
    assert [tokenizer.token_text(token_id) for token_id in ids] == ["1", "2", "3", "4"]


async def test_long_texts_are_encoded_in_a_thread(default_folder, reference):
    threads = []

    def encode(text, add_special_tokens):
        threads.append(threading.current_thread())
        return array("i", reference.encode(text, add_special_tokens=add_special_tokens).ids)

    tokenizer = Tokenizer(reference, encode, {})
    short, long = "a" * INLINE_CHARACTERS, "word " * INLINE_CHARACTERS
    assert list(await tokenizer.encode(short, False)) == reference.encode(short).ids
    assert list(await tokenizer.encode(long, False)) == reference.encode(long).ids
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


async def test_the_loop_runs_while_a_long_text_is_encoded(tokenizer):
    words = [tokenizer.token_text(token_id) for token_id in range(200, 40_000)]
    text = "".join(random.Random(0).choices(words, k=200_000))
    encoding = asyncio.ensure_future(tokenizer.encode(text, False))
    turns = 0
    while not encoding.done():
        turns += 1
        await asyncio.sleep(0)
    assert len(encoding.result()) > 150_000
    assert turns > 10


@pytest.mark.parametrize("fast", [True, False])
def test_a_lone_surrogate_is_the_clients_fault(tokenizer, reference, fast):
    with pytest.raises(InvalidRequest, match=r"lone surrogate \('\\ud83d'\) at character 2"):
        (tokenizer if fast else Tokenizer(reference, None, {})).encode_inline("ab\ud83d", add_special_tokens=False)


def test_without_a_faster_way_tokenizers_encodes(tokenizer, reference):
    slow = Tokenizer(reference, None, {})
    assert not slow.is_fast
    assert slow.eos_token_id is None
    for text in PROBES:
        assert slow.encode_inline(text, add_special_tokens=False) == tokenizer.encode_inline(text, False)


def test_bytes_of_byte_level_tokens_join_to_the_text(tokenizer):
    text = "naïve 🙂 日本\n"
    ids = tokenizer.encode_inline(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_every_token_decodes_to_its_bytes(tokenizer, reference):
    wrong = [
        token_id
        for token_id in range(tokenizer.vocab_size)
        if reference.decode([token_id], skip_special_tokens=False) != tokenizer.token_text(token_id)
    ]
    assert wrong == []


def test_bytes_of_sentencepiece_tokens(sentencepiece_tokenizer):
    token_id = sentencepiece_tokenizer.token_id
    assert sentencepiece_tokenizer.token_bytes(token_id("\u2581a")) == b" a"
    assert sentencepiece_tokenizer.token_bytes(token_id("<0xE4>")) == b"\xe4"
    assert sentencepiece_tokenizer.token_text(token_id("<0xE4>")) == "\ufffd"
    assert sentencepiece_tokenizer.token_text(token_id("</s>")) == "</s>"
    assert sentencepiece_tokenizer.eos_token_id == token_id("</s>")


@given(ids=st.lists(st.integers(0, 49_200), max_size=40), skip=st.booleans())
def test_any_tokens_decode_as_tokenizers_does(tokenizer, reference, ids, skip):
    """The default model's backend is not kept."""
    assert tokenizer._backend is None
    assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


class Misspelt:
    """A vocabulary in which one token is another."""

    def __init__(self, reference, token_id):
        self._reference, self._token_id = reference, token_id

    def id_to_token(self, token_id):
        return "other" if token_id == self._token_id else self._reference.id_to_token(token_id)

    def token_to_id(self, token):
        return self._reference.token_to_id(token)


@pytest.mark.parametrize("wrong", [None, 0, 49_151])
def test_the_backend_is_kept_where_another_vocabulary_differs(reference, wrong):
    tokenizer = Tokenizer(reference, None, {}, Misspelt(reference, wrong))
    assert (tokenizer._backend is None) is (wrong is None)
    assert tokenizer.token_text(0) == reference.id_to_token(0)


def test_sentencepiece_keeps_its_backend(sentencepiece_tokenizer):
    assert sentencepiece_tokenizer._backend is not None


def test_truncation_asked_for_by_the_file_is_not_done(sentencepiece_tokenizer):
    assert len(sentencepiece_tokenizer.encode_inline("abcdefgh abcdefgh", add_special_tokens=False)) > 5


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match=r"tokenizer\.json is no tokenizer\.json that this release"):
        load_tokenizer(ModelFolder(tmp_path, "broken"))


MEMORY_SCRIPT = """
import random, sys
from pathlib import Path
from trtserve.server.model.folder import ModelFolder
from trtserve.server.text.tokenizer import load_tokenizer

tokenizer = load_tokenizer(ModelFolder(Path(sys.argv[1]), "default"))
words = [tokenizer.token_text(token_id) for token_id in range(200, 49_000)]
choose = random.Random(0)

def encode(num_prompts):
    for _ in range(num_prompts):
        tokenizer.encode_inline("".join(choose.choices(words, k=4000)), add_special_tokens=False)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = encode(200)
print(encode(400) - before)
"""


def test_memory_stays_flat_over_distinct_prompts(default_model):
    # In a process of its own: what other tests left behind grows and shrinks as it likes.
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(default_model)]
    grown = int(subprocess.run(command, capture_output=True, text=True, timeout=50, check=True).stdout)
    assert grown < 400 * 4000 * 4  # less than the token ids alone of what came after the first measurement
