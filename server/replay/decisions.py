"""`trtserve replay --decisions FILE`: a decision log put to another policy, and what that one would have done.

Each recorded decision is asked anew with exactly what the policy saw then. It is not a replay: a different answer would
have led to different later situations, and those are the recorded ones.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from trtserve.plugins.api import Request, RequestId, SamplingParams, WorkerId
from trtserve.plugins.routing_api import HeldRequest, RoutingPolicy, RoutingState
from trtserve.server.router.decision_log import DecisionRecord, HeldRecord


class DecisionLogError(Exception):
    """A line that is no decision; the text says which."""


@dataclass(frozen=True, slots=True)
class Change:
    """One request that another policy would have sent elsewhere, or held."""

    request_id: RequestId
    prompt_tokens: int
    recorded: WorkerId
    overlap_blocks: int  # there
    instead: WorkerId | None  # None: held
    instead_overlap_blocks: int


@dataclass(slots=True)
class Comparison:
    """What another policy says of the recorded requests."""

    decisions: int = 0
    requests: int = 0
    same: int = 0
    elsewhere: int = 0
    held: int = 0
    recorded_overlap_blocks: int = 0  # of the requests that both would have sent
    instead_overlap_blocks: int = 0
    per_worker: Counter[str] = field(default_factory=Counter)  # requests that would have gone there
    changes: list[Change] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without the single changes."""
        names = ("decisions", "requests", "same", "elsewhere", "held")
        figures: dict[str, Any] = {name: getattr(self, name) for name in names}
        figures["overlap_blocks"] = {"recorded": self.recorded_overlap_blocks, "instead": self.instead_overlap_blocks}
        return figures | {"per_worker": dict(sorted(self.per_worker.items()))}


def compare(path: Path, policy: RoutingPolicy) -> Comparison:
    """Raises DecisionLogError, OSError."""
    comparison = Comparison()
    for record in _records(path):
        _ask(record, policy, comparison)
    return comparison


def _ask(record: DecisionRecord, policy: RoutingPolicy, comparison: Comparison) -> None:
    state = RoutingState(record.now_s, record.workers, record.estimates)
    plan = policy.assign([_held(one, record) for one in record.held], state)
    instead = {assignment.request_id: assignment.worker_id for assignment in plan.assignments}
    slots = {view.worker_id: view.slot for view in record.workers}
    held = {one.id: one for one in record.held}
    comparison.decisions += 1
    for assignment in record.assignments:
        one = held.get(assignment.request_id)
        if one is None:
            continue  # beyond what a record holds
        comparison.requests += 1
        other = instead.get(one.id)
        overlap = one.overlaps.get(slots[assignment.worker_id], 0)
        other_overlap = one.overlaps.get(slots[other], 0) if other is not None else 0
        if other is None:
            comparison.held += 1
        else:
            comparison.per_worker[other] += 1
            comparison.recorded_overlap_blocks += overlap
            comparison.instead_overlap_blocks += other_overlap
        if other == assignment.worker_id:
            comparison.same += 1
            continue
        comparison.elsewhere += other is not None
        comparison.changes.append(
            Change(one.id, one.prompt_tokens, assignment.worker_id, overlap, other, other_overlap)
        )


def _held(one: HeldRecord, record: DecisionRecord) -> HeldRequest:
    prompt = array("i", bytes(4 * one.prompt_tokens))
    request = Request(one.id, prompt, SamplingParams(one.max_tokens))
    return HeldRequest(request, record.role, one.held_since_s, lambda: one.overlaps)


def _records(path: Path) -> Iterator[DecisionRecord]:
    decoder = msgspec.json.Decoder(DecisionRecord)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise DecisionLogError(f"{path}, line {number}: {error}") from error
            if not record.workers:
                raise DecisionLogError(f"{path}, line {number}: a decision without workers")
            yield record
