"""Every way of not starting: its exit code, and a text that says what to do."""

from __future__ import annotations

import socket

import pytest

from tests.e2e.process import ServerProcess, TrtserveProcess, eventually, sim_arguments
from trtserve.plugins.manager import PluginManager


def run_to_its_end(*arguments: str) -> tuple[int, str]:
    with TrtserveProcess(*arguments) as process:
        return process.wait(), process.output


def test_a_port_in_use(sim_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = run_to_its_end(*sim_arguments(sim_model, "--port", str(port)))
    assert code == 5
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in output


def test_two_servers_that_start_at_once_do_not_share_a_port(sim_model, unused_port):
    arguments = sim_arguments(sim_model, "--port", str(unused_port), options=("start_s=2",))
    with TrtserveProcess(*arguments) as one, TrtserveProcess(*arguments) as two:
        ended = next_to_end(one, two)
        assert ended.wait() == 5
        assert "Address already in use" in ended.output
        other = two if ended is one else one
        other.until_output("ready at")


def next_to_end(*processes: TrtserveProcess) -> TrtserveProcess:
    return eventually(lambda: next((process for process in processes if not process.is_running), None), "an end")


def test_a_host_that_is_nowhere(sim_model):
    code, output = run_to_its_end(*sim_arguments(sim_model, "--host", "no.such.host.invalid"))
    assert code == 5
    assert "cannot listen on no.such.host.invalid" in output


def test_a_worker_endpoint_in_use(sim_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        code, output = run_to_its_end(*sim_arguments(sim_model, "--port", "0", "--worker-endpoint", endpoint))
    assert code == 5
    assert endpoint in output and "Address already in use" in output


def test_all_bad_settings_at_once(sim_model):
    code, output = run_to_its_end(
        *sim_arguments(sim_model, "--port", "70000", "--workers", "-1", "--kv-cache-gib", "1", "--log-level", "loud")
    )
    assert code == 2
    assert "3 bad settings" in output
    for line in ("port: ", "workers: ", "log-level: "):
        assert f"  {line}" in output
    assert "70000" in output


@pytest.mark.skipif(PluginManager().problem("engine", "tensorrt_llm") is None, reason="TensorRT-LLM is there")
def test_an_engine_that_is_not_installed(sim_model):
    code, output = run_to_its_end(str(sim_model), "--engine", "tensorrt_llm")
    assert code == 2
    assert "the tensorrt_llm engine needs tensorrt_llm where its workers run" in output


@pytest.mark.skipif(PluginManager().problem("transfer", "cupy_ipc") is None, reason="CuPy and a GPU are there")
def test_what_this_machine_cannot_do(sim_model):
    code, output = run_to_its_end(*sim_arguments(sim_model, "--mode", "disagg", "--transfer", "cupy_ipc"))
    assert code == 2
    assert "transfer cupy_ipc needs" in output


def test_what_nobody_has(sim_model):
    code, output = run_to_its_end(*sim_arguments(sim_model, "--router", "psychic", "--mode", "depressed"))
    assert code == 2
    assert "there is no policy 'psychic'; there are: kv, kv_arrival, least_loaded, random, round_robin" in output
    assert "there is no mode 'depressed'; there are: agg, disagg" in output


def test_no_workers_and_no_token_for_others(sim_model):
    code, output = run_to_its_end(*sim_arguments(sim_model, "--workers", "0"))
    assert code == 2
    assert "--workers 0: " in output and "TRTSERVE_WORKER_TOKEN" in output


def test_no_model_folder():
    code, output = run_to_its_end(*sim_arguments("nowhere", "--port", "0"))
    assert code == 3
    assert "MODEL 'nowhere' is no folder here, no hub id (owner/name)" in output


def test_a_model_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, output = run_to_its_end(*sim_arguments(tmp_path, "--port", "0"))
    assert code == 3
    assert "has no tokenizer.json" in output


def test_a_chat_template_that_cannot_be_read(sim_model, tmp_path):
    path = tmp_path / "none.jinja"
    code, output = run_to_its_end(*sim_arguments(sim_model, "--port", "0", "--chat-template", str(path)))
    assert code == 3
    assert f"--chat-template {path} cannot be read" in output


def test_a_worker_that_does_not_start_shows_its_last_lines(sim_model):
    with ServerProcess(*sim_arguments(sim_model, options=("fail_start=true",))) as server:
        assert server.wait() == 4
        assert "trtserve: worker agg-0 did not start: RuntimeError: The simulated engine was told" in server.output
        assert "  | Traceback" in server.output


def test_bad_engine_options_by_their_path(sim_model):
    code, output = run_to_its_end(*sim_arguments(sim_model, options=("speedup=0", "no_such=1")))
    assert code == 2
    assert "engine-options.speedup: " in output
    assert "engine-options.no_such: " in output


def test_a_flag_that_does_not_exist():
    code, output = run_to_its_end("--no-such-flag")
    assert code == 2
    assert "--no-such-flag" in output
