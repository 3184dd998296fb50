"""A leaner decoder layer for Llama-shaped models: one module, fused projections, few small operations.

Each layer is compared with the original on random input before it takes its place; one that differs stays out.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trtserve.plugins.engines.torch.attention import PagedStep
from trtserve.plugins.engines.torch.attention_terms import AttentionTerms
from trtserve.plugins.engines.torch.load_checks import AttentionProbe
from trtserve.plugins.engines.torch.packed_linear import Linear

_LOG = logging.getLogger(__name__)
_SWAPPABLE = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
_TRIAL_TOKENS = 6
_TRIAL_STRIDE = 17  # between the trial's positions, so that rotary embeddings matter
_TRIAL_SCALE = 0.02  # small beside what a layer adds, so that the residual does not hide a difference
_FEW_ROWS = 16  # up to so many it is the number of operations that counts
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.04, torch.float16: 0.01}  # relative error of a layer's output


def swap_layers(module: nn.Module, packed: bool) -> int:
    """Replace what can be replaced in a causal-LM module of transformers, in place; returns how many layers."""
    base: Any = module.base_model
    layers = getattr(base, "layers", None)
    rotary_embedding = getattr(base, "rotary_emb", None)
    if not isinstance(layers, nn.ModuleList) or rotary_embedding is None:
        return 0
    rotary: list[RotaryTables] = []
    swapped = 0
    for index, layer in enumerate(layers):
        if type(layer).__name__ not in _SWAPPABLE or not _is_silu_gated(layer):
            continue
        candidate = SwappedLayer(layer, rotary, packed)
        error = _trial_error(layer, candidate, rotary_embedding)
        if not error <= tolerance(_dtype(layer)):  # nor where it isn't a number
            _LOG.warning(
                "layer %d keeps the original %s: its stand-in differs by %.2g", index, type(layer).__name__, error
            )
            continue
        layers[index] = candidate
        swapped += 1
    return swapped


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """How far one is from the other, relative to the latter; inf where their shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    return float(torch.linalg.vector_norm((got - wanted).float()) / torch.linalg.vector_norm(wanted.float()))


def tolerance(dtype: torch.dtype) -> float:
    """The relative error up to which a stand-in may take the place of the original."""
    return _TOLERANCES[dtype]


