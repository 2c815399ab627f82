"""One question on its way to its answer: what is known so far, and the steps that every kind of model shares."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

import msgspec
from aiirwkv import (
    Answer,
    Chat,
    Completion,
    Considered,
    Embed,
    Generate,
    Hit,
    Message,
    Model,
    Receipt,
    Search,
    Stage,
    Usage,
)

from .condense import dialogue
from .evidence import Evidence, Limits, Synonyms, collect, fit, strangers, synonyms, weigh
from .prompts import say

if TYPE_CHECKING:
    from aiirwkv import Bus

    from .plugin import Rag

__all__ = ["Turn"]

PATIENCE = 600.0
"""Seconds that a model may take for an answer that is not streamed."""


class Turn:
    """`settings` are the plugin's. `groups` is the evidence the model may read, by passage; `answer` grows."""

    def __init__(self, request: Chat, bus: Bus, model: Model, settings: Rag) -> None:
        self.request = request
        self.question = request.question
        self.bus = bus
        self.model = model
        self.settings = settings
        self.limits = msgspec.convert(model.card.get("limits") or {}, Limits, strict=False)
        self.query = request.question
        self._asked: Sequence[float] = ()
        self._vectors: dict[str, Sequence[float]] = {}
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
        self.query = query
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
            sentences = collect(self.query, self.hits)
            self.evidence = await self.weighed(sentences)
            self.groups = fit(self.evidence, self.limits)
            self.note(
                {group[0].rank: f"{len(group)} sentence{'s' * (len(group) != 1)} to read" for group in self.groups}
            )
            stage.note = f"{len(sentences)} sentence{'s' * (len(sentences) != 1)}"

    async def weighed(self, sentences: Sequence[Evidence]) -> list[Evidence]:
        """The sentences with their scores against the question, best first."""
        if not sentences:
            return []
        if not self._asked:
            (self._asked,) = (await self.bus.call(Embed([self.query], kind="query"))).rows()
        if new := [text for text in dict.fromkeys(item.titled for item in sentences) if text not in self._vectors]:
            self._vectors |= zip(new, (await self.bus.call(Embed(new))).rows(), strict=True)
        asked, vectors = self._asked, [self._vectors[item.titled] for item in sentences]
        evidence = weigh(self.question, sentences, asked, vectors)
        if self.model.demonstration and (known := await self._synonyms(evidence)):
            evidence = weigh(self.question, sentences, asked, vectors, known)
        return evidence

    async def _synonyms(self, evidence: Sequence[Evidence]) -> Synonyms:
        """Words of the question that the best sentences say otherwise."""
        asked, theirs = strangers(self.question, evidence)
        if not asked or not theirs:
            return {}
        rows = (await self.bus.call(Embed([*asked, *theirs]))).rows()
        return synonyms(asked, theirs, rows[: len(asked)], rows[len(asked) :])

    def note(self, kept: Mapping[int, str], others: Mapping[int, str] | None = None) -> None:
        """Say in the receipt which of the passages found the answer comes from, by rank, and why not the others."""
        for rank, seen in self._considered():
            if similar := [item.similarity for item in self.evidence if item.rank == rank]:
                seen.scores["sentence"] = round(max(similar), 3)
            seen.kept = rank in kept
            seen.reason = kept.get(rank) or (others or {}).get(rank, "other passages fit better")

    def score(self, name: str, scores: Mapping[int, float]) -> None:
        """Add a score of passages found, by rank, to the receipt."""
        for rank, seen in self._considered():
            if rank in scores:
                seen.scores[name] = round(scores[rank], 3)

    def _considered(self) -> Iterator[tuple[int, Considered]]:
        """The passages found, by rank, in the receipt."""
        places = {(hit.document, hit.start): rank for rank, hit in enumerate(self.hits)}
        for seen in self.receipt.considered:
            rank = places.get((seen.document, seen.start))
            if rank is not None:
                yield rank, seen

    @property
    def refusal(self) -> str:
        """What the model says when the texts do not answer the question."""
        return str(self.model.card.get("refusal") or say("refusal", self.question))

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
        return [*dialogue(self.request.messages), Message("user", self.question)]

    # Generate

    async def complete(self, generate: Generate) -> str:
        """The whole text the model generates."""
        async with aclosing(self.stream(generate)) as pieces:
            return "".join([piece async for piece in pieces])

    async def whole(self, generate: Generate) -> Completion:
        """The same with the tokens' probabilities; nothing comes before all is there."""
        written = await self.bus.call(
            self._complete(msgspec.structs.replace(generate, logprobs=True)), to=self._plugin, timeout=PATIENCE
        )
        self._count(written.usage)
        self.answer.model = written.model or self.answer.model
        return written

    async def stream(self, generate: Generate) -> AsyncGenerator[str, None]:
        """Generate with the model, state and sampling that the request names; counts the tokens."""
        async with self.bus.stream(self._complete(generate), to=self._plugin) as chunks:
            async for chunk in chunks:
                self.answer.model = chunk.model or self.answer.model
                if chunk.usage:
                    self._count(chunk.usage)
                if chunk.text:
                    yield chunk.text

    @property
    def _plugin(self) -> str | None:
        return (self.request.model or "").rpartition("/")[0] or None

    def _complete(self, generate: Generate) -> Generate:
        asked = self.request
        return msgspec.structs.replace(
            generate,
            model=(asked.model or "").rpartition("/")[2] or None,
            state=asked.state,
            adapter=asked.adapter,
            conversation=asked.conversation,
            seed=asked.seed,
            top_p=asked.top_p,
            temperature=asked.temperature if generate.temperature is None else generate.temperature,
            max_tokens=asked.max_tokens if generate.max_tokens is None else generate.max_tokens,
        )

    def _count(self, usage: Usage) -> None:
        for field in Usage.__struct_fields__:
            setattr(self.answer.usage, field, getattr(self.answer.usage, field) + getattr(usage, field))
