"""The simulated engine as a plugin: made by its hook, checked options, faults where they are aimed."""

import json
import subprocess
import sys
import time
from array import array

import pytest
from pydantic import ValidationError

from trtserve.plugins.api import Engine, EngineConfig, FinishReason, Request, RequestId, SamplingParams
from trtserve.plugins.conformance.engine import CollectingSink
from trtserve.plugins.engines import sim
from trtserve.plugins.engines.sim.options import SimOptions

DEADLINE_S = 10


def config(model_path="", **options) -> EngineConfig:
    return EngineConfig(str(model_path), num_blocks=64, options={"speedup": 1e9, **options})


@pytest.fixture
def start():
    """Starts simulated engines; closed when the test is over."""
    engines = []

    def start_engine(engine_config):
        engine, sink = sim.make_engine("sim", engine_config), CollectingSink()
        engines.append(engine)
        return engine, sink, engine.start(sink)

    yield start_engine
    for engine in engines:
        engine.close()


def request(number=1, prompt=(1, 2, 3), max_tokens=8, **sampling) -> Request:
    return Request(RequestId(number), array("i", prompt), SamplingParams(max_tokens=max_tokens, **sampling))


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=30)


def test_the_hooks_answer_for_their_own_name_only():
    assert isinstance(sim.make_engine("sim", config()), Engine)
    assert sim.make_engine("torch", config()) is None
    assert sim.options_model("engine", "sim") is SimOptions
    assert sim.options_model("engine", "torch") is None
    assert sim.options_model("policy", "sim") is None


