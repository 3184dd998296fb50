"""The commands that start nothing, and keys from a file."""

from importlib.metadata import version

import pytest

from trtserve.server.cli import main, read_api_keys
from trtserve.settings.errors import SettingsError
from trtserve.settings.load import load_settings
from trtserve.settings.schema import Settings


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_the_version(capsys, arguments):
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{version('trtserve')}\n"


@pytest.mark.parametrize("command", ["plugins", "profiles", "version"])
def test_commands_without_arguments_take_none(capsys, command):
    assert main([command, "--port=1"]) == 2
    assert f"trtserve: {command} takes no arguments, and --port=1 was given" in capsys.readouterr().err
    assert main([command, "--help"]) == 0
    assert f"trtserve {command}: " in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "-h"]])
def test_help_names_commands_and_the_settings_file(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"trtserve {command}" in text for command in ("worker", "replay", "plugins", "profiles", "version"))
    assert "--config FILE" in text


def keys_of(tmp_path, content):
    (tmp_path / "keys").write_bytes(content)
    return read_api_keys(load_settings(Settings, ["--api-key-file", str(tmp_path / "keys")]))


def test_keys_from_a_file(tmp_path):
    assert keys_of(tmp_path, b"\xef\xbb\xbfone\r\n  # a comment\n\n\t two \n#three\n") == ["one", "two"]


@pytest.mark.parametrize("content", [b"", b"\n  # only a comment\n", b"\xef\xbb\xbf"])
def test_a_file_without_a_key_is_refused(tmp_path, content):
    with pytest.raises(SettingsError, match="holds no key"):
        keys_of(tmp_path, content)


def test_a_key_with_a_comment_behind_it_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"line 2 .* blank"):
        keys_of(tmp_path, b"one\ntwo # ours\n")


def test_a_key_from_the_environment_is_as_it_is_meant(monkeypatch):
    monkeypatch.setenv("TRTSERVE_API_KEY", " one\n")
    assert read_api_keys(load_settings(Settings, [])) == ["one"]
