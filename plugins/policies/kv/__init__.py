"""KV-aware routing: each request where it costs least, in milliseconds of everybody's waiting.

`kv` holds a request in the server until the worker that is best for it can begin its prompt; `kv_arrival` sends it as
soon as it arrives. Both use one cost (`cost.py`).
"""

from __future__ import annotations

from pydantic import BaseModel

from trtserve.plugins.hooks import hookimpl
from trtserve.plugins.policies.kv.options import KVOptions
from trtserve.plugins.policies.kv.policy import KVPolicy
from trtserve.plugins.routing_api import PolicyConfig, RoutingPolicy

_NAMES = ("kv", "kv_arrival")


@hookimpl
def make_policy(name: str, config: PolicyConfig) -> RoutingPolicy | None:
    if name not in _NAMES:
        return None
    return KVPolicy(KVOptions.model_validate(dict(config.options)), holds=name == "kv")


@hookimpl
def options_model(kind: str, name: str) -> type[BaseModel] | None:
    return KVOptions if kind == "policy" and name in _NAMES else None
