"""The conformance suite of engines: what the server relies on, as tests that any engine's author can run.

Write a test module with a fixture `engine_under_test` and import the tests into it:

    import pytest

    from trtserve.plugins.api import EngineConfig
    from trtserve.plugins.conformance.engine import *
    from my_package import MyEngine


    @pytest.fixture
    def engine_under_test():
        config = EngineConfig("/models/tiny", block_size=16, num_blocks=64, max_num_seqs=4, max_num_tokens=64)
        return EngineCase(MyEngine, config, vocab_size=512, eos_token_ids=(2,))

`EngineCase.make` gets a configuration and returns an engine that is not started; wrap a `StepEngine` there in
`trtserve.plugins.driver.Driver`. Each test starts a fresh engine, so take the smallest model there is. The suite needs
10 blocks a sequence and varies the configuration: engines that give themselves other sizes than asked for do not pass.
Failures of the suite's plain asserts read better after `pytest.register_assert_rewrite("trtserve.plugins.conformance")`
in a conftest.py. `CollectingSink` is there for an author's own tests.
"""

from __future__ import annotations

from trtserve.plugins.conformance.case import EngineCase
from trtserve.plugins.conformance.engine_cache import (
    test_events_follow_eviction,
    test_events_tell_what_is_stored,
    test_free_blocks_come_back,
    test_nothing_is_cached_when_caching_is_off,
    test_requests_beyond_the_cache_all_end,
    test_salts_keep_caches_apart,
    test_same_prompt_again_is_cached_and_says_the_same,
    test_some_token_is_always_computed,
)
from trtserve.plugins.conformance.engine_generation import (
    test_an_engine_says_whether_it_caches_prefixes,
    test_end_of_sequence_and_ignore_eos,
    test_greedy_is_deterministic,
    test_logprobs_have_the_shape_asked_for,
    test_max_tokens_is_exact,
    test_min_tokens_holds_stop_tokens_back,
    test_prompts_of_any_length_are_served,
    test_seeds_reproduce,
    test_start_tells_sane_sizes,
    test_stop_token_ends_and_is_reported,
)
from trtserve.plugins.conformance.engine_lifecycle import (
    test_cancel_gives_one_final_output_and_frees,
    test_cancel_of_a_waiting_request,
    test_cancel_of_unknown_or_ended_requests_is_ignored,
    test_cancel_right_after_submit,
    test_close_ends_everything_and_is_idempotent,
    test_close_of_an_idle_engine,
    test_counters_grow_and_add_up,
    test_many_ragged_requests_end_exactly_once,
    test_pass_statistics_are_true,
    test_refused_request_ends_with_an_error_and_the_engine_goes_on,
)
from trtserve.plugins.conformance.sink import CollectingSink

__all__ = [
    "CollectingSink",
    "EngineCase",
    "test_an_engine_says_whether_it_caches_prefixes",
    "test_cancel_gives_one_final_output_and_frees",
    "test_cancel_of_a_waiting_request",
    "test_cancel_of_unknown_or_ended_requests_is_ignored",
    "test_cancel_right_after_submit",
    "test_close_ends_everything_and_is_idempotent",
    "test_close_of_an_idle_engine",
    "test_counters_grow_and_add_up",
    "test_end_of_sequence_and_ignore_eos",
    "test_events_follow_eviction",
    "test_events_tell_what_is_stored",
    "test_free_blocks_come_back",
    "test_greedy_is_deterministic",
    "test_logprobs_have_the_shape_asked_for",
    "test_many_ragged_requests_end_exactly_once",
    "test_max_tokens_is_exact",
    "test_min_tokens_holds_stop_tokens_back",
    "test_nothing_is_cached_when_caching_is_off",
    "test_pass_statistics_are_true",
    "test_prompts_of_any_length_are_served",
    "test_refused_request_ends_with_an_error_and_the_engine_goes_on",
    "test_requests_beyond_the_cache_all_end",
    "test_salts_keep_caches_apart",
    "test_same_prompt_again_is_cached_and_says_the_same",
    "test_seeds_reproduce",
    "test_some_token_is_always_computed",
    "test_start_tells_sane_sizes",
    "test_stop_token_ends_and_is_reported",
]
