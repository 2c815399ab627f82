"""One question on its way to its answer: search, weigh, write, check."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

import msgspec
from aiirwkv import (
    Answer,
    Chat,
    Citation,
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

from .citing import Marks, cited
from .closely import quote, read
from .condense import conversation
from .evidence import Evidence, Limits, closeness, collect, fit, weigh
from .prompts import say

if TYPE_CHECKING:
    from aiirwkv import Bus

__all__ = ["Turn"]


class Turn:
    """Holds what is known so far. `write` yields the text; `answer` is whole when it has ended."""

    def __init__(self, request: Chat, bus: Bus, model: Model, confidence: float, weak: float, support: float) -> None:
        self.request = request
        self.bus = bus
        self.model = model
        self.confidence, self.weak, self.support = confidence, weak, support
        self.limits = msgspec.convert(model.card.get("limits") or {}, Limits, strict=False)
        self.hits: list[Hit] = []
        self.evidence: list[Evidence] = []
        self.receipt = Receipt()
        self.answer = Answer("", demonstration=model.demonstration, model=model.name)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Note in the receipt how long a step takes."""
        stage = Stage(name, 0.0)
        start = time.perf_counter()
        try:
            yield stage
        finally:
            stage.seconds = round(time.perf_counter() - start, 4)
            self.receipt.stages.append(stage)

    # Find

    async def search(self, search: Search) -> None:
        found = await self.bus.call(search)
        self.hits = found.hits
        self.receipt = found.receipt
        self.receipt.query = search.query
        self.receipt.collections = self.receipt.collections or search.collections
        self.receipt.model = self.model.name
        if not self.receipt.considered:
            self.receipt.considered = [
                Considered(h.collection, h.document, h.start, h.end, h.scores or {"score": h.score}, page=h.page)
                for h in self.hits
            ]

    async def weigh(self) -> None:
        """Cut the passages into sentences and score each against the question; best first."""
        with self.stage("weigh") as stage:
            question = self.request.question
            sentences = collect(f"{question} {self.receipt.query}", self.hits)
            if sentences:
                asked = await self.bus.call(Embed([self.receipt.query], kind="query", format="base64"))
                texts = [item.titled for item in sentences]
                vectors = await self.bus.call(Embed(texts, kind="passage", format="base64"))
                self.evidence = weigh(question, sentences, asked.rows()[0], vectors.rows())
            stage.note = f"{len(sentences)} sentences"
        self._keep(fit(self.evidence, self.limits, self.hits))

    def _keep(self, groups: Sequence[Sequence[Evidence]]) -> None:
        """Choose what the model may read, and note it in the receipt."""
        self.groups = groups
        kept = {(group[0].hit.document, group[0].hit.start): group for group in groups}
        for seen in self.receipt.considered:
            best = max((e.similarity for e in self.evidence if (e.hit.document, e.hit.start) == (seen.document, seen.start)),
                       default=None)  # fmt: skip
            if best is not None:
                seen.scores["sentence"] = round(best, 3)
                group = kept.get((seen.document, seen.start))
                seen.kept = group is not None
                seen.reason = f"{len(group)} sentences to read" if group else "more than the model reads well"

    @property
    def hopeless(self) -> bool:
        """Nothing found has anything to do with the question."""
        return all(item.similarity < self.weak and not item.coverage for item in self.evidence)

    # Write

    async def write(self) -> AsyncGenerator[str, None]:
        """The text of the answer, piece by piece."""
        gated = self.request.mode != "free"
        if gated and self.hopeless:
            way = self._without_sources()
        elif self.model.demonstration:
            way = self._closely()
        else:
            way = self._widely()
        with self.stage("write"):
            async with aclosing(way) as pieces:
                async for piece in pieces:
                    self.answer.answer += piece
                    yield piece
        self.answer.receipt = self.receipt

    async def _closely(self) -> AsyncGenerator[str, None]:
        """A demonstration model reads sentence by sentence; what it says is checked against the words it read."""
        question = self.request.question
        if not self.evidence:
            for piece in self._refuse():
                yield piece
            return
        refusal = str(self.model.card.get("refusal", ""))
        reading = await read(question, self.evidence, self._ask, refusal)
        best = reading.evidence
        self.receipt.prompt = best.reading
        if self.request.mode != "free" and reading.strength < self.confidence:
            for piece in self._refuse(best):
                yield piece
            return
        self.answer.supported = bool(reading.answer)
        self.answer.citations = [best.cite(1, reading.strength)]
        yield f"{reading.answer} [1]" if reading.answer else say("quoted", question, quote=quote(best))

    async def _widely(self) -> AsyncGenerator[str, None]:
        """A model that can be instructed reads all the evidence at once and names the passages itself."""
        question, gated = self.request.question, self.request.mode != "free"
        documents = [self._document(number, group) for number, group in enumerate(self.groups, 1)]
        refusal = str(self.model.card.get("refusal") or say("refusal", question))
        system = say("sources" if gated else "free", question, refusal=refusal)
        messages = [Message("system", system), *conversation(self.request.messages), Message("user", question)]
        self.receipt.prompt = "\n\n".join([system, *documents, question])
        marks = Marks(range(1, len(documents) + 1), refusal if gated else "")
        async with aclosing(self.stream(Generate(messages=messages, documents=documents))) as pieces:
            async for piece in pieces:
                if ready := marks.feed(piece):
                    yield ready
        if marks.refused:
            async with aclosing(self._without_sources()) as rest:
                async for piece in rest:
                    yield piece
            return
        if ready := marks.rest():
            yield ready
        if added := await self._check():
            yield added

    async def _without_sources(self) -> AsyncGenerator[str, None]:
        """The sources do not say: a refusal, or in mode `first` the model's own words, marked as such."""
        if self.request.mode != "first" or self.model.demonstration:
            for piece in self._refuse(*self.evidence[:1]):
                yield piece
            return
        self.answer.supported = False
        yield say("alone", self.request.question)
        messages = [*conversation(self.request.messages), Message("user", self.request.question)]
        async with aclosing(self.stream(Generate(messages=messages))) as pieces:
            async for piece in pieces:
                yield piece

    def _refuse(self, *closest: Evidence) -> Iterator[str]:
        self.answer.refused, self.answer.supported = True, False
        question = self.request.question
        if closest:
            self.answer.citations = [closest[0].cite(1, closest[0].strength(False))]
            yield say("refused", question, quote=quote(closest[0]))
        else:
            names = ", ".join(self.receipt.collections)
            yield say("nothing", question, where=f" in {names}" if names else "")

    @staticmethod
    def _document(number: int, group: Sequence[Evidence]) -> str:
        hit = group[0].hit
        title = " – ".join(part for part in (hit.document, hit.heading) if part)
        return f"[{number}] {title}\n" + " ".join(item.sentence.text for item in group)

    # Check

    async def _check(self) -> str:
        """
        Score each sentence of the answer against the passages it names, and cite the best sentence of each.

        Returns the marks that are added at the end when the model named none.
        """
        with self.stage("check") as stage:
            sentences = cited(self.answer.answer)
            if not sentences:
                self.answer.supported = False
                return ""
            vectors = (await self.bus.call(Embed([text for text, _ in sentences], format="base64"))).rows()
            best: dict[int, tuple[float, Evidence]] = {}
            supported = 0
            named = any(numbers for _, numbers in sentences)
            for (text, numbers), vector in zip(sentences, vectors, strict=True):
                allowed = numbers or range(1, len(self.groups) + 1)
                scored = [
                    (closeness(text, vector, item), number, item)
                    for number in allowed
                    for item in self.groups[number - 1]
                ]
                top: dict[int, tuple[float, Evidence]] = {}
                for score, number, item in scored:
                    if number not in top or score > top[number][0]:
                        top[number] = (score, item)
                highest = max((score for score, _ in top.values()), default=0.0)
                supported += highest >= self.support
                for number, (score, item) in top.items():
                    wanted = number in numbers or (not named and score == highest >= self.support)
                    if wanted and (number not in best or score > best[number][0]):
                        best[number] = (score, item)
            self.answer.citations = [self._cite(number, *best[number]) for number in sorted(best)]
            self.answer.supported = supported == len(sentences)
            stage.note = f"{supported} of {len(sentences)} sentences supported"
        return "" if named else "".join(f" [{citation.number}]" for citation in self.answer.citations)

    @staticmethod
    def _cite(number: int, score: float, item: Evidence) -> Citation:
        return item.cite(number, score)

    # Generate

    async def _ask(self, text: str) -> str:
        """What the model answers to the question after reading the text."""
        return await self.say(Generate(messages=[Message("user", self.request.question)], documents=[text]))

    async def say(self, generate: Generate) -> str:
        async with aclosing(self.stream(generate)) as pieces:
            return "".join([piece async for piece in pieces])

    async def stream(self, generate: Generate) -> AsyncGenerator[str, None]:
        """Generate with the model, state and sampling that the request names; counts the tokens."""
        asked = self.request
        plugin, _, name = (asked.model or "").rpartition("/")
        generate.model, generate.state, generate.adapter = name or None, asked.state, asked.adapter
        generate.conversation, generate.seed, generate.top_p = asked.conversation, asked.seed, asked.top_p
        if generate.temperature is None:
            generate.temperature = asked.temperature
        if generate.max_tokens is None:
            generate.max_tokens = asked.max_tokens
        usage = Usage()
        async with self.bus.stream(generate, to=plugin or None) as chunks:
            async for chunk in chunks:
                usage = chunk.usage or usage
                self.answer.model = chunk.model or self.answer.model
                if chunk.text:
                    yield chunk.text
        total = self.answer.usage
        total.prompt += usage.prompt
        total.cached += usage.cached
        total.completion += usage.completion
