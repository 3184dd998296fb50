"""Flags, variables and files become settings, or one error that names all that is wrong."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtserve.settings.errors import SettingsError
from trtserve.settings.names import ALIASES, OPTION_ALIASES, normalise
from trtserve.settings.schema import Settings, WorkerSettings

FIELDS = {
    "port": st.integers(0, 65_535),
    "max_num_seqs": st.integers(1, 65_536),
    "request_timeout": st.floats(0.5, 1000).map(lambda value: round(value, 3)),
    "served_model_name": st.text("abcXYZ019._-", min_size=1, max_size=20).filter(lambda name: not name.startswith("-")),
    "dtype": st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
}


def layer():
    return st.fixed_dictionaries({}, optional=FIELDS)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flags=layer(), variables=layer(), file=layer(), spelling=st.data())
def test_flags_win_over_variables_over_file_over_defaults(load, flags, variables, file, spelling):
    def spelt(name):
        return spelling.draw(st.sampled_from([name, name.replace("_", "-")]))

    loaded = load(
        *(f"--{spelt(name)}={value}" for name, value in flags.items()),
        variables={name.upper(): value for name, value in variables.items()},
        file={spelt(name): value for name, value in file.items()},
    )
    for name in FIELDS:
        default = Settings.model_fields[name].default
        assert getattr(loaded, name) == {name: default, **file, **variables, **flags}[name]


def test_model_is_the_one_positional_argument(load):
    assert load("one/model").model == "one/model"
    assert load("one", variables={"MODEL": "two"}, file={"model": "three"}).model == "one"
    assert load(variables={"MODEL": "two"}, file={"model": "three"}).model == "two"


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_names_of_other_servers_are_understood(alias, name):
    assert normalise([f"--{alias}=7"]) == normalise([f"--{alias.replace('-', '_')}=7"]) == [f"--{name}=7"]


@pytest.mark.parametrize(("alias", "option"), OPTION_ALIASES.items())
def test_flags_of_trtllm_serve_that_are_engine_options(alias, option):
    spelt = f"--{alias.replace('-', '_')}"
    wanted = [f"--engine-options={option}=4", "--port", "1"]
    assert normalise([f"{spelt}=4", "--port", "1"]) == normalise([spelt, "4", "--port", "1"]) == wanted


def test_aliases_hold_in_files_too(load):
    assert load(file={"max_model_len": 512, "backend": "sim"}).max_seq_len == 512


def test_what_follows_two_dashes_is_left_alone():
    assert normalise(["--max_model_len", "5", "--", "--a_b"]) == ["--max-seq-len", "5", "--", "--a_b"]


def test_options_of_plugins_come_from_all_layers(load):
    loaded = load(
        "--engine-options", "a=1", "--engine-options", "b=two",
        variables={"ENGINE_OPTIONS__B": "2", "ENGINE_OPTIONS__C": "3"},
        file={"engine_options": {"c": 0, "d": 4}},
    )  # fmt: skip
    assert loaded.engine_options == {"a": "1", "b": "two", "c": "3", "d": 4}


def test_every_bad_field_is_named_at_once(load):
    with pytest.raises(SettingsError) as caught:
        load(
            "--port=99999", "--max-model-len", "0x",
            variables={"WORKERS": "many", "BOGUS": "1"},
            file={"block-size": -1, "colour": "red", "dtype": "float8"},
        )  # fmt: skip
    lines = str(caught.value).splitlines()
    assert lines[0] == "7 bad settings:"
    starts = ("port:", "max-seq-len:", "workers:", "block-size:", "colour:", "dtype:", "TRTSERVE_BOGUS:")
    for start in starts:
        assert any(line.strip().startswith(start) for line in lines), start
    assert "(got '99999')" in str(caught.value) and "65535" in str(caught.value)
    assert "settings.yaml" in next(line for line in lines if "colour" in line)


@pytest.mark.parametrize("name", ["BOGUS", "MAX_MODEL_LENGTH", "PORTS", "ENGINE_OPTION__A", "_PORT"])
def test_a_misspelt_variable_is_refused(load, name):
    with pytest.raises(SettingsError, match=f"TRTSERVE_{name}: no such setting"):
        load(variables={name: "1"})


@pytest.mark.parametrize("name", ["PORT__FOO", "MODEL__", "API_KEY__X"])
def test_a_variable_below_a_setting_that_has_nothing_below_is_refused(load, name):
    with pytest.raises(SettingsError, match=f"TRTSERVE_{name}: no such setting"):
        load(variables={name: "1"})


MAPPINGS = [
    ("ENGINE_OPTIONS", "engine-options"),
    ("PREFILL", "prefill"),
    ("DECODE__ENGINE_OPTIONS", "decode.engine-opt"),
]


@pytest.mark.parametrize("value", ["abc", '{"a":', "[1]", ""])
@pytest.mark.parametrize(("name", "path"), MAPPINGS)
def test_a_mapping_that_is_none_is_named_with_all_else(load, name, path, value):
    with pytest.raises(SettingsError) as caught:
        load(variables={name: value, "PORT": "x"})
    assert str(caught.value).startswith("2 bad settings:")
    assert f"  {path}" in str(caught.value) and repr(value) in str(caught.value).replace("[1]", "'[1]'")


@pytest.mark.parametrize("value", ["abc", '{"a":', "a=1,b"])
@pytest.mark.parametrize("path", ["engine-options", "router-options", "prefill", "decode.engine-options"])
def test_so_is_a_flag_that_is_no_mapping(load, path, value):
    with pytest.raises(SettingsError) as caught:
        load(f"--{path}", value, "--port=x")
    assert str(caught.value).startswith("2 bad settings:")
    assert f"  {path}: " in str(caught.value) and value in str(caught.value)


@pytest.mark.parametrize("flags", [["--tp-size"], ["--tp-size", "--port=3"], ["--ep_size="]])
def test_a_flag_of_trtllm_serve_needs_its_value(flags):
    with pytest.raises(SettingsError, match=r"--[te]p-size: needs a value"):
        normalise(flags)


@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize("name", ["API_KEY", "WORKER_TOKEN"])
def test_a_secret_that_is_empty_is_refused(load, name, value):
    """An empty key would ask for one and open to `Authorization: Bearer`."""
    with pytest.raises(SettingsError, match=f"{name.lower().replace('_', '-')}: .*empty"):
        load(variables={name: value})


@pytest.mark.parametrize("name", ["CONFIG", "TEST_ANYTHING", "CONNECT", "WORKER_ID", "ENGINE_OPTIONS__DEEP__ER"])
def test_a_variable_of_the_project_is_not_refused(load, name, tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert load(variables={name: tmp_path / "empty.yaml"}).port == 8000


def test_the_file_may_be_named_by_a_variable_and_the_flag_wins(load, tmp_path):
    (tmp_path / "other.yaml").write_text("port: 1")
    assert load(variables={"CONFIG": tmp_path / "other.yaml"}).port == 1
    assert load(variables={"CONFIG": tmp_path / "other.yaml"}, file={"port": 2}).port == 2


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("- a\n- b\n", "must hold a mapping of settings, not a list"),
        ("a: [", "not YAML"),
        ("max_seq_len: 10\nmax-model-len: 20\n", "max-model-len sets max-seq-len, which it has set before"),
        ("port: 1\n7: 2\n", "7: no such setting"),
    ],
)
def test_a_bad_file_is_explained(load, content, complaint):
    with pytest.raises(SettingsError, match=complaint):
        load(file=content)


def test_a_file_that_is_not_there_or_not_named(load):
    with pytest.raises(SettingsError, match="No such file"):
        load("--config=/nowhere/at/all.yaml")
    with pytest.raises(SettingsError, match="needs the path"):
        load("--config")


@pytest.mark.parametrize("flag", ["--api-key", "--api_key=s3cret", "--worker-token=s3cret", "--worker_token"])
def test_secrets_do_not_belong_on_a_command_line(load, flag):
    with pytest.raises(SettingsError, match="secrets do not belong") as caught:
        load(flag, "s3cret")
    assert "s3cret" not in str(caught.value)


def test_flags_are_not_guessed_from_their_beginning(load, capsys):
    with pytest.raises(SystemExit) as caught:
        load("--api-ke=s3cret")
    assert caught.value.code == 2
    assert "unrecognized" in capsys.readouterr().err


def test_secrets_are_never_shown(load):
    loaded = load(variables={"API_KEY": "s3cret", "WORKER_TOKEN": "t0ken"})
    assert loaded.api_key.get_secret_value() == "s3cret"
    shown = f"{loaded!r} {loaded} {loaded.model_dump_json()} {loaded.model_dump(mode='json')}"
    assert "s3cret" not in shown and "t0ken" not in shown


@pytest.mark.parametrize("value", [12345678, ["12345678"], {"key": "12345678"}])
def test_a_secret_of_the_wrong_type_is_not_shown_either(load, value):
    with pytest.raises(SettingsError, match="api-key: Input should be a valid string") as caught:
        load(file={"api_key": value})
    assert "12345678" not in str(caught.value)


def test_two_sizes_for_one_cache_are_refused(load):
    with pytest.raises(SettingsError, match="give one of them"):
        load("--num-blocks=3", variables={"KV_CACHE_GIB": "1"})


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(load, value):
    with pytest.raises(SettingsError, match="kv-cache-gib"):
        load(f"--kv-cache-gib={value}")


def test_a_worker_needs_to_know_where_it_belongs(load):
    with pytest.raises(SettingsError) as caught:
        load(model=WorkerSettings)
    assert "connect: is required" in str(caught.value) and "worker-id: is required" in str(caught.value)
    worker = load("--connect=tcp://a:1", "--worker-id=agg-7", "--port=5", model=WorkerSettings)
    assert (worker.worker_id, worker.role, worker.port) == ("agg-7", "agg", 5)


def test_settings_do_not_change(load):
    with pytest.raises(ValueError, match="frozen"):
        load().port = 1


def test_every_setting_tells_what_it_means():
    for name, field in WorkerSettings.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize(
    ("variable", "transfer"), [("TRTLLM_USE_UCX_KVCACHE", "ucx"), ("TRTLLM_USE_NIXL_KVCACHE", "nixl")]
)
def test_tensorrt_llms_own_variables_choose_the_transfer(load, monkeypatch, variable, transfer):
    monkeypatch.setenv(variable, "0")
    assert load().transfer == "auto"
    monkeypatch.setenv(variable, "1")
    assert load().transfer == transfer
    assert load("--transfer", "shm").transfer == "shm"
    monkeypatch.setenv("TRTSERVE_TRANSFER", "auto")
    assert load().transfer == "auto"


def test_two_transfers_at_once_are_an_error(load, monkeypatch):
    monkeypatch.setenv("TRTLLM_USE_UCX_KVCACHE", "1")
    monkeypatch.setenv("TRTLLM_USE_NIXL_KVCACHE", "1")
    with pytest.raises(SettingsError, match="TRTLLM_USE_UCX_KVCACHE and TRTLLM_USE_NIXL_KVCACHE are both 1"):
        load()
