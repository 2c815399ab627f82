"""
Texts that a model is given just as they are: passages, and documents that it has read whole.

They stand before everything else in its prompt, so that what it remembers of them can be gone on from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aiirwkv import Collections, Generate, Hit, Message, ServiceError, headed, token_estimate

from .evidence import UNKNOWN_TOKENS, Evidence, Limits, collect
from .prompts import say
from .turn import Turn

__all__ = ["Text", "asking", "canonical", "choose", "only_document", "supporting"]

NEAR = 12
"""Sentences of a whole document that are looked at because they share words with the answer."""


@dataclass
class Text:
    """`hit` is the best passage found in it; `evidence` are sentences of it, best first."""

    text: str
    hit: Hit
    whole: bool = False
    evidence: list[Evidence] = field(default_factory=list)

    @property
    def ranks(self) -> set[int]:
        """The passages found that lie in it."""
        return {item.rank for item in self.evidence}

    @property
    def place(self) -> tuple[str, int]:
        return (self.hit.document_id or self.hit.document, 0 if self.whole else self.hit.start)


def only_document(turn: Turn) -> bool:
    """Whether all that the model may read stands in one document that it has read whole."""
    hits = [group[0].hit for group in turn.groups]
    documents = {(hit.collection, hit.document_id) for hit in hits}
    return len(documents) == 1 and _remembered(turn, hits[0])


def _remembered(turn: Turn, hit: Hit) -> bool:
    """The model has read the whole document, and may be asked about all of it."""
    return hit.read == "whole" and "pages" not in turn.request.where


async def choose(turn: Turn) -> list[Text]:
    """The texts with the best evidence, best first, as many as the model's card allows."""
    texts: dict[tuple[str, str, int], Text] = {}
    documents: dict[tuple[str, str], Text | None] = {}
    for item in turn.evidence:
        hit = item.hit
        document = (hit.collection, hit.document_id or hit.document)
        if document not in documents:
            documents[document] = await _document(turn, hit) if _remembered(turn, hit) else None
        whole = documents[document]
        place = (*document, -1 if whole else hit.start)
        if place not in texts:
            if len(texts) == turn.limits.passages > 0:
                continue
            texts[place] = whole or Text(headed(hit.heading, hit.text), hit)
        texts[place].evidence.append(item)
    return list(texts.values())


async def _document(turn: Turn, hit: Hit) -> Text | None:
    """The whole text of a document; None when the model is not made for so much, or it is no longer there."""
    text = ""
    try:
        while True:
            asked = Collections("text", name=hit.collection, document=hit.document_id, start=len(text))
            reply = await turn.bus.call(asked)
            text += reply.text
            if not reply.text or len(text) >= reply.count:
                break
    except ServiceError:
        return None
    fits = not turn.limits.tokens or token_estimate(text) <= turn.limits.tokens
    return Text(text, hit, whole=True) if text and fits else None


def canonical(texts: Sequence[Text], limits: Limits) -> list[Text]:
    """
    The best texts that the model reads well together, in an order that the question has no part in.

    So different questions have beginnings in common, which are read once.
    """
    left = limits.tokens or UNKNOWN_TOKENS
    chosen: list[Text] = []
    for text in texts:
        cost = token_estimate(text.text)
        if not chosen or cost <= left:
            chosen.append(text)
            left -= cost
    return sorted(chosen, key=lambda text: text.place)


def asking(turn: Turn, texts: Sequence[Text]) -> Generate:
    """The question below the texts. It stands for itself: the conversation before it is not repeated."""
    question = turn.question
    if not turn.model.demonstration:
        question = say("below" if turn.gated else "below_free", question, refusal=turn.refusal, question=turn.query)
    return Generate(messages=[Message("user", question)], documents=[text.text for text in texts])


async def supporting(turn: Turn, texts: Sequence[Text], answers: Sequence[str]) -> list[list[Evidence]]:
    """The evidence of each text; of a whole document also its sentences that share words with the answer to it."""
    found = [{item.start: item for item in text.evidence} for text in texts]
    more: list[Evidence] = []
    places: dict[int, int] = {}
    for place, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        if text.whole and answer:
            sentences = collect(answer, await _passages(turn, text.hit), NEAR)
            for item in sentences:
                item.rank = text.evidence[0].rank
                places[id(item)] = place
            more += sentences
    for item in await turn.weighed(more):
        found[places[id(item)]].setdefault(item.start, item)
    return [sorted(items.values(), key=lambda item: item.order, reverse=True) for items in found]


async def _passages(turn: Turn, hit: Hit) -> list[Hit]:
    """All passages of a document."""
    found: list[Hit] = []
    try:
        while True:
            asked = Collections("chunks", name=hit.collection, document=hit.document_id, offset=len(found))
            reply = await turn.bus.call(asked)
            found += [
                Hit(p.document, p.page, p.start, p.end, p.text, 0.0, hit.collection, hit.document_id, p.id, p.heading)
                for p in reply.chunks
            ]
            if not reply.chunks or len(found) >= reply.count:
                return found
    except ServiceError:  # it was deleted meanwhile
        return found
