"""What a test may change from outside the process: variables named TENSORRT_LLM_STAND_IN_*, read when the LLM is made.

| variable | default | meaning |
|---|---|---|
| VIOLATIONS | none | file that gets one line for each broken rule |
| REQUESTS | none | file that gets one JSON line for each accepted request |
| VERSION | 1.2.1 | `tensorrt_llm.__version__` |
| WITHOUT, WITH | none | comma-separated `Owner.name`: taken from, or added to, the fields or keywords |
| ARGUMENTS | 1.2 | `1.3`: kv_cache_config is merged and made an object, a raw speculative_config names its own type |
| STEP_MS | 1 | time of one engine step |
| LOAD_MS | 0 | time of the constructor |
| LENGTH | natural | tokens before the end token: a number, `natural` (each token ends with chance 1/64), `never` |
| TOKENS | all | `FIRST-LAST`: the ids that are generated, special ones left out |
| REQUEST_ERROR_TOKEN | none | a prompt with this token ends in RequestError |
| FATAL_ERROR_TOKEN | none | a prompt with this token ends the executor |
| KV_BLOCKS | 4096 | blocks of the whole KV memory, of which free_gpu_memory_fraction is used |
| DROP_EVERY_EVENT | 0 | each n-th KV event is lost |
| BLOCK_HASHES | int | `hex`: hashes as text, as 1.3 has them |
| EXCLUDE_FIRST_TOKENS | 0 | 1: a generation_only stream begins after first_gen_tokens. `hidden`: they come together |
| | | with the next token, and are not in token_ids_diff |
| CONTEXT_FINISH | not_finished | or `length`: the finish reason of a context_only request that goes on |
| EARLY_ENDS | 0 | 1: with n > 1 each sequence's own last response says its finish reason |
| END_TOKEN | kept | `trimmed`: the end token is not in token_ids |
| FIRST_REQUEST_ID | 1 | ids count up from here; they are unsigned 64-bit numbers |
| TRANSFER_MS | 0 | time of one KV transfer |
| TRANSFER_FAILURES | 0 | this many transfers fail first; `all` |
| DEVICES | 8 | GPUs there, where CUDA_VISIBLE_DEVICES does not say |
"""

from __future__ import annotations

import os
from dataclasses import dataclass

PREFIX = "TENSORRT_LLM_STAND_IN_"


def variable(name: str, default: str = "") -> str:
    """The value of one variable above."""
    return os.environ.get(PREFIX + name, default)


def listed(name: str) -> frozenset[str]:
    """The comma-separated names in a variable."""
    return frozenset(item.strip() for item in variable(name).split(",") if item.strip())


def _token(name: str) -> int | None:
    text = variable(name)
    return int(text) if text else None


def _token_range() -> tuple[int, int] | None:
    text = variable("TOKENS")
    if not text:
        return None
    first, last = text.split("-")
    return int(first), int(last)


@dataclass(frozen=True, slots=True)
class Environment:
    """The variables that one LLM runs with."""

    step_s: float
    load_s: float
    length: str
    tokens: tuple[int, int] | None
    request_error_token: int | None
    fatal_error_token: int | None
    kv_blocks: int
    drop_every_event: int
    hex_hashes: bool
    exclude_first_tokens: str
    context_finish: str
    trims_end_token: bool
    transfer_s: float
    transfer_failures: int
    devices: int

    @classmethod
    def read(cls) -> Environment:
        failures = variable("TRANSFER_FAILURES", "0")
        return cls(
            step_s=float(variable("STEP_MS", "1")) / 1000,
            load_s=float(variable("LOAD_MS", "0")) / 1000,
            length=variable("LENGTH", "natural"),
            tokens=_token_range(),
            request_error_token=_token("REQUEST_ERROR_TOKEN"),
            fatal_error_token=_token("FATAL_ERROR_TOKEN"),
            kv_blocks=int(variable("KV_BLOCKS", "4096")),
            drop_every_event=int(variable("DROP_EVERY_EVENT", "0")),
            hex_hashes=variable("BLOCK_HASHES", "int") == "hex",
            exclude_first_tokens=variable("EXCLUDE_FIRST_TOKENS", "0"),
            context_finish=variable("CONTEXT_FINISH", "not_finished"),
            trims_end_token=variable("END_TOKEN") == "trimmed",
            transfer_s=float(variable("TRANSFER_MS", "0")) / 1000,
            transfer_failures=1 << 30 if failures == "all" else int(failures),
            devices=_visible_devices(),
        )


def _visible_devices() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return int(variable("DEVICES", "8"))
    return len([device for device in visible.split(",") if device.strip()])
