"""What no engine on this machine's kernels can pass: measured bounds for the ratios of `engine.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from engine_runs import read_seconds
from torch import Tensor, nn

from trtserve.plugins.engines.torch.attention_terms import AttentionTerms
from trtserve.plugins.engines.torch.model import Model
from trtserve.plugins.engines.torch.packed_linear import Linear, packing_works

_REPEATS = 12


class BareStep:
    """The products that a decode step can't do without: each packed linear once, and each key and value read once.

    No norm, no rotation, no attention's products, no Python of a model around them. q, k and v count as one linear.
    """

    def __init__(self, module: Any, kv_bytes_per_token: int) -> None:
        """module: a causal LM of transformers in bfloat16; its weights are copied."""
        self._kv_bytes_per_token = kv_bytes_per_token
        weights: list[Tensor] = []
        for name, part in module.named_modules():
            if type(part) is nn.Linear:
                joins = name.endswith(("k_proj", "v_proj"))
                weights.append(torch.cat([weights.pop(), part.weight.detach()]) if joins else part.weight.detach())
        packs = packing_works(torch.bfloat16, torch.device("cpu"))
        self._linears = [(weight.shape[1], Linear(weight, None, packs)) for weight in weights]

    def seconds(self, batch: int, context: int) -> float:
        """For one token of each of `batch` sequences that see `context` tokens."""
        inputs = {width: torch.randn(batch, width).bfloat16() for width, _ in self._linears}

        def run() -> None:
            for width, linear in self._linears:
                linear(inputs[width])

        return _best(run) + read_seconds(batch * context * self._kv_bytes_per_token)


class NoAttention:
    """A step whose attention costs nothing and gives nonsense."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        """The queries, as if they were the answer."""
        return query.transpose(0, 1)


def forward_seconds(model: Model, batch: int) -> float:
    """A decode step's forward pass without attention."""
    tokens = torch.arange(batch)

    def run() -> None:
        model.forward(tokens[None] + 5, tokens[None], tokens, NoAttention())

    return _best(run)


@torch.inference_mode()
def _best(run: Callable[[], None]) -> float:
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)
