"""A model's forward pass as one loop over swapped layers, without the calls of transformers' classes around them.

In a decode step on a CPU those calls are felt: the weights that are read leave nothing in the caches, so that each
object that is touched between them is fetched again. Used only if it gives what the model's own forward pass gives.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from trtserve.plugins.engines.torch.attention import PagedStep
from trtserve.plugins.engines.torch.layer_swap import (
    RMSNorm,
    RotaryTables,
    SwappedLayer,
    relative_error,
    tolerance,
)
from trtserve.plugins.engines.torch.load_checks import AttentionProbe

_LOG = logging.getLogger(__name__)
_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
_TRIAL_TOKENS = 6
_TRIAL_STRIDE = 17


class LeanForward:
    """The forward pass of a causal LM all of whose layers are swapped. Shares the weights of its module."""

    def __init__(self, module: Any) -> None:
        base = module.base_model
        self._embedding: nn.Module = base.embed_tokens
        self._rotary_embedding: nn.Module = base.rotary_emb
        self._layers = [layer.run for layer in base.layers]
        self._norm = RMSNorm(base.norm).forward
        self._head: nn.Module = module.lm_head

    def __call__(self, input_ids: Tensor, position_ids: Tensor, rows_to_keep: Tensor, paged: PagedStep) -> Tensor:
        """As `Model.forward`."""
        embedded = self._embedding(input_ids)
        tables = RotaryTables(*self._rotary_embedding(embedded, position_ids))
        x = embedded[0]
        for layer in self._layers:
            x = layer(x, tables, paged)
        logits: Tensor = self._head(self._norm(x[rows_to_keep]))
        return logits


@torch.inference_mode()
def lean_forward(module: nn.Module, device: torch.device) -> LeanForward | None:
    """The lean forward pass of this module, or None where it has none or one that differs."""
    untyped: Any = module
    base = untyped.base_model
    layers = getattr(base, "layers", ())
    if not layers or not all(isinstance(layer, SwappedLayer) for layer in layers):
        return None
    if type(getattr(base, "norm", None)).__name__ not in _NORMS:
        return None
    candidate = LeanForward(untyped)
    index = torch.arange(_TRIAL_TOKENS, device=device)
    ids, positions, rows = index[None] % base.embed_tokens.num_embeddings, index[None] * _TRIAL_STRIDE, index[-2:]
    output = untyped(
        input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows, paged=AttentionProbe()
    )
    error = relative_error(candidate(ids, positions, rows, AttentionProbe()), output.logits[0])
    if not error <= tolerance(output.logits.dtype):  # nor where it isn't a number
        _LOG.warning("the forward pass of %s stays: a leaner one differs by %.2g", type(module).__name__, error)
        return None
    return candidate
