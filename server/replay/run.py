"""One replay: the parts of a server that decide, on a virtual clock, fed with a trace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trtserve.plugins.api import FinishReason, Mode, Request, RequestId, SamplingParams, WorkerId
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.routing_api import RoutingPolicy
from trtserve.server.metrics import Metrics
from trtserve.server.replay.cluster import ReplayCluster, SettlingRouter
from trtserve.server.replay.engine import ReplayedEngine
from trtserve.server.replay.hand_over import TransferModel
from trtserve.server.replay.measures import Gaps, MeasuredRequest, Moves, ReplayResult, summed_up
from trtserve.server.replay.trace import BLOCK_SIZE, TraceError, TraceRequest
from trtserve.server.replay.virtual_time import LONGEST_S, ReportClock, VirtualTimeLoop
from trtserve.server.replay.worker import VirtualWorker
from trtserve.server.router.core import RoutingCore
from trtserve.server.router.pinned import pinned_times, pinned_traffic
from trtserve.server.router.router import QueueLimits
from trtserve.server.router.traffic import Traffic
from trtserve.settings.schema import PinnedEstimates


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What is replayed, beside the trace. `mode` and `policy` are fresh ones: they keep state."""

    mode: Mode
    policy: RoutingPolicy
    engine: ReplayedEngine
    trace_block_size: int = BLOCK_SIZE
    speedup: float = 1.0  # of arrivals
    event_lag_s: float = 0.0
    pinned: PinnedEstimates = field(default_factory=PinnedEstimates)  # what the router is told instead of learning it
    transfer: TransferModel = field(default_factory=TransferModel)
    max_tokens: int = 8192  # what every request asks for, and all that the router is told of its length


def replay(
    trace: Sequence[TraceRequest], options: ReplayOptions, progress: Callable[[int], object] = lambda ended: None
) -> ReplayResult:
    """Deterministic but for `decision_us_mean`. `progress` is called with 1 as each request ends.

    Raises TraceError where a request cannot be served, Deadlock where a mode or policy forgets a request.
    """
    _check(trace, options)
    try:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(_Replay(trace, options, progress).run())
    except ExceptionGroup as errors:
        # The first is the cause of all others: it ended the task group.
        raise errors.exceptions[0] from None


def _check(trace: Sequence[TraceRequest], options: ReplayOptions) -> None:
    longest = options.engine.limits.max_seq_len
    for entry in trace:
        needed, where = entry.input_tokens + entry.output_tokens, f"line {entry.number + 1} of the trace"
        if needed > longest:
            raise TraceError(
                f"{where} needs {needed} tokens, and a worker holds {longest}: raise --num-blocks or --max-seq-len"
            )
        if entry.output_tokens > options.max_tokens:
            raise TraceError(
                f"{where} generates {entry.output_tokens} tokens, but requests ask for {options.max_tokens}: "
                "raise --max-tokens"
            )
    arrivals_ms = [entry.arrival_ms for entry in trace]
    span_s = (max(arrivals_ms) - min(arrivals_ms)) / 1000 / options.speedup
    if span_s > LONGEST_S / 2:
        raise TraceError(f"the trace lasts {span_s:.0f} s; {LONGEST_S / 2:.0f} s is the most that can be replayed")


class _Replay:
    """The state of one replay; made inside its event loop."""

    def __init__(
        self, trace: Sequence[TraceRequest], options: ReplayOptions, progress: Callable[[int], object]
    ) -> None:
        self._trace = trace
        self._options = options
        self._progress = progress
        self._start_ms = min(entry.arrival_ms for entry in trace)
        self._gaps = Gaps()
        self._metrics = Metrics()

    async def run(self) -> ReplayResult:
        self._loop = asyncio.get_running_loop()
        self._clock = ReportClock(self._loop)
        self._cluster = self._make_cluster()
        measured: dict[int, MeasuredRequest] = {}
        async with asyncio.TaskGroup() as group:
            for entry in sorted(self._trace, key=lambda entry: entry.arrival_ms):
                arrival_s = (entry.arrival_ms - self._start_ms) / 1000 / self._options.speedup
                await self._until(arrival_s)
                measured[entry.number] = sink = MeasuredRequest(entry.input_tokens, arrival_s, self._clock, self._gaps)
                group.create_task(self._serve(entry, sink))
        requests = [measured[entry.number] for entry in self._trace]
        return summed_up(requests, self._gaps, self._decision_us_mean(), self._moves())

    def _moves(self) -> Moves | None:
        """None of a mode that decides nothing about them."""
        events, links = self._cluster.events, self._cluster.links
        prompts = events["local_prefill"] + events["remote_prefill"]
        if not prompts:
            return None
        moved_bytes = links.moved_tokens * links.model.bytes_per_token
        return Moves(events["local_prefill"] / prompts, moved_bytes / 1e9)

    async def _until(self, time_s: float) -> None:
        if time_s > self._loop.time():
            reached = self._loop.create_future()
            self._loop.call_at(time_s, reached.set_result, None)
            await reached

    async def _serve(self, entry: TraceRequest, sink: MeasuredRequest) -> None:
        request = self._request(entry, sink.arrival_s)
        self._cluster.measure(request.id, sink)
        finish = await self._options.mode.run(request, sink, self._cluster)
        if finish.reason is FinishReason.ERROR:
            raise TraceError(f"line {entry.number + 1} of the trace failed: {finish.error}")
        self._progress(1)

    def _request(self, entry: TraceRequest, arrival_s: float) -> Request:
        """As the server would make it, with the length of its answer unknown."""
        options, limits = self._options, self._options.engine.limits
        prompt = entry.prompt(options.trace_block_size)
        max_tokens = min(options.max_tokens, limits.max_seq_len - len(prompt))
        hashes = block_hashes(prompt, limits.block_size) if options.policy.uses_prefixes else ()
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return Request(RequestId(entry.number), prompt, sampling, block_hashes=hashes, arrival_s=arrival_s)

    def _make_cluster(self) -> ReplayCluster:
        options, engine = self._options, self._options.engine
        limits = QueueLimits(len(self._trace), sum(entry.input_tokens for entry in self._trace))
        core = RoutingCore(
            options.policy,
            Traffic(pinned_traffic(options.pinned)),
            pinned_times(options.pinned, engine.limits.max_num_tokens),
            resync=_never_resync,
        )
        router = SettlingRouter(core, limits, self._metrics, "", self._clock)
        lengths = {RequestId(entry.number): entry.output_tokens for entry in self._trace}
        cluster = ReplayCluster(router, self._clock, lengths, options.event_lag_s, engine.limits, options.transfer)
        for role, count in options.mode.roles.items():
            for number in range(count):
                worker_id = WorkerId(f"{role}-{number}")
                router.add_worker(worker_id, role, engine.info)
                for stats in engine.warm_up():
                    router.learn(worker_id, stats)
                cluster.add(VirtualWorker(worker_id, role, engine.scheduler(), self._loop, cluster.report))
        return cluster

    def _decision_us_mean(self) -> float:
        read = self._metrics.registry.get_sample_value
        total_s, count = (read(f"trtserve_routing_decision_duration_seconds_{part}") for part in ("sum", "count"))
        assert total_s is not None and count, "a request was placed, so something was decided"
        return total_s / count * 1e6


def _never_resync(worker_id: WorkerId) -> None:
    raise AssertionError(f"the events of {worker_id} contradict each other: none is ever lost here")