def test_needs_no_heavy_library():
    source = """
import sys
from trtserve.plugins.api import EngineConfig
from trtserve.plugins.engines import sim
sim.make_engine("sim", EngineConfig(""))
heavy = {"torch", "numpy", "transformers", "tokenizers"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    result = run_python(source)
    assert result.returncode == 0, result.stderr


def test_every_option_has_bounds_and_a_description():
    for name, field in SimOptions.model_fields.items():
        assert field.description, name
        schema = SimOptions.model_json_schema()["properties"][name]
        assert "minimum" in str(schema) or "exclusiveMinimum" in str(schema) or name in ("fail_start", "fault_kind")


@pytest.mark.parametrize("options", [{"speedup": 0}, {"acceptance_rate": 1.5}, {"fault_kind": "flood"}, {"sped": 1}])
def test_wrong_options_are_refused_before_the_start(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        sim.make_engine("sim", config(**options))


def test_sizes_come_from_the_configuration(start):
    _, _, info = start(EngineConfig("", block_size=32, max_num_seqs=5, max_num_tokens=77, max_seq_len=4096))
    assert (info.block_size, info.num_blocks, info.max_num_seqs) == (32, 2048, 5)
    assert (info.max_num_tokens, info.max_seq_len, info.vocab_size) == (77, 4096, 32000)


@pytest.mark.parametrize("nested", [False, True])
def test_sizes_come_from_the_model_folder(start, tmp_path, nested):
    sizes = {"vocab_size": 5000, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sizes} if nested else sizes))
    engine, sink, info = start(config(tmp_path))
    assert (info.vocab_size, info.max_seq_len) == (5000, 512)
    engine.submit(request(max_tokens=200))
    sink.wait_ended([RequestId(1)], DEADLINE_S)
    said = [token_id for output in sink.outputs_of(RequestId(1)) for token_id in output.token_ids]
    assert all(1000 <= token_id < 5000 for token_id in said)
    assert max(said) > 4000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_len": 1025, "num_blocks": 64}, "max_seq_len is 1025.*1024 tokens of the KV cache"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"options": {"first_token_id": 31990}}, "31990 to 31999"),
        ({"options": {"last_token_id": 32000}}, "vocabulary of 32000"),
        ({"options": {"fail_start": True}}, "fail_start"),
    ],
)
def test_a_start_that_cannot_work_says_why(start, changes, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        start(EngineConfig("", **changes))


def test_a_model_folder_with_a_broken_config_is_told(start, tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list, not a JSON object"):
        start(config(tmp_path))


def test_two_workers_continue_alike(start):
    said = []
    for _ in range(2):
        engine, sink, _ = start(config())
        engine.submit(request(max_tokens=50))
        sink.wait_ended([RequestId(1)], DEADLINE_S)
        said.append([token_id for output in sink.outputs_of(RequestId(1)) for token_id in output.token_ids])
    assert said[0] == said[1]
    engine, sink, _ = start(config())
    engine.submit(request(prompt=(1, 2, 3, *said[0][:20]), max_tokens=30))
    sink.wait_ended([RequestId(1)], DEADLINE_S)
    assert [t for output in sink.outputs_of(RequestId(1)) for t in output.token_ids] == said[0][20:]


def test_speculation_is_counted(start):
    engine, sink, _ = start(config(num_draft_tokens=2, acceptance_rate=1.0))
    engine.submit(request(max_tokens=10))
    sink.wait_ended([RequestId(1)], DEADLINE_S)
    assert [len(output.token_ids) for output in sink.outputs_of(RequestId(1))] == [1, 3, 3, 3]
    assert (engine.stats().drafted_tokens_total, engine.stats().accepted_tokens_total) == (6, 6)


@pytest.mark.parametrize("after", [0, 3])
def test_an_error_hits_only_the_request_it_is_aimed_at(start, after):
    engine, sink, _ = start(config(fault_token_id=13, fault_kind="error", fault_after_tokens=after))
    engine.submit(request(1, (1, 2, 3), max_tokens=50))
    engine.submit(request(2, (1, 13, 3), max_tokens=50))
    sink.wait_ended([RequestId(1), RequestId(2)], DEADLINE_S)
    outputs = sink.outputs_of(RequestId(2))
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert "fault_token_id" in outputs[-1].error
    assert sum(len(output.token_ids) for output in outputs) == after
    assert sink.outputs_of(RequestId(1))[-1].finish_reason is FinishReason.LENGTH
    assert engine.stats().free_blocks == 64


def test_a_target_that_ended_before_its_fault_is_spared(start):
    engine, sink, _ = start(config(fault_token_id=13, fault_kind="error", fault_after_tokens=9))
    for number in (1, 2):
        engine.submit(request(number, (13,), max_tokens=5))
        sink.wait_ended([RequestId(number)], DEADLINE_S)
        assert sink.outputs_of(RequestId(number))[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("options", [{"hang_after_steps": 1}, {"fault_token_id": 2, "fault_kind": "hang"}])
def test_a_hang_lasts_until_close(start, options):
    engine, sink, _ = start(config(**options))
    engine.submit(request(max_tokens=50))
    if "hang_after_steps" in options:
        sink.wait_first_output(RequestId(1), DEADLINE_S)
    assert sink.stays_silent(0.1)
    told = len(sink.steps)
    assert told == options.get("hang_after_steps", 0)
    began_s = time.monotonic()
    engine.close()
    assert time.monotonic() - began_s < 2
    assert len(sink.steps) == told


@pytest.mark.parametrize(
    "options", [{"crash_after_steps": 3}, {"fault_token_id": 2, "fault_after_tokens": 3, "fault_kind": "crash"}]
)
def test_a_crash_ends_the_process_at_once(options):
    source = f"""
from array import array
from trtserve.plugins.api import EngineConfig, Request, SamplingParams
from trtserve.plugins.conformance.engine import CollectingSink
from trtserve.plugins.engines import sim

class Sink(CollectingSink):
    def push(self, step):
        print(len(step.outputs), flush=True)
        super().push(step)

sink = Sink()
engine = sim.make_engine("sim", EngineConfig("", options={{"speedup": 1e9, **{options!r}}}))
engine.start(sink)
engine.submit(Request(1, array("i", [1, 2, 3]), SamplingParams(max_tokens=50)))
sink.wait_ended([1], 20)
"""
    result = run_python(source)
    assert result.returncode == 70, result.stderr
    assert result.stdout == "1\n" * 3


def test_close_interrupts_a_long_pass(start):
    engine, sink, _ = start(config(speedup=1.0, slow_factor=1e6))
    engine.submit(request())
    began_s = time.monotonic()
    engine.close()
    assert time.monotonic() - began_s < 2
    assert not sink.steps


def test_starting_takes_as_long_as_it_is_told(start):
    began_s = time.monotonic()
    _, sink, _ = start(config(start_s=0.1))
    assert time.monotonic() - began_s >= 0.1
    assert sink.phases == ["simulating"]
