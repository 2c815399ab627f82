"""Questions, answers with citations, and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from .base import Piece, Reply, Request, StreamRequest
from .knowledge import Receipt, SearchMode
from .models import Message, Usage


class Citation(Reply):
    """The words an answer rests on. `text` is the extracted text of the document from `start` to `end`."""

    number: int
    document: str
    page: int | None
    start: int
    end: int
    text: str
    collection: str = ""
    document_id: str = ""
    chunk: str = ""
    support: float = 0.0


class Answer(Reply):
    """
    A whole answer. `refused`: the sources do not say. `supported`: the model's own words stand in the passages.

    `demonstration`: the built-in demonstration model wrote it.
    """

    answer: str
    citations: list[Citation] = []
    receipt: Receipt = msgspec.field(default_factory=Receipt)
    refused: bool = False
    supported: bool = True
    demonstration: bool = False
    model: str = ""
    conversation: str = ""
    usage: Usage = msgspec.field(default_factory=Usage)

    @classmethod
    def fold(cls, chunks: Sequence[ChatChunk]) -> Answer:
        for chunk in reversed(chunks):
            if chunk.answer is not None:
                return chunk.answer
        return cls("".join(chunk.text for chunk in chunks), supported=False)


class ChatChunk(Piece):
    """A stage that begins, the receipt of the search, a piece of text, and at last the whole checked answer."""

    stage: str = ""
    receipt: Receipt | None = None
    text: str = ""
    answer: Answer | None = None


class Chat(StreamRequest[ChatChunk, Answer]):
    """
    Answer a question from collections. `messages` are the earlier turns.

    `mode`: sources (refuse when they do not say), first (sources, then the model's own knowledge, marked), free.

    `read`: how the model is given the passages. None: the sentences of them that fit best, or the whole document, if
    they all stand in one that it has read; concat: whole, one after another; parallel: each by itself, and the answer
    that is supported best wins. What is given whole need not be read again when its state is kept.
    """

    question: str = ""
    messages: list[Message] = []
    collections: list[str] = []
    mode: Literal["sources", "first", "free"] = "sources"
    top: int = 5
    search: SearchMode = "hybrid"
    where: dict[str, list[str]] = {}
    read: Literal["concat", "parallel"] | None = None
    model: str | None = None
    state: str | None = None
    adapter: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    conversation: str | None = None
    hook = "chat"
    reply = Answer
    chunk = ChatChunk


class Turn(Reply):
    """One stored question or answer."""

    id: str
    role: Literal["user", "assistant"]
    content: str
    parent: str = ""
    created: float = 0.0
    answer: Answer | None = None
    feedback: int = 0


class Conversation(Reply):
    id: str
    title: str
    owner: str = ""
    created: float = 0.0
    updated: float = 0.0
    turns: list[Turn] = []


class ConversationsReply(Reply):
    conversations: list[Conversation] = []
    text: str = ""


class Conversations(Request[ConversationsReply]):
    """list, get, rename (`title`), branch (at `turn`), delete, export, feedback (on `turn`: -1, 0 or 1)."""

    action: Literal["list", "get", "rename", "branch", "delete", "export", "feedback"]
    id: str = ""
    title: str = ""
    turn: str = ""
    feedback: int = 0
    hook = "conversations"
    reply = ConversationsReply
