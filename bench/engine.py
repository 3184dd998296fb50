"""The embedded engine against transformers' `generate`, as ratios measured in one process, interleaved, best of n.

    python bench/engine.py [--quick] [--model FOLDER] [--threads 1]

Prints one line a ratio: `ok` where it meets its gate; `LIMIT` where it doesn't, and a bound that was measured in the
same run is below the gate too; `MISS` where it doesn't and might. Exits 1 when there is a MISS. Ratios carry over
between machines far better than speeds do; still, run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import transformers
from engine_limits import StraightStep, forward_seconds
from engine_runs import (
    PASS_TOKENS,
    Subject,
    Timing,
    generate,
    interleaved,
    make_prompts,
    read_seconds,
    run_alone,
    run_engine,
    run_generate,
)

from trtserve.plugins.api import Request, RequestId, SamplingParams
from trtserve.plugins.engines.torch.model import Model, load_model
from trtserve.plugins.engines.torch.options import TorchOptions
from trtserve.server.model.resolve import DEFAULT_MODEL, resolve_model

CPU = torch.device("cpu")
RAGGED = [32, 60, 100, 140, 190, 250, 320, 400]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure. `context`: prompt tokens where decoding is measured."""

    context: int
    new_tokens: int  # in each sequence while all of a batch decode
    repeats: int  # rounds in which the two sides take turns
    equal_prompts: int

    def engine_tokens(self, batch: int) -> int:
        """Tokens to ask of the engine, whose first sequences decode while the last ones are still in prefill."""
        return self.new_tokens + 1 + -(-batch * self.context // PASS_TOKENS)


FULL, QUICK = Effort(256, 16, 2, 12), Effort(96, 10, 1, 4)


@dataclass(frozen=True, slots=True)
class Ratio:
    """`possible`: an upper bound that was measured beside it, which `bound_by` describes."""

    name: str
    value: float
    gate: float
    possible: float | None = None
    bound_by: str = ""

    @property
    def verdict(self) -> str:
        """ok, LIMIT or MISS."""
        if self.value >= self.gate:
            return "ok"
        return "LIMIT" if self.possible is not None and self.possible < self.gate else "MISS"

    def __str__(self) -> str:
        limit = "" if self.possible is None else f" (at most {self.possible:.2f} here: {self.bound_by})"
        return f"{self.verdict:5} {self.value:6.2f}  gate {self.gate:5.2f}  {self.name}{limit}"


def equal_tokens(folder: str, effort: Effort) -> Iterator[Ratio]:
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = make_prompts([5 + 11 * number for number in range(effort.equal_prompts)], seed=1)
    wanted = [generate(module, [prompt], 8)[0][len(prompt) :] for prompt in prompts]
    subject = Subject(load_model(folder, torch.float32, CPU, TorchOptions()), max_num_tokens=37, max_num_seqs=32)
    for name in ("chunked", "from the prefix cache"):
        subject.run(prompts, 8)
        equal = sum(subject.tokens[number] == tokens for number, tokens in enumerate(wanted))
        yield Ratio(f"float32 tokens equal to generate, ragged, {name}", equal / len(prompts), 1.0)


def packed_over_plain(folder: str, effort: Effort) -> Iterator[Ratio]:
    packed, plain = (
        Subject(load_model(folder, torch.bfloat16, CPU, TorchOptions(layer_swap=False, packed_linears=packed)))
        for packed in (True, False)
    )
    for batch in (1, 8):
        lengths, tokens = [effort.context] * batch, effort.engine_tokens(batch)
        fast, slow, bare_fast, bare_slow = interleaved(
            3 * effort.repeats,  # more than elsewhere: it's a small ratio
            partial(run_engine, packed, lengths, tokens),
            partial(run_engine, plain, lengths, tokens),
            partial(run_alone, partial(forward_seconds, packed.model, batch)),
            partial(run_alone, partial(forward_seconds, plain.model, batch)),
        )
        yield Ratio(
            f"packed over plain linears, decode, batch {batch}",
            slow.step / fast.step,
            1.3,
            bare_slow.step / bare_fast.step,
            "transformers' layers with an attention that takes no time",
        )


def against_generate(module: Any, subject: Subject, weight_bytes: int, effort: Effort) -> Iterator[Ratio]:
    steps: dict[int, float] = {}
    runs: list[Callable[[int], Timing]]
    straight = StraightStep(module) if type(module) is transformers.LlamaForCausalLM else None
    for batch, decode_gate in ((1, 1.4), (8, 2.0), (32, 3.5)):
        lengths = [effort.context] * batch
        runs = [
            partial(run_generate, module, lengths, effort.new_tokens),
            partial(run_engine, subject, lengths, effort.engine_tokens(batch)),
        ]
        if straight is not None:
            runs.append(partial(run_alone, partial(straight.seconds, batch, effort.context + effort.new_tokens // 2)))
        theirs, ours, *bound = interleaved(effort.repeats + 1 if batch == 1 else effort.repeats, *runs)
        steps[batch] = ours.step
        yield Ratio(
            f"engine over generate, decode, batch {batch}",
            theirs.step / ours.step,
            decode_gate,
            theirs.step / bound[0].step if bound else None,
            "torch's operators of such a step in a straight line",
        )
    yield Ratio("tokens a second, batch 8 over batch 1", 8 * steps[1] / steps[8], 5.0)
    yield Ratio("tokens a second, batch 32 over batch 1", 32 * steps[1] / steps[32], 8.0)
    yield Ratio("decode batch 1 over reading the weights once", read_seconds(weight_bytes) / steps[1], 0.2)
    for batch in (1, 8):
        lengths = [512 if batch == 1 else 2 * effort.context] * batch
        theirs, ours = interleaved(
            effort.repeats, partial(run_generate, module, lengths, 1), partial(run_engine, subject, lengths, 2)
        )
        yield Ratio(f"engine over generate, prefill in steps of 512, batch {batch}", theirs.first / ours.first, 0.85)


def on_ragged_prompts(module: Any, subject: Subject, effort: Effort) -> Iterator[Ratio]:
    theirs = ours = cold = warm = float("inf")
    for number in range(effort.repeats):
        prompts, fresh = make_prompts(RAGGED, seed=50 + number), make_prompts(RAGGED, seed=80 + number)
        begin = time.perf_counter()
        generate(module, prompts, 32)
        theirs = min(theirs, time.perf_counter() - begin)
        ours = min(ours, subject.total(prompts, 32))
        cold = min(cold, subject.total(fresh, 1))
        warm = min(warm, subject.total(fresh, 1))
    yield Ratio("ragged batch of 8, engine over padded generate", theirs / ours, 1.5)
    yield Ratio("first token, nothing cached over all cached", cold / warm, 5.0)


def step_over_forward(subject: Subject, effort: Effort) -> Iterator[Ratio]:
    """The share of a decode step that is the model; a gate of 1 / 1.10."""
    inside: list[float] = []
    forward = Model.forward

    def timed(*arguments: Any) -> torch.Tensor:
        begin = time.perf_counter()
        logits = forward(*arguments)
        inside.append(time.perf_counter() - begin)
        return logits

    for number, prompt in enumerate(make_prompts([effort.context] * 8, seed=9)):
        subject.engine.add(Request(RequestId(number), array("i", prompt), SamplingParams(40, temperature=0.0)))
    shares = []
    with patch.object(Model, "forward", timed):
        while subject.engine.has_work():
            stats = subject.engine.step().stats
            if stats is not None and not stats.prefill_tokens:
                shares.append(inside[-1] / stats.duration_s)
    yield Ratio("bare forward over engine step, decode, batch 8", median(shares), 1 / 1.10)


def ratios(folder: str, effort: Effort) -> Iterator[Ratio]:
    yield from equal_tokens(folder, effort)
    yield from packed_over_plain(folder, effort)
    module: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    weight_bytes = sum(weight.nbytes for weight in module.parameters())
    subject = Subject(load_model(folder, torch.bfloat16, CPU, TorchOptions()))
    yield from against_generate(module, subject, weight_bytes, effort)
    yield from on_ragged_prompts(module, subject, effort)
    yield from step_over_forward(subject, effort)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a Hugging Face folder (default: {DEFAULT_MODEL})")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--quick", action="store_true", help="less context and one round: a trend, not a measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.model or str(resolve_model(DEFAULT_MODEL).path)
    verdicts: Counter[str] = Counter()
    for ratio in ratios(folder, QUICK if arguments.quick else FULL):
        verdicts[ratio.verdict] += 1
        print(ratio, flush=True)
    print(f"{verdicts['ok']} met, {verdicts['LIMIT']} beyond this machine's limit, {verdicts['MISS']} missed")
    return 1 if verdicts["MISS"] else 0


if __name__ == "__main__":
    sys.exit(main())
