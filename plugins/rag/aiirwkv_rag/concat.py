"""Whole texts, one after another, and the question below them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from . import closely, widely
from .citing import Marks
from .evidence import Evidence
from .texts import Text, asking, canonical, supporting
from .turn import Turn

__all__ = ["write"]


async def write(turn: Turn, texts: Sequence[Text]) -> AsyncGenerator[str, None]:
    """The answer as it is written; then the marks of what it rests on."""
    texts = canonical(texts, turn.limits)
    asked = asking(turn, texts)
    turn.receipt.prompt = "\n\n".join([*asked.documents, asked.messages[-1].content])
    turn.note({rank: "given whole" for text in texts for rank in text.ranks})

    async def evidence(said: str) -> list[list[Evidence]]:
        return await supporting(turn, texts, [said] * len(texts))

    if turn.model.demonstration:
        said = await turn.complete(asked)
        found = zip(texts, await evidence(said), strict=True)
        readings = [closely.reread(turn, said, text.text, items) for text, items in found]
        async for piece in closely.conclude(turn, max(readings, key=lambda reading: reading.strength)):
            yield piece
        return

    async for piece in widely.answer(turn, asked, Marks((), turn.refusal if turn.gated else ""), evidence):
        yield piece
