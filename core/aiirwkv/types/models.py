"""What models do: embed, rerank, generate, tune; and the models themselves."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import msgspec

from .base import Piece, Reply, Request, StreamRequest


class Embeddings(Reply, omit_defaults=True):
    """
    One vector per text. Dense: `vectors`, or the same rows as little-endian float32 in `data` (base64 on the wire).
    Sparse: token to weight. Multi: one vector per token.
    """

    dim: int = 0
    vectors: list[list[float]] = []
    data: bytes = b""
    sparse: list[dict[str, float]] = []
    multi: list[list[list[float]]] = []
    model: str = ""

    @classmethod
    def pack(cls, rows: Any, model: str = "") -> Embeddings:
        """From rows of floats or a two-dimensional float array."""
        if hasattr(rows, "astype"):
            return cls(int(rows.shape[1]), data=rows.astype("<f4").tobytes(), model=model)
        flat = array("f")
        rows = list(rows)
        for row in rows:
            flat.extend(row)
        return cls(len(rows[0]) if rows else 0, data=flat.tobytes(), model=model)

    def rows(self) -> list[list[float]]:
        """The dense vectors, in whichever form they came."""
        if self.vectors or not self.data:
            return self.vectors
        flat = array("f", self.data)
        return [flat[i : i + self.dim].tolist() for i in range(0, len(flat), self.dim)]


class Embed(Request[Embeddings]):
    """Turn texts into vectors. `kind` tells a question from a passage, for models that treat them differently."""

    texts: list[str]
    kind: Literal["query", "passage"] = "passage"
    outputs: list[Literal["dense", "sparse", "multi"]] = msgspec.field(default_factory=lambda: ["dense"])
    format: Literal["float", "base64"] = "float"
    hook = "embed"
    reply = Embeddings

    BATCH: ClassVar[int] = 64
    CHARACTERS: ClassVar[int] = 200_000

    def parts(self) -> list[Embed]:
        batches: list[list[str]] = [[]]
        size = 0
        for text in self.texts:
            if batches[-1] and (len(batches[-1]) == self.BATCH or size + len(text) > self.CHARACTERS):
                batches.append([])
                size = 0
            batches[-1].append(text)
            size += len(text)
        return [msgspec.structs.replace(self, texts=batch, format="base64") for batch in batches]

    def join(self, replies: list[Embeddings]) -> Embeddings:
        if len(replies) == 1:
            return replies[0]
        return Embeddings(
            dim=replies[0].dim,
            vectors=[row for reply in replies for row in reply.vectors],
            data=b"".join(reply.data for reply in replies),
            sparse=[row for reply in replies for row in reply.sparse],
            multi=[row for reply in replies for row in reply.multi],
            model=replies[0].model,
        )

    def shape(self, reply: Embeddings) -> Embeddings:
        if self.format == "base64":
            return reply if reply.data or not reply.vectors else Embeddings.pack(reply.vectors, reply.model)
        return msgspec.structs.replace(reply, vectors=reply.rows(), data=b"")


class Scores(Reply):
    """One score per text, in the order of the texts; higher is closer."""

    scores: list[float]
    model: str = ""


class Rerank(Request[Scores]):
    """Score texts against a query."""

    query: str
    texts: list[str]
    hook = "rerank"
    reply = Scores


class Usage(Reply):
    """Tokens: read from the prompt, of these found in the state cache, and written."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Finish = Literal["stop", "length"]


class Chunk(Piece):
    """A piece of generated text; the last one says why it ended and what it cost."""

    text: str = ""
    logprobs: list[float] = []
    finish: Finish | None = None
    usage: Usage | None = None
    model: str = ""


class Completion(Reply):
    """A whole generated text. `logprobs`: natural logarithm of each written token's probability, if asked for."""

    text: str
    finish: Finish | None = None
    usage: Usage = msgspec.field(default_factory=Usage)
    model: str = ""
    logprobs: list[float] = []

    @classmethod
    def fold(cls, chunks: Sequence[Chunk]) -> Completion:
        last = chunks[-1] if chunks else Chunk()
        return cls(
            "".join(chunk.text for chunk in chunks),
            last.finish,
            last.usage or Usage(),
            last.model,
            [value for chunk in chunks for value in chunk.logprobs],
        )


class Generate(StreamRequest[Chunk, Completion]):
    """
    Continue `prompt`, or answer `messages`; `documents` are set before the last turn in the model's own form.

    What is left out (None) comes from the model's card. `model` is "[plugin/]name"; `state` and `adapter` name tuned
    ones; `conversation` is a hint for keeping the state near.
    """

    prompt: str = ""
    messages: list[Message] = []
    documents: list[str] = []
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence: float | None = None
    frequency: float | None = None
    decay: float | None = None
    stop: list[str] = []
    seed: int | None = None
    logprobs: bool = False
    model: str | None = None
    state: str | None = None
    adapter: str | None = None
    conversation: str | None = None
    hook = "generate"
    reply = Completion
    chunk = Chunk


class Tuned(Reply):
    """A tuned state or adapter, and the proof: loss before and after on examples it was not tuned on."""

    name: str
    method: str
    model: str
    sha256: str
    steps: int
    loss_before: float
    loss_after: float
    seconds: float
    parameters: int = 0


class Tune(Request[Tuned]):
    """Tune a state or an adapter on examples: JSON lines as an object, or as pasted text."""

    name: str
    object: str = ""
    text: str = ""
    method: Literal["state", "lora", "pissa"] = "state"
    model: str | None = None
    steps: int = 200
    learning_rate: float | None = None
    batch_tokens: int = 1024
    rank: int = 8
    validation: float = 0.2
    seed: int = 0
    hook = "tune"
    reply = Tuned


class Model(Reply):
    """A base model, state or adapter. `card` holds prompt form, sampling, limits and origin."""

    name: str
    kind: Literal["base", "state", "adapter"] = "base"
    plugin: str = ""
    version: str = ""
    parameters: int = 0
    size: int = 0
    sha256: str = ""
    loaded: bool = False
    default: bool = False
    demonstration: bool = False
    base: str = ""
    card: dict[str, Any] = {}


class ModelsReply(Reply):
    models: list[Model]


class Models(Request[ModelsReply]):
    """list, add (`path` on the worker), pull (`url`), load, unload, use, delete: base models, states, adapters."""

    action: Literal["list", "add", "pull", "load", "unload", "use", "delete"] = "list"
    name: str = ""
    path: str = ""
    url: str = ""
    sha256: str = ""
    hook = "models"
    reply = ModelsReply
