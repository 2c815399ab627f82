"""Writing with a model that can be instructed: it reads all the evidence at once and names the passages itself."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from aiirwkv import Embed, Generate, Message

from .citing import Marks, cited
from .evidence import Evidence, closeness
from .prompts import say
from .turn import Turn

__all__ = ["answer", "check", "write"]


async def write(turn: Turn) -> AsyncGenerator[str, None]:
    """The answer as it is written, without marks of passages that were not sent; then the marks it forgot."""
    documents = [_document(number, group) for number, group in enumerate(turn.groups, 1)]
    system = say("sources" if turn.gated else "free", turn.question, refusal=turn.refusal)
    turn.receipt.prompt = "\n\n".join([system, *documents, turn.question])
    marks = Marks(range(1, len(documents) + 1), turn.refusal if turn.gated else "")
    asking = Generate(messages=[Message("system", system), *turn.dialogue()], documents=documents)
    async with aclosing(answer(turn, asking, marks)) as pieces:
        async for piece in pieces:
            yield piece


async def answer(
    turn: Turn, asking: Generate, marks: Marks, evidence: Callable[[str], Awaitable[list[list[Evidence]]]] | None = None
) -> AsyncGenerator[str, None]:
    """What the model says, checked against the evidence, which may depend on what it says; or a refusal instead."""
    text = ""
    async with aclosing(turn.stream(asking)) as pieces:
        async for piece in pieces:
            if ready := marks.feed(piece):
                text += ready
                yield ready
    if marks.refused:
        async with aclosing(turn.without_sources()) as instead:
            async for piece in instead:
                yield piece
        return
    if ready := marks.rest():
        text += ready
        yield ready
    if evidence:
        turn.groups = await evidence(text)
    if forgotten := await check(turn, text):
        yield forgotten


def _document(number: int, group: Sequence[Evidence]) -> str:
    hit = group[0].hit
    title = " – ".join(part for part in (hit.document, hit.heading) if part)
    return f"[{number}] {title}\n" + " ".join(item.sentence.text for item in group)


async def check(turn: Turn, text: str) -> str:
    """
    Score each sentence of the answer against the passages it names, or all when it names none, and cite the sentence
    of each that supports it best. Returns the marks to add when the model named no passage.
    """
    with turn.stage("check") as stage:
        sentences = cited(text)
        named = any(numbers for _, numbers in sentences)
        everything = range(1, len(turn.groups) + 1)
        rows = (await turn.bus.call(Embed([sentence for sentence, _ in sentences]))).rows() if sentences else []
        best: dict[int, tuple[float, Evidence]] = {}
        supported = 0
        for (sentence, numbers), vector in zip(sentences, rows, strict=True):
            scored = {number: _closest(sentence, vector, turn.groups[number - 1]) for number in numbers or everything}
            highest = max((score for score, _ in scored.values()), default=0.0)
            supported += highest >= turn.settings.support
            for number, (score, item) in scored.items():
                meant = number in numbers or (not named and score == highest >= turn.settings.support)
                if meant and (number not in best or score > best[number][0]):
                    best[number] = (score, item)
        turn.answer.citations = [item.cite(number, score) for number, (score, item) in sorted(best.items())]
        turn.answer.supported = bool(sentences) and supported == len(sentences)
        stage.note = f"{supported} of {len(sentences)} sentences supported"
    return "" if named else "".join(f" [{citation.number}]" for citation in turn.answer.citations)


def _closest(sentence: str, vector: Sequence[float], group: Sequence[Evidence]) -> tuple[float, Evidence]:
    """The evidence that supports the sentence best, and how well."""
    return max(((closeness(sentence, vector, item), item) for item in group), key=lambda pair: pair[0])
