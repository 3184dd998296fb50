"""POST /v1/chat/completions: messages to a prompt."""

from __future__ import annotations

import time

from trtserve.server.api.generation import Prepared
from trtserve.server.api.rendering import ChatShape
from trtserve.server.api.schema import parse_chat
from trtserve.server.api.serving import Serving


async def prepare_chat(raw: bytes, serving: Serving) -> Prepared:
    """Validate the body, render the model's template, tokenize."""
    stages = serving.metrics.stages
    started_s = time.perf_counter()
    params = parse_chat(raw, serving.rules)
    validated_s = time.perf_counter()
    prompt = await serving.render(
        params.messages,
        add_generation_prompt=params.add_generation_prompt,
        continue_final_message=params.continue_final_message,
        **params.chat_template_kwargs,
    )
    rendered_s = time.perf_counter()
    token_ids = await serving.tokenizer.encode(prompt, params.add_special_tokens)
    stages["validate"].observe(validated_s - started_s)
    stages["template"].observe(rendered_s - validated_s)
    stages["tokenize"].observe(time.perf_counter() - rendered_s)
    return Prepared(params, (token_ids,), ChatShape(serving.tokenizer))
