"""The same engine on one CUDA device: families against transformers there, chunked, cached, preempted, and in bfloat16.

Without a device these are skipped; where one is promised (TRTSERVE_TEST_EXPECT_GPU=1) its absence is a failure.
"""

from __future__ import annotations

import copy
import os
import random
from array import array

import pytest
import torch

from tests.plugins.engines.torch.test_families import FAMILIES, NEW_TOKENS, prompts
from trtserve.plugins.api import EngineConfig, KVRows
from trtserve.plugins.conformance.case import EngineCase
from trtserve.plugins.conformance.engine_kv import *  # noqa: F403
from trtserve.plugins.conformance.engine_kv import KVEngineCase
from trtserve.plugins.driver import Driver
from trtserve.plugins.engines.torch.engine import TorchEngine
from trtserve.plugins.engines.torch.model import load_model, prepare_model
from trtserve.plugins.engines.torch.options import TorchOptions

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda():
    if not torch.cuda.is_available():
        assert not os.environ.get("TRTSERVE_TEST_EXPECT_GPU"), "a GPU was promised and torch finds none"
        pytest.skip("no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")


@pytest.fixture(params=FAMILIES)
def original(request, tiny_module, cuda):
    config_class, config = FAMILIES[request.param]
    return tiny_module(config_class, **config).to(cuda)


def generate_there(module, prompt, num_tokens):
    ids = torch.tensor([prompt], device="cuda")
    out = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return out[0][len(prompt) :].tolist()


def test_family_gives_the_tokens_of_generate(original, cuda, runner_of):
    model = prepare_model(copy.deepcopy(original), torch.float32, cuda, TorchOptions())
    wanted = [generate_there(original, prompt, NEW_TOKENS) for prompt in prompts()]
    runner = runner_of(model, device="cuda", max_num_tokens=11, max_num_seqs=11)
    first = runner.generate(prompts(), max_tokens=NEW_TOKENS)
    again = runner.generate(prompts(), max_tokens=NEW_TOKENS)
    assert [answer.tokens for answer in first] == wanted
    assert [answer.tokens for answer in again] == wanted
    assert again[-1].cached_tokens == 64


def test_preemption_changes_no_token(tiny_module, cuda, runner_of):
    original = tiny_module("LlamaConfig").to(cuda)
    model = prepare_model(copy.deepcopy(original), torch.float32, cuda, TorchOptions())
    chance = random.Random(5)
    many = [[chance.randrange(3, 320) for _ in range(length)] for length in range(3, 60, 4)]
    wanted = [generate_there(original, prompt, 20) for prompt in many]
    runner = runner_of(model, device="cuda", num_blocks=18, block_size=8)
    assert [answer.tokens for answer in runner.generate(many, max_tokens=20)] == wanted
    assert runner.engine.stats().preemptions_total > 0


def test_sampling_repeats_and_frees_everything(tiny_module, cuda, runner_of):
    model = prepare_model(tiny_module("LlamaConfig"), torch.float32, torch.device("cpu"), TorchOptions())
    on_device = prepare_model(tiny_module("LlamaConfig").to(cuda), torch.float32, cuda, TorchOptions())
    sampling = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 7, "logprobs": 3, "presence_penalty": 0.5}
    runner = runner_of(on_device, device="cuda")
    first = runner.generate(prompts(), **sampling)
    again = runner.generate(prompts(), **sampling)
    host = runner_of(model).generate(prompts(), **sampling)
    assert [a.tokens for a in first] == [a.tokens for a in again] == [a.tokens for a in host]
    load = runner.engine.stats()
    assert (load.running, load.waiting, load.free_blocks) == (0, 0, 256)


def test_a_folder_in_bfloat16(tiny_llama_folder, cuda, runner_of):
    exact = load_model(str(tiny_llama_folder), torch.float32, cuda, TorchOptions())
    rounded = load_model(str(tiny_llama_folder), torch.bfloat16, cuda, TorchOptions())
    wanted = runner_of(exact, device="cuda").generate(prompts(), max_tokens=1, logprobs=20)
    given = runner_of(rounded, device="cuda", dtype="bfloat16").generate(prompts(), max_tokens=1, logprobs=20)
    for a, b in zip(wanted, given, strict=True):
        values = dict(b.logprobs[0].top)
        errors = [abs(value - values[token]) for token, value in a.logprobs[0].top[:5] if token in values]
        assert errors and sum(errors) / len(errors) < 0.2


def device_rows(layout, num_rows):
    memory = torch.zeros(num_rows, layout.block_bytes, dtype=torch.uint8, device=layout.device)
    return KVRows(memory.data_ptr(), num_rows, layout.block_bytes, layout.device, memory)


def test_blocks_move_between_device_and_host(tiny_module, tiny_llama_folder, cuda, runner_of):
    there = runner_of(
        prepare_model(tiny_module("LlamaConfig").to(cuda), torch.float32, cuda, TorchOptions()),
        tiny_llama_folder,
        device="cuda",
    )
    here = runner_of(
        prepare_model(tiny_module("LlamaConfig"), torch.float32, torch.device("cpu"), TorchOptions()),
        tiny_llama_folder,
    )
    prompt = prompts()[-1]
    (wanted,) = there.generate([prompt], max_tokens=NEW_TOKENS)
    (from_there, to_here), tokens = (
        (device_rows(runner.engine.kv_layout(), 6) for runner in (there, here)),
        array("i", prompt),
    )
    there.engine.attach_rows(from_there)
    here.engine.attach_rows(to_here)
    assert there.engine.read_kv(tokens, "", 0, [5, 1, 0, 3]) == 4
    to_here.owner.copy_(from_there.owner)
    assert here.engine.write_kv(tokens, "", 0, [5, 1, 0, 3]) == 4
    (given,) = here.generate([prompt], max_tokens=NEW_TOKENS)
    assert given.tokens == wanted.tokens and given.cached_tokens == 64


@pytest.fixture
def kv_engine_under_test(tiny_llama_folder, cuda):
    config = EngineConfig(
        str(tiny_llama_folder), dtype="float32", device="cuda", num_blocks=64, max_num_seqs=4, max_num_tokens=64
    )
    case = EngineCase(lambda changed: Driver(TorchEngine(changed)), config, vocab_size=320, eos_token_ids=(2,))
    return KVEngineCase(case, device_rows)
