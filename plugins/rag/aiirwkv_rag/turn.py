"""One question on its way to its answer: what is known so far, and the steps that every kind of model shares."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sized
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

import msgspec
from aiirwkv import Answer, Chat, Considered, Embed, Generate, Hit, Message, Model, Receipt, Search, Stage

from .condense import conversation
from .evidence import Evidence, Limits, Synonyms, collect, fit, strangers, synonyms, weigh
from .prompts import say

if TYPE_CHECKING:
    from aiirwkv import Bus

    from .plugin import Rag

__all__ = ["Turn"]


class Turn:
    """`settings` are the plugin's. `groups` is the evidence the model may read, by passage; `answer` grows."""

    def __init__(self, request: Chat, bus: Bus, model: Model, settings: Rag) -> None:
        self.request = request
        self.question = request.question
        self.bus = bus
        self.model = model
        self.settings = settings
        self.limits = msgspec.convert(model.card.get("limits") or {}, Limits, strict=False)
        self.hits: list[Hit] = []
        self.evidence: list[Evidence] = []
        self.groups: list[list[Evidence]] = []
        self.receipt = Receipt()
        self.answer = Answer("", demonstration=model.demonstration, model=model.name)

    @property
    def gated(self) -> bool:
        """Whether the answer must rest on the sources."""
        return self.request.mode != "free"

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Note in the receipt how long a step takes."""
        stage = Stage(name, 0.0)
        start = time.perf_counter()
        yield stage
        stage.seconds = round(time.perf_counter() - start, 4)
        self.receipt.stages.append(stage)

    # Find

    async def search(self, query: str) -> None:
        asked = self.request
        search = Search(query, asked.collections, asked.top, mode=asked.search, where=asked.where)
        found = await self.bus.call(search)
        self.hits, self.receipt = found.hits, found.receipt
        self.receipt.query = query
        self.receipt.collections = self.receipt.collections or asked.collections
        self.receipt.model = self.model.name
        if not self.receipt.considered:
            self.receipt.considered = [
                Considered(hit.collection, hit.document, hit.start, hit.end, {**hit.scores}, page=hit.page)
                for hit in self.hits
            ]

    async def weigh(self) -> None:
        """Cut the passages into sentences, score each against the question, and choose what the model may read."""
        with self.stage("weigh") as stage:
            query = self.receipt.query
            sentences = collect(query, self.hits)
            if sentences:
                (asked,) = (await self.bus.call(Embed([query], kind="query"))).rows()
                vectors = (await self.bus.call(Embed([item.titled for item in sentences]))).rows()
                self.evidence = weigh(self.question, sentences, asked, vectors)
                if self.model.demonstration and (known := await self._synonyms()):
                    self.evidence = weigh(self.question, sentences, asked, vectors, known)
            self.groups = fit(self.evidence, self.limits)
            self.note(
                {group[0].rank: f"{len(group)} sentence{'s' * (len(group) != 1)} to read" for group in self.groups}
            )
            stage.note = f"{len(sentences)} sentence{'s' * (len(sentences) != 1)}"

    async def _synonyms(self) -> Synonyms:
        """Words of the question that the best sentences say otherwise."""
        asked, theirs = strangers(self.question, self.evidence)
        if not asked or not theirs:
            return {}
        rows = (await self.bus.call(Embed([*asked, *theirs]))).rows()
        return synonyms(asked, theirs, rows[: len(asked)], rows[len(asked) :])

    def note(self, kept: dict[int, str]) -> None:
        """Say in the receipt which of the passages found the model reads, and why."""
        places = {(hit.document, hit.start): rank for rank, hit in enumerate(self.hits)}
        for seen in self.receipt.considered:
            rank = places.get((seen.document, seen.start))
            if rank is None:
                continue
            if similar := [item.similarity for item in self.evidence if item.rank == rank]:
                seen.scores["sentence"] = round(max(similar), 3)
            seen.kept = rank in kept
            seen.reason = kept.get(rank, "other passages fit better")

    @property
    def hopeless(self) -> bool:
        """Nothing found has anything to do with the question."""
        return all(item.similarity < self.settings.weak and not item.coverage for item in self.evidence)

    # Write

    async def without_sources(self) -> AsyncGenerator[str, None]:
        """
        The sources do not say: refuse, or in mode `first` let the model speak from its own knowledge, marked as such.

        A demonstration model knows nothing by itself, so it refuses in that mode too.
        """
        if self.request.mode != "first" or self.model.demonstration:
            yield self.refuse()
            return
        self.answer.supported = False
        yield say("alone", self.question)
        async with aclosing(self.stream(Generate(messages=self.dialogue()))) as pieces:
            async for piece in pieces:
                yield piece

    def refuse(self) -> str:
        """The text of a refusal, which says what was found instead."""
        self.answer.refused, self.answer.supported = True, False
        if not self.evidence:
            names = ", ".join(self.receipt.collections)
            return say("nothing", self.question, where=f" ({names})" if names else "")
        closest = self.evidence[0]
        self.answer.citations = [closest.cite(1, closest.strength(False))]
        return say("refused", self.question, quote=closest.quote)

    def dialogue(self) -> list[Message]:
        """The last rounds and the question."""
        return [*conversation(self.request.messages), Message("user", self.question)]

    # Generate

    async def complete(self, generate: Generate) -> str:
        """The whole text the model generates."""
        async with aclosing(self.stream(generate)) as pieces:
            return "".join([piece async for piece in pieces])

    async def stream(self, generate: Generate) -> AsyncGenerator[str, None]:
        """Generate with the model, state and sampling that the request names; counts the tokens."""
        asked, usage = self.request, self.answer.usage
        plugin, _, name = (asked.model or "").rpartition("/")
        asking = msgspec.structs.replace(
            generate,
            model=name or None,
            state=asked.state,
            adapter=asked.adapter,
            conversation=asked.conversation,
            seed=asked.seed,
            top_p=asked.top_p,
            temperature=asked.temperature if generate.temperature is None else generate.temperature,
            max_tokens=asked.max_tokens if generate.max_tokens is None else generate.max_tokens,
        )
        async with self.bus.stream(asking, to=plugin or None) as chunks:
            async for chunk in chunks:
                self.answer.model = chunk.model or self.answer.model
                if chunk.usage:
                    usage.prompt += chunk.usage.prompt
                    usage.cached += chunk.usage.cached
                    usage.completion += chunk.usage.completion
                if chunk.text:
                    yield chunk.text


def _sentences(some: Sized) -> str:
    return f"{len(some)} sentence{'s' * (len(some) != 1)}"
