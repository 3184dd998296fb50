"""A role's section over the settings that all workers share."""

import pytest

from trtserve.settings.errors import SettingsError
from trtserve.settings.roles import for_role, laid_over

FILE = {
    "max_num_tokens": 4096,
    "kv_cache_gib": 2,
    "engine_options": {"a": 1, "b": {"x": 1, "y": {"deep": 1}}},
    "prefill": {
        "max_num_tokens": 8192,
        "num_blocks": 9,
        "enable_prefix_caching": False,
        "engine_options": {"a": 2, "b": {"y": 3}},
    },
}


def test_a_section_comes_before_the_setting(load):
    settings = load("--max-num-seqs=7", file=FILE)
    prefill = for_role(settings, "prefill")
    assert (prefill.max_num_tokens, prefill.max_num_seqs, prefill.enable_prefix_caching) == (8192, 7, False)
    assert prefill.engine_options == {"a": 2, "b": {"x": 1, "y": 3}}


@pytest.mark.parametrize("role", ["agg", "decode"])
def test_other_roles_have_the_settings(load, role):
    settings = load(file=FILE)
    assert for_role(settings, role) == settings


def test_a_sections_cache_size_puts_the_other_kind_aside(load):
    prefill = for_role(load(file=FILE), "prefill")
    assert (prefill.num_blocks, prefill.kv_cache_gib) == (9, None)


def test_sections_come_from_all_layers(load):
    settings = load("--prefill.max-seq-len=99", variables={"PREFILL__MAX_NUM_TOKENS": 77}, file=FILE)
    prefill = for_role(settings, "prefill")
    assert (prefill.max_seq_len, prefill.max_num_tokens, prefill.num_blocks) == (99, 77, 9)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"max_num_tokens": 0}, "prefill.max-num-tokens: "),
        ({"block_size": 32}, "prefill.block-size: no such setting"),
        ({"num_blocks": 1, "kv_cache_gib": 1}, "both say how large the KV cache is"),
    ],
)
def test_a_bad_section_is_named(load, section, words):
    with pytest.raises(SettingsError, match=words):
        load(file={"prefill": section})


def test_options_are_laid_over_one_level_deep_and_nothing_is_changed():
    below, above = {"a": {"b": {"c": 1}}, "d": 1}, {"a": {"b": {"e": 2}}, "f": 3}
    assert laid_over(below, above) == {"a": {"b": {"e": 2}}, "d": 1, "f": 3}
    assert below == {"a": {"b": {"c": 1}}, "d": 1}
