"""
Reading for a demonstration model: one sentence at a time, its answer checked against the words it read.

Such a model copies short answers out of short texts, and may copy the wrong ones or break off. Its answer counts only
when it stands in the sentence and is of the kind that the question expects.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from aiirwkv import Generate, Message

from .evidence import ANSWER, Evidence
from .expect import closed, offers
from .prompts import say
from .turn import Turn
from .words import alike, content

__all__ = ["Reading", "clause", "conclude", "read", "reread", "standing", "write"]

Ask = Callable[[str], Awaitable[str]]
"""Give the model a text to read, and get what it answers."""

_COMMA = re.compile(r",\s+")
_CLAUSE = re.compile(r"\s*(?:;|,?\s+(?:and|but|while|whereas)\b|[.!?](?=\s+[A-Z]))\s+")
_PADDING = re.compile(
    r"\W*(?:(?:the|an?|in|on|at|to|by|from|for|of|is|are|it|they|their|his|her|its|our)\s+)+$", re.IGNORECASE
)
_ABBREVIATION = re.compile(r"(?:\b\w\.\w|\b(?:Prof|Dr|Mr|Mrs|Ms|St))\.$")
_NAME = r"(?!(?:The|An?|In|On|At|By|To|For|From|Our|His|Her|Its|When|Call|Ask)\b)[A-Z][\w'’-]*\.?"
_FIGURE = r"(?:\d[\d.:]*\w*|[Nn]oon|[Mm]idnight|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?)"
_RANGE = r"(?:\s*[–-]\s*|\s+(?:and|or|to|until|till|by)\s+)"
_LEFT = re.compile(rf"(?:{_NAME}\s+|{_NAME}\s+(?:and|or)\s+|{_FIGURE}{_RANGE}|[Ee]very\s+|\+|\d[ /-])$")
_PLACE = re.compile(rf"\s+(?:of\s+(?:the\s+|an?\s+)?[\w'’-]+|(?:in|at|near)\s+{_NAME})")
_RIGHT = re.compile(rf"(?:\s+{_NAME}|\s+(?:and|or)\s+{_NAME}|{_RANGE}{_FIGURE}|[ /-]\d[\d-]*)")


async def write(turn: Turn) -> AsyncGenerator[str, None]:
    """The model's answer if it stands in the sources, else the sentence that fits best, else a refusal."""

    async def ask(text: str) -> str:
        return await turn.complete(Generate(messages=[Message("user", turn.question)], documents=[text]))

    if not turn.evidence:
        yield turn.refuse()
        return
    reading = await read(turn.question, turn.evidence, ask, turn.refusal)
    turn.receipt.prompt = reading.evidence.reading
    turn.note({reading.evidence.rank: "it holds the sentence that fits best"})
    async for piece in conclude(turn, reading):
        yield piece


async def conclude(turn: Turn, reading: Reading) -> AsyncGenerator[str, None]:
    """The answer, its sentence, or a refusal when that does not answer the question well enough."""
    best = reading.evidence
    if turn.gated and (reading.strength < turn.settings.confidence or best.similarity < turn.settings.weak):
        yield turn.refuse()
        return
    turn.answer.supported = bool(reading.answer)
    turn.answer.citations = [best.cite(1, reading.strength)]
    yield f"{reading.answer} [1]" if reading.answer else say("quoted", turn.question, quote=best.quote)


@dataclass(frozen=True)
class Reading:
    """What came of reading: `answer` as it stands in the evidence, "" when the model gave none that does."""

    evidence: Evidence
    said: str
    answer: str

    @property
    def strength(self) -> float:
        return self.evidence.strength(bool(self.answer))


async def read(question: str, evidence: Sequence[Evidence], ask: Ask, refusal: str) -> Reading:
    """Read the best sentence: the part of it that fits the question, then, if that gives no answer, the whole."""
    best = evidence[0]
    text = best.reading
    said = ""
    part = clause(question, text)
    for given in dict.fromkeys((part, text)):
        said = await ask(given.rstrip(" .;:,") + ".")
        answer = standing(said, text, question, refusal)
        if answer and (given == part or answer.lower() in part.lower()):
            return Reading(best, said, answer)
    return Reading(best, said, "")


def reread(turn: Turn, said: str, text: str, evidence: Sequence[Evidence]) -> Reading:
    """What an answer to a longer text is worth: the sentence it stands in, or the best one if that fits far better."""
    answer = standing(said, text, turn.question, turn.refusal)
    holding = [item for item in evidence if answer and answer in item.sentence.text]
    readings = [Reading(item, said, answer) for item in holding[:1]]
    return max([*readings, Reading(evidence[0], said, "")], key=lambda reading: reading.strength)


def clause(question: str, text: str) -> str:
    """
    The part of a sentence of several clauses that answers the question, or the whole.

    A later clause leaves out what the earlier ones said, so its words count together with theirs.
    """
    text = ANSWER.sub("", text) or text
    words = set(content(question))
    for pattern in (_COMMA, _CLAUSE):
        parts = [part for part in pattern.split(text) if len(part.split()) > 2 and offers(question, part) is not False]
        if len(parts) > 1:
            known: set[str] = set()
            shared = []
            for part in parts:
                known |= {word for word in words for other in content(part) if word == other or alike(word, other)}
                shared.append(len(known))
            best = parts[shared.index(max(shared))]
            text = best[:1].upper() + best[1:]
    return text


def standing(said: str, text: str, question: str, refusal: str = "") -> str:
    """The model's answer as it stands in the text, completed to whole words, names and ranges; "" when it does not."""
    bare = said.strip().strip(".,;:!? \"'“”")
    if not bare or (refusal and refusal.strip(".").lower() in said.lower()):
        return ""
    found = re.search(r"\s+".join(map(re.escape, bare.split())), text, re.IGNORECASE)
    if not found:
        return ""
    start, end = _complete(text, *found.span())
    if closed(question) or _PADDING.fullmatch(text[start:end] + " "):
        return ""
    for widened in ((start, end), *_widened(text, start, end)):
        if offers(question, text[slice(*widened)]) is not False:
            return text[slice(*widened)]
    return ""


def _widened(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The span with one word more: after it, before it, on both sides."""
    after = re.match(r"\s+[\w'’-]+", text[end:])
    before = re.search(r"\b[\w'’-]+\s+$", text[:start])
    further, earlier = end + len(after[0]) if after else end, before.start() if before else start
    return [(start, further), (earlier, end), (earlier, further)]


def _complete(text: str, start: int, end: int) -> tuple[int, int]:
    """Widen a span to whole words, then to the whole of a name, a range, or a pair."""
    while start and text[start - 1].isalnum() and text[start].isalnum():
        start -= 1
    end += len(re.match(r"[^\s,;:!?()\"“”]*", text[end:])[0])  # type: ignore[index]
    if place := _PLACE.match(text[end:]):
        end += place.end()
    if text[start].isupper() or text[start].isdigit() or re.search(r"[Ee]very\s+$", text[:start]):
        while left := _LEFT.search(text[:start]):
            start = left.start()
        while right := _RIGHT.match(text[end:]):
            end += right.end()
    if not _ABBREVIATION.search(text[start:end]):
        end = start + len(text[start:end].rstrip("."))
    return start, end
