import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.server.text.stop_strings import StopStrings


def read_by_characters(text, stops, include):
    """What the rule says: the first to be complete, of those the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


# Few letters, so that stop strings overlap and almost match all the time.
texts = st.text(st.sampled_from("aab🙂"), max_size=30)
stop_lists = st.lists(st.text(st.sampled_from("aab🙂"), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=500)
@given(pieces=st.lists(texts, max_size=6), stops=stop_lists, include=st.booleans())
def test_any_cutting_gives_what_a_reader_of_characters_gives(pieces, stops, include):
    matcher = StopStrings(stops, include)
    text = "".join([matcher.push(piece) for piece in pieces])
    text += matcher.finish()
    assert (text, matcher.matched) == read_by_characters("".join(pieces), stops, include)


@given(text=texts, stops=stop_lists)
def test_only_what_may_begin_a_stop_string_is_held_back(text, stops):
    matcher = StopStrings(stops)
    safe = "".join(map(matcher.push, text))
    if matcher.matched is None:
        beginnings = [text[i:] for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in stops)]
        assert text[len(safe) :] == max(beginnings, key=len, default="")


def test_the_first_complete_one_wins():
    matcher = StopStrings(["bcd", "c"])
    assert matcher.push("abcd") == "ab"
    assert matcher.matched == "c"
    assert matcher.push("more") == ""
    assert matcher.finish() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStrings(["a", ""])
