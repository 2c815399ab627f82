"""From passages to evidence: their sentences, each weighed against the question. It searches and writes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from aiirwkv import Citation, Hit, token_estimate

from .expect import offers
from .sentences import Sentence, split
from .words import alike, content, names, topical, topical_words

__all__ = ["ANSWER", "Evidence", "Limits", "closeness", "collect", "fit", "strangers", "synonyms", "weigh"]

MOST = 48
"""Sentences that are embedded for one question."""

ANSWER = re.compile(r"^.*[?？]\s*")
"""What stands before the answer in a sentence that is a question with its answer."""

SAME = 0.78
"""Cosine of words from which on they mean the same."""
BEST = 6
"""Sentences whose words are compared with those of the question one by one."""

_REFERS = re.compile(r"(?:it|its|they|their|he|she|his|her|this|these|those|there)\b", re.IGNORECASE)


@dataclass
class Evidence:
    """A sentence of a passage. Offsets count characters of the document's text."""

    hit: Hit
    rank: int
    sentence: Sentence
    before: str = ""
    topic: frozenset[str] = frozenset()
    similarity: float = 0.0
    coverage: float = 0.0
    unknown: float = 0.0
    offers: bool | None = None
    named: bool = True
    vector: Sequence[float] = ()

    @property
    def start(self) -> int:
        return self.hit.start + self.sentence.start

    @property
    def end(self) -> int:
        return self.hit.start + self.sentence.end

    @property
    def titled(self) -> str:
        """The sentence under its heading."""
        heading = self.sentence.heading
        return f"{heading}: {self.sentence.plain}" if heading else self.sentence.plain

    @property
    def reading(self) -> str:
        """The sentence, after the one that says what its pronoun means."""
        return f"{self.before} {self.sentence.plain}" if self.before else self.sentence.plain

    @property
    def quote(self) -> str:
        """The sentence as it is quoted: of a question and its answer, the answer."""
        return ANSWER.sub("", self.sentence.plain) or self.sentence.plain

    @property
    def order(self) -> float:
        """How well it fits the question, to choose the best; the scale has no meaning."""
        kind = {True: 0.05, None: 0.0, False: -0.3}[self.offers]
        named = 0.0 if self.named else -0.15
        return self.similarity + 0.15 * self.coverage + kind + named - 0.01 * self.rank

    def strength(self, answered: bool) -> float:
        """
        The probability that it answers the question, given whether the model found an answer in it.

        A logistic regression on the 330 hand-written questions of bench/answers.json, the answerable ones also with
        their answer taken out of the text; with MiniLM's similarities and the built-in model's answers.
        """
        signals = (
            (SIMILARITY, self.similarity),
            (COVERAGE, self.coverage),
            (UNKNOWN, self.unknown),
            (UNFIT, self.offers is False),
            (FIT, self.offers is True),
            (NAMED, self.named),
            (ANSWERED, answered),
        )
        return 1 / (1 + math.exp(-BIAS - sum(weight * signal for weight, signal in signals)))

    def cite(self, number: int, support: float) -> Citation:
        hit = self.hit
        return Citation(
            number,
            hit.document,
            hit.page,
            self.start,
            self.end,
            self.sentence.text,
            collection=hit.collection,
            document_id=hit.document_id,
            chunk=hit.chunk,
            support=round(support, 3),
        )


BIAS, SIMILARITY, COVERAGE, UNKNOWN, UNFIT, FIT, NAMED, ANSWERED = -4.85, 4.7, 2.9, -2.0, -3.4, 0.9, 0.25, 0.8


class Limits(msgspec.Struct, frozen=True):
    """How much a model reads well: passages, and tokens of all of them. 0 stands for not known."""

    passages: int = 0
    tokens: int = 0


UNKNOWN_TOKENS = 3000
"""Tokens of evidence for a model that does not say how much it reads well."""


def collect(question: str, hits: Sequence[Hit], most: int = MOST) -> list[Evidence]:
    """The sentences of the passages; when there are very many, those that share most words with the question."""
    found: dict[tuple[str, int], Evidence] = {}
    for rank, hit in enumerate(hits):
        sentences = split(hit.text, hit.heading)
        first = sentences[0].plain if sentences else ""
        topic = frozenset(content(f"{hit.document} {hit.heading} {hit.text.lstrip().partition(chr(10))[0]} {first}"))
        previous = ""
        for sentence in sentences:
            before = previous if _REFERS.match(sentence.plain) else ""
            item = Evidence(hit, rank, sentence, before, topic)
            place = (hit.document_id or hit.document, item.start)
            if place not in found or found[place].end < item.end:
                found[place] = item
            previous = sentence.plain
    words = set(content(question))
    best = sorted(found.values(), key=lambda e: (len(words & set(content(e.titled))), -e.rank), reverse=True)
    return best[:most]


