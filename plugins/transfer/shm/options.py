"""The options of the shm transfer."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ShmOptions(BaseModel, extra="forbid", frozen=True):
    """What a worker's shm transfer takes of the machine."""

    copy_threads: int = Field(2, ge=1, le=16, description="Threads that copy blocks of reads over 1 MiB.")
