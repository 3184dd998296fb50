"""The OpenAI client, of both major versions that people have installed, against the server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.e2e.process import ServerProcess

SCRIPT = Path(__file__).with_name("openai_script.py")
OLDER = Path(sys.prefix) / "openai-2"


@pytest.mark.parametrize("major", [2, 3])
def test_the_client_finds_nothing_to_complain_of(server: ServerProcess, major: int):
    environment = dict(os.environ)
    if major == 2:
        assert OLDER.is_dir(), f"openai 2 is missing; `make` installs it: pip install --target {OLDER} 'openai<3'"
        environment["PYTHONPATH"] = str(OLDER)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", SCRIPT, server.url, "sim"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{major}.")
    server.until_idle(64)


@pytest.fixture(scope="module")
def torch_server(default_model: Path):
    """The default model on the embedded engine, as `make serve` has it."""
    arguments = (str(default_model), "--served-model-name", "default", "--max-seq-len", "512", "--kv-cache-gib", "0.1")
    with ServerProcess(*arguments, environment={"OMP_NUM_THREADS": "1"}) as server:
        server.until_output("curl -N", timeout_s=120)
        yield server.until_ready()


@pytest.mark.timeout(180)
def test_a_real_model_answers(torch_server: ServerProcess):
    """Greedy, so the same every time."""
    asked = {
        "model": "default",
        "messages": [{"role": "user", "content": "Name the capital of France."}],
        "temperature": 0,
        "max_tokens": 16,
    }
    with openai.OpenAI(
        base_url=f"{torch_server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        answer = client.chat.completions.create(**asked)
        assert "Paris" in answer.choices[0].message.content
        chunks = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