def weigh(
    question: str,
    evidence: Sequence[Evidence],
    asked: Sequence[float],
    vectors: Sequence[Sequence[float]],
    known: Synonyms | None = None,
) -> list[Evidence]:
    """Score the sentences against the question, given both as vectors; best first. `known` relates their words."""
    words = list(dict.fromkeys(topical(question)))
    named = {word for name in names(question) for word in content(name)}
    everywhere = {word for item in evidence for word in content(item.titled)}
    for item, vector in zip(evidence, vectors, strict=True):
        context = f"{item.titled} {item.before}"
        here = set(content(context))
        item.vector = vector
        item.similarity = _cosine(asked, vector)
        covered = [max(1.0 * _in(word, here, known), 0.5 * _in(word, item.topic, known)) for word in words]
        item.coverage = _mean(covered, 1.0)
        item.unknown = _mean([float(not _in(word, everywhere | item.topic, known)) for word in words], 0.0)
        item.named = all(_in(name, here | item.topic) for name in named)
        item.offers = offers(question, context)
    return sorted(evidence, key=lambda item: item.order, reverse=True)


Synonyms = dict[str, frozenset[str]]
"""For the stem of a word in the question, those in the texts that mean the same."""


def strangers(question: str, evidence: Sequence[Evidence]) -> tuple[list[str], list[str]]:
    """The question's words that the best sentences lack, and the words of these sentences: perhaps some are alike."""
    best = evidence[:BEST]
    here = {word for item in best for word in content(item.titled)}
    asked = [word for word in dict.fromkeys(topical_words(question)) if not all(_in(w, here) for w in content(word))]
    asked = [word for word in asked if word[0].islower()]  # names stand for themselves
    theirs = dict.fromkeys(word for item in best for word in topical_words(item.titled)) if asked else {}
    return asked, list(theirs)


def synonyms(
    asked: Sequence[str], theirs: Sequence[str], a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]
) -> Synonyms:
    """Words that mean the same, by their vectors. Below SAME are also opposites: red and blue, early and late."""
    return {
        stem: frozenset(
            other
            for its, words in zip(b, theirs, strict=True)
            if _cosine(vector, its) >= SAME
            for other in content(words)
        )
        for vector, word in zip(a, asked, strict=True)
        for stem in content(word)
    }


def fit(evidence: Sequence[Evidence], limits: Limits) -> list[list[Evidence]]:
    """
    What the model is given to read: the best sentences within its limits, grouped by passage, in the order of the text.

    A generous limit keeps whole passages.
    """
    ranks = list(dict.fromkeys(item.rank for item in evidence))
    ranks = sorted(ranks[: limits.passages] if limits.passages else ranks)
    left = limits.tokens or UNKNOWN_TOKENS
    chosen: list[Evidence] = []
    for item in evidence:
        cost = token_estimate(item.sentence.text)
        if item.rank in ranks and (not chosen or cost <= left):
            chosen.append(item)
            left -= cost
    groups = [sorted((item for item in chosen if item.rank == rank), key=lambda item: item.start) for rank in ranks]
    return [group for group in groups if group]


def closeness(text: str, vector: Sequence[float], item: Evidence) -> float:
    """How well the evidence supports a sentence: similarity, or the share of its words that stand there."""
    here = set(content(item.titled))
    return max(_cosine(vector, item.vector), _mean([float(_in(word, here)) for word in content(text)], 0.0))


def _in(word: str, words: set[str] | frozenset[str], known: Synonyms | None = None) -> bool:
    """Whether the word, one of its family, or a synonym is among the words."""
    if word in words or any(alike(word, other) for other in words):
        return True
    return bool(known and known.get(word, frozenset()) & words)


def _mean(values: Sequence[float], empty: float) -> float:
    return sum(values) / len(values) if values else empty


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    length = math.hypot(*a) * math.hypot(*b)
    return sum(map(float.__mul__, a, b)) / length if length else 0.0
