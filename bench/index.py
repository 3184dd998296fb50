"""The router's prefix index at a million blocks on 100 workers, against its goals.

    python bench/index.py [--quick]

Prints a Markdown table and exits 1 when a goal is missed. Everything is timed after the index was renewed once by
events, since dicts that entries come to and go from are larger and less orderly than new ones. Memory is the growth of
the resident set of a process of its own, divided by the (block, worker) pairs. Lines without a goal only inform.
Times of events and of remove_worker are CPU times, those of lookups by the clock, the best of five rounds.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles

from trtserve.server.router.feed import ChangeKind, EventFeed
from trtserve.server.router.index import PrefixIndex

NUM_WORKERS = 100
CHAIN = 64  # blocks in a prompt
BATCH = 32  # blocks in an event
SYSTEM = 16  # blocks of a system prompt that every worker has
LONG = 8192  # blocks in a prompt of 131,072 tokens
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def is_met(self) -> bool:
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    def row(self) -> str:
        if self.at_most is None and self.at_least is None:
            return f"| {self.name} | {self.value:.3g} {self.unit} | | |"
        goal = f"≤ {self.at_most:g}" if self.at_most is not None else f"≥ {self.at_least:g}"
        return (
            f"| {self.name} | {self.value:.3g} {self.unit} | {goal} {self.unit} | {'ok' if self.is_met else 'MISS'} |"
        )


def make_hashes(count: int) -> array[int]:
    """Packed, so that every use makes int objects of its own, as messages and prompts do."""
    return array("Q", random.randbytes(8 * count))


class Fleet:
    """Workers whose cache is full: whatever comes replaces their oldest chain. Each chain is on `copies` workers."""

    def __init__(self, blocks_per_worker: int, copies: int = 1) -> None:
        self.index = PrefixIndex()
        self.slots = [self.index.add_worker(blocks_per_worker) for _ in range(NUM_WORKERS)]
        self.feeds = [EventFeed(self.index, slot, _no_resync) for slot in self.slots]
        self.next_events = [0] * NUM_WORKERS
        self.chains: list[deque[array[int]]] = [deque() for _ in self.slots]
        self.copies = copies
        self.rounds = blocks_per_worker // CHAIN * NUM_WORKERS // copies
        self.apply_s: list[float] = []
        self._next_worker = cycle(range(NUM_WORKERS))

    def renew(self) -> None:
        """Store a chain for every chain that fits in, at first into empty workers, then in place of the oldest."""
        for _ in range(self.rounds):
            chain = make_hashes(CHAIN)
            for _ in range(self.copies):
                self._store(next(self._next_worker), chain)

    def _store(self, worker: int, chain: array[int]) -> None:
        chains = self.chains[worker]
        is_full = len(chains) == self.rounds * self.copies // NUM_WORKERS
        oldest = chains.popleft() if is_full else None
        for start in range(0, CHAIN, BATCH):
            # The end of a chain is evicted before its beginning.
            if oldest is not None:
                self._apply(worker, "removed", oldest[CHAIN - start - BATCH : CHAIN - start])
            self._apply(worker, "stored", chain[start : start + BATCH])
        chains.append(chain)

    def _apply(self, worker: int, kind: ChangeKind, packed: array[int]) -> None:
        begin = time.thread_time()
        self.feeds[worker].apply(self.next_events[worker], ((kind, packed.tolist()),), begin)
        self.apply_s.append(time.thread_time() - begin)
        self.next_events[worker] += 1


def _no_resync() -> None:
    raise AssertionError("no event was lost")


def event_figures(fleet: Fleet) -> Iterator[Figure]:
    fleet.apply_s.clear()
    fleet.renew()
    rate = len(fleet.apply_s) * BATCH / sum(fleet.apply_s) / 1e6
    yield Figure("events, stored and removed in turn, batches of 32", rate, "M blocks/s", at_least=1)
    yield Figure("longest event of 32 blocks", max(fleet.apply_s) * 1e3, "ms")


def lookup_figures(fleet: Fleet, repeats: int) -> Iterator[Figure]:
    def stored_chain() -> array[int]:
        return random.choice(random.choice(fleet.chains))

    def half_stored_chain() -> array[int]:
        return stored_chain()[: CHAIN // 2] + make_hashes(CHAIN // 2)

    name = "lookup of 64 blocks,"
    yield from _lookups(fleet.index, f"{name} all on one worker", stored_chain, repeats)
    yield from _lookups(fleet.index, f"{name} 32 on one worker", half_stored_chain, repeats)
    yield from _lookups(fleet.index, f"{name} nowhere", partial(make_hashes, CHAIN), repeats)
    shared = make_hashes(CHAIN)
    spread = random.sample(fleet.slots, 8)
    held = [fleet.index.reserve(slot, shared[: 8 * (number + 1)].tolist()) for number, slot in enumerate(spread)]
    yield from _lookups(fleet.index, f"{name} on 8 workers to 8 depths", lambda: shared, repeats)
    for reservation in held:
        fleet.index.unreserve(reservation)
    held = [fleet.index.reserve(slot, shared[:SYSTEM].tolist()) for slot in fleet.slots]
    held.append(fleet.index.reserve(fleet.slots[0], shared.tolist()))
    yield from _lookups(fleet.index, f"{name} all on one, 16 on all workers", lambda: shared, repeats)
    for reservation in held:
        fleet.index.unreserve(reservation)


def _lookups(index: PrefixIndex, name: str, chain: Callable[[], array[int]], repeats: int) -> Iterator[Figure]:
    rounds = [_lookup_times_us(index, chain, repeats // ROUNDS) for _ in range(ROUNDS)]
    yield Figure(f"{name}, p50", min(map(median, rounds)), "µs", at_most=10)
    yield Figure(f"{name}, p99", min(quantiles(times_us, n=100)[-1] for times_us in rounds), "µs")


def _lookup_times_us(index: PrefixIndex, chain: Callable[[], array[int]], repeats: int) -> list[float]:
    times_us = []
    for _ in range(repeats):
        hashes = chain().tolist()
        begin = time.perf_counter_ns()
        index.overlaps(hashes)
        times_us.append((time.perf_counter_ns() - begin) / 1e3)
    return times_us


def reservation_figures(fleet: Fleet, repeats: int) -> Iterator[Figure]:
    for blocks in (CHAIN, LONG):
        times_us = []
        for _ in range(repeats * CHAIN // blocks):
            hashes = make_hashes(blocks).tolist()
            begin = time.perf_counter_ns()
            fleet.index.unreserve(fleet.index.reserve(fleet.slots[0], hashes))
            times_us.append((time.perf_counter_ns() - begin) / 1e3)
        yield Figure(f"reserve and unreserve {blocks} blocks, p50", median(times_us), "µs")
    long = make_hashes(LONG)
    reservation = fleet.index.reserve(fleet.slots[0], long.tolist()[: LONG // 3])
    yield from _uncapped(_lookups(fleet.index, f"lookup of {LONG} blocks, a third there", lambda: long, repeats // 20))
    fleet.index.unreserve(reservation)


def _uncapped(figures: Iterator[Figure]) -> Iterator[Figure]:
    for figure in figures:
        yield Figure(figure.name, figure.value, figure.unit)


def removal_figures(fleet: Fleet) -> Iterator[Figure]:
    times_ms = []
    for slot in fleet.slots[:20]:
        begin = time.thread_time()
        fleet.index.remove_worker(slot)
        times_ms.append((time.thread_time() - begin) * 1e3)
    yield Figure(f"remove_worker, {len(fleet.chains[0]) * CHAIN:,} blocks", median(times_ms), "ms")


def memory_figure(blocks_per_worker: int, copies: int) -> Figure:
    command = [sys.executable, __file__, "--memory", str(copies), "--blocks", str(blocks_per_worker)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    name = f"memory, {blocks_per_worker:,} blocks a worker, each on {copies}"
    return Figure(name, float(answer.stdout), "bytes per block and worker", at_most=260)


def bytes_per_pair(blocks_per_worker: int, copies: int) -> float:
    before = _resident_bytes()
    fleet = Fleet(blocks_per_worker, copies)
    fleet.renew()
    fleet.renew()
    pairs = sum(fleet.index.num_stored(slot) for slot in fleet.slots)
    # What the bench keeps beside the index: its chains, 8 bytes a block and shared by the copies; and its times.
    fleet.apply_s.clear()
    fleet.chains.clear()
    return (_resident_bytes() - before) / pairs


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def figures(blocks_per_worker: int, repeats: int) -> Iterator[Figure]:
    fleet = Fleet(blocks_per_worker)
    fleet.renew()
    yield from event_figures(fleet)
    yield from lookup_figures(fleet, repeats)
    yield from reservation_figures(fleet, repeats)
    yield from removal_figures(fleet)
    del fleet
    for copies in (1, 4):
        yield memory_figure(blocks_per_worker, copies)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the blocks: a trend, not a measurement")
    parser.add_argument("--memory", type=int, metavar="COPIES", help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    random.seed(1)
    if options.memory:
        print(bytes_per_pair(options.blocks, options.memory))
        return 0
    print("| what | value | goal | |\n|---|---|---|---|")
    missed = 0
    for figure in figures(1_000 if options.quick else 10_000, 2_000 if options.quick else 20_000):
        missed += not figure.is_met
        print(figure.row(), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
