"""The server process stays small: the libraries of engines are for workers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.process import ServerProcess

HEAVY = ("torch", "numpy", "transformers", "cupy", "tensorrt_llm", "nixl", "ucp", "gguf")


def test_the_server_maps_none_of_their_libraries(server: ServerProcess):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True}
    assert server.client.post("/v1/chat/completions", json=body).status_code == 200
    maps = Path(f"/proc/{server.pid}/maps").read_text()
    assert "tokenizers" in maps  # this is how a library would look
    assert not re.findall(r"libtorch|libcuda|/(?:numpy|torch|transformers|cupy)/", maps)


def test_its_modules_import_none_of_them():
    code = (
        "import sys, pkgutil, importlib\n"
        "import trtserve.server.app, trtserve.server.cli\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_server_is_small(server: ServerProcess):
    status = Path(f"/proc/{server.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    assert int(found[1]) / 1024 < 150


@pytest.mark.parametrize("command", [["plugins"], ["version"], ["--help"]])
def test_small_commands_import_no_http_server(command):
    code = (
        "import sys\nfrom trtserve.server.cli import main\n"
        f"try:\n    main({command!r})\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('hypercorn', 'tokenizers', 'zmq') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
