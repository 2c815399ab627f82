"""What models do: embed, rerank, generate, tune; and the models themselves."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import msgspec

from .base import Piece, Reply, Request, StreamRequest
from .knowledge import Object


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
    """
    Tokens: of the prompt, of these not read again because the state cache had them, and written.

    `hits`: how many kept states were continued from; `bytes`: their size.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    hits: int = 0
    bytes: int = 0


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Finish = Literal["stop", "length"]


class Chunk(Piece):
    """
    A piece of generated text. The last piece of a text says why it ended, the last of all what it cost.

    `index` tells which of the `n` texts it belongs to.
    """

    text: str = ""
    index: int = 0
    logprobs: list[float] = []
    finish: Finish | None = None
    usage: Usage | None = None
    model: str = ""


class Choice(Reply):
    """One of several texts for the same prompt."""

    text: str
    finish: Finish | None = None
    logprobs: list[float] = []

    @classmethod
    def fold(cls, chunks: Sequence[Chunk]) -> Choice:
        return cls(
            "".join(chunk.text for chunk in chunks),
            next((chunk.finish for chunk in reversed(chunks) if chunk.finish), None),
            [value for chunk in chunks for value in chunk.logprobs],
        )


class Completion(Reply):
    """
    A whole generated text. `logprobs`: natural logarithm of each written token's probability, if asked for.

    With `n` above 1, `choices` holds all the texts, and the other fields the first of them.
    """

    text: str
    finish: Finish | None = None
    usage: Usage = msgspec.field(default_factory=Usage)
    model: str = ""
    logprobs: list[float] = []
    choices: list[Choice] = []

    @classmethod
    def fold(cls, chunks: Sequence[Chunk]) -> Completion:
        texts: dict[int, list[Chunk]] = {0: []}
        for chunk in chunks:
            texts.setdefault(chunk.index, []).append(chunk)
        choices = [Choice.fold(texts[index]) for index in sorted(texts)]
        first, last = choices[0], chunks[-1] if chunks else Chunk()
        return cls(
            first.text,
            first.finish,
            last.usage or Usage(),
            last.model,
            first.logprobs,
            choices if len(choices) > 1 else [],
        )


class Generate(StreamRequest[Chunk, Completion]):
    """
    Continue `prompt`, or answer `messages`; `documents` are set before the last turn in the model's own form.

    What is left out (None) comes from the model's card. `model` is "[plugin/]name"; `state` and `adapter` name tuned
    ones; `conversation` is a hint for keeping the state near. `cache` false neither uses nor keeps states.
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
    logit_bias: dict[int, float] = {}
    ban: list[int] = []
    stop: list[str] = []
    regex: str = ""
    json_schema: dict[str, Any] | None = None
    n: int = 1
    seed: int | None = None
    logprobs: bool = False
    model: str | None = None
    state: str | None = None
    adapter: str | None = None
    conversation: str | None = None
    cache: bool = True
    hook = "generate"
    reply = Completion
    chunk = Chunk


class KeptState(Reply):
    """
    What a model remembers of a text it has read. `tokens`: how long that text is; `bytes`: the size of the state.

    `label` says what was read; `pinned`: not dropped to make room for states that nobody asked to keep.
    """

    id: str
    model: str = ""
    label: str = ""
    owner: str = ""
    tokens: int = 0
    bytes: int = 0
    memory: bool = False
    disk: bool = False
    pinned: bool = False
    hits: int = 0
    created: float = 0.0
    used: float = 0.0


class CacheStats(Reply):
    """The state cache: bytes in memory and on disk with their budgets, and what it has spared since the start."""

    states: int = 0
    memory: int = 0
    memory_budget: int = 0
    disk: int = 0
    disk_budget: int = 0
    hits: int = 0
    misses: int = 0
    tokens_saved: int = 0
    dropped: int = 0


class StatesReply(Reply, omit_defaults=True):
    """The states that the action is about, the cache as a whole, and for export the file as an object."""

    states: list[KeptState] = []
    cache: CacheStats = msgspec.field(default_factory=CacheStats)
    usage: Usage | None = None
    object: Object | None = None


class States(Request[StatesReply]):
    """
    What the model remembers of texts it has read.

    list, read (`documents`, after `messages`, in the model's own form, or `prompt`: read now, so that a request that
    begins with them need not; `pin` keeps the state), export (`id`: as a file), import (`object`), drop (`id`, or all).
    """

    action: Literal["list", "read", "export", "import", "drop"] = "list"
    id: str = ""
    messages: list[Message] = []
    documents: list[str] = []
    prompt: str = ""
    model: str | None = None
    state: str | None = None
    adapter: str | None = None
    label: str = ""
    pin: bool = True
    object: str = ""
    hook = "states"
    reply = StatesReply


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
    """
    Base models, states and adapters of a worker.

    list, add (`path` on the worker), pull (`url`, or `hub` and a file in it; as a job it tells its progress), load,
    unload, use (as the default from now on), delete. `base` is the model that a state or adapter without a card of its
    own was made for.
    """

    action: Literal["list", "add", "pull", "load", "unload", "use", "delete"] = "list"
    name: str = ""
    path: str = ""
    url: str = ""
    hub: str = ""
    file: str = ""
    sha256: str = ""
    base: str = ""
    hook = "models"
    reply = ModelsReply
