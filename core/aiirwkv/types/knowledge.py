"""Documents on their way into collections, and passages on their way out."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from .base import Reply, Request


class Object(Reply):
    """Something too big for a message, kept in the bus's object store under `id`."""

    id: str
    name: str = ""
    size: int = 0
    sha256: str = ""
    media_type: str = ""
    owner: str = ""


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
    """
    Extracted text, in `text`, or as the object `object` when it is above 512 KiB.

    `scanned`: how many of the `pages` show something, but have no text. `markdown`: the text is written in it.
    """

    text: str = ""
    object: str = ""
    anchors: list[Anchor] = []
    title: str = ""
    media_type: str = ""
    pages: int = 0
    scanned: int = 0
    markdown: bool = False
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


class Source(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A document to index: an uploaded object, or pasted text."""

    object: str = ""
    text: str = ""
    name: str = ""
    media_type: str = ""
    tags: list[str] = []


def headed(heading: str, text: str) -> str:
    """
    A passage under its heading: what is embedded, and what a model reads.

    A kept state fits only the very same text, so who has it read and who asks about it must both write it like this.
    """
    return text if not heading or heading in text else f"{heading}\n{text}"


def token_estimate(text: str) -> int:
    """About how many tokens a text has, whatever the vocabulary; rather too many than too few."""
    plain = len(text.encode("ascii", "ignore"))
    return math.ceil(plain / 3 + (len(text) - plain) * 1.5)


DocumentState = Literal["ready", "unchanged", "needs_ocr", "failed"]
Reading = Literal["whole", "passages"]
"""What a model has read of a document beforehand: the whole text at once, or each passage by itself."""


class Document(Reply):
    """
    A document of a collection. `reason` says why it is not ready or not read, and what to do.

    `read`: what the model remembers of it.
    """

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
    read: Reading | None = None


class Indexed(Reply):
    """What became of the documents of an index request."""

    collection: str
    documents: list[Document] = []
    chunks: int = 0
    seconds: float = 0.0


class Index(Request[Indexed]):
    """
    Read documents into a collection, which is made if it does not exist.

    `read`: have the model read them too and keep what it remembers; None: as the document or its collection is set.
    """

    collection: str
    sources: list[Source]
    read: bool | None = None
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
    read: Reading | None = None


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
    """
    A set of documents with one embedder. `shares`: user or role:NAME to read or write.

    `read`: the model reads what is indexed into it, and remembers it.
    """

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
    read: bool = False


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
    rebuild, export, import (`object`). With `read`, describe has the model read what is there and what comes, or forget
    it (with `document`: only that); it may take long, so it is best sent as a job.
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
    read: bool | None = None
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
