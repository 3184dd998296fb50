"""The engine's side of disaggregation: hands a prefilled prompt over, pulls one from another process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.result import Response
from tensorrt_llm.llmapi.configs import CacheTransceiverConfig

from .engine_settings import EngineSettings
from .environment import Environment
from .request import Request
from .tokens import digest, mixed
from .transfer import HeldKV, KVSource, opaque_state, pull, read_opaque_state
from .violations import record, violated

_HAS_GLOBAL_ID = "disagg_request_id" in DisaggregatedParams.__dataclass_fields__


def _global_id(request_id: int) -> int:
    """A number that needs all of its 64 bits."""
    return mixed(request_id) | 1 << 63


class Disaggregation:
    def __init__(self, settings: EngineSettings, environment: Environment) -> None:
        self.layout = settings.kv_layout()
        config = settings.args.cache_transceiver_config
        assert config is not None
        timeout_ms = getattr(config, "kv_transfer_timeout_ms", None)
        self._timeout_s = None if timeout_ms is None else timeout_ms / 1000
        self._buffer_tokens = config.max_tokens_in_buffer
        self._finish = environment.context_finish
        self._failures_left = environment.transfer_failures
        self._freed: list[int] = []
        self._pulling: set[int] = set()
        self._lock = threading.Lock()
        self._source = KVSource(environment.transfer_s, self._free)

    def check(self, params: DisaggregatedParams, num_tokens: int) -> None:
        """Raises where a prefill could not be handed over safely with this configuration."""
        if params.request_type != "context_only":
            return
        if self._timeout_s is None and "kv_transfer_timeout_ms" in CacheTransceiverConfig.model_fields:
            raise violated("a context_only request without kv_transfer_timeout_ms: KV that nobody pulls stays for ever")
        if self._buffer_tokens is not None and num_tokens > self._buffer_tokens:
            raise violated(f"a prompt of {num_tokens} tokens where max_tokens_in_buffer is {self._buffer_tokens}")

    def hand_over(self, request: Request, response: Response) -> None:
        """Keep the request's KV for a puller, and say in its last response how to get it."""
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        self._source.hold(request.id, HeldKV(digest(request.prompt), len(request.prompt), deadline))
        drafts = [mixed(request.id + i) % 1000 for i in range(self.layout.draft_tokens)] or None
        response.finish_reason = self._finish
        response.disaggregated_params = DisaggregatedParams(
            request_type="context_only",
            first_gen_tokens=list(request.sequences[0].tokens),
            ctx_request_id=request.id,
            opaque_state=opaque_state(self._source.port, self._source.incarnation, request.id, self.layout),
            draft_tokens=drafts,
        )
        if _HAS_GLOBAL_ID:
            response.disaggregated_params.disagg_request_id = _global_id(request.id)

    def start_pull(self, request: Request, pulled: Callable[[Request, str | None], None]) -> None:
        """Pull on a thread of its own; `pulled` is called there, with what went wrong or None."""
        self._pulling.add(request.id)
        threading.Thread(target=self._pull, args=(request, pulled), daemon=True, name="stand-in-pull").start()

    def is_in_flight(self, request_id: int) -> bool:
        return request_id in self._pulling or self._source.holds(request_id)

    def take_freed(self) -> list[int]:
        """Requests whose KV was pulled or given up since the last call."""
        late = self._source.free_expired(time.monotonic())
        with self._lock:
            freed, self._freed = [*self._freed, *late], []
        return freed

    def close(self) -> None:
        self._source.close()

    def _free(self, request_id: int) -> None:
        with self._lock:
            self._freed.append(request_id)

    def _pull(self, request: Request, pulled: Callable[[Request, str | None], None]) -> None:
        try:
            error = self._pull_error(request)
        except Exception as unexpected:
            error = f"{type(unexpected).__name__}: {unexpected}"
        self._pulling.discard(request.id)
        pulled(request, error)

    def _pull_error(self, request: Request) -> str | None:
        params = request.params
        assert params is not None and params.opaque_state is not None
        port, incarnation, request_id, layout = read_opaque_state(params.opaque_state)
        if request_id != params.ctx_request_id:
            record(f"ctx_request_id {params.ctx_request_id} is not the one of the opaque state ({request_id})")
            return "ctx_request_id and opaque_state are of two requests"
        if _HAS_GLOBAL_ID and params.disagg_request_id != _global_id(request_id):
            record(f"disagg_request_id {params.disagg_request_id} is not the one that prefill gave")
            return "disagg_request_id is of another request"
        difference = self.layout.difference(layout)
        if difference:
            return f"KV cache layouts differ: {difference}"
        if len(params.draft_tokens or []) != self.layout.draft_tokens:
            record(
                f"generation_only came with draft_tokens {params.draft_tokens}, MTP drafts {self.layout.draft_tokens}"
            )
            return "draft_tokens do not match the speculative decoding of this side"
        with self._lock:
            if self._failures_left:
                self._failures_left -= 1
                return "stand-in: this KV transfer fails"
        wanted = {"request_id": request_id, "incarnation": incarnation}
        wanted |= {"digest": digest(request.prompt), "num_tokens": len(request.prompt)}
        answer = pull(port, wanted)
        return None if answer == "ok" else answer
