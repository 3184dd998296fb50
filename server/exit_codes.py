"""What the process's exit code says. docs/operations.md has the same table."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Of `trtserve serve`."""

    OK = 0  # ended as asked, everything answered
    DEFECT = 1  # an error of ours; the log has the traceback
    USAGE = 2  # settings or plugins: the text names each one
    MODEL = 3  # the model could not be found, fetched or read
    WORKER = 4  # a worker did not start; its last lines were printed
    ADDRESS = 5  # the HTTP or worker address cannot be used
    CUT_OFF = 6  # ended as asked, but requests were cut off by the shutdown timeout or a second signal
