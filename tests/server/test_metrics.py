"""What a scrape shows: every series with its help, the state as it is at that moment."""

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from trtserve.server.metrics import FINISH_REASONS, STAGES, Metrics, ServerSample, WorkerSample


def worker(worker_id="agg-0", **changes):
    values = {
        "worker_id": worker_id, "role": "agg", "is_ready": True, "running": 2, "waiting": 1, "num_blocks": 100,
        "free_blocks": 75, "block_size": 16, "booked_requests": 3, "restarts": 4, "prompt_tokens": 50,
        "cached_tokens": 20, "generated_tokens": 30, "drafted_tokens": 40, "accepted_tokens": 30,
        "lost_kv_events": 2, "preemptions": 5,
    }  # fmt: skip
    return WorkerSample(**(values | changes))


def scrape(metrics):
    """Every sample: (name, labels) to value. Raises what a scraper would."""
    families = list(text_string_to_metric_families(metrics.render().decode()))
    assert all(family.documentation for family in families)
    assert len({family.name for family in families}) == len(families)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def of(worker_id, role="agg"):
    return (("role", role), ("worker", worker_id))


def test_everything_that_can_be_counted_is_there_from_the_start():
    samples = scrape(Metrics())
    for stage in STAGES:
        assert samples["trtserve_stage_duration_seconds_count", (("stage", stage),)] == 0
    for reason in FINISH_REASONS:
        assert samples["trtserve_sequences_finished_total", (("finish_reason", reason),)] == 0
    for name in ("prompt_tokens", "cached_prompt_tokens", "generation_tokens", "disconnects"):
        assert samples[f"trtserve_{name}_total", ()] == 0
    assert not any(name.endswith("_created") for name, _ in samples)


def test_counting():
    metrics = Metrics()
    metrics.requests.labels("chat", "200").inc()
    metrics.finished["stop"].inc(2)
    metrics.stages["route"].observe(0.001)
    metrics.ttft.observe(0.3)
    samples = scrape(metrics)
    assert samples["trtserve_requests_total", (("endpoint", "chat"), ("status", "200"))] == 1
    assert samples["trtserve_sequences_finished_total", (("finish_reason", "stop"),)] == 2
    assert samples["trtserve_time_to_first_token_seconds_bucket", (("le", "0.25"),)] == 0
    assert samples["trtserve_time_to_first_token_seconds_bucket", (("le", "0.5"),)] == 1


def test_the_state_is_that_of_the_scrape():
    now = [ServerSample(1, 2, 30, [worker()])]
    metrics = Metrics()
    metrics.watch(lambda: now[0])
    samples = scrape(metrics)
    assert samples["trtserve_inflight_requests", ()] == 1
    assert (samples["trtserve_queued_requests", ()], samples["trtserve_queued_tokens", ()]) == (2, 30)
    expected = {
        "up": 1, "running_sequences": 2, "waiting_sequences": 1, "booked_sequences": 3, "free_blocks": 75,
        "restarts_total": 4, "prompt_tokens_total": 50, "cached_prompt_tokens_total": 20,
        "generation_tokens_total": 30, "preemptions_total": 5,
    }  # fmt: skip
    for name, value in expected.items():
        assert samples[f"trtserve_worker_{name}", of("agg-0")] == value, name
    now[0] = ServerSample(0, 0, 0, [])
    samples = scrape(metrics)
    assert samples["trtserve_inflight_requests", ()] == 0
    assert ("trtserve_worker_up", of("agg-0")) not in samples


def test_the_engines_gauges_are_sums_over_ready_workers():
    workers = [worker(), worker("agg-1", num_blocks=300, free_blocks=25), worker("agg-2", is_ready=False)]
    metrics = Metrics()
    metrics.watch(lambda: ServerSample(0, 7, 0, workers))
    samples = scrape(metrics)
    assert samples["trtllm_num_requests_running", ()] == 4
    assert samples["trtllm_num_requests_waiting", ()] == 7 + 2
    assert samples["trtllm_kv_cache_utilization", ()] == (25 + 275) / 400
    assert samples["trtllm_kv_cache_max_blocks", ()] == 400
    assert samples["trtllm_kv_cache_tokens_per_block", ()] == 16
    assert samples["trtserve_worker_up", of("agg-2")] == 0


def test_no_worker_is_no_error():
    metrics = Metrics()
    metrics.watch(lambda: ServerSample(0, 0, 0, [worker(is_ready=False, num_blocks=0)]))
    samples = scrape(metrics)
    assert samples["trtllm_kv_cache_utilization", ()] == samples["trtllm_kv_cache_tokens_per_block", ()] == 0


def test_label_values_are_escaped():
    metrics = Metrics()
    metrics.build.labels("1", "sim", 'a "model"\n\\').set(1)
    assert any(dict(labels).get("model") == 'a "model"\n\\' for _, labels in scrape(metrics))


def test_the_documentation_lists_what_there_is():
    document = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    listed = set(re.findall(r"`((?:trtserve|trtllm)_[a-z_]+)(?:\{[a-z_,]+\})?`", document))
    metrics = Metrics()
    metrics.watch(lambda: ServerSample(0, 0, 0, [worker()]))
    metrics.requests.labels("chat", "200").inc()
    metrics.rejections.labels("queue_full").inc()
    there = {line.split()[2] for line in metrics.render().decode().splitlines() if line.startswith("# HELP")}
    assert listed == there
