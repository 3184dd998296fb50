"""`python -m trtserve.plugins.engines.tensorrt_llm.first_run MODEL`: ask a real TensorRT-LLM what nobody wrote down.

Starts two `LLM`s, one for prefill and one for decode, each in a process, on one GPU or two, and prints one line of JSON
for each question of `first_run_questions`. docs/first_gpu_run.md says what depends on the answers.

Exit code 0: each question has an answer, whatever it is. 1: some have an error instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from trtserve.plugins.engines.tensorrt_llm.first_run_questions import QUESTIONS, SideError

ANSWER_S = 120.0


class SideProcess:
    """A side (`first_run_side`) and the way to it. Called, it asks one command; see `Ask`."""

    def __init__(self, name: str, arguments: Mapping[str, Any], gpu: str | None, start_s: float) -> None:
        environment = os.environ | {"TLLM_WORKER_USE_SINGLE_PROCESS": "1"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.first_run_side"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name=f"{name}-answers").start()
        self._send(arguments)
        self._answer(start_s)

    def __call__(self, do: str, **arguments: Any) -> Any:
        self._send({"do": do, **arguments})
        return self._answer(ANSWER_S)

    def close(self) -> None:
        """End it, by force where it does not end by itself."""
        with contextlib.suppress(OSError):
            self._pipe("stdin").close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # ranks are processes of its own group
            self._process.wait()
        self._pipe("stdout").close()

    def _read(self) -> None:
        for line in self._pipe("stdout"):
            self._lines.put(line)
        self._lines.put("")

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            print(json.dumps(message), file=self._pipe("stdin"), flush=True)
        except OSError as error:
            raise SideError(f"the {self._name} side has ended") from error

    def _answer(self, timeout_s: float) -> Any:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise SideError(f"the {self._name} side gave no answer in {timeout_s:g} s") from None
        if not line:
            raise SideError(f"the {self._name} side ended with code {self._process.wait(10)}")
        reply = json.loads(line)
        if "error" in reply:
            raise SideError(f"{self._name}: {reply['error']}")
        return reply["answer"]

    def _pipe(self, name: str) -> Any:
        return getattr(self._process, name)


def llm_arguments(model: str, backend: str, memory: float, more: Mapping[str, Any]) -> dict[str, Any]:
    """Small, with everything on that a question asks about."""
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "max_batch_size": 8,
        "max_num_tokens": 2048,
        "max_seq_len": 2048,
        "enable_iter_perf_stats": True,
        "disable_overlap_scheduler": True,
        "cuda_graph_config": None,
        "kv_cache_config": {"free_gpu_memory_fraction": memory, "event_buffer_max_size": 4096, "tokens_per_block": 32},
        "cache_transceiver_config": {
            "backend": backend, "max_tokens_in_buffer": 2048, "kv_transfer_timeout_ms": 60_000,
        },
        **more,
    }  # fmt: skip


def answers(prefill: SideProcess, decode: SideProcess, only: frozenset[str]) -> Iterator[dict[str, Any]]:
    """One record for each question, in the order they are asked."""
    for question in QUESTIONS:
        if only and question.__name__ not in only:
            continue
        record: dict[str, Any] = {"question": question.__name__, "asks": (question.__doc__ or "").strip()}
        try:
            record["answer"] = question(prefill, decode)
        except (SideError, LookupError, TypeError) as error:
            record["error"] = f"{type(error).__name__}: {error}"
        yield record


def main(arguments: list[str] | None = None) -> int:
    """Ask the questions, print a line of JSON for each; returns the exit code."""
    parser = argparse.ArgumentParser(prog="first_run", description="Ask TensorRT-LLM on this machine what is open.")
    parser.add_argument("model", help="a Hugging Face folder or name; a small one will do")
    parser.add_argument("--backend", default="UCX", help="of the KV transceiver: UCX, NIXL, DEFAULT (default UCX)")
    parser.add_argument("--gpus", default="", help="two, comma-separated; one: both sides share it (default: shared)")
    parser.add_argument("--memory", type=float, default=0.3, help="fraction of free memory for each side's KV")
    parser.add_argument("--llm-args", type=Path, metavar="YAML", help="more arguments for both sides")
    parser.add_argument("--only", action="append", default=[], metavar="QUESTION", help="by name; may be repeated")
    parser.add_argument("--start-s", type=float, default=900.0, help="how long a side may take to load")
    given = parser.parse_args(arguments)
    more = yaml.safe_load(given.llm_args.read_text(encoding="utf-8")) or {} if given.llm_args else {}
    llm = llm_arguments(given.model, given.backend, given.memory, more)
    gpus = [gpu for gpu in given.gpus.split(",") if gpu] or [None]
    failed = False
    with contextlib.ExitStack() as stack:
        prefill = stack.enter_context(contextlib.closing(SideProcess("prefill", llm, gpus[0], given.start_s)))
        decode = stack.enter_context(contextlib.closing(SideProcess("decode", llm, gpus[-1], given.start_s)))
        for record in answers(prefill, decode, frozenset(given.only)):
            failed |= "error" in record
            print(json.dumps(record), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
