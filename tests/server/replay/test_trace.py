import json
from array import array

import pytest

from tests.server.replay.traces import conversations, write_trace
from trtserve.plugins.blocks import block_hashes
from trtserve.server.replay.trace import TraceError, TraceRequest, read_trace

GOOD = {"timestamp": 0, "input_length": 20, "output_length": 3, "hash_ids": [7, 8]}


def test_what_was_written_is_read(tmp_path):
    trace = conversations(20)
    path = write_trace(tmp_path / "trace.jsonl", trace)
    assert read_trace(path, 16) == trace
    assert read_trace(path, 16, limit=3) == trace[:3]


def test_a_prompt_is_its_ids_and_an_end_of_its_own():
    first, second = (TraceRequest(number, 0.0, 10, 1, array("i", [5, 9, 3])).prompt(4) for number in (0, 1))
    assert first.tolist() == [5, 5, 5, 5, 9, 9, 9, 9, -1, -1]
    assert second.tolist()[8:] == [-2, -2]
    assert block_hashes(first, 4) == block_hashes(second, 4)
    assert block_hashes(first, 5)[1] != block_hashes(second, 5)[1]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "truncated"),
        ("[1, 2]", "Expected `object`, got `array`"),
        ("", "truncated"),
        (json.dumps({**GOOD, "timestamp": -1}), r"`float` >= 0.* at `\$.timestamp`"),
        (json.dumps({**GOOD, "timestamp": "now"}), r"at `\$.timestamp`"),
        (json.dumps({**GOOD, "input_length": 0}), r"`int` >= 1 - at `\$.input_length`"),
        (json.dumps({**GOOD, "output_length": 1.5}), r"at `\$.output_length`"),
        (json.dumps({**GOOD, "hash_ids": [7, -1]}), r"`int` >= 0 - at `\$.hash_ids"),
        (json.dumps({**GOOD, "hash_ids": [7, 2**31]}), r"at `\$.hash_ids"),
        (json.dumps({**GOOD, "hash_ids": [7]}), "has 1 hash_ids, but 20 tokens are 2 blocks of 16; --trace-block-size"),
        (json.dumps({"timestamp": 0}), "missing required field `input_length`"),
        (b'{"timestamp": "\xff"}'.decode("latin-1"), r"at `\$.timestamp`|utf-8|Invalid"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n".encode("latin-1"))
    with pytest.raises(TraceError, match=f"trace.jsonl:2: .*{problem}") as error:
        read_trace(path, 16)
    assert "\n" not in str(error.value)
    assert len(read_trace(path, 16, limit=1)) == 1


def test_no_file_and_an_empty_one(tmp_path):
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        read_trace(tmp_path / "nothing")
    (tmp_path / "empty").touch()
    with pytest.raises(TraceError, match="holds no request"):
        read_trace(tmp_path / "empty")
