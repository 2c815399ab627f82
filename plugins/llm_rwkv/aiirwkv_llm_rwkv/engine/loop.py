"""
The engine: one thread that owns the model and works on all requests at once (continuous batching).

Each pass lets rows in, reads with one forward call the token that each writing row has chosen and a portion of the
prompts, keeps states, chooses the next tokens, and hands out text.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
import torch
from aiirwkv.errors import DeadlineExceeded, ServiceError
from aiirwkv.types import Chunk
from torch import Tensor

from ..cache.states import StateCache
from ..runtimes.runtime import Piece, Runtime
from ..tokenizer import Tokenizer
from .pace import Pace, Pass
from .reader import Reader
from .requests import SPACING, Row, Run
from .reuse import Reuse
from .sampling import choose_all, logprob
from .scheduling import Schedule

__all__ = ["Engine", "Told", "hand_out"]

Told = tuple[Run, Chunk | ServiceError]
"""Who is told what."""

log = logging.getLogger(__name__)


def hand_out(told: Sequence[Told]) -> None:
    for run, piece in told:
        run.emit(piece)


class Engine:
    """Runs a model. `submit`, `close` and `stats` may be called from any thread."""

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        *,
        name: str = "",
        cache: StateCache | None = None,
        rows: int = 0,
        threads: int = 0,
        deliver: Callable[[list[Told]], None] = hand_out,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        `name` is the model's. At most `rows` texts at once; 0 chooses by the size of a state. `deliver` gets, in the
        engine's thread, all that a pass has to tell.
        """
        self.runtime, self.tokenizer, self.cache = runtime, tokenizer, cache
        self.threads, self.deliver, self.clock = threads, deliver, clock
        self.reader = Reader(runtime)
        self.reuse = Reuse(cache, name)
        self.schedule = Schedule(runtime, self.reuse, rows)
        self.pace = Pace()
        self.tokens_read = self.tokens_written = 0
        self._told: list[Told] = []
        self._inbox: SimpleQueue[Run | None] = SimpleQueue()
        self._closing = self._finishing = self._closed = False
        self._thread = threading.Thread(target=self._work, name="rwkv-engine", daemon=True)

    # From any thread

    def start(self) -> None:
        self._thread.start()

    def submit(self, run: Run) -> None:
        self._inbox.put(run)
        if self._closed:
            self._turn_away()

    def close(self, finish: bool = False) -> None:
        """End the thread. What is not done gets an error, unless it is to be finished first."""
        self._finishing, self._closing = finish, True
        self._inbox.put(None)
        self._thread.join()

    def stats(self) -> dict[str, Any]:
        """For `$SRV.STATS`. Rates, the mean number of rows and the longest gap are of the last seconds."""
        schedule = self.schedule
        return {
            "running": len(schedule.rows),
            "waiting": len(schedule.waiting) + self._inbox.qsize(),
            "parked": len(schedule.parked),
            "rows": schedule.most,
            "tokens_read": self.tokens_read,
            "tokens_written": self.tokens_written,
            **self.pace.figures(self.clock()),
            "threads": self.threads,
            "runtime": dict(self.runtime.choices),
            "states": msgspec.to_builtins(self.cache.stats()) if self.cache else {},
        }

    # The thread

    def _work(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        with torch.inference_mode():
            while not self._closing or (self._finishing and self.busy):
                try:
                    self.take()
                    self.step()
                except Exception as error:  # a mistake of ours, not of a request: all are told, the engine lives on
                    log.exception("a pass of the engine failed")
                    self._end_all(_typed(error))
        self._end_all(_stopped())
        self._closed = True
        self._turn_away()

    @property
    def busy(self) -> bool:
        return not self._inbox.empty() or bool(self.schedule.everybody())

    def take(self) -> None:
        """Take in what has come; sleep while there is nothing to do."""
        while not self._inbox.empty() or not (self.busy or self._closing):
            if run := self._inbox.get():
                self.schedule.add(run)

    def _turn_away(self) -> None:
        with suppress(Empty):
            while True:
                if run := self._inbox.get_nowait():
                    self.deliver([(run, _stopped())])

    def _end_all(self, error: ServiceError) -> None:
        for row in self.schedule.everybody():
            self._fail(row.run, error)
        self.schedule.leave()
        self._hand_out()

    def step(self) -> None:
        """One pass."""
        began, before = self.clock(), self.tokens_written
        self._expire(began)
        self.schedule.admit(self._fail)
        batch, writing = self._plan()
        logits = self._read(batch)
        ready = [row for row in self.schedule.rows if row.logits is not None and not row.run.over]
        writers = [row for row in ready if not row.run.read_only]
        gap = self._write(writers, _together(writers, batch, logits)) if writers else 0.0
        self._hand_out()
        self._keep()
        self.schedule.leave()
        self._hand_out()
        for row in ready:
            row.logits = None
        now, read = self.clock(), sum(len(piece.tokens) for _, piece in batch) - writing
        self.tokens_read += read
        self.pace.note(Pass(now, now - began, self.tokens_written - before, read, gap), writing)

    def _expire(self, now: float) -> None:
        for row in self.schedule.everybody():
            if now > row.run.deadline:
                self._fail(row.run, DeadlineExceeded("generate: the time given ran out before the text was complete"))
        self.schedule.leave()

    def _plan(self) -> tuple[list[tuple[Row, Piece]], int]:
        """One token of each row that writes (and how many these are), then portions of the prompts."""
        batch = [(row, row.piece(1)) for row in self.schedule.rows if row.pending and not row.reading]
        writing = len(batch)
        budget = self.pace.chunk(writing, self.reader.most)
        for row in self.schedule.readers():
            if budget <= 0 or (len(batch) > writing and budget < min(SPACING, row.pending)):
                break
            batch.append((row, row.piece(budget)))
            budget -= len(batch[-1][1].tokens)
        self.schedule.served(row for row, _ in batch[writing:])
        return batch, writing

    def _read(self, batch: list[tuple[Row, Piece]]) -> Tensor:
        """Advance the states by the batch; rows that have read everything get logits. Returns those of all."""
        if not batch:
            return torch.empty(0, self.runtime.vocabulary)
        logits, errors = self.reader.forward([piece for _, piece in batch])
        for (row, piece), error, line in zip(batch, errors, logits, strict=True):
            if error:
                self._fail(row.run, error)
            else:
                row.at += len(piece.tokens)
                row.logits = None if row.pending else line
        return logits

    def _write(self, rows: list[Row], logits: Tensor) -> float:
        """Choose each row's next token, from logits [rows, V]. Returns the longest time since a row's last one."""
        tokens, now = choose_all([row.run.samplers[row.index] for row in rows], logits), self.clock()
        gap = 0.0
        for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if isinstance(token, Exception):
                self._fail(row.run, token)
                continue
            gap = max(gap, now - row.last) if row.ids else gap
            row.last = now
            known = logprob(logits[number], token) if row.run.logprobs else None
            self.tokens_written += token not in row.run.stop
            self._tell(row, row.add(token, self.tokenizer.tokens.get(token, b""), known))
        return gap

    def _tell(self, row: Row, piece: Chunk | None) -> None:
        if piece:
            row.run.over = row.run.unfinished == 0
            self._told.append((row.run, piece))

    def _keep(self) -> None:
        """Keep the states of rows that have come to a mark or an end; let a prompt's other texts begin."""
        for row in self.schedule.rows:
            run, whole = row.run, len(row.run.prompt)
            if run.over and not row.over:
                continue
            complete = row.at == whole and row.logits is not None
            if complete and row.index == 0 and len(run.outputs) > 1:
                self.schedule.branch(row, self.runtime.get(row.slot))
            try:
                if row.marks and row.at == row.marks[0]:
                    self.reuse.keep(row, self.runtime.get(row.slot))
                if row.over:
                    self.reuse.keep_answer(row, partial(self.runtime.get, row.slot))
            except ServiceError as error:
                self._fail(run, error)
            if run.read_only and complete:
                self._tell(row, row.end("", "stop"))

    def _fail(self, run: Run, error: Exception) -> None:
        if not run.over:
            run.over = True
            self._told.append((run, _typed(error)))

    def _hand_out(self) -> None:
        if self._told:
            told, self._told = self._told, []
            self.deliver(told)


def _together(rows: list[Row], batch: list[tuple[Row, Piece]], logits: Tensor) -> Tensor:
    """The logits of these rows [rows, V]; without a copy if they are the first of the batch."""
    if rows == [row for row, _ in batch[: len(rows)]]:
        return logits[: len(rows)]
    return torch.stack([row.logits for row in rows if row.logits is not None])


def _typed(error: Exception) -> ServiceError:
    """What a caller is told."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, MemoryError):
        return ServiceError(f"generate: out of memory, even for a little at a time: {error}; free some and ask again")
    return ServiceError(f"generate: the model failed with {type(error).__name__}: {error}")


def _stopped() -> ServiceError:
    return ServiceError("generate: the worker was stopped before the answer was complete; ask again")
