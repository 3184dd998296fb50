"""Every metric, declared once: name, meaning, unit, labels. Served as Prometheus text.

Two families. `trtserve_*` is the server's own view. `trtllm_*` is the engines' view under TensorRT-LLM's names, five
gauges without labels, summed over the workers: the Gateway API's endpoint picker reads exactly those. The gauges about
workers are read at scrape time from what workers last reported; nothing here runs per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from trtserve.server.instruments import Counter, Family, Gauge, Histogram

STAGES = ("validate", "template", "tokenize", "route")
PHASES = ("queued", "prefill", "hand_over", "decode")
FINISH_REASONS = ("stop", "length")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# TensorRT-LLM's and vLLM's buckets, so that dashboards made for them fit.
_FAST_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08)
_TTFT_BUCKETS = (*_FAST_TTFT_BUCKETS, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_TPOT_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10, 20, 40, 80)
_E2E_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_DECISION_BUCKETS = (0.00001, 0.000025, 0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1)
_PREFIX_ERROR_BUCKETS = (-16384, -4096, -1024, -256, -64, -1, 0, 64, 256, 1024, 4096, 16384)
_FREE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STAGE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 30)


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker at the time of a scrape."""

    worker_id: str
    role: str
    is_ready: bool
    running: int
    waiting: int
    num_blocks: int
    free_blocks: int
    block_size: int
    booked_requests: int
    restarts: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    lost_kv_events: int
    indexed_blocks: int = 0
    event_gaps: int = 0


@dataclass(frozen=True, slots=True)
class LinkSample:
    """Who reads whose KV, at the time of a scrape."""

    source: str  # the worker that is read
    reader: str
    is_up: bool
    transfer: str
    lane: str
    bandwidth_bytes_per_s: float
    failures: int


@dataclass(frozen=True, slots=True)
class ServerSample:
    """The server at the time of a scrape."""

    inflight_requests: int
    queued_requests: int
    queued_tokens: int
    workers: Sequence[WorkerSample]
    links: Sequence[LinkSample] = ()


