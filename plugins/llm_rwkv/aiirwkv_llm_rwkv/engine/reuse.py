"""What the engine reads only once: states continued from, kept for later, and waited for while they are being made."""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable, Sequence

from aiirwkv.errors import ServiceError
from torch import Tensor

from ..cache.states import StateCache
from .requests import SPACING, Row

__all__ = ["Reuse"]

log = logging.getLogger(__name__)


class Reuse:
    """Between the engine's rows and the state cache; without a cache it does nothing. For the engine's thread."""

    def __init__(self, cache: StateCache | None, model: str) -> None:
        """`model` is the model's name, for whoever looks at a kept state."""
        self.cache, self.model = cache, model

    def begin(self, row: Row) -> bool:
        """Say what the row is going to read. False while another one is reading some of it."""
        run = row.run
        if not (row.fresh and run.cache and self.cache):
            return True
        if not row.keys:
            marks = run.marks()
            row.keys = dict(zip(marks, self.cache.keys(run.root, run.prompt, marks), strict=True))
        row.holds = self.cache.begin(*row.keys.values())
        return row.holds

    def done(self, row: Row, until: int | None = None) -> None:
        """What the row has read up to there is kept; None: others wait in vain for the rest."""
        if row.holds and self.cache:
            self.cache.done(*(key for mark, key in row.keys.items() if until is None or mark <= until))
            row.holds = until is not None and until < len(row.run.prompt)

    def resume(self, row: Row) -> None:
        """Let it go on from the longest beginning of the prompt whose state is kept, and see where to keep more."""
        if not (row.holds and self.cache):
            return
        run, whole = row.run, len(row.run.prompt)
        if found := self.cache.longest(run.root, run.prompt):
            row.at, row.state, row.logits = found.length, found.state, found.logits if found.length == whole else None
            run.usage.cached, run.usage.hits, run.usage.bytes = found.length, 1, found.entry.header.nbytes
            self.done(row, found.length)
        row.marks = [mark for mark in run.marks() if mark > row.at or (run.pin and mark == whole)]
        branch = self.cache.shared(run.root, run.prompt)
        if row.at + SPACING <= branch and all(abs(branch - mark) >= SPACING for mark in row.marks):
            insort(row.marks, branch)

    def keep(self, row: Row, state: Tensor) -> None:
        """Keep the state of a row that has come to a mark. Raises ServiceError when it was to be pinned and cannot."""
        run, mark = row.run, row.marks.pop(0)
        if mark == len(run.prompt):
            run.kept = self._keep(row, run.prompt, state, row.logits, run.label, run.pin)
        else:
            self._keep(row, run.prompt[:mark], state)
        self.done(row, mark)

    def keep_answer(self, row: Row, state: Callable[[], Tensor]) -> None:
        """Keep the state after an answer, if the next prompt of the conversation will have the same tokens."""
        run, read = row.run, row.at - len(row.run.prompt)
        if not (run.cache and self.cache and run.answered) or read < SPACING or len(run.outputs) > 1:
            return
        if list(run.answered(row.text)[:read]) == row.ids[:read]:
            self._keep(row, [*run.prompt, *row.ids[:read]], state())

    def _keep(
        self,
        row: Row,
        tokens: Sequence[int],
        state: Tensor,
        logits: Tensor | None = None,
        label: str = "",
        pin: bool = False,
    ) -> str:
        assert self.cache
        try:
            entry = self.cache.keep(
                row.run.root, tokens, state, logits, owner=row.run.owner, model=self.model, label=label, pin=pin
            )
            return entry.id if entry else ""
        except ServiceError:
            raise
        except (MemoryError, OSError) as error:
            log.warning("the state after %d tokens is not kept: %s", len(tokens), error)
            return ""
