"""/tokenize and /detokenize: what the model sees of a text, with its chat template applied where messages are given."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trtserve.server.api.body import body_of
from trtserve.server.api.inspection import json_response
from trtserve.server.api.parameters import ignored_header
from trtserve.server.api.schema import TokenizeParams, parse_detokenize, parse_tokenize
from trtserve.server.api.serving import Serving


class Tokenization:
    """Handlers for Starlette."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def tokenize(self, request: Request) -> Response:
        serving = self._serving
        params = parse_tokenize(await body_of(request, serving.limits), serving.rules)
        token_ids = await serving.tokenizer.encode(await self._text(params), params.add_special_tokens)
        content = {"tokens": token_ids.tolist(), "count": len(token_ids)}
        if params.return_token_strs:
            content["token_strs"] = [serving.tokenizer.token_text(token_id) for token_id in token_ids]
        return _answer(content, params.ignored)

    async def _text(self, params: TokenizeParams) -> str:
        if params.text is not None:
            return params.text
        return await self._serving.render(
            params.messages,
            add_generation_prompt=params.add_generation_prompt,
            continue_final_message=params.continue_final_message,
            **params.chat_template_kwargs,
        )

    async def detokenize(self, request: Request) -> Response:
        serving = self._serving
        params = parse_detokenize(await body_of(request, serving.limits), serving.rules)
        text = serving.tokenizer.decode(params.tokens, params.skip_special_tokens)
        return _answer({"prompt": text}, params.ignored)


def _answer(content: Any, ignored: tuple[str, ...]) -> Response:
    response = json_response(content)
    if ignored:
        response.headers["x-trtserve-ignored-params"] = ignored_header(ignored)
    return response
