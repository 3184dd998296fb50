"""What is said to people on stdout and stderr, which may be closed, full, or a pipe that nobody reads any more; a
server goes on all the same.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO


def say(text: str) -> None:
    """A line, or several, on stdout."""
    _write(sys.stdout, text)


def say_error(text: str) -> None:
    """The same on stderr."""
    _write(sys.stderr, text)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # it was closed when Python started
        return
    try:
        print(text, file=stream, flush=True)
    except OSError:
        # What could not be written stays in the buffer, and would be an error again when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
