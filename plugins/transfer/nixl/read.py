"""One read: which pieces are still to be posted, how many are under way into its targets, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator

from trtserve.plugins.transfer.nixl.layout import Piece
from trtserve.plugins.transfer_api import Completion, TransferId, TransferOutcome


class Read:
    """Once `outcome` is set nothing more is posted; a read that was never stopped has none and is DONE. The read has
    ended when besides none of its pieces is under way into its targets."""

    def __init__(self, transfer_id: TransferId, pieces: Iterator[Piece], begun_s: float, deadline_s: float) -> None:
        """begun_s, deadline_s: of the monotonic clock."""
        self.id = transfer_id
        self.deadline_s = deadline_s
        self.outcome: TransferOutcome | None = None
        self.reason = ""
        self.under_way = 0  # pieces
        self._pieces = pieces
        self._begun_s = begun_s
        self._num_bytes = 0
        self._next = next(pieces, None)

    @property
    def has_more(self) -> bool:
        """Whether a piece is to be posted."""
        return self.outcome is None and self._next is not None

    @property
    def has_ended(self) -> bool:
        return not self.under_way and not self.has_more

    def take_piece(self) -> Piece:
        """The next piece, to be posted; `has_more` comes first."""
        piece = self._next
        assert piece is not None
        self._next = next(self._pieces, None)
        self.under_way += 1
        return piece

    def end_piece(self, num_bytes: int) -> None:
        """A piece that was taken writes no more into the targets. num_bytes: what has arrived of it."""
        self.under_way -= 1
        self._num_bytes += num_bytes

    def stop(self, outcome: TransferOutcome, reason: str) -> None:
        """Post nothing more and end thus, unless an end is decided already."""
        if self.outcome is None:
            self.outcome, self.reason = outcome, reason

    def completion(self, now_s: float) -> Completion:
        """The end of a read that has ended."""
        outcome = self.outcome or TransferOutcome.DONE
        return Completion(self.id, outcome, self._num_bytes, now_s - self._begun_s, self.reason)
