"""How many tokens of prompts go into one pass, so that those who are writing hardly notice; and figures of passes."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

__all__ = ["Pace", "Pass"]


class Pass(NamedTuple):
    """What one step of the engine did."""

    end: float
    seconds: float
    written: int
    """Tokens, one of each row that writes."""
    read: int
    """Tokens of prompts."""
    gap: float
    """The longest time since a row's last token, of the rows that wrote one now."""


class Pace:
    """It learns from the last passes what one without a prompt takes, and what a token of a prompt adds."""

    EXTRA = 1.0
    """What prompts may add to a pass, in passes without any: the time between two tokens is doubled then."""
    LEAST, MOST = 8, 256
    """Tokens of prompts that are read beside rows that write."""

    def __init__(self, seconds: float = 10) -> None:
        """Figures are of the last `seconds`."""
        self.seconds = seconds
        self._passes: deque[Pass] = deque()
        self._alone: dict[int, deque[float]] = {}
        self._token: deque[float] = deque(maxlen=3)

    def chunk(self, writing: int, most: int) -> int:
        """Tokens of prompts, at most `most`, for a pass in which so many rows write."""
        if not writing:
            return most
        alone = self._alone.get(writing.bit_length())
        if not alone:
            return 0  # first one pass without a prompt, to see what it takes
        token = median(self._token) if self._token else math.inf
        fits = self.EXTRA * median(alone) / token if token else math.inf
        return int(min(max(fits, self.LEAST), self.MOST, most))

    def note(self, done: Pass, writing: int) -> None:
        """After a pass in which so many rows read the token they had chosen before."""
        self._passes.append(done)
        while self._passes[0].end < done.end - self.seconds:
            self._passes.popleft()
        if not writing:
            return
        alone = self._alone.setdefault(writing.bit_length(), deque(maxlen=5))
        if not done.read:
            alone.append(done.seconds)
        elif alone:
            self._token.append(max(done.seconds - median(alone), 0.0) / done.read)

    def figures(self, now: float) -> dict[str, float]:
        """Of the last seconds: tokens read and written per second, rows that wrote at once, and the longest gap."""
        passes = [done for done in tuple(self._passes) if done.end >= now - self.seconds]
        span = max(now - passes[0].end + passes[0].seconds, 1e-9) if passes else 1.0
        writing = [done.written for done in passes if done.written]
        return {
            "read_per_second": round(sum(done.read for done in passes) / span, 1),
            "written_per_second": round(sum(done.written for done in passes) / span, 1),
            "rows_mean": round(sum(writing) / max(len(writing), 1), 2),
            "longest_gap": round(max((done.gap for done in passes), default=0.0), 4),
        }