class RotaryTables:
    """cos and sin in the form that `SwappedLayer` wants, made once a step and shared by its layers."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._source = cos
        half = cos.shape[-1] // 2
        self.cos = cos[0][:, None]
        self.signed_sin = torch.cat([-sin[0][:, :half], sin[0][:, half:]], -1)[:, None]

    def is_of(self, cos: Tensor) -> bool:
        return self._source is cos


class SwappedLayer(nn.Module):
    """A decoder layer: RMSNorm, fused q/k/v, optional q/k norms, rotation, attention, gated MLP, two residuals."""

    def __init__(self, layer: Any, rotary: list[RotaryTables], packed: bool) -> None:
        """`rotary` holds at most one entry and is shared by all layers of a model."""
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx: int = attention.layer_idx
        self._head_dim: int = attention.head_dim
        self._heads = attention.q_proj.out_features // self._head_dim
        self._kv_heads = attention.k_proj.out_features // self._head_dim
        self._terms = AttentionTerms(attention.scaling, _window(attention), None, None)
        self._rotary = rotary
        # methods instead of modules: looking a module up and calling it costs as much as a small operation
        self._input_norm = RMSNorm(layer.input_layernorm).forward
        self._mlp_norm = RMSNorm(layer.post_attention_layernorm).forward
        has_head_norms = hasattr(attention, "q_norm")
        self._query_norm = RMSNorm(attention.q_norm) if has_head_norms else None
        self._key_norm = RMSNorm(attention.k_norm) if has_head_norms else None
        self._project = _fused([attention.q_proj, attention.k_proj, attention.v_proj], packed).forward
        self._add_output = _fused([attention.o_proj], packed).plus
        # gate and up apart, so that oneDNN takes the activation and the product of both along
        self._gate = _fused([mlp.gate_proj], packed).silu
        self._multiply_up = _fused([mlp.up_proj], packed).times
        self._add_down = _fused([mlp.down_proj], packed).plus

    def forward(
        self,
        hidden_states: Tensor,
        *_positional: Any,
        position_embeddings: tuple[Tensor, Tensor],
        paged: PagedStep,
        **_ignored: Any,
    ) -> Tensor:
        """hidden_states: [1, tokens, hidden] -> the same shape."""
        return self.run(hidden_states[0], self._tables(position_embeddings), paged)[None]

    def run(self, x: Tensor, tables: RotaryTables, paged: PagedStep) -> Tensor:
        """x: [tokens, hidden] -> the same shape. Long, since each call in here costs as much as a small operation."""
        tokens, heads, turned_heads = x.shape[0], self._heads, self._heads + self._kv_heads
        projected = self._project(self._input_norm(x)).view(tokens, turned_heads + self._kv_heads, self._head_dim)
        turned = projected[:, :turned_heads]
        if self._query_norm is not None and self._key_norm is not None:
            turned[:, :heads] = self._query_norm(turned[:, :heads])
            turned[:, heads:] = self._key_norm(turned[:, heads:])
        rolled = turned.roll(self._head_dim // 2, -1)
        turned.mul_(tables.cos).addcmul_(rolled, tables.signed_sin)
        x = self._add_output(paged.attend_joined(self.layer_idx, projected, heads, self._terms), x)
        y = self._mlp_norm(x)
        return self._add_down(self._multiply_up(y, self._gate(y)), x)

    def _tables(self, position_embeddings: tuple[Tensor, Tensor]) -> RotaryTables:
        cos, sin = position_embeddings
        if not self._rotary or not self._rotary[0].is_of(cos):
            self._rotary[:] = [RotaryTables(cos, sin)]
        return self._rotary[0]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + epsilon) * weight over the last dimension, rounded once."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self._weight: Tensor = norm.weight.detach()
        self._epsilon: float = norm.variance_epsilon
        self._shape = tuple(self._weight.shape)
        # torch's own is one kernel on CUDA, and on the CPU many, of which these few do the same
        is_half = self._weight.dtype in (torch.bfloat16, torch.float16) and self._weight.device.type == "cpu"
        self._single = self._weight.float() if is_half else None
        self._both_shape = (2 * self._shape[0],)
        self._both_weights = torch.cat([self._weight, self._weight])

    def forward(self, x: Tensor) -> Tensor:
        """x: [tokens, ..., dimension] -> the same shape."""
        if self._single is None:
            return F.rms_norm(x, self._shape, self._weight, self._epsilon)
        if x.dim() == 2 and x.shape[0] <= _FEW_ROWS:
            # x beside -x has a mean of zero and the variance mean(x²): so torch's one kernel for the other norm will do
            both = torch.layer_norm(torch.cat((x, -x), 1), self._both_shape, self._both_weights, None, self._epsilon)
            return torch.narrow_copy(both, 1, 0, self._shape[0])  # in one piece, as linears take it
        numbers = x.float()
        length = torch.linalg.vector_norm(numbers, dim=-1, keepdim=True)
        scale = length.square_().div_(self._shape[0]).add_(self._epsilon).rsqrt_()
        return numbers.mul_(scale).mul_(self._single).to(x.dtype)


def _fused(linears: list[Any], packed: bool) -> Linear:
    """Linears with the same input as one; a member without a bias counts as a bias of zero."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    if all(linear.bias is None for linear in linears):
        return Linear(weight, None, packed)
    biases = [_bias_or_zero(linear) for linear in linears]
    return Linear(weight, torch.cat(biases), packed)


def _bias_or_zero(linear: Any) -> Tensor:
    bias: Tensor = linear.weight.new_zeros(linear.weight.shape[0]) if linear.bias is None else linear.bias.detach()
    return bias


def _window(attention: Any) -> int | None:
    """The window that this attention module hands over with each call; Mistral reads it from its configuration."""
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
        return window
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return None


def _is_silu_gated(layer: Any) -> bool:
    return getattr(layer.mlp.config, "hidden_act", None) == "silu"


def _dtype(layer: nn.Module) -> torch.dtype:
    return next(layer.parameters()).dtype


@torch.inference_mode()
def _trial_error(layer: nn.Module, candidate: SwappedLayer, rotary_embedding: Any) -> float:
    """How far the candidate is from the original, relative to the original's output; inf where they ask for different
    attention."""
    weight = next(layer.parameters())
    hidden = int(weight.shape[-1])
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(1, _TRIAL_TOKENS, hidden, generator=generator) * _TRIAL_SCALE
    x = x.to(device=weight.device, dtype=weight.dtype)
    positions = torch.arange(_TRIAL_TOKENS, device=weight.device)[None] * _TRIAL_STRIDE
    embeddings = rotary_embedding(x, positions)
    original_calls, own_calls = AttentionProbe(), AttentionProbe()
    wanted = layer(x, position_embeddings=embeddings, position_ids=positions, use_cache=False, paged=original_calls)
    got = candidate(x, position_embeddings=embeddings, paged=own_calls)
    # the trial is shorter than any window, so a wrong one would not show in the numbers
    return float("inf") if original_calls.terms != own_calls.terms else relative_error(got, wanted)
