"""What is packaged is what is there, and the server process stays light."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("server", "plugins", "settings")


def test_the_list_of_packages_is_the_tree():
    there = {
        "trtserve." + str(init.parent.relative_to(ROOT)).replace(os.sep, ".")
        for folder in FOLDERS
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == there


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_is_in_a_package(folder):
    for module in (ROOT / folder).rglob("*.py"):
        assert (module.parent / "__init__.py").exists(), module


def test_import_names_lead_to_the_folders():
    directories = PROJECT["tool"]["setuptools"]["package-dir"]
    assert directories == {f"trtserve.{folder}": folder for folder in FOLDERS}
    for folder in FOLDERS:
        assert Path(import_module(f"trtserve.{folder}").__file__).parent == ROOT / folder


def test_type_checkers_see_the_same_tree():
    links = {path.name: path for path in (ROOT / "typings" / "trtserve").iterdir()}
    assert set(links) == set(FOLDERS)
    for folder, link in links.items():
        assert link.is_symlink() and not Path(os.readlink(link)).is_absolute()
        assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_types_are_shipped(folder):
    assert (ROOT / folder / "py.typed").exists()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][f"trtserve.{folder}"]


def test_every_profile_is_shipped():
    (pattern,) = (name for name in PROJECT["tool"]["setuptools"]["package-data"]["trtserve.settings"] if "*" in name)
    settings = ROOT / "settings"
    there = set(settings.rglob("*.yaml"))
    assert there and set(settings.glob(pattern)) == there


def test_a_wheel_is_made_without_a_warning_and_holds_what_is_there(tmp_path):
    source, made = tmp_path / "source", tmp_path / "made"
    made.mkdir()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    program = f"from setuptools import build_meta; print(build_meta.build_wheel({str(made)!r}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=source, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (path for folder in FOLDERS for path in (source / folder).rglob("*") if path.is_file())
    assert names == {f"trtserve/{path.relative_to(source)}" for path in files}


def test_the_installed_version_is_the_projects():
    assert version("trtserve") == PROJECT["project"]["version"]


def test_the_command_is_there():
    (command,) = entry_points(group="console_scripts", name="trtserve")
    assert callable(command.load())


def test_every_plugin_that_is_promised_loads():
    promised = PROJECT["project"]["entry-points"]["trtserve"]
    for name, module in promised.items():
        plugin = import_module(module)
        kind = name.partition(".")[0]
        assert hasattr(plugin, f"make_{kind}"), name
    installed = {point.name for point in entry_points(group="trtserve") if point.dist and point.dist.name == "trtserve"}
    assert installed == set(promised), "install the project again: its entry points have changed"


HEAVY = ("torch", "transformers", "numpy", "tensorrt_llm", "cupy", "nixl", "gguf")


@pytest.mark.parametrize("module", ["trtserve.server.app", "trtserve.server.workers.main", "trtserve.plugins.api"])
def test_nothing_heavy_is_imported(module):
    """At run time, beside the import contracts: other libraries might bring one of these along."""
    program = f"import sys, {module}\nprint(*sorted(set(sys.modules) & set({HEAVY})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_no_folder_is_called_what_tells_nothing():
    for folder in FOLDERS:
        names = {path.stem for path in (ROOT / folder).rglob("*.py")}
        assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


def test_the_images_have_what_they_copy_and_run_without_rights():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert set(FOLDERS) < set(copied) and all((ROOT / name).exists() for name in copied)
    stages = "\n".join(lines).split("\nFROM ")[1:]
    users = [re.findall(r"^USER (\d+)$", stage, re.MULTILINE) for stage in stages]
    assert [len(found) for found in users] == [1, 1] and all(int(found[0]) > 0 for found in users)
    (pinned,) = re.findall(r"torch==([\d.]+)\+cpu", "\n".join(lines))
    assert f"torch=={pinned}" in PROJECT["project"]["optional-dependencies"]["embedded"]
