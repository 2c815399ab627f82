"""Cut text into sentences with exact character offsets. It does not tokenise words and knows no grammar."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Sentence", "split"]


@dataclass(frozen=True)
class Sentence:
    """The characters start to end of a text, and the heading they stand under."""

    start: int
    end: int
    text: str
    heading: str = ""

    @property
    def plain(self) -> str:
        """The text without marks of lists and emphasis, on one line."""
        return " ".join(_MARK.sub("", line).replace("**", "").replace("__", "") for line in self.text.split("\n"))


_SHORT_FORMS = """
mr mrs ms dr prof st jr sr rev hon gen col capt lt sgt vs etc eg ie e.g i.e cf ca approx no nos vol pp p fig sec ch art
inc ltd co corp dept est ext tel jan feb mar apr jun jul aug sep sept oct nov dec
"""
_ABBREVIATIONS = frozenset(_SHORT_FORMS.split())
_MARK = re.compile(r"^\s*(?:[-*+•‣▪]\s+|\(?\d{1,3}[.)]\s+|>\s+|[QA]:\s*)")
_HEADING = re.compile(r"^\s{0,3}#{1,6}\s+(.*?)\s*#*$")
_RULE = re.compile(r"^\s*(?:[-=*_]{3,}|\|?[\s:|-]+\|[\s:|-]*)$")
_STOP = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s|$)|[。！？]+[”’」』）]*")
_CLOSING = "”’」』）"
_NUMBERING = re.compile(r"\s*\(?\d{1,3}\.")
_BARE_YES = re.compile(r"[?？]\s*(?:A:\s*)?\w+[.!]$")
_LAST_WORD = re.compile(r"[^\s(\[]+$")


def split(text: str, heading: str = "") -> list[Sentence]:
    """
    The sentences of a text, in order. Headings are not sentences, but each sentence knows the one it stands under;
    an item of a list is a sentence; a question and the answer that follows it are one.
    """
    sentences: list[Sentence] = []
    for start, end, title in _blocks(text, heading):
        sentences += [
            Sentence(start + at, start + to, text[start + at : start + to], title) for at, to in _cut(text[start:end])
        ]
    return _join_questions(text, sentences)


def _blocks(text: str, heading: str) -> Iterator[tuple[int, int, str]]:
    """Stretches that no sentence leaves: paragraphs and items of lists, without headings and rules."""
    start = at = 0
    previous = ""
    for line in [*text.splitlines(keepends=True), "\n"]:
        bare = line.strip()
        title = _HEADING.match(line.rstrip())
        if start < at and (title or _apart(previous, bare)):
            yield start, at, heading
            start = at
        if title or not bare or _RULE.match(bare):
            if title:
                heading = title[1]
            start = at + len(line)
        at += len(line)
        previous = bare


def _apart(before: str, line: str) -> bool:
    """Whether a line begins something new, and is not the wrapped rest of the line before."""
    if not line or _MARK.match(line) or _RULE.match(line) or line.startswith("|"):
        return True
    return len(before) < 50 and not before.endswith((",", ";", "-")) and not line[0].islower()


def _cut(block: str) -> Iterator[tuple[int, int]]:
    """The sentences of one block, without the blanks around them."""
    start = 0
    for stop in _STOP.finditer(block):
        if _ends_sentence(block, start, stop):
            yield from _trim(block, start, stop.end())
            start = stop.end()
    yield from _trim(block, start, len(block))


def _ends_sentence(block: str, start: int, stop: re.Match[str]) -> bool:
    after = block[stop.end() : stop.end() + 1]
    if stop[0][0] != ".":
        return not (stop[0][-1] in _CLOSING and after.isalnum())
    word = _LAST_WORD.search(block, 0, stop.start())
    last = word[0].lower() if word else ""
    if last in _ABBREVIATIONS or (len(last) == 1 and last.isalpha()) or _NUMBERING.fullmatch(block[start : stop.end()]):
        return False
    return not block[stop.end() :].lstrip()[:1].islower()


def _trim(block: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    inner = block[start:end]
    if bare := inner.strip():
        first = start + inner.index(bare)
        yield first, first + len(bare)


def _join_questions(text: str, sentences: list[Sentence]) -> list[Sentence]:
    joined: list[Sentence] = []
    for sentence in sentences:
        last = joined[-1] if joined else None
        if last and _answers(last, sentence, text[last.end : sentence.start]):
            joined[-1] = Sentence(last.start, sentence.end, text[last.start : sentence.end], last.heading)
        else:
            joined.append(sentence)
    return joined


def _answers(question: Sentence, answer: Sentence, between: str) -> bool:
    """Whether a sentence answers the one before, or says more after a bare yes or no."""
    open_ = question.text.endswith(("?", "？")) or _BARE_YES.search(question.text)
    near = between.count("\n") < 3 and question.heading == answer.heading
    return bool(open_) and near and not answer.text.endswith(("?", "？"))
