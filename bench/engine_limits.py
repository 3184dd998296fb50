"""What no engine of this kind can pass on this machine's kernels: measured bounds for the ratios of `engine.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trtserve.plugins.engines.torch.attention_terms import AttentionTerms
from trtserve.plugins.engines.torch.kv_store import KVStore, LayerShape
from trtserve.plugins.engines.torch.layer_swap import RMSNorm, RotaryTables
from trtserve.plugins.engines.torch.likeliest import most_likely
from trtserve.plugins.engines.torch.model import Model
from trtserve.plugins.engines.torch.packed_linear import Linear, packing_works

_REPEATS = 12
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a layer of `StraightStep` computes with, in the order in which it does."""

    first_norm: RMSNorm
    qkv: Linear
    output: Linear
    second_norm: RMSNorm
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A step's inputs, and its KV: all of it, and the views that attention reads."""

    ids: Tensor  # int64[rows]
    slots: Tensor  # int64[rows]
    tables: RotaryTables
    store: KVStore
    views: list[tuple[Tensor, Tensor]]  # [rows, kv_heads, tokens, dim]


class StraightStep:
    """A decode step of a Llama as torch's operators alone can do it, one after the other, with no engine around them.

    What no engine of this kind can leave out, in its order, so that each operator finds the caches as it would:
    embedding; in each layer a norm, one linear for q, k and v, rotation, new keys and values into rows, attention, a
    norm, four linears that take activation, product and residual along; a norm, logits, the likeliest token. Each is
    the fastest form that this project has measured, and weights and KV lie on huge pages, as the engine's do.

    What an engine needs besides is left out: rows lie close together and are equally long, so that there is no mask;
    new KV goes to no blocks; rotary tables are there; nothing is scheduled, packed, looked up or checked, and no module
    of a model is called.
    """

    def __init__(self, module: Any) -> None:
        """module: a LlamaForCausalLM of transformers in bfloat16; its weights are copied."""
        config = module.config
        packs = packing_works(torch.bfloat16, _CPU)
        self._shape = LayerShape(config.num_key_value_heads, config.head_dim, config.head_dim)
        self._heads: int = config.num_attention_heads
        self._embedding: Tensor = module.get_input_embeddings().weight.detach()
        self._layers = [_layer(layer, packs) for layer in module.model.layers]
        self._norm, self._logits = RMSNorm(module.model.norm), _linear(packs, module.lm_head)

    def seconds(self, batch: int, context: int) -> float:
        """For one token of each of `batch` sequences that see `context` tokens."""
        inputs = self._inputs(batch, context)
        return _best(lambda: self._run(inputs))

    def _inputs(self, rows: int, tokens: int) -> _Inputs:
        shape = self._shape
        store = KVStore([shape] * len(self._layers), rows, tokens, torch.bfloat16, _CPU)
        for slab in store.slabs:
            slab.normal_()
        by_row = (shape.kv_heads, rows, tokens, shape.key_dim)
        views = [
            (keys.view(by_row).transpose(0, 1), values.view(by_row).transpose(0, 1))
            for keys, values in zip(store.keys, store.values, strict=True)
        ]
        row = torch.arange(rows)
        tables = RotaryTables(*torch.randn(2, 1, rows, shape.key_dim).bfloat16())
        return _Inputs(row + 5, (row + 1) * tokens - 1, tables, store, views)

    def _run(self, inputs: _Inputs) -> None:
        heads, rows, dim = self._heads, len(inputs.ids), self._shape.key_dim
        num_turned = heads + self._shape.kv_heads
        cos, sin, slots = inputs.tables.cos, inputs.tables.signed_sin, inputs.slots
        x = F.embedding(inputs.ids, self._embedding)
        for layer, (keys, values), pair in zip(self._layers, inputs.views, inputs.store.pairs, strict=True):
            projected = layer.qkv(layer.first_norm(x)).view(rows, -1, dim)
            turned = projected[:, :num_turned]
            rolled = turned.roll(dim // 2, -1)
            turned.mul_(cos).addcmul_(rolled, sin)
            assert pair is not None
            pair.index_copy_(1, slots, projected[:, heads:].transpose(0, 1))
            mixed = F.scaled_dot_product_attention(projected[:, :heads, None], keys, values, enable_gqa=True)
            x = layer.output.plus(mixed.reshape(rows, -1), x)
            y = layer.second_norm(x)
            x = layer.down.plus(layer.up.times(y, layer.gate.silu(y)), x)
        most_likely(self._logits(self._norm(x)))


class NoAttention:
    """A step whose attention costs nothing and gives nonsense."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        """The queries, as if they were the answer."""
        return query.transpose(0, 1)

    def attend_joined(self, layer: int, joined: Tensor, heads: int, terms: AttentionTerms) -> Tensor:
        """The same, joined."""
        return joined[:, :heads].flatten(1)


def forward_seconds(model: Model, batch: int) -> float:
    """A decode step's forward pass without attention."""
    tokens = torch.arange(batch)
    return _best(lambda: model.forward(tokens[None] + 5, tokens[None], tokens, NoAttention()))


def _layer(layer: Any, packs: bool) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        RMSNorm(layer.input_layernorm),
        _linear(packs, attention.q_proj, attention.k_proj, attention.v_proj),
        _linear(packs, attention.o_proj),
        RMSNorm(layer.post_attention_layernorm),
        *(_linear(packs, linear) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
    )


def _linear(packs: bool, *linears: Any) -> Linear:
    """Linears of the same input as one."""
    return Linear(torch.cat([linear.weight.detach() for linear in linears]), None, packs)


@torch.inference_mode()
def _best(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)
