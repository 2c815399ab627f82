"""
Examples out of JSON lines, in the form in which the model is asked, and their order in training.

A line holds `prompt` and `response`, or `messages`, each perhaps with `documents`; or `text`. Other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec
from aiirwkv.errors import BadRequest
from aiirwkv.types import Message
from aiirwkv_llm_rwkv.card import Card, clean
from aiirwkv_llm_rwkv.tokenizer import Tokenizer

__all__ = ["Example", "Sample", "encode", "pack", "plan", "read", "split"]

SHOWN = 5
"""Broken lines that a complaint names."""
HELD_OUT = 500
"""Lines that are held out at most; more would cost time and say little more."""


class Line(msgspec.Struct):
    """One line as it may be written."""

    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    messages: list[Message] | None = None
    documents: list[str] = []


class Example(NamedTuple):
    """What the model reads and what it shall answer. A mere text has no prompt."""

    line: int
    prompt: str
    answer: str


class Sample(NamedTuple):
    """An example in tokens; those from `answer` on are learnt."""

    line: int
    tokens: list[int]
    answer: int


def read(path: Path, card: Card) -> list[Example]:
    """
    The examples of a file; of a conversation, one for each of the assistant's turns.

    The same example twice counts once: it could otherwise be learnt and held out. BadRequest: which lines are broken.
    """
    found: dict[tuple[str, str], Example] = {}
    broken: list[str] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                for prompt, answer in _examples(msgspec.json.decode(raw, type=Line), card):
                    found.setdefault((prompt, answer), Example(number, prompt, answer))
            except UnicodeDecodeError:
                broken.append(f"line {number} is not UTF-8")
            except (msgspec.MsgspecError, BadRequest) as error:
                broken.append(f"line {number}: {error}")
    _complain(broken)
    if not found:
        raise BadRequest("tune: the data is empty; a line is like " + '{"prompt": "…", "response": "…"}')
    return list(found.values())


def _examples(line: Line, card: Card) -> Iterator[tuple[str, str]]:
    """Prompt and answer as text; both end in the way the model's card has it."""
    kinds = [line.prompt is not None or line.response is not None, line.text is not None, line.messages is not None]
    if sum(kinds) != 1:
        raise BadRequest("a line has `prompt` and `response`, or `messages`, or `text`, and only one of these")
    if line.text is not None:
        if not line.text.strip():
            raise BadRequest("the text is empty")
        yield "", line.text
        return
    if line.messages is not None:
        messages = line.messages
    else:
        messages = [Message("user", line.prompt or ""), Message("assistant", line.response or "")]
    turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        raise BadRequest("`messages` holds no turn of the role assistant, so there is nothing to learn")
    for turn in turns:
        answer = clean(messages[turn].content)
        if not answer:
            raise BadRequest("the response is empty" if line.messages is None else "an assistant's turn is empty")
        try:
            prompt = card.prompt.write(messages[:turn], line.documents)
        except BadRequest:
            what = "the prompt is empty" if line.messages is None else "each assistant's turn must follow a user's"
            raise BadRequest(what) from None
        yield prompt, f" {answer}{card.stop.strings[0] if card.stop.strings else ''}"


def encode(examples: Sequence[Example], card: Card, tokenizer: Tokenizer, limit: int) -> list[Sample]:
    """The examples in tokens. A text is learnt from its second token to its end. BadRequest: which are too long."""
    samples: list[Sample] = []
    broken: list[str] = []
    end = list(card.stop.tokens[:1])
    for line, prompt, answer in examples:
        before, after = tokenizer.encode(prompt), tokenizer.encode(answer)
        if not prompt or not card.stop.strings:
            after += end
        sample = Sample(line, before + after, len(before) or 1)
        if len(sample.tokens) > limit:
            broken.append(
                f"line {line} has {len(sample.tokens)} tokens and batch_tokens is {limit}: shorten it or raise that"
            )
        elif len(sample.tokens) > sample.answer:
            samples.append(sample)
        else:
            broken.append(f"line {line} has a single token, so there is nothing to learn")
    _complain(broken)
    return samples


def _complain(broken: Sequence[str]) -> None:
    if broken:
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise BadRequest(f"tune: the data cannot be used: {'; '.join(broken[:SHOWN])}{more}")


def split(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """The samples to learn, and those held out to measure: a share of the lines, chosen by the seed."""
    lines = sorted({sample.line for sample in samples})
    if len(lines) < 2:
        raise BadRequest("tune: the data needs at least two different examples: one to learn, one to measure with")
    count = min(max(1, round(share * len(lines))), len(lines) - 1, HELD_OUT)
    held = set(Random(seed).sample(lines, count))
    return [s for s in samples if s.line not in held], [s for s in samples if s.line in held]


def pack(order: Iterator[int] | Sequence[int], lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Batches in this order, none with more than `limit` tokens, padding included, and none with a sample twice."""
    batch: list[int] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if batch and (longest * (len(batch) + 1) > limit or index in batch):
            yield batch
            batch, longest = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch


def plan(lengths: Sequence[int], limit: int, steps: int, seed: int) -> list[list[int]]:
    """
    The samples of every step. The order is shuffled anew in every epoch.

    Nothing but lengths and seed decides it, so that a run which is taken up again finds the same.
    """
    random = Random(seed)

    def forever() -> Iterator[int]:
        while True:
            yield from random.sample(range(len(lengths)), len(lengths))

    batches = pack(forever(), lengths, limit)
    return [next(batches) for _ in range(steps)]
