"""Makes TensorRT-LLM's SamplingParams, a new one for every request."""

from __future__ import annotations

from typing import Any

from trtserve.plugins.api import GuidedDecoding, Request, RequestRefused
from trtserve.plugins.engines.tensorrt_llm.library import Library
from trtserve.plugins.engines.tensorrt_llm.sampling import sampling_keywords


class SamplingObjects:
    """vocab_size: of the model's logits."""

    def __init__(self, library: Library, vocab_size: int) -> None:
        self._library = library
        self._vocab_size = vocab_size

    def make(self, request: Request) -> Any:
        """Raises RequestRefused for what this version cannot do, and what SamplingParams raises for bad values."""
        keywords = sampling_keywords(request)
        if "min_tokens" in keywords and "stop_token_ids" in keywords:
            # It masks its one end id so long, and no stop token.
            raise RequestRefused(
                "min_tokens holds back one end-of-sequence token only on this engine: leave out stop_token_ids, and "
                "with a model that has several end-of-sequence tokens leave out min_tokens or set ignore_eos."
            )
        if request.sampling.logit_bias:
            keywords["embedding_bias"] = self._bias(request.sampling.logit_bias)
        if request.sampling.guided is not None:
            keywords["guided_decoding"] = self._guide(request.sampling.guided)
        missing = sorted(keywords.keys() - self._library.sampling_fields)
        if missing:
            raise RequestRefused(f"TensorRT-LLM {self._library.version} has no {', '.join(missing)}.")
        return self._library.sampling_params(**keywords)

    def _guide(self, guided: GuidedDecoding) -> Any:
        make = self._library.guided_decoding_params
        if make is None:
            raise RequestRefused(f"TensorRT-LLM {self._library.version} has no guided decoding.")
        if guided.kind == "json_object":
            return make(json_object=True)
        names = {"json_schema": "json", "regex": "regex", "grammar": "grammar"}
        return make(**{names[guided.kind]: guided.text})

    def _bias(self, logit_bias: tuple[tuple[int, float], ...]) -> Any:
        """float32[vocab_size]."""
        import torch

        bias = torch.zeros(self._vocab_size, dtype=torch.float32)
        for token_id, value in logit_bias:
            if not 0 <= token_id < self._vocab_size:
                raise RequestRefused(f"logit_bias names token {token_id}; the vocabulary has {self._vocab_size}.")
            bias[token_id] += value
        return bias
