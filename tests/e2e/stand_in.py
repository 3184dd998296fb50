"""Whole servers whose workers run the TensorRT-LLM engine on the stand-in for TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.process import ServerProcess, eventually

CONTRACT = Path(__file__).parents[1] / "contract"
NUM_BLOCKS = 64


class StandInServer(ServerProcess):
    """`broken_rules` are the rules of TensorRT-LLM that any of its workers broke, a line each."""

    def __init__(self, *arguments: str, rules: Path, num_workers: int, environment: dict[str, str]) -> None:
        super().__init__(*arguments, environment=environment)
        self._rules = rules
        self._num_workers = num_workers

    def until_idle(self, num_blocks: int = NUM_BLOCKS) -> None:
        """num_blocks: of each worker."""
        super().until_idle(num_blocks * self._num_workers)

    def until_serving(self) -> None:
        """Wait until every worker is given requests. One that is up is not before it has tried its pairs."""

        def serving() -> set[str]:
            ranks = self.client.get("/v1/router/state").json()["workers"]
            return {rank["id"].partition("/")[0] for rank in ranks if not rank["is_draining"]}

        eventually(lambda: len(serving()) == self._num_workers, "every worker serves", timeout_s=30)

    def broken_rules(self) -> list[str]:
        return self._rules.read_text().splitlines() if self._rules.exists() else []


@contextmanager
def stand_in_server(
    model: Path, scratch: Path, *more: str, mode: str = "agg", prefill: int = 1, decode: int = 1, **variables: str
) -> Iterator[StandInServer]:
    """A server that is ready, and that breaks no rule before it has ended. scratch: a folder of its own; variables: of
    the stand-in, without their prefix."""
    rules = scratch / "broken-rules.txt"
    environment = {"PYTHONPATH": str(CONTRACT), "TENSORRT_LLM_STAND_IN_VIOLATIONS": str(rules)}
    # Words only, and no end of its own: answers are as those of the simulated engine.
    variables = {"TOKENS": "400-999", "LENGTH": "never"} | variables
    environment |= {f"TENSORRT_LLM_STAND_IN_{name}": value for name, value in variables.items()}
    flags = ["--engine", "tensorrt_llm", "--mode", mode, "--block-size", "16", "--num-blocks", str(NUM_BLOCKS)]
    flags += ["--max-seq-len", "1024"]
    if mode == "disagg":
        flags += ["--disagg-policy", "always", "--prefill-workers", str(prefill), "--decode-workers", str(decode)]
    num_workers = prefill + decode if mode == "disagg" else 1
    with StandInServer(
        str(model), *flags, *more, rules=rules, num_workers=num_workers, environment=environment
    ) as server:
        server.until_ready()
        server.until_serving()
        yield server
        assert server.broken_rules() == []
    assert server.broken_rules() == []
