"""
What travels on the bus: one request type per hook, and its reply.

Everything is JSON. A request refuses fields it does not know, so a typo is an error; a reply ignores them, so that a
newer worker can say more. Offsets count characters of the extracted text; times are seconds; sizes are bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import msgspec

from .errors import BadRequest

__all__ = [
    "Access",
    "Anchor",
    "Answer",
    "Chat",
    "ChatChunk",
    "Chunk",
    "Citation",
    "Collection",
    "Collections",
    "CollectionsReply",
    "Completion",
    "Configuration",
    "Considered",
    "Conversation",
    "Conversations",
    "ConversationsReply",
    "Convert",
    "Converted",
    "Discover",
    "Discovered",
    "Document",
    "DocumentState",
    "Embed",
    "Embeddings",
    "Evaluate",
    "Evaluation",
    "Finish",
    "Generate",
    "Hit",
    "Hits",
    "Index",
    "Indexed",
    "Job",
    "JobState",
    "Jobs",
    "JobsReply",
    "Message",
    "Metric",
    "Model",
    "Models",
    "ModelsReply",
    "Object",
    "Passage",
    "Piece",
    "REQUESTS",
    "Receipt",
    "Reply",
    "Request",
    "Rerank",
    "Scores",
    "Search",
    "SearchMode",
    "Service",
    "Source",
    "Stage",
    "StreamRequest",
    "Tune",
    "Tuned",
    "Turn",
    "Usage",
    "User",
    "Users",
    "UsersReply",
    "WebPage",
]

R = TypeVar("R")
C = TypeVar("C")


class Reply(msgspec.Struct):
    """Base of replies. Unknown fields are ignored, so a newer worker can say more."""


class Piece(Reply, omit_defaults=True):
    """Base of the pieces of a stream, kept small on the wire."""


class Request(msgspec.Struct, Generic[R], omit_defaults=True, forbid_unknown_fields=True):
    """Base of requests. Unknown fields are refused, so a typo is an error and not a default."""

    hook: ClassVar[str]
    reply: ClassVar[Any]

    def parts(self) -> list[Self]:
        """The requests that `Bus.call` really sends: itself, or several that fit one message each."""
        return [self]

    def join(self, replies: list[R]) -> R:
        """The reply to `self`, from the replies to its parts."""
        return replies[0]

    def shape(self, reply: R) -> R:
        """The reply in the form this request asked for; the worker calls it before sending."""
        return reply

    def need(self, *fields: str) -> None:
        """Refuse the request unless each of these optional fields says something."""
        if missing := [field for field in fields if getattr(self, field) in (None, "", [], {})]:
            action = f" with action {do!r}" if (do := getattr(self, "action", None)) else ""
            raise BadRequest(f"{self.hook}{action} needs `{'`, `'.join(missing)}`")


class StreamRequest(Request[R], Generic[C, R], kw_only=True):
    """A request answered by a stream of pieces C, or, with `stream` false, by one whole reply R."""

    chunk: ClassVar[Any]
    stream: bool = True


# embed and rerank


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


# generate


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


# objects, convert and discover


class Object(Reply):
    """Something too big for a message, kept in the bus's object store under `id`."""

    id: str
    name: str = ""
    size: int = 0
    sha256: str = ""
    media_type: str = ""


class Anchor(Reply, omit_defaults=True):
    """A place in extracted text: characters start to end belong to a page, a heading, a table or a box on a page."""

    kind: Literal["page", "heading", "table", "box"]
    start: int
    end: int
    page: int = 0
    title: str = ""
    level: int = 0
    box: list[float] = []


class Converted(Reply, omit_defaults=True):
    """Extracted text, in `text`, or as the object `object` when it is above 512 KiB."""

    text: str = ""
    object: str = ""
    anchors: list[Anchor] = []
    title: str = ""
    media_type: str = ""
    pages: int = 0
    warnings: list[str] = []


class Convert(Request[Converted]):
    """Extract the text of an object."""

    object: str
    name: str = ""
    media_type: str = ""
    hook = "convert"
    reply = Converted


class WebPage(Reply):
    """A page found on the web; `object` holds its bytes when they were fetched."""

    url: str
    title: str = ""
    snippet: str = ""
    object: str = ""


class Discovered(Reply):
    pages: list[WebPage]


