"""The model: a transformers class with its weights, run on packed batches through our attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trtserve.plugins.engines.torch.attention import ATTENTION_NAME, PagedStep, paged_attention
from trtserve.plugins.engines.torch.kv_store import LayerShape
from trtserve.plugins.engines.torch.layer_swap import swap_layers
from trtserve.plugins.engines.torch.lean_forward import LeanForward, lean_forward
from trtserve.plugins.engines.torch.load_checks import AttentionProbe, ModelRefused, check_class, check_config
from trtserve.plugins.engines.torch.options import TorchOptions
from trtserve.plugins.engines.torch.packed_linear import pack_linears, packing_works

_DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_PROBE_TOKENS = 5


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model, ready for `forward`. Its weights live as long as it does."""

    module: nn.Module
    layers: tuple[LayerShape, ...]
    vocab_size: int  # rows of logits; token ids at or above it would break the embedding
    max_position_embeddings: int
    dtype: torch.dtype
    device: torch.device
    lean: LeanForward | None = None  # does what `module` does

    def forward(self, input_ids: Tensor, position_ids: Tensor, rows_to_keep: Tensor, paged: PagedStep) -> Tensor:
        """input_ids, position_ids: int64[1, tokens]; rows_to_keep: int64[rows] -> logits [rows, vocab_size].

        Call it under `torch.inference_mode`.
        """
        if self.lean is not None:
            return self.lean(input_ids, position_ids, rows_to_keep, paged)
        return _forward(self.module, input_ids, position_ids, rows_to_keep, paged)


def choose_device(name: str) -> torch.device:
    """The device for a name out of the settings; raises ValueError where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for and torch finds no CUDA device: use 'cpu' or 'auto'")
    return torch.device(name)


def choose_dtype(name: str) -> torch.dtype:
    """The dtype of weights and KV for a name out of the settings."""
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not known: use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_model(path: str, dtype: torch.dtype, device: torch.device, options: TorchOptions) -> Model:
    """Read a Hugging Face folder. Blocks for seconds; raises ModelRefused or ValueError with the reason."""
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"model_path {path!r} has no config.json: give a Hugging Face model folder on this machine")
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    check_config(config)
    model_class = _model_class(config)
    check_class(model_class)
    module = _read_weights(model_class, path, config, dtype).to(device)
    return prepare_model(module, dtype, device, options)


def prepare_model(module: nn.Module, dtype: torch.dtype, device: torch.device, options: TorchOptions) -> Model:
    """Check a causal-LM module of transformers by a trial forward, and set it up for the engine in place.

    Raises ModelRefused. `module` is on `device` in `dtype`, and belongs to the model from now on.
    """
    untyped: Any = module
    config: Any = untyped.config
    check_config(config)
    check_class(type(module))
    module.eval().requires_grad_(False)
    transformers.AttentionInterface.register(ATTENTION_NAME, paged_attention)
    untyped.set_attn_implementation(ATTENTION_NAME)
    embeddings: Any = untyped.get_input_embeddings()
    packed = options.packed_linears and packing_works(dtype, device)
    if options.layer_swap:
        swap_layers(module, packed)
    if packed:
        pack_linears(module)
    probe = AttentionProbe()
    positions = torch.arange(_PROBE_TOKENS, device=device)
    with torch.inference_mode():
        logits = _forward(module, positions[None] % embeddings.num_embeddings, positions[None], positions[-1:], probe)
    layers = probe.layer_shapes()
    text_config = config.get_text_config()
    if len(layers) != text_config.num_hidden_layers:
        raise ModelRefused(
            f"{config.model_type}: {len(layers)} of {text_config.num_hidden_layers} layers use attention; the others "
            "keep state that cannot be paged. Choose another model for this engine."
        )
    limit = getattr(text_config, "max_position_embeddings", None)
    vocab_size = min(logits.shape[-1], embeddings.num_embeddings)
    lean = lean_forward(module, device) if options.layer_swap else None
    return Model(module, layers, vocab_size, limit or 2**31, dtype, device, lean)


def _forward(module: nn.Module, ids: Tensor, positions: Tensor, rows: Tensor, paged: PagedStep) -> Tensor:
    # the causal-LM class and not its base: some families scale or cap the logits there
    output = module(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows, paged=paged)
    logits: Tensor = output.logits[0]
    return logits


def _model_class(config: Any) -> Any:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise ModelRefused(
            f"{config.model_type} is not a text generation model that transformers {transformers.__version__} knows. "
            "Choose another model, or install a version that knows it."
        )
    return getattr(transformers, name)


def _read_weights(model_class: Any, path: str, config: Any, dtype: torch.dtype) -> nn.Module:
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    module, info = model_class.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        local_files_only=True,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelRefused(
            f"{path}: {len(missing)} weights are missing, first {missing[0]!r}; transformers would fill them with "
            "random numbers. Fetch the folder again, all *.safetensors files included."
        )
    loaded: nn.Module = module
    return loaded
