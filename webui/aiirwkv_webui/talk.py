"""A conversation without its looks: questions, the answers that stream in, stop. It outlives a reload of the page."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
from aiirwkv import AiirwkvError, Answer, Chat, Message, Receipt

if TYPE_CHECKING:
    from aiirwkv.bus import Bus

ROUNDS = 6
"""Earlier rounds that go along with a question."""


@dataclass(eq=False)
class Turn:
    """One question and what became of it; `text` grows until `over`."""

    question: str
    collections: list[str]
    stages: list[str] = field(default_factory=list)
    text: str = ""
    answer: Answer | None = None
    receipt: Receipt | None = None
    error: str = ""
    stopped: bool = False
    over: bool = False


class Talk:
    """The turns of one browser tab. It runs while somebody looks on: the last one to leave stops it."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self._scope: anyio.CancelScope | None = None
        self._viewers = 0

    @property
    def busy(self) -> bool:
        return self._scope is not None

    def join(self) -> None:
        self._viewers += 1

    def leave(self) -> None:
        self._viewers -= 1
        if not self._viewers:
            self.stop()

    def stop(self) -> None:
        """Stop the answer that is being written; what is there stays."""
        if self._scope:
            self._scope.cancel()

    def ask(self, bus: Bus, question: str, collections: list[str]) -> None:
        """Begin a new turn."""
        self.turns.append(Turn(question, collections))
        self.start(bus, self.turns[-1])

    def start(self, bus: Bus, turn: Turn) -> None:
        """Have a turn answered; whatever happens is written into it."""
        turn.stages, turn.text, turn.answer, turn.receipt = [], "", None, None
        turn.error, turn.stopped, turn.over = "", False, False
        self._scope = anyio.CancelScope()
        self._task = asyncio.create_task(self._run(bus, turn, self._scope))

    async def _run(self, bus: Bus, turn: Turn, scope: anyio.CancelScope) -> None:
        request = Chat(question=turn.question, messages=self._before(turn), collections=turn.collections)
        try:
            with scope:
                async with bus.stream(request) as chunks:
                    async for chunk in chunks:
                        if chunk.stage:
                            turn.stages.append(chunk.stage)
                        turn.receipt = chunk.receipt or turn.receipt
                        turn.text += chunk.text
                        turn.answer = chunk.answer or turn.answer
        except AiirwkvError as exc:
            turn.error = str(exc)
        finally:
            turn.stopped = scope.cancel_called and turn.answer is None
            turn.over, self._scope = True, None

    def _before(self, turn: Turn) -> list[Message]:
        """The last rounds that were answered."""
        rounds = [before for before in self.turns if before.answer and before is not turn][-ROUNDS:]
        return [
            message
            for before in rounds
            if before.answer
            for message in (Message("user", before.question), Message("assistant", before.answer.answer))
        ]
