"""Everything that happened in one turn of the event loop, handed over as one step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace

from trtserve.plugins.api import EngineSink, KVEvent, Output, PassStats, StepOutputs
from trtserve.plugins.engines.tensorrt_llm.stats import LoadBook


class _Rank:
    """What one rank has to say, and its load."""

    def __init__(self, book: LoadBook) -> None:
        self.book = book
        self.outputs: list[Output] = []
        self.events: list[KVEvent] = []


class StepReport:
    """Collects outputs, events and statistics; they go out when the turn that brought them is over, a message for each
    rank that has any.

    TensorRT-LLM wakes the readers of all requests of an iteration together, so a turn is an iteration, or several.
    """

    def __init__(self, sink: EngineSink, books: Sequence[LoadBook]) -> None:
        """books: one a rank."""
        self._sink = sink
        self._ranks = [_Rank(book) for book in books]
        self._passes: list[PassStats] = []
        self._is_due = False
        self._is_open = False

    def open(self) -> None:
        """The server's first request comes. Before it nothing is handed over: of the warm-up only the KV events are
        kept, as its blocks are parents of nobody's but stored."""
        if not self._is_open:
            self._is_open = True
            self._passes.clear()
            for rank in self._ranks:
                rank.outputs.clear()
            self._send_soon()

    def output(self, output: Output, rank: int) -> None:
        """Goes with the next step of this rank."""
        self._ranks[rank].outputs.append(output)
        self._send_soon()

    def events(self, events: Sequence[KVEvent], rank: int) -> None:
        """Raises IndexError for a rank that is not there."""
        if events:
            self._ranks[rank].events.extend(events)
            self._send_soon()

    def passed(self, stats: PassStats) -> None:
        """An iteration, of which all ranks take part; told as the first one's."""
        self._passes.append(stats)
        self._send_soon()

    def _send_soon(self) -> None:
        if self._is_open and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Hand over what there is. May wait for as long as the sink has no room."""
        self._is_due = False
        passes, self._passes = self._passes, []
        for stats in passes[:-1]:
            self._sink.push(StepOutputs((), self._ranks[0].book.load(), stats=stats))
        for number, rank in enumerate(self._ranks):
            outputs, rank.outputs = _merged(rank.outputs), []
            events, rank.events = rank.events, []
            stats_of_rank = passes[-1] if passes and number == 0 else None
            if outputs or events or stats_of_rank is not None:
                self._sink.push(StepOutputs(outputs, rank.book.load(), events, stats_of_rank, number))


def _merged(outputs: list[Output]) -> list[Output]:
    """At most one output of a request in a step: a reader that was late gives two."""
    if len({output.request_id for output in outputs}) == len(outputs):
        return outputs
    by_request: dict[int, Output] = {}
    for output in outputs:
        former = by_request.get(output.request_id)
        by_request[output.request_id] = output if former is None else _joined(former, output)
    return list(by_request.values())


def _joined(first: Output, then: Output) -> Output:
    has_logprobs = first.logprobs is not None or then.logprobs is not None
    return replace(
        then,
        token_ids=[*first.token_ids, *then.token_ids],
        cached_tokens=first.cached_tokens if first.cached_tokens is not None else then.cached_tokens,
        logprobs=(first.logprobs or ()) + (then.logprobs or ()) if has_logprobs else None,
    )
