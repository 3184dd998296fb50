"""Engines to test: small random models, and the default model in float32 with what transformers says of it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trtserve.plugins.api import (
    EngineConfig,
    KVEvent,
    Output,
    Request,
    RequestId,
    SamplingParams,
    StepOutputs,
    TokenIds,
    TokenLogprob,
)
from trtserve.plugins.engines.torch.engine import TorchEngine
from trtserve.plugins.engines.torch.model import Model, load_model, prepare_model
from trtserve.plugins.engines.torch.options import TorchOptions

CPU = torch.device("cpu")
TINY_VOCAB = 320
MAX_STEPS = 2000
REFERENCE_TOKENS = 10


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Answer:
    """All that an engine said of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)

    @property
    def last(self) -> Output:
        return self.outputs[-1]

    @property
    def cached_tokens(self) -> int | None:
        return self.outputs[0].cached_tokens


@dataclass
class Runner:
    """A started engine, driven step by step until it has nothing more to do."""

    engine: TorchEngine
    steps: list[StepOutputs] = field(default_factory=list)
    next_id: int = 1

    def add(
        self, prompt: list[int] | TokenIds, eos: tuple[int, ...] = (), num_resumed: int = 0, **sampling: Any
    ) -> RequestId:
        request_id = RequestId(self.next_id)
        self.next_id += 1
        params = SamplingParams(**{"max_tokens": REFERENCE_TOKENS, "temperature": 0.0, **sampling})
        self.engine.add(Request(request_id, array("i", prompt), params, eos, num_resumed=num_resumed))
        return request_id

    def step(self) -> StepOutputs:
        self.steps.append(self.engine.step())
        return self.steps[-1]

    def drain(self) -> dict[RequestId, Answer]:
        """Step until done; the answers of all requests since the runner began."""
        for _ in range(MAX_STEPS):
            if not self.engine.has_work():
                return self.answers()
            self.step()
        raise AssertionError("the engine does not come to an end")

    def answers(self) -> dict[RequestId, Answer]:
        found: dict[RequestId, Answer] = {}
        for step in self.steps:
            for output in step.outputs:
                answer = found.setdefault(output.request_id, Answer())
                answer.outputs.append(output)
                answer.tokens.extend(output.token_ids)
                answer.logprobs.extend(output.logprobs or ())
        return found

    def generate(self, prompts: list[list[int]], **sampling: Any) -> list[Answer]:
        """All prompts as one batch."""
        ids = [self.add(prompt, **sampling) for prompt in prompts]
        answers = self.drain()
        return [answers[request_id] for request_id in ids]

    @property
    def events(self) -> list[KVEvent]:
        return [event for step in self.steps for event in step.events]


MakeRunner = Callable[..., Runner]


@pytest.fixture
def runner_of() -> MakeRunner:
    """Start an engine on a model in memory: runner_of(model, num_blocks=…, max_num_tokens=…); `folder`: for its
    fingerprint only."""

    def make(model: Model, folder: Path | str = "in memory", **config: Any) -> Runner:
        wanted = {"dtype": "float32", "device": "cpu", "num_blocks": 256, **config}
        engine = TorchEngine(EngineConfig(str(folder), **wanted), load=lambda *_: model)
        engine.start(lambda phase: None)
        return Runner(engine)

    return make


TinyModule = Callable[..., torch.nn.Module]


@pytest.fixture(scope="session")
def tiny_module() -> TinyModule:
    """A transformers model with random weights, large enough that attention decides the answer."""

    def make(config_class: str, seed: int = 1, **config: Any) -> torch.nn.Module:
        base: dict[str, Any] = {
            "vocab_size": TINY_VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "eos_token_id": None,
            "bos_token_id": 1,
            "pad_token_id": 0,
            "initializer_range": 0.3,
        }
        torch.manual_seed(seed)
        settings = getattr(transformers, config_class)(**{**base, **config})
        module = transformers.AutoModelForCausalLM.from_config(
            settings, dtype=torch.float32, attn_implementation="eager"
        )
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() == 1 or any(part in name for part in ("experts", "router", "gate", "sinks")):
                parameter.data.normal_(0, 0.3)
        return module.eval()

    return make


@pytest.fixture
def tiny_llama(tiny_module: TinyModule) -> Model:
    return prepare_model(tiny_module("LlamaConfig"), torch.float32, CPU, TorchOptions())


@pytest.fixture(scope="session")
def tiny_llama_folder(tiny_module: TinyModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_llama")
    tiny_module("LlamaConfig", num_hidden_layers=2).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Reference:
    """Prompts, and what transformers' `generate` makes of each alone, greedily, in float32."""

    prompts: list[list[int]]
    tokens: list[list[int]]


@pytest.fixture(scope="session")
def fp32_model(default_model: Path) -> Model:
    return load_model(str(default_model), torch.float32, CPU, TorchOptions())


@pytest.fixture(scope="session")
def reference(default_model: Path) -> Reference:
    module = transformers.LlamaForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    chance = random.Random(7)
    lengths = [1, 2, 3, 5, 8, 11, 15, 16, 17, 21, 26, 31, 32, 33, 40, 47, 48, 55, 79, 113]
    prompts = [[chance.randrange(3, 49000) for _ in range(length)] for length in lengths]
    return Reference(prompts, [generate_alone(module, prompt, REFERENCE_TOKENS) for prompt in prompts])


@pytest.fixture(scope="session")
def generate_with() -> Callable[[Any, list[int], int], list[int]]:
    return generate_alone


def generate_alone(module: Any, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = out[0][len(prompt) :].tolist()
    return tokens
