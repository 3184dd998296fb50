"""Every shipped profile is a whole deployment that its engine accepts: what `--dry-run` says of each."""

from __future__ import annotations

import os

import pytest
import yaml

from trtserve.server.cli import main
from trtserve.settings.catalog import find_profile, profiles
from trtserve.settings.config_file import read_config
from trtserve.settings.errors import SettingsError

# name: GPUs of a worker of each role, and whether the server itself starts it
SHAPES = {
    "agg": {"agg": (1, True)},
    "agg_router": {"agg": (1, True)},
    "disagg": {"prefill": (1, True), "decode": (1, True)},
    "disagg_router": {"prefill": (1, True), "decode": (1, True)},
    "deepseek_r1/agg": {"agg": (4, True)},
    "deepseek_r1/disagg": {"prefill": (4, True), "decode": (4, True)},
    "deepseek_r1/mtp_agg": {"agg": (4, True)},
    "deepseek_r1/mtp_disagg": {"prefill": (4, True), "decode": (4, True)},
    "deepseek_r1/wide_ep_agg": {"agg": (16, False)},
    "deepseek_r1/wide_ep_disagg": {"prefill": (16, False), "decode": (16, False)},
    "deepseek_r1/multinode": {"agg": (16, False)},
    "deepseek_r1/gb200_disagg": {"prefill": (4, False), "decode": (8, False)},
    "deepseek_r1/gb200_wide_ep_disagg": {"prefill": (4, False), "decode": (32, False)},
    "deepseek_r1/h200_mtp_agg": {"agg": (8, True)},
    "llama4/eagle/agg": {"agg": (4, True)},
    "llama4/eagle/disagg": {"prefill": (4, True), "decode": (4, True)},
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in os.environ:
        if name.upper().startswith(("TRTSERVE_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)


def dry_run(capsys, *flags):
    assert main([*flags, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_every_profile_is_named_here():
    assert {profile.name for profile in profiles()} == SHAPES.keys()


@pytest.mark.parametrize(("name", "shape"), SHAPES.items(), ids=SHAPES)
def test_a_profile_starts_as_it_is(capsys, name, shape):
    text = dry_run(capsys, "--config", name)
    for role, (gpus, is_started) in shape.items():
        assert f"# tensorrt_llm of a worker with role {role}: {gpus} GPU" in text
        assert (f"#   {role}-0   role {role}, engine tensorrt_llm" in text) is is_started
    assert yaml.safe_load(text)["block_size"] == 32


@pytest.mark.parametrize("name", SHAPES)
def test_a_profile_is_in_the_names_of_1_2(capsys, name):
    text = dry_run(capsys, "--config", name)
    assert " now" not in text and "is left out" not in text and "not in every TensorRT-LLM" not in text


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if "decode" in shape])
def test_disaggregated_profiles_have_room_for_their_prompts(capsys, name):
    prefill, decode = dry_run(capsys, "--config", name).split("# tensorrt_llm of a worker with role ")[1:]
    assert "#   disable_overlap_scheduler: true" in prefill
    assert "#   disable_overlap_scheduler: true" not in decode
    assert '"backend": ' in prefill and '"kv_transfer_timeout_ms": ' in decode


def test_flags_come_before_a_profile(capsys):
    text = dry_run(capsys, "other/model", "--config", "deepseek_r1/agg", "--workers", "2", "--max-num-tokens", "9000")
    assert '#   model: "other/model"' in text and "#   max_num_tokens: 9000" in text
    assert "#   agg-1   role agg, engine tensorrt_llm, on GPUs 4,5,6,7" in text


def test_a_file_of_ones_own_comes_before_a_profile_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agg").write_text("port: 1234")
    assert read_config("agg") == {"port": 1234}
    assert read_config("agg.yaml")["engine"] == "tensorrt_llm"


def test_a_name_that_is_neither_says_what_may_be_meant():
    with pytest.raises(SettingsError, match=r"deepseek/agg: No such file.*`trtserve profiles`.*deepseek_r1/agg"):
        read_config("deepseek/agg")


def test_profiles_are_listed_with_a_line_each(capsys):
    assert main(["profiles"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SHAPES)
    multinode = find_profile("deepseek_r1/multinode")
    assert multinode is not None and any(multinode.name in line and multinode.summary in line for line in lines)
