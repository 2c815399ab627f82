"""Each text by itself: all are asked at the same time, and the answer that is supported best wins."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import anyio
from aiirwkv import Completion, Embed

from . import closely
from .citing import Marks, cited
from .evidence import Evidence, closeness
from .texts import Text, asking, supporting
from .turn import Turn
from .widely import check

__all__ = ["Candidate", "write"]


@dataclass
class Candidate:
    """
    What came of one text. `answer` is "" when the text does not say.

    `fit`: the probability that the text answers the question, by its best sentence; `support`: how much of the answer
    stands in the text; `sure`: the model's own probability of a token of it, the geometric mean. All from 0 to 1.
    """

    text: Text
    answer: str = ""
    evidence: list[Evidence] = field(default_factory=list)
    fit: float = 0.0
    support: float = 0.0
    sure: float = 0.0

    @property
    def score(self) -> float:
        return self.fit * self.support * self.sure


async def write(turn: Turn, texts: Sequence[Text]) -> AsyncGenerator[str, None]:
    """The best of the answers, when all are there, with the mark of its text."""
    before = turn.answer.usage.cached
    with turn.stage("ask") as stage:
        said = await _ask(turn, texts)
        stage.note = f"{len(texts)} text{'s' * (len(texts) != 1)} at the same time"
        if kept := turn.answer.usage.cached - before:
            stage.note += f", {kept} of their tokens read before"
    async for piece in (_closely if turn.model.demonstration else _widely)(turn, texts, said):
        yield piece


async def _ask(turn: Turn, texts: Sequence[Text]) -> list[Completion]:
    said: dict[int, Completion] = {}

    async def ask(number: int, text: Text) -> None:
        said[number] = await turn.whole(asking(turn, [text]))

    try:
        async with anyio.create_task_group() as tasks:
            for number, text in enumerate(texts):
                tasks.start_soon(ask, number, text)
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [said[number] for number in range(len(texts))]


async def _closely(turn: Turn, texts: Sequence[Text], said: Sequence[Completion]) -> AsyncGenerator[str, None]:
    """
    How sure such a model is tells nothing of whether it is right: it is at its surest when it refuses. What counts is
    how well the sentence fits that the answer stands in.
    """
    answers = [reply.text for reply in said]
    found = zip(texts, answers, await supporting(turn, texts, answers), strict=True)
    readings = [closely.reread(turn, answer, text.text, evidence) for text, answer, evidence in found]
    place = max(range(len(texts)), key=lambda place: readings[place].strength)
    _tell(turn, texts, [reading.strength for reading in readings], place)
    async for piece in closely.conclude(turn, readings[place]):
        yield piece


async def _widely(turn: Turn, texts: Sequence[Text], said: Sequence[Completion]) -> AsyncGenerator[str, None]:
    with turn.stage("judge") as stage:
        candidates = await _judge(turn, [_candidate(turn, *pair) for pair in zip(texts, said, strict=True)])
        answered = sum(bool(candidate.answer) for candidate in candidates)
        stage.note = f"{answered} of {len(texts)} texts say something"
    place = max(range(len(texts)), key=lambda place: candidates[place].score)
    best = candidates[place]
    _tell(turn, texts, [candidate.score for candidate in candidates], place)
    if not best.answer:
        async for piece in turn.without_sources():
            yield piece
        return
    yield best.answer
    turn.groups = [best.evidence]
    if marks := await check(turn, best.answer):
        yield marks


def _candidate(turn: Turn, text: Text, said: Completion) -> Candidate:
    marks = Marks((), turn.refusal if turn.gated else "")
    begun = marks.feed(said.text)
    if marks.refused:
        return Candidate(text)
    sure = math.exp(sum(said.logprobs) / len(said.logprobs)) if said.logprobs else 1.0
    return Candidate(text, (begun + marks.rest()).strip(), sure=sure)


async def _judge(turn: Turn, candidates: list[Candidate]) -> list[Candidate]:
    """Give the answers their scores, with one call of the embedder for all."""
    split = [[sentence for sentence, _ in cited(candidate.answer)] for candidate in candidates]
    sentences = [sentence for part in split for sentence in part]
    rows = iter((await turn.bus.call(Embed(sentences))).rows() if sentences else [])
    found = await supporting(turn, [c.text for c in candidates], [c.answer for c in candidates])
    for candidate, part, evidence in zip(candidates, split, found, strict=True):
        if not part:
            candidate.answer = ""
            continue
        candidate.evidence = evidence
        candidate.fit = max(item.strength(True) for item in candidate.evidence)
        support = 0.0
        for sentence in part:
            row = next(rows)
            support += max(closeness(sentence, row, item) for item in candidate.evidence)
        candidate.support = min(max(support / len(part), 0.0), 1.0)
    return candidates


def _tell(turn: Turn, texts: Sequence[Text], scores: Sequence[float], place: int) -> None:
    """Show in the receipt how the answers did, and what the model read for the best of them."""
    asked = asking(turn, [texts[place]])
    turn.receipt.prompt = "\n\n".join([*asked.documents, asked.messages[-1].content])
    turn.note(
        {rank: "the answer to it is supported best" for rank in texts[place].ranks},
        {rank: "another answer is supported better" for text in texts for rank in text.ranks},
    )
    turn.score("answer", {rank: score for text, score in zip(texts, scores, strict=True) for rank in text.ranks})
