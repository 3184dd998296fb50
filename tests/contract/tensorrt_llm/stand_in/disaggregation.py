"""The engine's side of disaggregation: hands a prefilled prompt over, pulls one from another process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.result import Response

from .engine_settings import EngineSettings
from .environment import Environment
from .request import Request
from .tokens import digest, mixed
from .transfer import HeldKV, KVSource, opaque_state, pull, read_opaque_state
from .violations import record


class Disaggregation:
    def __init__(self, settings: EngineSettings, environment: Environment) -> None:
        self.layout = settings.kv_layout()
        config = settings.args.cache_transceiver_config
        assert config is not None
        timeout_ms = getattr(config, "kv_transfer_timeout_ms", None)
        self._timeout_s = None if timeout_ms is None else timeout_ms / 1000
        self._finish = environment.context_finish
        self._failures_left = environment.transfer_failures
        self._freed: list[int] = []
        self._pulling: set[int] = set()
        self._lock = threading.Lock()
        self._source = KVSource(environment.transfer_s, self._free)

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
