"""A YAML file's keys are the flags' names, also inside its sections."""

from typing import get_origin

import pytest
from pydantic import BaseModel

from trtserve.settings.errors import SettingsError
from trtserve.settings.schema import MAPPINGS, SECTIONS, Settings


@pytest.mark.parametrize("key", ["max-num-tokens", "max_num_tokens", "max-num-batched-tokens"])
def test_keys_of_a_section_may_have_dashes(load, key):
    assert load(file={"prefill": {key: 7}}).prefill.max_num_tokens == 7


def test_other_sections_too_but_not_options_of_plugins(load):
    loaded = load(file={"pinned-estimates": {"block-life": 3}, "decode": {"engine-options": {"a-b": 1}}})
    assert loaded.pinned_estimates.block_life == 3
    assert loaded.decode.engine_options == {"a-b": 1}
    assert load(file={"engine-options": {"a-b": {"c-d": 1}}}).engine_options == {"a-b": {"c-d": 1}}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("port: 1\nport: 2\n", "port.* twice"),
        ("prefill:\n  dtype: auto\n  dtype: auto\n", "dtype.* twice"),
        ("engine-options:\n  {a: 1, a: 2}\n", "a.* twice"),
        ("prefill:\n  max-seq-len: 5\n  max_seq_len: 5\n", "prefill.max_seq_len sets .*max-seq-len, which it has set"),
        ("prefill:\n  max-num-seqs: 0\n", r"prefill\.max-num-seqs: .*greater"),
        ("prefill:\n  no-such: 0\n", r"prefill\.no-such: no such setting"),
        ("prefill: 3\n", "prefill: "),
    ],
)
def test_a_key_is_there_once_and_known(load, content, complaint):
    with pytest.raises(SettingsError, match=complaint):
        load(file=content)


def test_yaml_may_merge_mappings(load):
    """Of keys that come by `<<` those that stand there win, as YAML has it."""
    loaded = load(file="prefill: &one {max-num-seqs: 2, max-seq-len: 9}\ndecode: {<<: *one, max-num-seqs: 3}\n")
    assert (loaded.decode.max_num_seqs, loaded.decode.max_seq_len) == (3, 9)


def test_what_has_settings_below_it_is_known():
    kinds = {name: field.annotation for name, field in Settings.model_fields.items()}
    assert {name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)} == SECTIONS
    assert {name for name, kind in kinds.items() if get_origin(kind) is dict} == MAPPINGS
