"""The private folder: for this user only, kept from being tidied up, removed at the end."""

import fcntl
import os

import pytest

from trtserve.server.runtime_folder import runtime_folder
from trtserve.settings.errors import SettingsError


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_it_is_private_locked_and_removed(place):
    with runtime_folder() as folder:
        assert folder.parent == place and folder.stat().st_mode & 0o777 == 0o700
        (folder / "settings.json").write_text("{}")
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # as systemd-tmpfiles asks before it removes anything
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    assert list(place.iterdir()) == []


def test_nowhere_to_make_it_is_said(place, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(place / "missing"))
    with pytest.raises(SettingsError, match=r"missing.*set TMPDIR"), runtime_folder():
        pass
