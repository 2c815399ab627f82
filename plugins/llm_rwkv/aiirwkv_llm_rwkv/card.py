"""A model's card: what the model is, how it wants to be asked, and what it can be trusted with. One card.json each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
from aiirwkv.errors import BadRequest, PluginError
from aiirwkv.types import Message

__all__ = ["Card", "Limits", "Prompt", "Sampling", "Stop", "clean"]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    pass


class Sampling(_Strict, kw_only=True, frozen=True):
    """
    How the next token is chosen. Temperature 0 takes the likeliest one.

    The penalties are RWKV's: a token that was written loses `presence` + `frequency` × its count, and counts shrink by
    `decay` with every token.
    """

    temperature: float = 1.0
    top_p: float = 0.3
    top_k: int = 0
    min_p: float = 0.0
    presence: float = 0.5
    frequency: float = 0.5
    decay: float = 0.996
    max_tokens: int = 1024


class Stop(_Strict, frozen=True):
    """What ends an answer: token ids, and strings of the text (for `messages` only)."""

    tokens: tuple[int, ...] = (0,)
    strings: tuple[str, ...] = ("\n\nUser:",)


class Limits(_Strict, frozen=True):
    """How much text the model reads well: passages, and tokens of all of them. 0: not known."""

    passages: int = 0
    tokens: int = 0


class Prompt(_Strict, frozen=True):
    """
    The forms of a prompt. {text} is the words of a message, {documents} the documents, set before the last question.

    An empty form means that the model was not made for such a message; it is then left out. The general forms are those
    of RWKV-7 G1. A form of a question ends without a space: the model writes it.
    """

    question: str = "User: {text}\n\nAssistant:"
    reading: str = "{documents}\n\nUser: {text}\n\nAssistant:"
    user: str = "User: {text}\n\n"
    assistant: str = "Assistant: {text}\n\n"
    system: str = "System: {text}\n\n"
    between: str = "\n"

    def write(self, messages: Sequence[Message], documents: Sequence[str] = ()) -> str:
        """The prompt for a conversation whose last message is the user's question."""
        return "".join(self.parts(messages, documents))

    def parts(self, messages: Sequence[Message], documents: Sequence[str] = ()) -> list[str]:
        """
        The same prompt in parts: each earlier turn, each document with what stands before it, and the rest.

        Where a part ends, other prompts may go on in another way.
        """
        if not messages or messages[-1].role != "user":
            raise BadRequest("generate: the last of `messages` must have the role user")
        question = clean(messages[-1].content)
        if not question:
            raise BadRequest("generate: the last of `messages` is empty")
        forms = {"user": self.user, "assistant": self.assistant, "system": self.system}
        parts = [_fill(forms[message.role], text=clean(message.content)) for message in messages[:-1]]
        passages = [text for document in documents if (text := clean(document))]
        before, _, after = self.reading.partition("{documents}")
        if not passages or "{text}" in before or not after:  # nobody else asks the same before these documents
            last = self.reading if passages else self.question
            parts.append(_fill(last, text=question, documents=self.between.join(passages)))
        else:
            parts += [before + passages[0], *(self.between + text for text in passages[1:])]
            parts.append(_fill(after, text=question, documents=self.between.join(passages)))
        return [part for part in parts if part]

    def beginning(self, messages: Sequence[Message], documents: Sequence[str]) -> list[str]:
        """
        What a prompt with these documents after these messages begins with, whatever the question, in parts.

        The last part is not of it: it shows what follows, since a token may reach into that ("。" and a new line).
        """
        if not messages and not any(map(clean, documents)):
            raise BadRequest("states: read needs `documents`, `messages` or `prompt`; all are empty")
        parts = self.parts([*messages, Message("user", "?")], documents)
        if len(parts) == 1:
            raise BadRequest(
                "states: in this model's form the question comes first, so that nothing can be read before it; "
                "see `prompt.reading` in its card.json"
            )
        return parts


class Card(_Strict, kw_only=True, frozen=True):
    """`sha256` maps file names to their hashes, checked when the model is loaded."""

    name: str
    kind: str = "base"
    version: str = "rwkv7"
    description: str = ""
    parameters: int = 0
    languages: list[str] = []
    demonstration: bool = False
    license: str = ""
    origin: str = ""
    sha256: dict[str, str] = {}
    prompt: Prompt = Prompt()
    stop: Stop = Stop()
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    refusal: str = ""

    @classmethod
    def load(cls, path: Path) -> Card:
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PluginError(f"the model card {path} cannot be used: {error}") from None


def clean(text: str) -> str:
    """A blank line separates turns, so a turn holds none; neither does it begin or end with white space."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"\n\s*\n", "\n", text).strip()


def _fill(form: str, **words: str) -> str:
    """Replace {text} and {documents}, once: what the words hold is not looked at again."""
    return re.sub(r"\{(text|documents)\}", lambda found: words.get(found[1], ""), form)
