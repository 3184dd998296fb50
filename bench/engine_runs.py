"""Timed runs of the embedded engine and of transformers' `generate`, for the ratios of `engine.py`."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import transformers

from trtserve.plugins.api import EngineConfig, Request, RequestId, SamplingParams
from trtserve.plugins.engines.torch.engine import TorchEngine
from trtserve.plugins.engines.torch.model import Model

PASS_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run: everything up to the first tokens, and the median decode step."""

    first: float
    step: float


class Clock(transformers.LogitsProcessor):
    """Notes when `generate` has the logits of each step."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.ticks.append(time.perf_counter())
        return scores


def timing_of(begin: float, ticks: list[float]) -> Timing:
    steps = [late - early for early, late in pairwise(ticks)]
    return Timing(ticks[0] - begin, median(steps) if steps else 0.0)


def make_prompts(lengths: list[int], seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, 30000) for _ in range(length)] for length in lengths]


def generate(module: Any, prompts: list[list[int]], new_tokens: int, *processors: Any) -> list[list[int]]:
    """transformers' greedy search on prompts padded on the left; returns prompts and new tokens."""
    width = max(map(len, prompts))
    out = module.generate(
        torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        logits_processor=transformers.LogitsProcessorList(processors),
    )
    tokens: list[list[int]] = out.tolist()
    return tokens


def run_generate(module: Any, lengths: list[int], new_tokens: int, round_number: int) -> Timing:
    clock = Clock()
    begin = time.perf_counter()
    generate(module, make_prompts(lengths, round_number), new_tokens, clock)
    return timing_of(begin, clock.ticks)


class Subject:
    """An engine on a model that is in memory."""

    def __init__(self, model: Model, **config: Any) -> None:
        wanted = {
            "device": "cpu",
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_blocks": 1400,
            "max_num_tokens": PASS_TOKENS,
            **config,
        }
        self.model = model
        self.engine = TorchEngine(EngineConfig("in memory", **wanted), load=lambda *_: model)
        self.engine.start(lambda phase: None)
        self.tokens: dict[int, list[int]] = {}
        self.num_runs = 0

    def run(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Decode steps count from when every prompt has its first token."""
        self.num_runs += 1
        self.tokens = {}
        begin = time.perf_counter()
        for number, prompt in enumerate(prompts):
            params = SamplingParams(new_tokens, temperature=0.0)
            self.engine.add(Request(RequestId(number), array("i", prompt), params))
        ticks: list[float] = []
        while self.engine.has_work():
            for output in self.engine.step().outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            # after the first request has ended a step is smaller than a full one
            if len(self.tokens) == len(prompts) and self.engine.stats().running == len(prompts):
                ticks.append(time.perf_counter())
        return timing_of(begin, ticks or [time.perf_counter()])

    def total(self, prompts: list[list[int]], new_tokens: int) -> float:
        begin = time.perf_counter()
        self.run(prompts, new_tokens)
        return time.perf_counter() - begin


def run_engine(subject: Subject, lengths: list[int], new_tokens: int, round_number: int) -> Timing:
    # every run has prompts of its own, or the prefix cache would answer
    prompts = make_prompts(lengths, 1000 * subject.num_runs + round_number)
    return subject.run(prompts, new_tokens)


def run_alone(seconds: Callable[[], float], round_number: int) -> Timing:
    """Something that times one step of its own, to take its turn beside runs."""
    return Timing(0.0, seconds())


def interleaved(repeats: int, *runs: Callable[[int], Timing]) -> list[Timing]:
    """Each run `repeats` times in turn, and the best of each; a run gets the number of the round, for fresh prompts."""
    rounds = [[run(number) for run in runs] for number in range(repeats)]
    each = zip(*rounds, strict=True)
    return [Timing(min(run.first for run in mine), min(run.step for run in mine)) for mine in each]


def read_seconds(num_bytes: int) -> float:
    """The time to read so many bytes, at the speed of a sum."""
    numbers = torch.ones(num_bytes // 4)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begin)
    return min(times)
