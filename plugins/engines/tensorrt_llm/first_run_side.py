"""One TensorRT-LLM `LLM` in a process of its own, for the questions of `first_run`: JSON lines in, JSON lines out.

The first line is the LLM's arguments. Each later line is a command, answered by one line: `{"answer": ...}` or
`{"error": ...}`. A process, so that a question may crash it. What the library prints goes to stderr.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from trtserve.plugins.engines.tensorrt_llm.hand_over import DISAGGREGATED_KEYWORDS

Command = Callable[..., Awaitable[Any]]

_PLAIN = DISAGGREGATED_KEYWORDS - {"request_type", "opaque_state"}
"""Disaggregated parameters that JSON can carry as they are."""


class Side:
    """The commands. Token ids are plain lists; bytes travel as base64 text."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        import tensorrt_llm

        self._library = tensorrt_llm
        self._llm = tensorrt_llm.LLM(**arguments)
        self._end_id = end_id(Path(str(self._llm._hf_model_dir)))
        self._last: Any = None  # the result of the last request

    async def describe(self) -> dict[str, Any]:
        """Version, names and sizes."""
        from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
        from tensorrt_llm.scheduling_params import SchedulingParams

        classes = (self._library.DisaggregatedParams, self._library.SamplingParams, SchedulingParams)
        return {
            "version": self._library.__version__,
            "end_id": self._end_id,
            "fields": {cls.__name__: {f.name: repr(f.default) for f in dataclasses.fields(cls)} for cls in classes},
            "generate_async": list(inspect.signature(self._library.LLM.generate_async).parameters),
            "TorchLlmArgs": sorted(TorchLlmArgs.model_fields),
            "sizes": {
                name: getattr(self._llm.args, name) for name in ("max_batch_size", "max_num_tokens", "max_seq_len")
            },
            "has_check_health": hasattr(self._llm, "_check_health"),
        }

    async def generate(
        self, prompt: list[int], sampling: dict[str, Any] | None = None, bias: Mapping[str, float] | None = None,
        streaming: bool = False, disaggregated: dict[str, Any] | None = None, abort: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Every step of a request: what each sequence's object says then. `abort` asks for its end after the last."""
        params = self._disaggregated(disaggregated)
        keywords = {} if params is None else {"disaggregated_params": params}
        result = self._llm.generate_async(prompt, self._sampling(sampling or {}, bias), streaming=streaming, **keywords)
        steps = []
        if streaming:
            async for step in result:
                steps.append([_shown(output) for output in step.outputs])
        else:
            await result
            steps.append([_shown(output) for output in result.outputs])
        self._last = result
        if abort:
            result.abort()
        return {"steps": steps, "cached_tokens": getattr(result, "cached_tokens", None)}

    async def abort_last(self) -> bool:
        """Abort the last request, whatever became of it; whether the LLM says afterwards that it is healthy."""
        self._last.abort()
        return bool(self._llm._check_health()) if hasattr(self._llm, "_check_health") else True

    async def events(self, timeout_s: float) -> dict[str, Any]:
        """All KV events until the iteration ends, and how long that took."""
        started = asyncio.get_running_loop().time()
        events = [event async for event in self._llm.get_kv_cache_events_async(timeout_s)]
        return {"events": events, "took_s": asyncio.get_running_loop().time() - started}

    async def stats(self, timeout_s: float) -> list[dict[str, Any]]:
        """All iterations until there are no more."""
        return [item async for item in self._llm.get_stats_async(timeout_s)]

    async def merging(self) -> dict[str, Any]:
        """How `update_llm_args_with_extra_dict` merges a block that both sides have."""
        from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict

        below = {"kv_cache_config": {"dtype": "auto"}}
        merged = update_llm_args_with_extra_dict(below, {"kv_cache_config": {"tokens_per_block": 64}})
        return {"kv_cache_config": str(merged["kv_cache_config"])}

    async def parsers(self) -> dict[str, Any]:
        """The tool and reasoning parsers that trtllm-serve has."""
        from importlib import import_module

        found: dict[str, Any] = {}
        for module, name in (
            ("tensorrt_llm.serve.tool_parser.tool_parser_factory", "ToolParserFactory"),
            ("tensorrt_llm.llmapi.reasoning_parser", "ReasoningParserFactory"),
        ):
            try:
                factory = getattr(import_module(module), name)
                found[name] = sorted(getattr(factory, "parsers", None) or factory._parsers)
            except (ImportError, AttributeError) as error:
                found[name] = f"{type(error).__name__}: {error}"
        return found

    def _sampling(self, fields: dict[str, Any], bias: Mapping[str, float] | None) -> Any:
        fields = {"end_id": self._end_id, "pad_id": self._end_id, "max_tokens": 16, **fields}
        if bias is not None:
            fields["embedding_bias"] = bias_vector(Path(str(self._llm._hf_model_dir)), bias)
        return self._library.SamplingParams(**fields)

    def _disaggregated(self, fields: dict[str, Any] | None) -> Any:
        if fields is None:
            return None
        state = fields.get("opaque_state")
        given = fields | ({} if state is None else {"opaque_state": base64.b64decode(state)})
        return self._library.DisaggregatedParams(**given)


def end_id(folder: Path) -> int:
    """The model's first end token; -1 where its files name none."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        if value is not None:
            return int(value[0] if isinstance(value, list) else value)
    return -1


def bias_vector(folder: Path, bias: Mapping[str, float]) -> Any:
    """A float32 tensor of the vocabulary's size; an array of the standard library where there is no torch."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = [0.0] * int({**config, **config.get("text_config", {})}["vocab_size"])
    for token, value in bias.items():
        values[int(token)] = value
    try:
        import torch
    except ImportError:
        from array import array

        return array("f", values)
    return torch.tensor(values, dtype=torch.float32)


def _shown(output: Any) -> dict[str, Any]:
    logprobs = [entry for entry in output.logprobs or [] if isinstance(entry, dict)]
    shown: dict[str, Any] = {
        "token_ids": list(output.token_ids),
        "token_ids_diff": list(output.token_ids_diff),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "num_logprobs": [len(entry) for entry in logprobs],
    }
    params = output.disaggregated_params
    if params is not None and params.opaque_state is not None:
        given = {name: value for name in _PLAIN if (value := getattr(params, name, None)) is not None}
        shown["disaggregated"] = given | {"opaque_state": base64.b64encode(params.opaque_state).decode()}
    return shown


async def serve(side: Side, lines: TextIO, answers: TextIO) -> None:
    """Answer commands until the input ends. Lines are read on a thread, as the LLM needs the loop."""
    while line := await asyncio.to_thread(lines.readline):
        command = json.loads(line)
        name = command.pop("do")
        try:
            method: Command = getattr(side, name)
            reply: dict[str, Any] = {"answer": await method(**command)}
        except Exception as error:  # a question's answer may be an error
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply, default=repr), file=answers, flush=True)


async def _main(lines: TextIO, answers: TextIO) -> None:
    side = Side(json.loads(lines.readline()))
    print(json.dumps({"answer": "ready"}), file=answers, flush=True)
    await serve(side, lines, answers)


if __name__ == "__main__":
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(_main(sys.stdin, _answers))
    os._exit(0)  # whatever threads and ranks the library still has
