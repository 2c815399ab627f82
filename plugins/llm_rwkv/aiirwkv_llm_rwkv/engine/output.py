"""From tokens to text that may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from ..tokenizer import Utf8

__all__ = ["Output"]


class Output:
    """
    The text of one answer, token by token.

    It ends before the stop string that is complete first, the longest one if several are, however the text was cut
    into tokens. What could be the beginning of one is held back until it is known not to be. With `strip`, white space
    before the first word is left out.
    """

    def __init__(self, stop: Sequence[str] = (), strip: bool = False) -> None:
        self._stop = [string for string in stop if string]
        self._strip = strip
        self._utf8 = Utf8()
        self._held = ""
        self.stopped = False

    def add(self, token: bytes) -> str:
        """What can be shown now; `stopped` says whether a stop string was completed."""
        self._held += self._utf8.add(token)
        found = [(at + len(string), at) for string in self._stop if (at := self._held.find(string)) >= 0]
        if found:
            self.stopped = True
            return self._show(min(found)[1])
        return self._show(len(self._held) - max((_overlap(self._held, string) for string in self._stop), default=0))

    def end(self) -> str:
        """The rest, when the answer ended in another way. A character that is not whole is left out."""
        return "" if self.stopped else self._show(len(self._held))

    def _show(self, until: int) -> str:
        text, self._held = self._held[:until], self._held[until:]
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        return text


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of the text are the beginning of the string, but not all of it."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
