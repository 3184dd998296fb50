"""The contract of routing: what a policy sees of the held requests and the workers, and what it answers.

A policy is pure: it decides from its arguments and its own earlier answers, does no I/O and has no clock, so the server
and a replay in virtual time run the same code. The router keeps every number here up to date as bookings, engine steps
and KV events come in, so that a decision sums nothing up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from trtserve.plugins.api import EngineInfo, Request, RequestId, Role, WorkerId, WorkerLoad

LONG_AGO_S = -1e9
"""Before any time that a monotonic clock gives, and a number in JSON."""


@dataclass(frozen=True, slots=True)
class Curve:
    """constant + linear x + quadratic x^2, in milliseconds, fitted for x from `low` to `high`.

    A fitted polynomial means nothing outside its range: below it x counts as `low`, beyond it the value grows in
    proportion to x.
    """

    constant: float
    linear: float
    quadratic: float
    low: float
    high: float

    def at(self, x: float) -> float:
        """Milliseconds."""
        inside = self.low if x < self.low else self.high if x > self.high else x
        value = (self.quadratic * inside + self.linear) * inside + self.constant
        return value if x <= self.high else value * x / self.high


@dataclass(frozen=True, slots=True)
class PassTimes:
    """How long a pass of one type of worker takes: prefill_ms(new prompt tokens) + decode_ms(share of KV read)."""

    prefill: Curve  # x: new prompt tokens of the pass
    decode: Curve  # x: context tokens of the decoding sequences / KV tokens of the worker

    def prefill_ms(self, tokens: float) -> float:
        """0 without new prompt tokens."""
        return self.prefill.at(tokens) if tokens > 0 else 0.0

    def decode_ms(self, usage: float) -> float:
        """usage: 0 to 1; held at the fitted range, so that more than a full cache never looks fast."""
        return self.decode.at(min(usage, self.decode.high))


@dataclass(frozen=True, slots=True)
class Estimates:
    """What the router has learnt of the traffic, or was told."""

    output_tokens: float  # mean length of an answer
    reuse_probability: float  # that a stored block is used again before it is evicted, 0 to 1
    block_life_s: float  # mean age at which a block is used again


@dataclass(slots=True, eq=False)
class WorkerView:
    """A ready worker. The router's, which changes it between decisions; a policy only reads."""

    worker_id: WorkerId
    role: Role
    info: EngineInfo
    slot: int  # its number in `HeldRequest.overlaps`
    pass_times: PassTimes
    load: WorkerLoad = field(default_factory=WorkerLoad)  # as last reported

    booked_requests: int = 0  # exact: placed and not ended
    booked_tokens: int = 0  # prompt + max_tokens of those
    context_tokens: int = 0  # prompt + generated so far of those
    decoding: int = 0  # of those: have their first token
    decode_ms: float = 0.0  # of a pass that decodes for all of those
    decode_slope_ms: float = 0.0  # how much longer it takes for each share of the worker's KV that is read beside

    pass_ends_s: float = LONG_AGO_S  # when the pass under way ends, as estimated; in the past: it is idle, or late
    is_prefilling: bool = False  # the pass under way works on prompts
    queued_tokens: int = 0  # of booked prompts, left to compute after the pass under way
    queued_prompts: int = 0  # of those: prompts that the last, partly filled pass will work on

    unused_blocks: int = 0  # KV blocks that hold nothing
    free_blocks: int = 0  # KV blocks unused or evictable, less those that prompts sent there are about to take
    eviction_loss: float = 0.0  # chance, 0 to 1, that the block evicted next would have been used again

    @property
    def free_slots(self) -> int:
        """How many more requests may be placed there now; 0 or below where it is full."""
        return self.info.max_num_seqs - self.booked_requests

    @property
    def kv_tokens(self) -> int:
        """Tokens that its KV cache holds."""
        return self.info.num_blocks * self.info.block_size


def _no_overlaps() -> Mapping[int, int]:
    return {}


class HeldRequest(msgspec.Struct, frozen=True, eq=False):
    """A request that waits in the router's queue."""

    request: Request
    role: Role
    held_since_s: float
    overlaps: Callable[[], Mapping[int, int]] = _no_overlaps
    """By slot, for workers that have any: how many leading blocks of the prompt are stored there, or will be for a
    request already sent there. Looks into the prefix index, so policies without `uses_prefixes` don't ask."""
    moves_kv: bool = False  # its prompt's KV comes from another worker: blocks that are lacking need not be computed


class RoutingState(msgspec.Struct, frozen=True):
    """All that a decision may depend on, beside the held requests."""

    now_s: float  # monotonic
    workers: Sequence[WorkerView]  # the ready ones of one role, at least one
    estimates: Estimates


class Assignment(msgspec.Struct, frozen=True):
    """One request to one worker, now."""

    request_id: RequestId
    worker_id: WorkerId
    cost_ms: float | None = None  # what the policy thinks it costs, for the explanation


class Plan(msgspec.Struct, frozen=True):
    """A policy's answer."""

    assignments: Sequence[Assignment]
    again_at_s: float | None = None  # ask again then, if no request or worker comes or goes before


class RoutingPolicy(Protocol):
    """Which held request goes where, now. Made by the hook `make_policy`."""

    @property
    def uses_prefixes(self) -> bool:
        """Whether it asks for `overlaps`; if not, block hashes are not even computed."""

    def assign(self, held: Sequence[HeldRequest], state: RoutingState) -> Plan:
        """`held`: the oldest ones, at most 256, in order of arrival, all for the role of the workers; where that many
        were given and some of them placed, it is asked again for the rest. Requests left out stay in the queue. A
        worker must not be given more than its `free_slots`. Asked on the event loop whenever a request arrives or ends,
        a worker comes or a pass with prompts ends, and at `again_at_s`; what comes in one turn of the loop may
        be asked about together. A plan that breaks these rules books nothing, like an exception: it is logged, the
        requests wait on, and the policy is asked again at the next occasion, after a second at the latest."""


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """How to build a policy; made from the settings."""

    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)  # checked by the plugin's options model
