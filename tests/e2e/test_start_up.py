"""From the command line to the first answer: the banner, readiness by phases, dry runs."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import Serve, ServerProcess, TrtserveProcess, eventually, sim_arguments


def test_the_banner_names_what_is_served_and_its_command_works(server: ServerProcess):
    banner = server.output[server.output.index("trtserve 0.") :]
    for part in ("sim, mode agg, engine sim, router kv, workers agg-0", f"ready at {server.url} after"):
        assert part in banner
    command = banner[banner.index("curl -N") :].partition("\n\n")[0]
    # The banner's -N is for people who watch; --max-time is for a test that must end.
    answer = subprocess.run(
        [*shlex.split(command.replace("\\\n", " ")), "--silent", "--show-error", "--max-time", "10"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"


def test_live_before_ready_and_the_phase_meanwhile(serve: Serve, unused_port: int):
    server = serve("--port", str(unused_port), options=("start_s=2.5",))
    client = server.client
    client.base_url = httpx.URL(f"http://127.0.0.1:{unused_port}")

    def live() -> bool:
        try:
            return client.get("/live").status_code == 200
        except httpx.ConnectError:
            return False

    eventually(live, "live")
    starting = client.get("/ready")
    assert (starting.status_code, starting.json()["status"]) == (503, "starting")
    health = eventually(lambda: "simulating" in (text := client.get("/health").text) and text, "the engine's phase")
    assert json.loads(health)["workers"][0]["state"] == "starting"
    early = client.post("/v1/completions", json={"prompt": "a"})
    assert (early.status_code, early.json()["error"]["code"]) == (503, "no_worker")
    assert int(early.headers["retry-after"]) >= 1
    assert client.get("/v1/models").status_code == 200
    eventually(lambda: client.get("/ready").status_code == 200, "ready")
    assert client.get("/health").json()["status"] == "ready"
    server.until_ready()


class RedirectedServer(ServerProcess):
    """Started by a shell with these redirections."""

    def __init__(self, redirections: str, *arguments: str) -> None:
        self._redirections = redirections
        super().__init__(*arguments)

    def command(self, arguments: tuple[str, ...]) -> list[str]:
        return ["sh", "-c", f'exec "$@" {self._redirections}', "sh", *super().command(arguments)]


@pytest.mark.parametrize("redirections", [">/dev/full", "2>/dev/full", "<&- >&- 2>&-"])
def test_a_server_goes_on_where_nobody_can_read_what_it_says(redirections: str, sim_model: Path, unused_port: int):
    with RedirectedServer(redirections, *sim_arguments(sim_model, "--port", str(unused_port))) as server:
        server.client.base_url = httpx.URL(f"http://127.0.0.1:{unused_port}")

        def is_ready() -> bool:
            try:
                return server.client.get("/ready").status_code == 200
            except httpx.ConnectError:
                return not server.is_running

        eventually(is_ready, "ready")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_workers_and_their_load(serve: Serve):
    server = serve("--workers", "2").until_ready()
    assert "workers agg-0, agg-1" in server.output
    server.until_metric("trtserve_worker_up", lambda up: up == 2)
    assert len(server.worker_pids()) == 2
    assert server.metric("trtllm_kv_cache_max_blocks") == 128


def test_a_dry_run_shows_settings_and_plan_and_starts_nothing(sim_model, tmp_path):
    arguments = sim_arguments(sim_model, "--workers", "2", "--dry-run", options=("speedup=2",))
    with TrtserveProcess(*arguments) as shown:
        assert shown.wait() == 0
    assert "workers: 2" in shown.output
    assert '"speedup": 2.0' in shown.output
    assert "agg-1   role agg, engine sim" in shown.output
    config = tmp_path / "shown.yaml"
    config.write_text(shown.output)
    with TrtserveProcess("--config", str(config), "--dry-run") as again:
        assert again.wait() == 0
    assert again.output == shown.output


def test_a_dry_run_takes_no_port_and_no_model(tmp_path):
    with TrtserveProcess(str(tmp_path / "nothing"), "--engine", "sim", "--dry-run") as shown:
        assert shown.wait() == 0


@pytest.mark.parametrize("argument", ["--worker-token=x", "--api_key=y"])
def test_no_secret_on_the_command_line(argument):
    with TrtserveProcess("--engine", "sim", argument) as refused:
        assert refused.wait() == 2
    assert "secrets do not belong on a command line" in refused.output
    assert argument not in refused.output


def test_plugins_are_listed_with_what_they_lack():
    with TrtserveProcess("plugins") as listed:
        assert listed.wait() == 0
    rows = [line.split() for line in listed.output.splitlines()]
    assert ["engine", "sim", "trtserve", "ok"] in rows
    assert {row[0] for row in rows} >= {"engine", "mode", "policy", "launcher"}