class Metrics:
    """The registry and the instruments that the code counts with, all of them on the event loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counters("trtserve_requests", "HTTP requests that ended", "endpoint", "status")
        finished = self._counters("trtserve_sequences_finished", "Generated sequences that ended", "finish_reason")
        self.finished = {reason: finished.labels(reason) for reason in FINISH_REASONS}
        self.rejections = self._counters(
            "trtserve_rejections", "Turned away: queue_full, no_worker, draining", "reason"
        )
        self.disconnects = self._counter("trtserve_disconnects", "Clients that left before their answer's end")
        self.prompt_tokens = self._counter("trtserve_prompt_tokens", "Prompt tokens of ended requests")
        self.cached_tokens = self._counter(
            "trtserve_cached_prompt_tokens", "Prompt tokens that came from a prefix cache"
        )
        self.generation_tokens = self._counter("trtserve_generation_tokens", "Generated tokens")
        self.ttft = self._histogram(
            "trtserve_time_to_first_token_seconds", "From the request's arrival to its first token", _TTFT_BUCKETS
        )
        self.tpot = self._histogram(
            "trtserve_time_per_output_token_seconds", "Mean time between tokens of a request", _TPOT_BUCKETS
        )
        self.duration = self._histogram(
            "trtserve_request_duration_seconds", "From the request's arrival to its end", _E2E_BUCKETS
        )
        stages = self._histograms(
            "trtserve_stage_duration_seconds",
            f"Time of a stage before the engine: {', '.join(STAGES)}",
            _STAGE_BUCKETS,
            "stage",
        )
        self.stages = {stage: stages.labels(stage) for stage in STAGES}
        self.decisions = self._counters("trtserve_routing_decisions", "Sequences placed on a worker", "policy")
        self.decision_seconds = self._histogram(
            "trtserve_routing_decision_duration_seconds", "Time of one routing decision", _DECISION_BUCKETS
        )
        self.held_seconds = self._histogram(
            "trtserve_routing_hold_seconds", "From a sequence's arrival at the router to its placement", _STAGE_BUCKETS
        )
        self.prefix_error = self._histogram(
            "trtserve_routing_prefix_error_tokens",
            "Cached prompt tokens that were predicted, minus those that were found",
            _PREFIX_ERROR_BUCKETS,
        )
        self._declare_hand_overs()
        self.loop_delay = self._gauges(
            "trtserve_event_loop_delay_seconds", "How late the last timer of the event loop was"
        ).labels()
        self.build = self._gauges("trtserve_build_info", "Always 1", "version", "engine", "model")

    def _declare_hand_overs(self) -> None:
        """What modes decide, KV on its way between workers, and what becomes of sequences that are given up."""
        self.mode_events = self._counters(
            "trtserve_mode_events", "What the serving mode decided, or fell back to, for a sequence", "event"
        )
        self.kv_fetches = self._counters(
            "trtserve_kv_fetches",
            "Prompts whose KV a decode worker read: valid, lease_expired, failed",
            "outcome",
            "lane",
        )
        self.kv_fetched_bytes = self._counters("trtserve_kv_fetched_bytes", "KV bytes that decode workers read", "lane")
        self.kv_hand_over_seconds = self._histogram(
            "trtserve_kv_hand_over_duration_seconds",
            "What a request waits for its KV once its prompt is computed and a decode worker is chosen",
            _STAGE_BUCKETS,
        )
        self.kv_fetch_seconds = self._histogram(
            "trtserve_kv_fetch_duration_seconds", "From the first read of a prompt's KV to the last", _STAGE_BUCKETS
        )
        cancel_to_free = self._histograms(
            "trtserve_cancel_to_free_seconds",
            "From a sequence's cancellation until nothing of it is held any more, by the phase it was in: "
            f"{', '.join(PHASES)}",
            _FREE_BUCKETS,
            "phase",
        )
        self.cancel_to_free = {phase: cancel_to_free.labels(phase) for phase in PHASES}

    def _counters(self, name: str, meaning: str, *labels: str) -> Family[Counter]:
        return Family(self.registry, CounterMetricFamily, name, meaning, Counter, labels)

    def _counter(self, name: str, meaning: str) -> Counter:
        return self._counters(name, meaning).labels()

    def _gauges(self, name: str, meaning: str, *labels: str) -> Family[Gauge]:
        return Family(self.registry, GaugeMetricFamily, name, meaning, Gauge, labels)

    def _histograms(self, name: str, meaning: str, buckets: Sequence[float], *labels: str) -> Family[Histogram]:
        return Family(self.registry, HistogramMetricFamily, name, meaning, partial(Histogram, buckets), labels)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        return self._histograms(name, meaning, buckets).labels()

    def watch(self, sample: Callable[[], ServerSample]) -> None:
        """Collect the gauges of server and workers from `sample` at every scrape."""
        self.registry.register(_StateCollector(sample))

    def render(self) -> bytes:
        """Prometheus text, format 0.0.4."""
        return generate_latest(self.registry)


class _StateCollector(Collector):
    def __init__(self, sample: Callable[[], ServerSample]) -> None:
        self._sample = sample

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self._sample()
        yield GaugeMetricFamily("trtserve_inflight_requests", "Requests being answered", now.inflight_requests)
        yield GaugeMetricFamily("trtserve_queued_requests", "Sequences waiting for a worker", now.queued_requests)
        yield GaugeMetricFamily("trtserve_queued_tokens", "Prompt tokens of those", now.queued_tokens)
        yield from _engine_gauges(now)
        yield from _worker_families(now.workers)
        yield from _link_families(now.links)


def _engine_gauges(now: ServerSample) -> Iterable[Metric]:
    ready = [worker for worker in now.workers if worker.is_ready]
    blocks = sum(worker.num_blocks for worker in ready)
    used = sum(worker.num_blocks - worker.free_blocks for worker in ready)
    waiting = now.queued_requests + sum(worker.waiting for worker in ready)
    size = ready[0].block_size if ready else 0
    yield GaugeMetricFamily("trtllm_num_requests_running", "Sequences running", sum(worker.running for worker in ready))
    yield GaugeMetricFamily("trtllm_num_requests_waiting", "Sequences waiting, in server and workers", waiting)
    yield GaugeMetricFamily(
        "trtllm_kv_cache_utilization", "Share of KV blocks in use, 0 to 1", used / blocks if blocks else 0.0
    )
    yield GaugeMetricFamily("trtllm_kv_cache_tokens_per_block", "Tokens in a KV block", size)
    yield GaugeMetricFamily("trtllm_kv_cache_max_blocks", "KV blocks of all ready workers", blocks)


_Reader: TypeAlias = tuple[str, Callable[[WorkerSample], float]]

_WORKER_GAUGES: dict[str, _Reader] = {
    "up": ("1 while the worker is ready", lambda worker: int(worker.is_ready)),
    "running_sequences": ("Sequences running", lambda worker: worker.running),
    "waiting_sequences": ("Sequences submitted and not running", lambda worker: worker.waiting),
    "booked_sequences": ("Sequences placed and not ended", lambda worker: worker.booked_requests),
    "free_blocks": ("KV blocks unused or evictable", lambda worker: worker.free_blocks),
    "indexed_blocks": ("KV blocks that the prefix index has of it", lambda worker: worker.indexed_blocks),
}
_WORKER_COUNTERS: dict[str, _Reader] = {
    "restarts": ("Processes started after the first", lambda worker: worker.restarts),
    "prompt_tokens": ("Prompt tokens", lambda worker: worker.prompt_tokens),
    "cached_prompt_tokens": ("Prompt tokens from the prefix cache", lambda worker: worker.cached_tokens),
    "generation_tokens": ("Generated tokens", lambda worker: worker.generated_tokens),
    "preemptions": ("Sequences preempted", lambda worker: worker.preemptions),
    "drafted_tokens": ("Tokens proposed by speculative decoding", lambda worker: worker.drafted_tokens),
    "accepted_tokens": ("Tokens proposed by speculative decoding and kept", lambda worker: worker.accepted_tokens),
    "lost_kv_events": ("KV events lost by the engine itself", lambda worker: worker.lost_kv_events),
    "kv_event_gaps": ("Times that KV events were missed, and all blocks asked for", lambda worker: worker.event_gaps),
}


def _worker_families(workers: Sequence[WorkerSample]) -> Iterable[Metric]:
    for name, (meaning, read) in _WORKER_GAUGES.items():
        gauge = GaugeMetricFamily(f"trtserve_worker_{name}", meaning, labels=("worker", "role"))
        for worker in workers:
            gauge.add_metric((worker.worker_id, worker.role), read(worker))
        yield gauge
    for name, (meaning, read) in _WORKER_COUNTERS.items():
        counter = CounterMetricFamily(f"trtserve_worker_{name}", meaning, labels=("worker", "role"))
        for worker in workers:
            counter.add_metric((worker.worker_id, worker.role), read(worker))
        yield counter


def _link_families(links: Sequence[LinkSample]) -> Iterable[Metric]:
    """Labels: `from` is read by `to`."""
    pair = ("from", "to")
    up = GaugeMetricFamily("trtserve_kv_link_up", "1 while one worker can read the other's KV", labels=pair)
    info = GaugeMetricFamily("trtserve_kv_link_info", "Always 1", labels=(*pair, "transfer", "lane"))
    bandwidth = GaugeMetricFamily(
        "trtserve_kv_link_bandwidth_bytes_per_second", "What the probe of a connection measured; rough", labels=pair
    )
    failures = CounterMetricFamily(
        "trtserve_kv_link_failures", "Times that a connection failed to come or was lost", labels=pair
    )
    for link in links:
        names = (link.source, link.reader)
        up.add_metric(names, int(link.is_up))
        failures.add_metric(names, link.failures)
        if link.is_up:
            info.add_metric((*names, link.transfer, link.lane), 1)
            bandwidth.add_metric(names, link.bandwidth_bytes_per_s)
    return up, info, bandwidth, failures
