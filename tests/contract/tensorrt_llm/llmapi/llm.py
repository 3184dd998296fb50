"""`tensorrt_llm.LLM`: the PyTorch backend's class."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import time
import weakref
from pathlib import Path
from typing import Any

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.iteration_result import IterationResult, empty_iteration
from tensorrt_llm.executor.result import GenerationResult
from tensorrt_llm.sampling_params import SamplingParams
from tensorrt_llm.scheduling_params import SchedulingParams
from tensorrt_llm.stand_in.construction import check_main_is_guarded, checked_arguments, filled_arguments
from tensorrt_llm.stand_in.engine import Engine
from tensorrt_llm.stand_in.environment import Environment, variable
from tensorrt_llm.stand_in.features import versioned_keywords
from tensorrt_llm.stand_in.model_folder import ModelFolder
from tensorrt_llm.stand_in.submission import Submissions
from tensorrt_llm.stand_in.violations import documented

from .llm_args import TorchLlmArgs


class RequestOutput(GenerationResult):
    """What `generate_async` gives."""


class LLM:
    """Blocks while it loads; lives until `shutdown`, or until its executor dies."""

    def __init__(
        self, model: str | Path, tokenizer: Any = None, tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False, trust_remote_code: bool = False, tensor_parallel_size: int = 1,
        dtype: str = "auto", revision: str | None = None, tokenizer_revision: str | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        environment = Environment.read()
        check_main_is_guarded()
        given = checked_arguments(type(self).__name__, kwargs)
        args = TorchLlmArgs(
            model=str(model), tokenizer=tokenizer, tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init, trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size, dtype=dtype, revision=revision,
            tokenizer_revision=tokenizer_revision, **given,
        )  # fmt: skip
        folder = ModelFolder.read(Path(model))
        self.args, settings = filled_arguments(args, folder, environment)
        time.sleep(environment.load_s)
        self.tokenizer = None
        self.llm_id = f"stand-in-{os.getpid()}-{time.time_ns() // 1_000_000}"
        self._hf_model_dir = Path(model)
        self._engine: Engine | None = Engine(settings, environment, self._died)
        self._submissions = Submissions(self._engine, folder)
        self._request_ids = itertools.count(int(variable("FIRST_REQUEST_ID", "1")))
        self._iterations: dict[str, IterationResult] = {}
        atexit.register(_shut_down, weakref.ref(self))

    def generate(self, inputs: Any, sampling_params: SamplingParams | None = None, **keywords: Any) -> RequestOutput:
        """One prompt, synchronously; not in an event loop."""
        return self.generate_async(inputs, sampling_params, **keywords).result()

    @versioned_keywords
    def generate_async(
        self, inputs: Any, sampling_params: SamplingParams | None = None, lora_request: Any = None,
        prompt_adapter_request: Any = None, streaming: bool = False, kv_cache_retention_config: Any = None,
        disaggregated_params: DisaggregatedParams | None = None, trace_headers: Any = None,
        _postproc_params: Any = None, scheduling_params: SchedulingParams | None = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:  # fmt: skip
        """No coroutine: checks, enqueues and returns at once. Changes the sampling parameters."""
        if self._engine is None:
            raise RuntimeError("LLM is shutting down")
        if self._engine.error is not None:
            raise RuntimeError(f"LLM is shutting down: {self._engine.error}")
        loop = _running_loop()
        self._arm_iterations(loop)
        request = self._submissions.request(
            RequestOutput, next(self._request_ids), inputs, sampling_params, streaming, disaggregated_params,
            scheduling_params, cache_salt, loop,
        )  # fmt: skip
        self._engine.submit(request)
        return request.result

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        iteration = self._iterations.get("stats")
        return [] if iteration is None else iteration.get_results()

    def get_stats_async(self, timeout: float | None = 2) -> Any:
        """Empty before the first request."""
        iteration = self._iterations.get("stats")
        if iteration is None:
            return empty_iteration()
        iteration.set_timeout(timeout)
        return iteration

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        return self._events().get_results()

    def get_kv_cache_events_async(self, timeout: float | None = 2) -> IterationResult:
        """One reader, in the loop of the first request, and not before that request."""
        events = self._events()
        events.set_timeout(timeout)
        return events

    def shutdown(self) -> None:
        """Idempotent."""
        engine, self._engine = getattr(self, "_engine", None), None
        if engine is not None:
            engine.close()

    def _check_health(self) -> bool:
        return self._engine is not None and self._engine.error is None

    def _events(self) -> IterationResult:
        if "kv_cache_events" not in self._iterations:
            raise documented(AssertionError("KV cache events are read before the first request"))
        return self._iterations["kv_cache_events"]

    def _arm_iterations(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """The shared queues are made with the first request, in its loop, and armed again by each."""
        assert self._engine is not None
        if not self._iterations:
            self._engine.stats = IterationResult("stats", loop, self.args.max_stats_len)
            self._engine.events = IterationResult("kv_cache_events", loop, None)
            self._iterations = {"stats": self._engine.stats, "kv_cache_events": self._engine.events}
        for iteration in self._iterations.values():
            iteration.mark_undone()

    def _died(self) -> None:
        """On the engine's thread, once; generate_async refuses from here on."""

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def __getstate__(self) -> Any:
        raise RuntimeError("LLM object can not be pickled.")

    def __del__(self) -> None:
        self.shutdown()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _shut_down(reference: weakref.ref[LLM]) -> None:
    llm = reference()
    if llm is not None:
        llm.shutdown()
