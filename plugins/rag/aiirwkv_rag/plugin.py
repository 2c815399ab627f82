"""The plugin: what is asked, step by step, until a checked answer stands."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from aiirwkv import Chat, ChatChunk, Context, Generate, Message, Model, Models, NoWorker, Plugin, Search, hookimpl

from .condense import complete, conversation
from .prompts import say
from .turn import Turn

if TYPE_CHECKING:
    from aiirwkv import Bus

__all__ = ["Rag"]

REMEMBERED = 5.0
"""Seconds that the list of models stays good."""


class Rag(Plugin):
    """Answers questions from collections, with citations; refuses when they do not say."""

    confidence: float = 0.42
    """A demonstration model's evidence must answer the question with this probability, or the answer is a refusal."""
    weak: float = 0.25
    """Refuse at once when no sentence shares a word with the question or is as similar to it as this (cosine)."""
    support: float = 0.5
    """A sentence of an answer counts as supported from this similarity to a sentence of the sources on."""

    @hookimpl
    async def chat(self, request: Chat, ctx: Context) -> AsyncIterator[ChatChunk]:
        request.need("question")
        model = await self._model(ctx.bus, request.model or "")
        turn = Turn(request, ctx.bus, model, self.confidence, self.weak, self.support)
        yield ChatChunk(stage=f"searching {', '.join(request.collections) or 'all collections'}")
        query = await self._query(turn)
        await turn.search(Search(query, request.collections, request.top, mode=request.search, where=request.where))
        yield ChatChunk(stage=f"reading {len(turn.hits)} passage{'s' * (len(turn.hits) != 1)}")
        await turn.weigh()
        yield ChatChunk(receipt=turn.receipt)
        yield ChatChunk(stage="writing")
        async with aclosing(turn.write()) as pieces:
            async for piece in pieces:
                yield ChatChunk(text=piece)
        yield ChatChunk(answer=turn.answer)

    async def _query(self, turn: Turn) -> str:
        """What to search for: the question, made complete from the conversation when it refers to it."""
        question, earlier = turn.request.question, conversation(turn.request.messages)
        if not earlier:
            return question
        if turn.model.demonstration:
            return complete(question, earlier)
        lines = "\n".join(f"{message.role}: {message.content}" for message in earlier)
        asked = say("condense", question, conversation=lines, question=question)
        written = await turn.say(Generate(messages=[Message("user", asked)], max_tokens=80, temperature=0.0))
        lines_written = written.strip().splitlines()
        return lines_written[0] if lines_written else complete(question, earlier)

    async def _model(self, bus: Bus, wanted: str) -> Model:
        """The model's card: the one that is asked for by [plugin/]name, else the default; unknown ones are blank."""
        at, models = getattr(self, "_models", (0.0, []))
        if time.monotonic() - at > REMEMBERED:
            try:
                models = [model for model in (await bus.call(Models("list"))).models if model.kind == "base"]
            except NoWorker:
                models = []
            self._models: tuple[float, list[Model]] = (time.monotonic(), models)
        plugin, _, name = wanted.rpartition("/")
        if not wanted:
            ready = [model for model in models if model.default] or [model for model in models if model.loaded]
            return ready[0] if ready else Model("")
        named = [model for model in models if model.name == name and plugin in ("", model.plugin)]
        return named[0] if named else Model(name, plugin=plugin)

    def about(self) -> dict[str, Any]:
        return {"modes": ["sources", "first", "free"], "citations": True}
