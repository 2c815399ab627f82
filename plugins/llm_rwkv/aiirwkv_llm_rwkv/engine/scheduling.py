"""Whose turn it is: which texts are worked on at once, and in which order prompts are read. Fair between users."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from ..runtimes.runtime import Runtime
from .requests import Row, Run
from .reuse import Reuse

__all__ = ["Schedule"]

LONG = 4096
"""Tokens of a prompt after which a user's next prompts overtake it."""

log = logging.getLogger(__name__)


class Schedule:
    """
    The rows at work and those that wait. For the engine's thread.

    A user's requests are served in the order in which they came; users share the slots and the passes evenly, however
    much one of them asks.
    """

    ROWS = 64
    """Texts that are worked on at once, at most, if nothing else is asked for."""
    POOL = 512 * 2**20
    """Bytes that their states may take then."""

    def __init__(self, runtime: Runtime, reuse: Reuse, rows: int = 0) -> None:
        """At most `rows` texts at once; 0 chooses by the size of a state."""
        self.runtime, self.reuse = runtime, reuse
        self.most = rows or max(1, min(self.ROWS, self.POOL // (4 * runtime.layout.size)))
        self.rows: list[Row] = []
        self.waiting: list[Row] = []
        self.parked: list[Row] = []
        """Their prompts begin with what another row is just reading; they wait for its state."""
        self._requests = self._turn = self._slots = 0
        self._free: list[int] = []
        self._served: dict[str, int] = {}

    def add(self, run: Run) -> None:
        self._requests += 1
        self.waiting.append(Row(run, self._requests, state=run.state))

    def branch(self, row: Row, state: Tensor) -> None:
        """Let the other texts of its request begin from the state, and with the logits, that it has now."""
        for index in range(1, len(row.run.outputs)):
            more = Row(row.run, row.order, index, at=row.at, state=state, fresh=False)
            more.logits = None if row.logits is None else row.logits.clone()
            self.waiting.append(more)

    def everybody(self) -> list[Row]:
        return [*self.rows, *self.waiting, *self.parked]

    def admit(self, fail: Callable[[Run, Exception], None]) -> None:
        """Give slots to those who wait, as far as there are any. `fail` is told for whom that cannot be done."""
        for row in self.parked[:]:
            if self.reuse.begin(row):
                self.reuse.done(row)
                self.parked.remove(row)
                self.waiting.append(row)
        while self.waiting:
            row = foremost(self.waiting, self.rows)
            self.waiting.remove(row)
            try:
                if not self._room(row):
                    self.waiting.append(row)
                    return
                if self.reuse.begin(row):
                    self._enter(row)
                else:
                    self.parked.append(row)
            except Exception as error:  # no memory for a single row, a state that does not fit or cannot be read
                self.reuse.done(row)
                fail(row.run, error)

    def leave(self) -> None:
        """Whoever is done, has failed or was cancelled makes room."""
        for row in self.everybody():
            if row.over or row.run.over:
                self.reuse.done(row)
                if row.slot >= 0:
                    self._vacate(row)
        self.waiting = [row for row in self.waiting if not row.run.over]
        self.parked = [row for row in self.parked if not row.run.over]
        if not self.rows:
            self._served.clear()

    def readers(self) -> list[Row]:
        """
        Rows with a prompt to read, those first whose users had their turn longest ago.

        What is only read for later lets everybody pass, and a very long prompt the user's own shorter ones.
        """

        def turn(row: Row) -> tuple[bool, int, int, int]:
            return row.run.read_only, self._served.get(row.run.owner, 0), row.at // LONG, row.order

        return sorted((row for row in self.rows if row.reading), key=turn)

    def served(self, rows: Iterable[Row]) -> None:
        """They have had their turn."""
        self._turn += 1
        self._served |= dict.fromkeys((row.run.owner for row in rows), self._turn)

    def _room(self, row: Row) -> bool:
        """See to a free slot: a new one, or that of a row whose owner has more than a fair share of them."""
        if not self._free and self._slots < self.most:
            self._grow()
        if not self._free and (victim := crowded(self.rows, row)):
            victim.state = self.runtime.get(victim.slot)
            self._vacate(victim)
            self.waiting.append(victim)
        return bool(self._free)

    def _grow(self) -> None:
        """More slots. If there is no memory for them, fewer rows must do; for a single one, MemoryError."""
        wished = min(self.most, max(4, 2 * self._slots))
        for slots in (wished, self._slots + 1):
            try:
                self.runtime.grow(slots)
            except MemoryError as error:
                if not self._slots and slots == 1:
                    raise
                log.warning("there is no room for %d rows: %s", slots, error)
            else:
                self._free += reversed(range(self._slots, slots))
                self._slots = slots
                return
        self.most = self._slots

    def _enter(self, row: Row) -> None:
        """It gets a slot, and into it the state from which it goes on."""
        if row.fresh:
            self.reuse.resume(row)
            row.fresh = False
        self.runtime.put(self._free[-1], row.state)
        row.slot = self._free.pop()
        row.state = None
        self.rows.append(row)

    def _vacate(self, row: Row) -> None:
        self._free.append(row.slot)
        row.slot = -1
        self.rows.remove(row)


def foremost(waiting: Iterable[Row], active: Iterable[Row]) -> Row:
    """Who is let in next: of the owners with the fewest active rows, the one whose request came first."""
    load = Counter(row.run.owner for row in active)
    return min(waiting, key=lambda row: (load[row.run.owner], row.order, row.index))


def crowded(active: Sequence[Row], row: Row) -> Row | None:
    """Whose slot this row should have: the last row of the owner who has most of them, if that makes it fairer."""
    load = Counter(row.run.owner for row in active)
    owner, most = max(load.items(), key=lambda item: item[1], default=("", 0))
    if most - load[row.run.owner] < 2:
        return None
    return max((each for each in active if each.run.owner == owner), key=lambda each: (each.order, each.index))
