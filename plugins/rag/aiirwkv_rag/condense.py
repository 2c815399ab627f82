"""A follow-up question made complete, so that it can be searched for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aiirwkv import Message

from .words import topical_words

__all__ = ["complete", "conversation", "dialogue", "refers"]

ROUNDS = 6

_REFERS = re.compile(
    r"^\W*(?:and|or|but|what about|how about|then)\b|"
    r"\b(?:it|its|they|them|their|he|him|his|she|her|hers|that|those|these|this|there|ones?|same)\b",
    re.IGNORECASE,
)


def refers(question: str) -> bool:
    """Whether an English question seems to mean something that was said before."""
    return _REFERS.search(question) is not None


def complete(question: str, earlier: Sequence[Message]) -> str:
    """The question, with what the question before was about when it refers to it. Without a model."""
    before = next((message.content for message in reversed(earlier) if message.role == "user"), "")
    if not before or not refers(question):
        return question
    known = {word.lower() for word in topical_words(question)}
    subject = [word for word in topical_words(before) if word.lower() not in known]
    return f"{question} ({' '.join(subject)})" if subject else question


def conversation(earlier: Sequence[Message]) -> list[Message]:
    """The last rounds, from a question on."""
    return _from_a_question([message for message in earlier if message.role != "system"][-2 * ROUNDS :])


def dialogue(earlier: Sequence[Message]) -> list[Message]:
    """
    The last rounds for a model to go on from: six to eleven of them.

    They begin with the same question for six rounds on end, so that what the model has read of them stays a beginning
    of what it reads next.
    """
    said = _from_a_question([message for message in earlier if message.role != "system"])
    questions = [place for place, message in enumerate(said) if message.role == "user"]
    first = max(len(questions) // ROUNDS - 1, 0) * ROUNDS
    return said[questions[first] :] if questions else []


def _from_a_question(messages: list[Message]) -> list[Message]:
    while messages and messages[0].role != "user":
        messages = messages[1:]
    return messages
