"""What the endpoints serve with: made once by the composition root, shared by all requests, never changed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trtserve.plugins.api import Mode
from trtserve.server.api.asgi import Scope
from trtserve.server.api.choice import Flusher
from trtserve.server.api.parameters import SamplingDefaults
from trtserve.server.api.schema import RequestRules
from trtserve.server.api.schema_messages import Message
from trtserve.server.cluster import ServerCluster
from trtserve.server.errors import AuthenticationFailed
from trtserve.server.metrics import Metrics
from trtserve.server.requests import LiveRequests
from trtserve.server.roles import RoleChanges
from trtserve.server.text.chat_template import ChatTemplate
from trtserve.server.text.tokenizer import Tokenizer

_INLINE_CHARACTERS = 100_000  # rendered within a millisecond

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one request may take."""

    max_body_bytes: int
    max_buffered_bytes: int
    request_timeout_s: float


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as clients see it."""

    name: str
    created: int  # Unix seconds
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    defaults: SamplingDefaults


class ApiKeys:
    """Who may use the API. Without keys, everyone may."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.are_required = bool(keys)
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, scope: Scope) -> None:
        """Raises AuthenticationFailed unless the request bears one of the keys. Takes the same time for any key."""
        if not self._digests:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise AuthenticationFailed("The API key is missing or wrong; send `Authorization: Bearer KEY`.")


@dataclass(frozen=True, slots=True)
class Serving:
    """Everything a request needs on its way."""

    model: ServedModel
    rules: RequestRules
    tokenizer: Tokenizer
    template: ChatTemplate
    mode: Mode
    cluster: ServerCluster
    live: LiveRequests
    flusher: Flusher
    metrics: Metrics
    keys: ApiKeys
    limits: HttpLimits
    roles: RoleChanges
    phase: Callable[[], str]  # what start-up is doing, in words, for /health

    async def render(self, messages: Sequence[Message], **settings: Any) -> str:
        """The prompt of a conversation, by the model's template; long conversations are rendered in a thread."""
        size = sum(len(message.get("content") or "") for message in messages)
        if size <= _INLINE_CHARACTERS:
            return self.template.render(messages, **settings)
        return await asyncio.to_thread(self.template.render, messages, **settings)


class _RandomIds:
    """128 random bits each, as hex. They come from the system many at a time: a call costs a switch of threads where
    others encode meanwhile."""

    _SIZE = 16

    def __init__(self) -> None:
        self._left = b""

    def next(self) -> str:
        if not self._left:
            self._left = secrets.token_bytes(64 * self._SIZE)
        taken, self._left = self._left[: self._SIZE], self._left[self._SIZE :]
        return taken.hex()


_random_ids = _RandomIds()


def request_id_of(scope: Scope) -> str:
    """The client's X-Request-Id if it has a sane one, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return _random_ids.next()
