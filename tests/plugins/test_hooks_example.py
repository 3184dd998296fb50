"""The engine that docs/plugins.md shows is installed as somebody else's distribution, and works as it is printed."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.e2e.process import ServerProcess, TrtserveProcess
from tests.models import make_tiny_model

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = (ROOT / "docs" / "plugins.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def distribution(tmp_path_factory):
    """A folder for PYTHONPATH with the module and what an installer would write about it."""
    folder = tmp_path_factory.mktemp("site")
    engine, suite = blocks("python")
    (project,) = (tomllib.loads(block) for block in blocks("toml"))
    (name,) = project["tool"]["setuptools"]["py-modules"]
    (folder / f"{name}.py").write_text(engine)
    (folder / "test_conformance.py").write_text(suite)
    information = project["project"]
    info = folder / f"{information['name'].replace('-', '_')}-{information['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {information['name']}\nVersion: {information['version']}\n"
    )
    points = information["entry-points"]["trtserve"]
    lines = [f"{point} = {module}" for point, module in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[trtserve]", *lines, ""]))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def test_it_is_about_as_long_as_promised():
    engine = blocks("python")[0]
    code = [line for line in engine.splitlines() if line.strip() and not line.startswith(("import ", "from ", '"""'))]
    assert len(code) <= 80


def test_it_is_listed(distribution):
    with TrtserveProcess("plugins", environment={"PYTHONPATH": str(distribution)}) as process:
        assert process.wait() == 0
        assert re.search(r"^engine +echo +echo-engine +ok$", process.output, re.MULTILINE)


def test_it_answers_through_http(distribution, model):
    flags = (model, "--engine=echo", "--engine-option", "pause_s=0.001")
    with ServerProcess(*flags, environment={"PYTHONPATH": str(distribution)}) as server:
        server.until_ready()
        body = {"prompt": "say it again", "max_tokens": 12, "temperature": 0}
        answer = server.client.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == "say it again"
        assert answer["usage"]["completion_tokens"] == 12
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "stream": True}
        with server.client.stream("POST", "/v1/chat/completions", json=chat) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert stream.status_code == 200 and lines[-1] == "data: [DONE]"


def test_its_options_are_checked(distribution, model):
    flags = (model, "--engine=echo", "--engine-option", "pause_s=-1")
    with TrtserveProcess(*flags, environment={"PYTHONPATH": str(distribution)}) as process:
        assert process.wait() == 2
        assert "engine-options.pause_s" in process.output


def test_it_passes_the_conformance_suite_as_printed(distribution):
    environment = {**os.environ, "PYTHONPATH": str(distribution)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(distribution)]
    done = subprocess.run(
        [*command, str(distribution)], capture_output=True, text=True, timeout=50, cwd=distribution, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 18
