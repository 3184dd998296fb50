"""How the slow steps of getting a model tell how far they are."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

from tqdm import tqdm


class Progress(Protocol):
    """Called from one thread, many times a second at most; must be quick."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """step: what is going on, in words; done of total in the step's own units (bytes, tensors); 0: unknown."""


def silent(step: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


class ProgressBar:
    """A tqdm bar on stderr for each step, one after the other; as a context manager it ends the last one too."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._step = ""

    def __call__(self, step: str, done: int, total: int) -> None:
        bar: tqdm[Any] | None = self._bar
        if bar is None or step != self._step:
            self.close()
            self._bar = bar = tqdm(desc=step, total=total or None, unit_scale=True, unit="", dynamic_ncols=True)
            self._step = step
        bar.total = total or bar.total
        bar.update(done - bar.n)

    def close(self) -> None:
        """End the bar of the current step; idempotent."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
