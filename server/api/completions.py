"""POST /v1/completions: texts or token ids as prompts."""

from __future__ import annotations

import time

from trtserve.plugins.api import TokenIds
from trtserve.server.api.generation import Prepared
from trtserve.server.api.rendering import CompletionShape
from trtserve.server.api.schema import parse_completion
from trtserve.server.api.serving import Serving
from trtserve.server.text.detokenizer import Detokenizer


async def prepare_completion(raw: bytes, serving: Serving) -> Prepared:
    """Validate the body, tokenize what is not tokens yet."""
    stages = serving.metrics.stages
    started_s = time.perf_counter()
    params = parse_completion(raw, serving.rules)
    validated_s = time.perf_counter()
    prompts: list[TokenIds] = []
    echoes: list[str] = []
    for prompt in params.prompts:
        if isinstance(prompt, str):
            prompts.append(await serving.tokenizer.encode(prompt, params.add_special_tokens))
            echo = prompt
        else:
            prompts.append(prompt)
            echo = serving.tokenizer.decode(prompt, skip_special_tokens=False) if params.echo else ""
        echoes += [echo if params.echo else ""] * params.n
    stages["validate"].observe(validated_s - started_s)
    stages["tokenize"].observe(time.perf_counter() - validated_s)

    def detokenizer(index: int) -> Detokenizer:
        return serving.tokenizer.detokenizer(params.skip_special_tokens, prompts[index // params.n])

    return Prepared(params, prompts, CompletionShape(serving.tokenizer, echoes, detokenizer))
