import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from trtserve.server.model import hub
from trtserve.server.model.errors import ModelError
from trtserve.server.model.progress import silent
from trtserve.server.model.resolve import DEFAULT_MODEL, default_cache_dir, resolve_model


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_local_folder_is_itself(folder, monkeypatch):
    model = resolve_model(str(folder))
    assert (model.path, model.name) == (folder, "my-model")
    monkeypatch.chdir(folder.parent)
    assert resolve_model("my-model") == model
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/my-model") == model


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_folder_without_what_is_needed_is_refused(folder, file):
    (folder / file).unlink()
    with pytest.raises(ModelError, match=rf"my-model has no {file} .*give a whole Hugging Face model folder"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", '{"vocab_size": "many"}'), ("config.json", "{"), ("generation_config.json", '{"top_k": "x"}')],
)
def test_a_folder_whose_files_make_no_sense_is_refused_before_anything_is_started(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match=file):
        resolve_model(str(folder))


def test_a_file_is_refused(folder):
    with pytest.raises(ModelError, match="is a file; give the folder"):
        resolve_model(str(folder / "config.json"))


@pytest.mark.parametrize("name", ["", "smollm", "/no/such/folder", "a/b/c", "../x y"])
def test_what_is_no_model_says_what_would_be(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "..")
    if name:
        with pytest.raises(ModelError, match=rf"no hub id \(owner/name\) and not {DEFAULT_MODEL}"):
            resolve_model(name)
    else:
        with pytest.raises(ModelError):
            resolve_model(name)


def test_a_hub_id_is_fetched_with_what_serving_needs(folder, monkeypatch):
    calls = []

    def snapshot_download(repository, allow_patterns, ignore_patterns):
        calls.append((repository, allow_patterns))
        assert "original/*" in ignore_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = resolve_model("owner/name")
    assert (model.path, model.name) == (folder, "owner/name")
    ((repository, patterns),) = calls
    assert repository == "owner/name"
    assert {"*.safetensors", "*.json", "*.jinja"} < set(patterns)


def test_without_a_way_to_the_hub_a_local_folder_is_asked_for(tmp_path):
    script = "from trtserve.server.model.resolve import resolve_model; resolve_model('trtserve-tests/nothing-like-it')"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "ModelError: trtserve-tests/nothing-like-it cannot be fetched" in done.stderr
    assert "give its path as MODEL" in done.stderr


def test_whatever_the_hub_library_raises_becomes_ours(monkeypatch):
    def snapshot_download(repository, **patterns):
        raise RuntimeError("client gone")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match="RuntimeError: client gone"):
        hub.download("owner/name", silent)


def test_the_cache_is_where_xdg_says(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert default_cache_dir() == Path("/var/x/trtserve")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache_dir() == Path("/home/me/.cache/trtserve")


@pytest.mark.parametrize("name", [DEFAULT_MODEL, "~/model", "~nobody-of-that-name/model"])
def test_a_user_without_a_home_is_told_what_to_do(name, monkeypatch):
    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # as in a container with --user
    with pytest.raises(ModelError, match="no home folder"):
        resolve_model(name)


def test_the_default_model_needs_no_network_once_it_is_there(default_model, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    model = resolve_model(DEFAULT_MODEL)
    assert (model.path, model.name) == (default_model, DEFAULT_MODEL)
    assert model.config().vocab_size == 49152
    assert model.generation_defaults().eos_token_ids == (2,)


def test_nothing_heavy_is_imported_by_the_server(default_model):
    script = (
        "import sys\n"
        "from trtserve.server.model.resolve import resolve_model\n"
        "from trtserve.server.text.text_stream import TextStream\n"
        "from trtserve.server.text.tokenizer import load_tokenizer\n"
        "from trtserve.server.text.chat_template import load_chat_template\n"
        "folder = resolve_model(sys.argv[1])\n"
        "load_tokenizer(folder); load_chat_template(folder).render([{'role': 'user', 'content': 'Hi'}])\n"
        "print({'torch', 'transformers', 'numpy', 'gguf', 'safetensors', 'huggingface_hub'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", script, str(default_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "set()"
