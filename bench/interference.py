"""Do long prompts hold up the tokens of others? Aggregated workers beside as many prefill and decode workers.

    python bench/interference.py [--engine sim] [--engine torch] [--runs 3]

Some streams decode all the time while long prompts keep coming. The figure is the time between two tokens of those
streams, its 99th percentile above all; disaggregated workers have to stay below aggregated ones, or the exit code is 1.
sim: 4 aggregated workers against 2 and 2; torch, with the default model: 2 against 1 and 1. Whole servers over HTTP,
medians of several runs that take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import httpx
from hand_over import server

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.models import make_tiny_model


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server."""

    streams: int  # that decode, each with a short prompt
    stream_tokens: int
    prompts: int
    prompt_tokens: int
    every_s: float  # a long prompt
    token_ids: tuple[int, int]


@dataclass(slots=True)
class Seen:
    gaps_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def stream(client: httpx.AsyncClient, prompt: list[int], num_tokens: int) -> list[float]:
    """When each event with text came, and before all when it was asked for."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    times = [time.perf_counter()]
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times


async def run(url: str, load: Load, seed: int) -> Seen:
    chance, seen = random.Random(seed), Seen()

    def prompt(length: int) -> list[int]:
        return [chance.randrange(*load.token_ids) for _ in range(length)]

    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=300) as client:

        async def decode(own: list[int]) -> None:
            times = await stream(client, own, load.stream_tokens)
            seen.gaps_s += [late - early for early, late in pairwise(times[1:])]

        async def prefill(number: int, own: list[int]) -> None:
            await asyncio.sleep((number + 1) * load.every_s)
            times = await stream(client, own, 2)
            seen.first_s.append(times[1] - times[0])

        async with asyncio.TaskGroup() as group:
            for _ in range(load.streams):
                group.create_task(decode(prompt(40)))
            for number in range(load.prompts):
                group.create_task(prefill(number, prompt(load.prompt_tokens)))
    return seen


def compare(name: str, model: str, load: Load, sides: dict[str, list[str]], runs: int) -> bool:
    """Whether the second side keeps its tokens coming better than the first."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    for number in range(runs):
        for side, flags in sides.items():
            with server(model, flags) as client:
                url = str(client.base_url)
                asyncio.run(run(url, Load(1, 4, 1, 32, 0.1, load.token_ids), 99))  # warm
                seen = asyncio.run(run(url, load, number))
            figures = (quantile(seen.gaps_s, 0.5), quantile(seen.gaps_s, 0.99), median(seen.first_s))
            rows.setdefault(side, []).append(figures)
    medians = {side: [median(column) * 1e3 for column in zip(*each, strict=True)] for side, each in rows.items()}
    for side, (p50, p99, first) in medians.items():
        print(f"| {name} | {side} | {p50:.1f} | {p99:.1f} | {first:.0f} |", flush=True)
    (_, before, _), (_, after, _) = medians.values()
    print(f"| {name} | ratio | | {after / before:.2f} | |", flush=True)
    return after < before


def sim(runs: int) -> bool:
    model = str(make_tiny_model(Path(tempfile.mkdtemp()) / "sim"))
    common = ["--engine", "sim", "--num-blocks", "8192", "--max-num-tokens", "8192", "--max-seq-len", "4096"]
    split = [*common, "--mode", "disagg", "--prefill-workers", "2", "--decode-workers", "2"]
    load = Load(16, 700, 60, 3900, 0.08, (300, 900))
    return compare("sim", model, load, {"4 aggregated": [*common, "--workers", "4"], "2 and 2": split}, runs)


def torch(runs: int) -> bool:
    common = ["--engine", "torch", "--engine-option", "num_threads=1"]
    load = Load(3, 150, 5, 1000, 1.5, (300, 9000))
    sides = {"2 aggregated": [*common, "--workers", "2"], "1 and 1": [*common, "--mode", "disagg"]}
    return compare("torch", "smollm2-135m-instruct", load, sides, runs)


ENGINES: dict[str, Callable[[int], bool]] = {"sim": sim, "torch": torch}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=ENGINES, help="one of them only")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    print("| engine | workers | between tokens, p50 ms | p99 ms | first token of long prompts, ms |")
    print("|---|---|---|---|---|")
    met = [ENGINES[name](arguments.runs) for name in arguments.engine or ENGINES]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
