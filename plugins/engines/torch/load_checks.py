"""Which models the engine may run, decided before and after the weights are read.

A model that keeps state outside of attention, builds its own masks, or rotates by the longest position of a batch
gives wrong tokens in a packed batch without any error, so each of these is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trtserve.plugins.engines.torch.attention_terms import AttentionTerms, split_joined
from trtserve.plugins.engines.torch.kv_store import LayerShape

_KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_BATCH_DEPENDENT_ROPES = frozenset({"dynamic", "longrope"})
_CURE = "Choose another model for this engine, or serve this one with another engine."


class ModelRefused(Exception):
    """This model cannot be run correctly here; the text says why and what to do."""


def check_config(config: Any) -> None:
    """Refuse by the configuration alone. config: a transformers PreTrainedConfig."""
    name = config.model_type
    if getattr(config, "quantization_config", None) is not None:
        raise ModelRefused(
            f"{name}: the checkpoint is quantized and this engine reads plain weights only. "
            "Use the unquantized checkpoint, or another engine."
        )
    strange = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if strange:
        raise ModelRefused(f"{name}: layers of type {', '.join(sorted(strange))} are not supported. {_CURE}")
    for rope_type in _rope_types(config):
        if rope_type in _BATCH_DEPENDENT_ROPES:
            raise ModelRefused(
                f"{name}: rope type {rope_type!r} depends on the longest sequence of a batch, so one request would "
                f"change another's answer. {_CURE}"
            )


def check_class(model_class: Any) -> None:
    """Refuse by what the transformers class says of itself."""
    if not getattr(model_class, "_supports_attention_backend", False):
        raise ModelRefused(f"{model_class.__name__} does not use transformers' attention interface. {_CURE}")
    if getattr(model_class, "_is_stateful", False):
        raise ModelRefused(f"{model_class.__name__} keeps state that isn't attention keys and values. {_CURE}")


def _rope_types(config: Any) -> Iterator[str]:
    """All rope types of a configuration; they may be nested by layer type."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if not isinstance(found, Mapping):
            continue
        for parameters in (found, *found.values()):
            if isinstance(parameters, Mapping):
                yield str(parameters.get("rope_type", parameters.get("type", "default")))


@dataclass(slots=True)
class AttentionProbe:
    """Stands in for the KV store in a trial forward: plain attention over one sequence, and a note of each call."""

    calls: Counter[int] = field(default_factory=Counter)
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    terms: dict[int, AttentionTerms] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        self.calls[layer] += 1
        self.shapes[layer] = LayerShape(key.shape[0], key.shape[2], value.shape[2])
        self.terms[layer] = terms
        index = torch.arange(query.shape[1], device=query.device)
        visible = index[None] <= index[:, None]
        if terms.window is not None:
            visible &= index[None] > index[:, None] - terms.window
        mixed = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=visible, scale=terms.scaling, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)

    def attend_joined(self, layer: int, joined: Tensor, heads: int, terms: AttentionTerms) -> Tensor:
        return self.attend(layer, *split_joined(joined, heads), terms).flatten(1)

    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """The shapes in layer order; refuses unless the layers 0 .. n - 1 called attention exactly once each."""
        layers = sorted(self.calls)
        if not layers or layers != list(range(len(layers))) or set(self.calls.values()) != {1}:
            raise ModelRefused(
                f"in a trial forward the layers called attention so often: {dict(sorted(self.calls.items()))}; "
                f"each layer must call it exactly once. {_CURE}"
            )
        return tuple(self.shapes[layer] for layer in layers)
