"""Numbers of passages in a model's text: let through those that were sent, tell which sentence rests on what."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from .sentences import split

__all__ = ["Marks", "cited"]

_MARK = re.compile(r"\s*\[(\d{1,3}(?:\s*[,，、]\s*\d{1,3})*)\]")
_OPEN = re.compile(r"\s*\[[\d\s,，、]*$|\s+$")


class Marks:
    """
    A filter for streamed text that removes marks like [7] of passages that were not sent.

    Holds back only what may still become a mark, and a beginning that may still become the refusal.
    """

    def __init__(self, numbers: Collection[int], refusal: str = "") -> None:
        self._numbers = numbers
        self._refusal = _bare(refusal)
        self._held = ""
        self._begun = False

    @property
    def refused(self) -> bool:
        """So far the text is the refusal, and nothing else."""
        return not self._begun and bool(self._refusal) and _bare(self._held).startswith(self._refusal)

    def feed(self, text: str) -> str:
        """The next piece of text, with what can be let through."""
        self._held += text
        if not self._begun:
            start = _bare(self._held)
            if not start or self._refusal.startswith(start) or (self._refusal and start.startswith(self._refusal)):
                return ""
            self._begun = True
        waiting = _OPEN.search(self._held)
        cut = waiting.start() if waiting else len(self._held)
        ready, self._held = self._held[:cut], self._held[cut:]
        return self._clean(ready)

    def rest(self) -> str:
        """What was held back; call it at the end, unless the text is the refusal."""
        ready, self._held = self._held, ""
        return self._clean(ready).rstrip()

    def _clean(self, text: str) -> str:
        return _MARK.sub(self._known, text)

    def _known(self, mark: re.Match[str]) -> str:
        known = [number for number in _numbers(mark[1]) if number in self._numbers]
        blank = " " if mark[0][0].isspace() else ""
        return blank + "".join(f"[{number}]" for number in dict.fromkeys(known)) if known else ""


def cited(text: str) -> list[tuple[str, list[int]]]:
    """The sentences of an answer without their marks, each with the numbers it names (also just after its end)."""
    found: list[tuple[str, list[int]]] = []
    for sentence in split(text):
        numbers = [number for mark in _MARK.finditer(sentence.text) for number in _numbers(mark[1])]
        bare = _MARK.sub("", sentence.text).strip()
        leading = re.match(r"(?:\s*\[\d{1,3}\])+", sentence.text)
        if leading and found:
            early = _numbers(leading[0])
            found[-1][1].extend(early)
            numbers = numbers[len(early) :]
        if bare:
            found.append((bare, numbers))
    return found


def _numbers(text: str) -> Sequence[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _bare(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).lower()
