import json

import pytest

from tests.server.replay.traces import conversations, write_trace
from trtserve.server.replay.command import main

SMALL = ("--trace-block-size", "16", "--num-blocks", "400", "--max-num-tokens", "256")


@pytest.fixture
def trace(tmp_path):
    return write_trace(tmp_path / "trace.jsonl", conversations(60))


@pytest.fixture
def replayed(trace, capsys):
    """Run the command on the trace; (exit code, stdout, stderr)."""

    def run(*flags):
        code = main([str(trace), *SMALL, *flags])
        return code, *capsys.readouterr()

    return run


def test_json(replayed):
    code, out, err = replayed("--json", "--workers", "3", "--router", "round_robin")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert list(figures) == [
        *("requests", "hit_rate", "ttft_ms", "itl_ms", "e2e_ms", "held_share", "hold_ms_mean", "decision_us_mean"),
    ]
    assert figures["requests"] == 60
    assert list(figures["ttft_ms"]) == ["mean", "p50", "p90", "p99", "max"]
    assert list(figures["itl_ms"]) == ["mean", "p99"]
    assert list(figures["e2e_ms"]) == ["mean", "p50", "p99"]


def test_a_table_has_the_same_figures(replayed):
    _, table, _ = replayed("--workers", "2", "--router", "least_loaded")
    figures = json.loads(replayed("--workers", "2", "--router", "least_loaded", "--json")[1])
    lines = table.splitlines()
    assert lines[0] == f"60 requests, {figures['hit_rate']:.1%} of prompt tokens from prefix caches"
    assert lines[2].split() == ["TTFT,", "ms", *(f"{value:.1f}" for value in figures["ttft_ms"].values())]
    assert lines[3].split() == ["ITL,", "ms", *(f"{value:.1f}" for value in figures["itl_ms"].values())]


def test_assignments_are_the_same_twice(replayed, tmp_path):
    for name in ("first", "second"):
        assert replayed("--workers", "3", "--router", "kv", "--assignments", str(tmp_path / name))[0] == 0
    lines = (tmp_path / "first").read_text().splitlines()
    assert lines == (tmp_path / "second").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 60
    assert {worker for worker, _ in rows} == {0, 1, 2}
    assert all(dispatch_ms >= 0 for _, dispatch_ms in rows)


def test_flags_are_spelled_as_the_servers(replayed):
    slow = json.loads(replayed("--json", "--engine-option", "slow_factor=4", "--engine-options=speedup=2")[1])
    aliased = json.loads(replayed("--json", "--engine_options", "slow_factor=4,speedup=2", "--kv-block-size", "16")[1])
    plain = json.loads(replayed("--json")[1])
    assert slow["ttft_ms"] == aliased["ttft_ms"]
    assert slow["e2e_ms"]["mean"] > plain["e2e_ms"]["mean"]


def test_only_the_first_requests(replayed):
    assert json.loads(replayed("--json", "--requests", "5")[1])["requests"] == 5


def test_progress_goes_to_stderr(replayed):
    code, out, err = replayed("--json", "--progress")
    assert code == 0
    assert json.loads(out)["requests"] == 60
    assert "60/60" in err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--router", "nonsense"], "there is no policy 'nonsense'"),
        (["--mode", "nonsense"], "there is no mode 'nonsense'"),
        (["--router", "kv", "--router-option", "nonsense=1"], "router-options.nonsense"),
        (["--engine-option", "speedup=0"], "engine-options.speedup: Input should be greater than 0"),
        (["--engine-option", "speedup"], "--engine-options speedup: give name=value"),
        (["--num-blocks", "20"], "of the trace needs"),
        (["--max-seq-len", "100000"], "max_seq_len is 100000; it must be at least 2 and at most the 6400 tokens"),
        (["--block-size", "16", "--trace-block-size", "64"], "trace.jsonl:1: has"),
        (["--assignments", "/nonexistent/file"], "--assignments /nonexistent/file: No such file or directory"),
    ],
)
def test_what_cannot_be_replayed(replayed, flags, problem):
    code, out, err = replayed(*flags)
    assert (code, out) == (2, "")
    assert err.startswith("trtserve replay: ")
    assert problem in err


def test_a_bad_line_is_one_error(replayed, trace):
    with trace.open("a") as lines:
        lines.write("nonsense\n")
    code, out, err = replayed()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "trace.jsonl:61: " in err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--workers", "0"], "argument --workers: 0 is not at least 1"),
        (["--speedup", "0"], "argument --speedup: 0 is not above 0"),
        (["--speedup", "inf"], "argument --speedup: inf is not above 0"),
        (["--event-lag-ms", "-1"], "argument --event-lag-ms: -1 is not at least 0"),
        (["--requests", "many"], "argument --requests: invalid whole number value: 'many'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_flags(replayed, capsys, flags, problem):
    with pytest.raises(SystemExit, match="2"):
        replayed(*flags)
    assert problem in capsys.readouterr().err


def test_disaggregated_workers(replayed):
    flags = ("--mode", "disagg", "--prefill-workers", "2", "--disagg-policy", "always", "--kv-bytes-per-token", "1000")
    code, out, _ = replayed(*flags, "--json")
    moves = json.loads(out)["moves"]
    assert code == 0 and moves["local_share"] == 0 and moves["moved_gb"] > 0
    assert f"{moves['moved_gb']:.1f} GB of KV moved" in replayed(*flags)[1]


def test_a_sweep_over_all_divisions(replayed):
    code, out, _ = replayed("--sweep", "--workers", "3")
    lines = out.splitlines()
    assert code == 0 and [line[:22].strip() for line in lines[1:-1]] == [
        *("3 aggregated", "1 prefill, 2 decode", "2 prefill, 1 decode"),
    ]
    figures = json.loads(replayed("--sweep", "--workers", "3", "--json")[1])
    assert list(figures) == [line[:22].strip() for line in lines[1:-1]]
    assert lines[1].split()[2] == f"{figures['3 aggregated']['ttft_ms']['mean']:.0f}"
