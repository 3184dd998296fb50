"""KV events and statistics: their shapes, their one reader, and that they say what is cached."""

from __future__ import annotations

import asyncio

import pytest

BUFFER = {"event_buffer_max_size": 1024}
PROMPT = [5, 6, 7, 8, 9, 10]


async def events_of(llm) -> list[dict]:
    return [event async for event in llm.get_kv_cache_events_async(0.05)]


def stored_tokens(event: dict) -> list[list[int]]:
    return [[token["token_id"] for token in block["tokens"]] for block in event["data"]["blocks"]]


async def test_shapes(make_llm, sampling):
    llm = make_llm(kv=BUFFER)
    result = await llm.generate_async(PROMPT, sampling(max_tokens=4, ignore_eos=True))
    created, prompt, rest = await events_of(llm)
    assert created == {
        "event_id": 0,
        "data": {"type": "created", "num_blocks_per_cache_level": [3686, 0]},
        "window_size": 4096,
    }
    block = prompt["data"]["blocks"][0]
    assert block["tokens"][0] == {"type": "unique_token", "token_id": 5, "token_extra_id": 0}
    assert {name: block[name] for name in ("type", "cache_level", "priority")} == {
        "type": "stored_block",
        "cache_level": 0,
        "priority": 35,
    }
    assert prompt["data"]["parent_hash"] is None
    said = result.outputs[0].token_ids
    assert stored_tokens(prompt) == [PROMPT[:4]]
    assert stored_tokens(rest) == [[*PROMPT[4:], *said[:2]], said[2:3]]  # the last token is in no block
    assert rest["data"]["parent_hash"] == block["block_hash"]


async def test_a_longer_block_takes_a_partial_ones_place(make_llm, sampling):
    llm = make_llm(kv=BUFFER)
    first = await llm.generate_async(PROMPT[:2], sampling(max_tokens=2, ignore_eos=True))
    await llm.generate_async([*PROMPT[:2], *first.outputs[0].token_ids, 11, 12], sampling(max_tokens=1))
    kinds = [event["data"]["type"] for event in await events_of(llm)]
    assert kinds == ["created", "stored", "removed", "stored", "stored"]


async def test_what_is_evicted_is_removed(make_llm, sampling):
    llm = make_llm(kv=BUFFER | {"max_tokens": 16})
    cached: set[int] = set()
    for first in (3, 4, 5, 6):
        await llm.generate_async([first, *PROMPT], sampling(max_tokens=2))
    for event in await events_of(llm):
        if event["data"]["type"] == "stored":
            cached |= {block["block_hash"] for block in event["data"]["blocks"]}
        if event["data"]["type"] == "removed":
            assert cached >= set(event["data"]["block_hashes"])
            cached -= set(event["data"]["block_hashes"])
    assert 0 < len(cached) <= 4
    assert (await llm.generate_async([6, *PROMPT], sampling(max_tokens=2))).cached_tokens == 6
    assert (await llm.generate_async([3, *PROMPT], sampling(max_tokens=2))).cached_tokens == 0


async def test_what_goes_to_the_host_is_updated(make_llm, sampling):
    llm = make_llm(kv=BUFFER | {"max_tokens": 16, "host_cache_size": 64 * 4 * 1024})
    for first in (3, 4, 5, 6):
        await llm.generate_async([first, *PROMPT], sampling(max_tokens=2))
    updates = [event["data"] for event in await events_of(llm) if event["data"]["type"] == "updated"]
    assert updates[0]["cache_level"] == {"type": "event_diff", "new_value": 1, "old_value": 0}
    assert (await llm.generate_async([3, *PROMPT], sampling(max_tokens=2))).cached_tokens == 6


async def test_no_reading_before_the_first_request(make_llm, sampling, violations):
    llm = make_llm(kv=BUFFER, enable_iter_perf_stats=True)
    assert [item async for item in llm.get_stats_async(0.05)] == []
    with pytest.raises(AssertionError):
        llm.get_kv_cache_events_async(0.05)
    assert len(violations()) == 1


async def test_one_reader(make_llm, sampling, violations):
    llm = make_llm(kv=BUFFER)
    await llm.generate_async(PROMPT, sampling())
    await events_of(llm)
    await llm.generate_async(PROMPT, sampling())
    await events_of(llm)
    llm.generate_async(PROMPT, sampling(max_tokens=1))
    results = await asyncio.gather(events_of(llm), events_of(llm), return_exceptions=True)
    assert any(isinstance(result, RuntimeError) for result in results)
    assert "two readers" in violations()[0]


async def test_an_iteration_that_ended_waits_for_a_new_request(make_llm, sampling):
    llm = make_llm(kv=BUFFER)
    await llm.generate_async(PROMPT, sampling())
    assert len(await events_of(llm)) == 3
    late = llm.generate_async([50, *PROMPT], sampling(max_tokens=2))
    llm._iterations["kv_cache_events"]._done = True  # as if the reader had timed out after the request was submitted
    await late
    assert await events_of(llm) == []
    await llm.generate_async([51, *PROMPT], sampling(max_tokens=2))
    assert len(await events_of(llm)) >= 2


async def test_lost_events_leave_a_gap(make_llm, sampling, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_DROP_EVERY_EVENT", "2")
    llm = make_llm(kv=BUFFER)
    await llm.generate_async(PROMPT, sampling())
    await llm.generate_async([9, *PROMPT], sampling())
    assert [event["event_id"] for event in await events_of(llm)] == [0, 1, 3]


async def test_a_full_buffer_loses_the_oldest(make_llm, sampling):
    llm = make_llm(kv={"event_buffer_max_size": 1})
    await llm.generate_async(PROMPT, sampling(max_tokens=1))
    assert (await events_of(llm))[0]["event_id"] > 0


async def test_ranks_are_named(trtllm, make_llm, sampling):
    llm = make_llm(kv=BUFFER, tensor_parallel_size=2, enable_attention_dp=True)
    hard = trtllm.SchedulingParams(attention_dp_rank=1, attention_dp_relax=False)
    await llm.generate_async(PROMPT, sampling(), scheduling_params=hard)
    ranks = {event["attention_dp_rank"] for event in await events_of(llm) if event["data"]["type"] == "stored"}
    assert ranks == {1}


async def test_statistics(make_llm, sampling):
    llm = make_llm(enable_iter_perf_stats=True)
    await llm.generate_async(PROMPT, sampling(ignore_eos=True))
    stats = [item async for item in llm.get_stats_async(0.05)]
    assert [item["iter"] for item in stats] == list(range(1, 9))
    first = stats[0]
    assert (first["numActiveRequests"], first["numQueuedRequests"]) == (1, 0)
    blocks = first["kvCacheStats"]
    assert (blocks["usedNumBlocks"], blocks["tokensPerBlock"]) == (4, 4)
    assert blocks["maxNumBlocks"] - blocks["freeNumBlocks"] == 4
    silent = make_llm()
    await silent.generate_async(PROMPT, sampling())
    assert [item async for item in silent.get_stats_async(0.05)] == []