class Discover(Request[Discovered]):
    """Find pages on the web for a query, or fetch one url as an object."""

    query: str = ""
    url: str = ""
    top: int = 10
    hook = "discover"
    reply = Discovered


# index, search, collections, evaluate


class Source(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A document to index: an uploaded object, or pasted text."""

    object: str = ""
    text: str = ""
    name: str = ""
    media_type: str = ""
    tags: list[str] = []


DocumentState = Literal["ready", "unchanged", "needs_ocr", "failed"]


class Document(Reply):
    """A document of a collection. `reason` says why it is not ready, and what to do."""

    id: str
    name: str
    state: DocumentState
    chunks: int = 0
    characters: int = 0
    pages: int = 0
    size: int = 0
    sha256: str = ""
    media_type: str = ""
    tags: list[str] = []
    reason: str = ""
    created: float = 0.0


class Indexed(Reply):
    """What became of the documents of an index request."""

    collection: str
    documents: list[Document] = []
    chunks: int = 0
    seconds: float = 0.0


class Index(Request[Indexed]):
    """Read documents into a collection, which is made if it does not exist."""

    collection: str
    sources: list[Source]
    hook = "index"
    reply = Indexed


class Stage(Reply):
    """One step of an answer: how long it took, and what it did, in words."""

    name: str
    seconds: float
    note: str = ""


class Considered(Reply):
    """A passage that was looked at: its scores by stage, whether it was kept, and why or why not."""

    collection: str
    document: str
    start: int
    end: int
    scores: dict[str, float] = {}
    kept: bool = False
    reason: str = ""
    page: int | None = None
    text: str = ""


class Receipt(Reply):
    """How an answer came about: what was searched, kept and dropped, and how long each stage took."""

    query: str = ""
    collections: list[str] = []
    stages: list[Stage] = []
    considered: list[Considered] = []
    prompt: str = ""
    model: str = ""


class Hit(Reply):
    """A passage found. `text` is the extracted text from `start` to `end`; `scores` names each leg's own score."""

    document: str
    page: int | None
    start: int
    end: int
    text: str
    score: float
    collection: str = ""
    document_id: str = ""
    chunk: str = ""
    heading: str = ""
    scores: dict[str, float] = {}


class Hits(Reply):
    """Passages, best first, and the receipt."""

    hits: list[Hit]
    receipt: Receipt = msgspec.field(default_factory=Receipt)


SearchMode = Literal["hybrid", "dense", "keyword"]


class Search(Request[Hits]):
    """Find passages. No collections named: all that the caller may read. `where`: documents, tags, pages to keep."""

    query: str
    collections: list[str] = []
    top: int = 5
    mode: SearchMode = "hybrid"
    rerank: str | None = None
    where: dict[str, list[str]] = {}
    hook = "search"
    reply = Hits


Access = Literal["read", "write"]


class Collection(Reply):
    """A set of documents with one embedder. `shares`: user or role:NAME to read or write."""

    id: str
    name: str
    description: str = ""
    owner: str = ""
    shares: dict[str, Access] = {}
    embedder: str = ""
    fingerprint: str = ""
    chunk_size: int = 0
    chunk_overlap: int = 0
    documents: int = 0
    chunks: int = 0
    created: float = 0.0


class Passage(Reply):
    """A stored chunk of a document."""

    id: str
    document: str
    number: int
    start: int
    end: int
    text: str
    page: int | None = None
    heading: str = ""
    enabled: bool = True


class CollectionsReply(Reply, omit_defaults=True):
    """What the action is about; the other fields stay empty. `text` starts at character `start` of its document."""

    collections: list[Collection] = []
    documents: list[Document] = []
    chunks: list[Passage] = []
    text: str = ""
    start: int = 0
    object: Object | None = None
    count: int = 0
    problems: list[str] = []


class Collections(Request[CollectionsReply]):
    """
    Manage collections. `name` is a collection's name or id, `document` a document's.

    create, list, rename (`to`), describe, delete (with `document`: only that), share (`user`, `access`; none takes it
    back), documents, chunks, text (of `document`, from `start` to `end`), edit (`chunk`: `text`, `enabled`), verify,
    rebuild, export, import (`object`).
    """

    action: Literal[
        "create", "list", "rename", "describe", "delete", "share", "documents", "chunks", "text", "edit", "verify",
        "rebuild", "export", "import",
    ]  # fmt: skip
    name: str = ""
    to: str = ""
    description: str | None = None
    embedder: str | None = None
    chunk_size: int | None = None
    chunk_overlap: int | None = None
    document: str = ""
    chunk: str = ""
    text: str | None = None
    enabled: bool | None = None
    start: int = 0
    end: int | None = None
    user: str = ""
    access: Access | None = None
    object: str = ""
    query: str = ""
    offset: int = 0
    limit: int = 1000
    hook = "collections"
    reply = CollectionsReply


class Configuration(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A way to search, to be measured."""

    label: str = ""
    mode: SearchMode = "hybrid"
    rerank: str | None = None
    top: int = 10
    answers: bool = False


class Metric(Reply):
    """A mean over the questions with its 95 % bootstrap interval."""

    configuration: str
    name: str
    value: float
    low: float
    high: float


class Evaluation(Reply):
    questions: int
    metrics: list[Metric]


class Evaluate(Request[Evaluation]):
    """Measure configurations on a question set: an uploaded SQuAD-style object, or the collection's own questions."""

    collection: str
    object: str = ""
    configurations: list[Configuration] = []
    limit: int | None = None
    hook = "evaluate"
    reply = Evaluation


# chat and conversations


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
    """

    question: str = ""
    messages: list[Message] = []
    collections: list[str] = []
    mode: Literal["sources", "first", "free"] = "sources"
    top: int = 5
    search: SearchMode = "hybrid"
    where: dict[str, list[str]] = {}
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


# tune and models


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


# users and jobs


class User(Reply, frozen=True):
    """Who calls. The role `owner` may do everything."""

    name: str
    roles: tuple[str, ...] = ()


class UsersReply(Reply):
    """`token` is a signed claim, valid until `expires` (seconds since 1970)."""

    users: list[User] = []
    token: str = ""
    expires: float = 0.0


class Users(Request[UsersReply]):
    """me; list; add and remove a user (`name`, `roles`); claim: a signed claim for `name`, valid for `seconds`."""

    action: Literal["me", "list", "add", "remove", "claim"] = "me"
    name: str = ""
    roles: list[str] = []
    seconds: float = 3600.0
    hook = "users"
    reply = UsersReply


JobState = Literal["queued", "running", "paused", "done", "failed", "cancelled"]


class Job(Reply):
    """
    A request delivered durably. `done` of `total` (0: unknown) with a `note`; `result` is the hook's reply.

    `attempt` counts deliveries, `stalled` those in a row that brought nothing beyond `reached`; `request`, `claim` and
    `sequence` (the message that counts) serve resume and retry.
    """

    id: str
    hook: str
    plugin: str = ""
    user: str = ""
    group: str = ""
    state: JobState = "queued"
    done: float = 0.0
    total: float = 0.0
    note: str = ""
    attempt: int = 0
    stalled: int = 0
    reached: float = 0.0
    sequence: int = 0
    created: float = 0.0
    updated: float = 0.0
    result: Any = None
    error: str = ""
    code: int = 0
    request: Any = None
    claim: str = ""

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class JobsReply(Reply):
    jobs: list[Job]


class Jobs(Request[JobsReply]):
    """list (by `group`, `state`), get, cancel, pause, resume, retry; with `group` instead of `id`: all of a group."""

    action: Literal["list", "get", "cancel", "pause", "resume", "retry"] = "list"
    id: str = ""
    group: str = ""
    state: JobState | None = None
    limit: int = 1000
    hook = "jobs"
    reply = JobsReply


REQUESTS: dict[str, type[Request[Any]]] = {
    cls.hook: cls
    for cls in (
        Embed,
        Rerank,
        Generate,
        Convert,
        Discover,
        Index,
        Search,
        Collections,
        Evaluate,
        Chat,
        Conversations,
        Tune,
        Models,
        Users,
        Jobs,
    )
}


def fold(request: type[StreamRequest[C, R]], chunks: Iterable[C]) -> R:
    """The whole reply that a stream's pieces make."""
    whole: R = request.reply.fold(list(chunks))
    return whole


class Service(Reply):
    """
    One hook of one plugin in one worker, as discovery tells it.

    `rank`: place among the plugins that `[use]` names for the hook (0 first), -1 when it is not named.
    """

    hook: str
    plugin: str
    worker: str
    rank: int
    about: dict[str, Any] = {}
    version: str = ""
    distribution: str = ""
    process: str = ""
    pid: int = 0
