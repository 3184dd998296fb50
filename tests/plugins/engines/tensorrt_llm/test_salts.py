"""The salt of a stored block, told or concluded, and never another tenant's."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.engines.tensorrt_llm import salts as module
from trtserve.plugins.engines.tensorrt_llm.salts import Salts

SIZE = 4
ROOT = array("i", [1, 2, 3, 4])


def of(salts, root=ROOT, **block):
    return salts.of(array("i", root), block)


def test_without_salts_nothing_is_remembered():
    salts = Salts(SIZE)
    salts.submitted(ROOT, "")
    assert of(salts) == ""
    assert not salts._by_root


def test_a_later_version_tells_it():
    salts = Salts(SIZE)
    assert of(salts, cache_salt="a") == "a"


def test_two_tenants_with_the_same_beginning():
    salts = Salts(SIZE)
    salts.submitted(array("i", [*ROOT, 5]), "a")
    assert of(salts) == "a"
    salts.submitted(array("i", [*ROOT, 6]), "")
    assert of(salts) is None
    assert of(salts, cache_salt="a") == "a"


def test_a_prompt_shorter_than_a_block_is_filled_up_with_its_answer():
    salts = Salts(SIZE)
    salts.submitted(ROOT[:2], "a")
    assert of(salts) == "a"
    assert of(salts, [1, 3, 3, 4]) == ""
    salts.submitted(ROOT[:3], "b")
    assert of(salts) is None


def test_beyond_what_is_remembered_nobody_can_say(monkeypatch):
    monkeypatch.setattr(module, "_MOST_ROOTS", 2)
    salts = Salts(SIZE)
    for first in range(3):
        salts.submitted(array("i", [first, 0, 0, 0]), "a")
    assert [of(salts, [first, 0, 0, 0]) for first in range(3)] == [None, "a", "a"]


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=6)
requests = st.lists(st.tuples(prompts, prompts, st.sampled_from(["", "a", "b"])), max_size=12)


@given(requests)
def test_never_a_salt_that_could_be_wrong(requests):
    salts = Salts(SIZE)
    salts.submitted(array("i", [9]), "x")  # the first salted one
    possible = {}
    for prompt, answer, salt in requests:
        salts.submitted(array("i", prompt), salt)
        root = tuple((prompt + answer)[:SIZE])
        if len(root) == SIZE:
            possible.setdefault(root, set()).add(salt)
    for root, those in possible.items():
        answer = of(salts, root)
        assert answer is None or {answer} == those
