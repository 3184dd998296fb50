"""docs/wire.md lists the messages that there are, with their fields in order."""

import re
from pathlib import Path
from typing import get_args

import pytest

from trtserve.server.workers import wire

DOCUMENT = (Path(__file__).parents[3] / "docs" / "wire.md").read_text()
KINDS = (*get_args(wire.FromWorker), wire.Batch, *get_args(wire.ToWorker))
MESSAGES = {kind.__struct_config__.tag: kind for kind in KINDS}


def test_the_version_is_the_codes():
    assert f"Version {wire.WIRE_VERSION}." in DOCUMENT


def test_every_message_is_listed_and_no_other():
    listed = re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.MULTILINE)
    assert sorted(listed) == sorted(MESSAGES)


@pytest.mark.parametrize("tag", MESSAGES)
def test_fields_are_listed_in_order(tag):
    (fields,) = re.findall(rf"^\| `{tag}` \|(.*?)\|", DOCUMENT, re.MULTILINE)
    named = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", fields))
    assert tuple(named) == MESSAGES[tag].__struct_fields__


def test_details_are_listed_in_order():
    listed = re.search(r"as arrays: (.*?), null", DOCUMENT, re.DOTALL)[1]
    assert tuple(re.findall(r"`(\w+)`", listed)) == wire.Detail.__struct_fields__
