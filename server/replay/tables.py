"""A replay's figures for people."""

from __future__ import annotations

from collections.abc import Mapping

from trtserve.server.replay.measures import Moves, ReplayResult


def table(result: ReplayResult) -> str:
    """The figures of one replay, for people."""
    ttft, e2e, moves = result.ttft, result.e2e, result.moves
    rows = [
        ("", "mean", "p50", "p90", "p99", "max"),
        ("TTFT, ms", *(f"{value:.1f}" for value in (ttft.mean, ttft.p50, ttft.p90, ttft.p99, ttft.max))),
        ("ITL, ms", _or_dash(result.itl_mean_ms), "", "", _or_dash(result.itl_p99_ms), ""),
        ("end to end, ms", *(f"{value:.1f}" for value in (e2e.mean, e2e.p50, e2e.p90, e2e.p99, e2e.max))),
    ]
    lines = [f"{name:16}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in rows]
    return "\n".join(
        [
            f"{result.requests} requests, {result.hit_rate:.1%} of prompt tokens from prefix caches",
            *(line.rstrip() for line in lines),
            f"held: {result.held_share:.1%} of requests, {result.hold_ms_mean:.1f} ms in the mean over all",
            f"decision: {result.decision_us_mean:.0f} µs of real time in the mean",
            *([] if moves is None else [_told(moves)]),
        ]
    )


def sweep_table(rows: Mapping[str, ReplayResult]) -> str:
    """A line for each division of the workers."""
    head = ("", "TTFT mean", "p99", "ITL mean", "p99", "e2e mean", "p99", "cached", "local", "KV moved")
    cells = [head]
    for name, result in rows.items():
        moves = result.moves
        cells.append(
            (
                *(name, f"{result.ttft.mean:.0f}", f"{result.ttft.p99:.0f}"),
                *(_or_dash(result.itl_mean_ms), _or_dash(result.itl_p99_ms)),
                *(f"{result.e2e.mean:.0f}", f"{result.e2e.p99:.0f}", f"{result.hit_rate:.1%}"),
                *(("-", "-") if moves is None else (f"{moves.local_share:.0%}", f"{moves.moved_gb:.0f} GB")),
            )
        )
    return "\n".join(f"{name:22}" + "".join(f"{cell:>11}" for cell in row) for name, *row in cells) + "\n(times in ms)"


def _told(moves: Moves) -> str:
    return f"{moves.local_share:.1%} of prompts computed on decode workers; {moves.moved_gb:.1f} GB of KV moved"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
