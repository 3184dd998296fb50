import pytest

from trtserve.server.errors import InvalidRequest
from trtserve.server.text.content import flatten_content


def test_text_in_all_its_forms():
    assert flatten_content(None) == ""
    assert flatten_content("a") == "a"
    assert flatten_content([]) == ""
    assert flatten_content([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]) == "a\nb"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", None])
def test_what_is_no_text_is_refused_by_its_place(kind):
    with pytest.raises(InvalidRequest, match="only text is") as caught:
        flatten_content([{"type": "text", "text": "a"}, {"type": kind}], "messages[2].content")
    assert caught.value.param == "messages[2].content[1]"


def test_a_text_part_without_text_is_refused():
    with pytest.raises(InvalidRequest, match="needs its 'text'"):
        flatten_content([{"type": "text"}])
