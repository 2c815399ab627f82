"""The plugin: what is asked, step by step, until a checked answer stands."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from aiirwkv import Chat, ChatChunk, Context, Generate, Message, Model, Models, NoWorker, Plugin, hookimpl

from . import closely, concat, parallel, widely
from .condense import complete, conversation
from .prompts import say
from .texts import choose, only_document
from .turn import Turn

if TYPE_CHECKING:
    from aiirwkv import Bus

__all__ = ["Rag"]

REMEMBERED = 5.0
"""Seconds that the list of models stays good."""


class Rag(Plugin):
    """Answers questions from collections, with citations; refuses when they do not say."""

    confidence: float = 0.47
    """A demonstration model's evidence must answer the question with this probability, or the answer is a refusal."""
    weak: float = 0.25
    """Refuse at once when no sentence shares a word with the question or is as similar to it as this (cosine)."""
    support: float = 0.5
    """A sentence of an answer counts as supported from this similarity to a sentence of the sources on."""

    @hookimpl
    async def chat(self, request: Chat, ctx: Context) -> AsyncIterator[ChatChunk]:
        request.need("question")
        turn = Turn(request, ctx.bus, await self._model(ctx.bus, request.model or ""), self)
        yield ChatChunk(stage=f"searching {', '.join(request.collections) or 'all collections'}")
        await turn.search(await self._query(turn))
        yield ChatChunk(stage=f"reading {len(turn.hits)} passage{'s' * (len(turn.hits) != 1)}")
        await turn.weigh()
        yield ChatChunk(receipt=turn.receipt)
        yield ChatChunk(stage="writing")
        with turn.stage("write"):
            async with aclosing(self._write(turn)) as pieces:
                async for piece in pieces:
                    turn.answer.answer += piece
                    yield ChatChunk(text=piece)
        turn.answer.receipt = turn.receipt
        yield ChatChunk(answer=turn.answer)

    async def _write(self, turn: Turn) -> AsyncGenerator[str, None]:
        read, demonstration = turn.request.read, turn.model.demonstration
        if read is None and not demonstration and only_document(turn):
            read = "concat"
        hopeless = turn.gated and turn.hopeless
        texts = await choose(turn) if read and not hopeless else []
        if hopeless:
            writing = turn.without_sources()
        elif texts:
            writing = (parallel if read == "parallel" else concat).write(turn, texts)
        else:
            writing = closely.write(turn) if demonstration else widely.write(turn)
        async with aclosing(writing) as pieces:
            async for piece in pieces:
                yield piece

    async def _query(self, turn: Turn) -> str:
        """What to search for: the question, made complete from the conversation when it refers to it."""
        earlier = conversation(turn.request.messages)
        if not earlier:
            return turn.question
        if turn.model.demonstration:
            return complete(turn.question, earlier)
        said = "\n".join(f"{message.role}: {message.content}" for message in earlier)
        asked = say("condense", turn.question, conversation=said, question=turn.question)
        asking = Generate(messages=[Message("user", asked)], max_tokens=80, temperature=0.0)
        written = (await turn.complete(asking)).strip()
        return written.splitlines()[0] if written else complete(turn.question, earlier)

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
