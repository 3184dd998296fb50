"""`trtserve replay TRACE …` and `trtserve replay --decisions FILE …`: flags to a replay, its result to a table, JSON
and a file."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError
from tqdm import tqdm

from trtserve.plugins.api import EngineConfig, ModeConfig
from trtserve.plugins.manager import PluginError, PluginManager
from trtserve.plugins.routing_api import PolicyConfig
from trtserve.server.exit_codes import ExitCode
from trtserve.server.replay.decisions import Comparison, DecisionLogError, compare
from trtserve.server.replay.engine import ReplayedEngine
from trtserve.server.replay.hand_over import KV_BYTES_PER_TOKEN, TransferModel
from trtserve.server.replay.measures import ReplayResult
from trtserve.server.replay.run import ReplayOptions, replay
from trtserve.server.replay.tables import sweep_table, table
from trtserve.server.replay.trace import BLOCK_SIZE, TraceError, read_trace
from trtserve.server.replay.virtual_time import Deadlock
from trtserve.settings.errors import SettingsError
from trtserve.settings.names import normalise
from trtserve.settings.schema import PinnedEstimates

_MOST_CHANGES = 20
"""Shown of what another policy would have done."""


class _BadFlag(Exception):
    """A flag has a value that cannot be used; the text is for the user."""


def main(arguments: Sequence[str]) -> int:
    """`arguments`: without ``trtserve replay``. Returns the exit code; exits for --help and for bad flags, as argparse
    does."""
    try:
        parser = _parser()
        flags = parser.parse_args(normalise(arguments))
        if (flags.trace is None) == (flags.decisions is None):
            parser.error("give a TRACE or --decisions FILE")
        if flags.decisions is not None:
            return _compare(flags)
        if flags.sweep:
            print(_sweep(flags))
            return ExitCode.OK
        with _opened(flags.assignments) as assignments:
            result = _replayed(flags)
            for worker, dispatch_ms in result.assignments if assignments is not None else ():
                print(json.dumps([worker, dispatch_ms]), file=assignments)
    except (DecisionLogError, TraceError, PluginError, SettingsError, _BadFlag) as error:
        print(f"trtserve replay: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except Deadlock as error:
        print(f"trtserve replay: the mode or the routing policy forgot a request: {error}", file=sys.stderr)
        return ExitCode.DEFECT
    print(json.dumps(result.summary()) if flags.json else table(result))
    return ExitCode.OK


def _compare(flags: argparse.Namespace) -> int:
    manager = PluginManager()
    options = manager.check_options("policy", flags.router, _named_values("router", flags.router_options))
    try:
        found = compare(flags.decisions, manager.make_policy(flags.router, PolicyConfig(flags.seed, options)))
    except OSError as error:
        raise _BadFlag(f"--decisions {flags.decisions}: {error.strerror}") from error
    print(json.dumps(found.as_dict()) if flags.json else _comparison_table(found, flags.router))
    return ExitCode.OK


def _opened(path: Path | None) -> nullcontext[None] | TextIO:
    """Opened before the replay, which nobody wants to have run for nothing."""
    try:
        return nullcontext() if path is None else path.open("w")
    except OSError as error:
        raise _BadFlag(f"--assignments {path}: {error.strerror}") from error


def _replayed(flags: argparse.Namespace) -> ReplayResult:
    trace = read_trace(flags.trace, flags.trace_block_size, flags.requests)
    options = _options(flags)
    # tqdm itself decides by whether stderr is a terminal where it is told None.
    hidden = False if flags.progress else None
    with tqdm(total=len(trace), unit="req", disable=hidden, dynamic_ncols=True, file=sys.stderr) as bar:
        return replay(trace, options, bar.update)


def _sweep(flags: argparse.Namespace) -> str:
    """The same trace on every way to divide --workers into prefill and decode workers, and on aggregated ones."""
    rows: dict[str, ReplayResult] = {}
    for prefill in range(flags.workers):
        decode = flags.workers - prefill
        chosen = {"mode": "disagg" if prefill else "agg", "prefill_workers": prefill, "decode_workers": decode}
        name = f"{prefill} prefill, {decode} decode" if prefill else f"{flags.workers} aggregated"
        rows[name] = _replayed(argparse.Namespace(**vars(flags) | chosen))
    if flags.json:
        return json.dumps({name: result.summary() for name, result in rows.items()})
    return sweep_table(rows)


def _transfer(flags: argparse.Namespace) -> TransferModel:
    return TransferModel(flags.transfer_gb_per_s * 1e9, flags.transfer_latency_ms / 1000, flags.kv_bytes_per_token)


def _options(flags: argparse.Namespace) -> ReplayOptions:
    manager = PluginManager()
    router_options = manager.check_options("policy", flags.router, _named_values("router", flags.router_options))
    engine_options = manager.check_options("engine", "sim", _named_values("engine", flags.engine_options))
    config = EngineConfig(
        model_path="",
        block_size=flags.block_size or flags.trace_block_size,
        num_blocks=flags.num_blocks,
        max_num_seqs=flags.max_num_seqs,
        max_num_tokens=flags.max_num_tokens,
        max_seq_len=flags.max_seq_len,
        enable_prefix_caching=flags.enable_prefix_caching,
        seed=flags.seed,
        options=engine_options,
    )
    try:
        engine = ReplayedEngine.of(config)
    except ValueError as error:
        raise _BadFlag(str(error)) from error
    return ReplayOptions(
        mode=manager.make_mode(
            flags.mode, ModeConfig(flags.workers, flags.prefill_workers, flags.decode_workers, flags.disagg_policy)
        ),
        policy=manager.make_policy(flags.router, PolicyConfig(flags.seed, router_options)),
        engine=engine,
        trace_block_size=flags.trace_block_size,
        speedup=flags.speedup,
        event_lag_s=flags.event_lag_ms / 1000,
        pinned=_pinned(flags.pinned_estimates),
        transfer=_transfer(flags),
        max_tokens=flags.max_tokens,
    )


def _pinned(given: Sequence[str]) -> PinnedEstimates:
    """``output_tokens=300``; the coefficients of a curve are separated by colons: ``decode_ms=5:50:0``."""
    values: dict[str, Any] = dict(_named_values("pinned-estimates", given))
    for name in ("prefill_ms", "decode_ms"):
        if name in values:
            values[name] = values[name].split(":")
    try:
        return PinnedEstimates.model_validate(values)
    except ValidationError as error:
        lines = [f"--pinned-estimates {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise _BadFlag("\n".join(lines)) from error


def _named_values(kind: str, given: Sequence[str]) -> dict[str, str]:
    """``a=1`` and ``a=1,b=2``, as the server's own flags have it."""
    options: dict[str, str] = {}
    for item in ",".join(given).split(",") if given else ():
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise _BadFlag(f"--{kind}-options {item}: give name=value")
        options[name] = value
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trtserve replay",
        description="Replay a trace in virtual time: the server's router and policies, simulated engines.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    whole, positive = _number(int, 1), _number(float, 0, exclusive=True)
    values: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    add("trace", type=Path, nargs="?", metavar="TRACE", help="JSON lines in Mooncake's format")
    add("--decisions", type=Path, metavar="FILE", help="put a --decision-log to the policy instead of a trace")
    add("--trace-block-size", type=whole, default=BLOCK_SIZE, metavar="N", help="tokens of one hash id (512)")
    add("--requests", type=whole, metavar="N", help="replay only so many, the first (all)")
    add("--speedup", type=positive, default=1.0, metavar="X", help="of arrivals (1)")
    add("--mode", default="agg", help="serving mode (agg)")
    add("--workers", type=whole, default=1, metavar="N", help="aggregated workers, or all of a --sweep (1)")
    add("--prefill-workers", type=whole, default=1, metavar="N", help="of mode disagg (1)")
    add("--decode-workers", type=whole, default=1, metavar="N", help="of mode disagg (1)")
    add("--disagg-policy", choices=("auto", "always", "never"), default="auto", help="as the server's (auto)")
    add("--transfer-gb-per-s", type=positive, default=25.0, metavar="X", help="KV from worker to worker, GB/s (25)")
    add("--transfer-latency-ms", type=_number(float, 0), default=2.0, metavar="MS", help="of each move of KV (2)")
    add(
        "--kv-bytes-per-token",
        type=positive,
        default=KV_BYTES_PER_TOKEN,
        metavar="N",
        help=f"({KV_BYTES_PER_TOKEN}, Llama 3.1 8B in 16 bits)",
    )
    add("--sweep", action="store_true", help="every way to divide --workers into prefill and decode workers")
    add("--router", default="kv", metavar="POLICY", help="routing policy (kv)")
    add("--router-options", help="the policy's own options", **values)
    add("--pinned-estimates", help="what the router is told instead of learning it, as in the settings", **values)
    add("--event-lag-ms", type=_number(float, 0), default=0.0, metavar="MS", help="KV events come so much later (0)")
    add("--seed", type=_number(int, 0), default=0, metavar="N", help="of the policy (0)")
    add("--block-size", type=whole, metavar="N", help="tokens in a KV block of a worker (--trace-block-size)")
    add("--num-blocks", type=whole, default=2048, metavar="N", help="KV blocks of a worker (2048)")
    add("--max-num-seqs", type=whole, default=256, metavar="N", help="sequences that a worker runs at once (256)")
    add("--max-num-tokens", type=whole, default=8192, metavar="N", help="tokens in one pass of a worker (8192)")
    add("--max-seq-len", type=_number(int, 2), metavar="N", help="tokens of one sequence (what the KV cache holds)")
    add("--max-tokens", type=whole, default=8192, metavar="N", help="what each request asks for, not gets (8192)")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True, help="reuse KV (yes)")
    add("--engine-options", help="the simulated engine's own options", **values)
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add(
        "--assignments",
        type=Path,
        metavar="FILE",
        help="write [worker number, dispatch ms] of each request, a line each",
    )
    add("--progress", action="store_true", help="show progress on stderr though it is no terminal")
    return parser


def _number(kind: Callable[[str], float], least: float, exclusive: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value) or value < least or (exclusive and value == least):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if exclusive else 'at least'} {least}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse says "invalid … value"
    return parse


def _comparison_table(found: Comparison, policy: str) -> str:
    both = found.requests - found.held
    lines = [
        f"{found.decisions} decisions about {found.requests} requests, put to {policy}:",
        f"  {found.same} to the same worker, {found.elsewhere} to another one, {found.held} held for later",
        f"  leading blocks there: {found.recorded_overlap_blocks} as recorded, "
        f"{found.instead_overlap_blocks} by {policy} (over the {both} requests that both send)",
    ]
    for change in found.changes[:_MOST_CHANGES]:
        instead = change.instead or "held"
        lines.append(
            f"  request {change.request_id}, {change.prompt_tokens} tokens: {change.recorded} "
            f"({change.overlap_blocks} blocks there) -> {instead} ({change.instead_overlap_blocks})"
        )
    if len(found.changes) > _MOST_CHANGES:
        lines.append(f"  and {len(found.changes) - _MOST_CHANGES} more")
    return "\n".join(lines)
