"""Finding the end of an answer by what it says.

The rule: the stop string that is *complete* first ends the text; of those complete at the same character, the longest.
It is what a reader of single characters would do, so it does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one text for stop strings. Holds back only what may be the beginning of one."""

    __slots__ = ("_held", "_include", "_stops", "matched")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """include: the stop string itself belongs to the text. Raises ValueError for an empty stop string."""
        if not all(stops):
            raise ValueError("a stop string is empty; it would end every text before it begins")
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """The text that is safe now; '' for ever after a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        first: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (first is None or (start + len(stop), start) < first):
                first = (start + len(stop), start)
                self.matched = stop
        if first is not None:
            self._held = ""
            return text[: first[0] if self._include else first[1]]
        safe = self._first_beginning(text)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """The text ends here: what was held back was no stop string."""
        text, self._held = self._held, ""
        return text

    def _first_beginning(self, text: str) -> int:
        """Where the text's last part starts that some stop string begins with; its length if there is none."""
        end = first = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, end - len(stop) + 1), first)
            while start >= 0:
                if stop.startswith(text[start:]):
                    first = start
                    break
                start = text.find(stop[0], start + 1, first)
        return first
