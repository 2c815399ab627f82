"""Index: from a source to chunks that a search finds. Whatever interrupts it, asked again it goes on where it was."""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from weakref import WeakValueDictionary

import anyio
import msgspec
from aiirwkv import (
    BadRequest,
    Busy,
    Collection,
    Conflict,
    Context,
    Convert,
    Converted,
    DeadlineExceeded,
    Document,
    Forbidden,
    Index,
    Indexed,
    NotFound,
    NoWorker,
    Service,
    ServiceError,
    Source,
    StreamBroken,
    Unauthorized,
)

from . import embedding
from .catalogue import Catalogue
from .chunking import cut
from .database import storing
from .memory import Memory
from .permissions import checked, find, is_id, lookup
from .staging import Staged, Staging
from .vectors import VectorIndex, in_thread

BATCH = 64
"""Texts per call of the embedder; a query waits at most for one batch."""
CONVERT_TIMEOUT = 300.0
MAX_NAME = 255
MIN_CHARACTERS_PER_PAGE = 8
"""Pages with less than so many characters of text, on average, are taken for pictures of text."""
RECIPE = 1
"""Raise it when the same bytes would give other chunks, so that indexing again makes them anew."""
NOT_THE_DOCUMENTS_FAULT = (NoWorker, Busy, Unauthorized, Forbidden, StreamBroken)


class Defaults(msgspec.Struct, frozen=True):
    """Of a collection that is made by indexing into it."""

    chunk_size: int
    chunk_overlap: int


class _Received(msgspec.Struct):
    """A source's bytes: a file among the incoming."""

    path: Path
    name: str
    sha256: str
    size: int
    media_type: str


class _Unreadable(Exception):
    """Why a document cannot be made ready."""

    def __init__(self, reason: str, document: Document) -> None:
        self.document = msgspec.structs.replace(document, reason=reason)


class Ingest:
    """Reads sources into collections."""

    def __init__(self, catalogue: Catalogue, index: VectorIndex, memory: Memory, defaults: Defaults) -> None:
        self.catalogue, self.staging, self.index, self.defaults = catalogue, Staging(catalogue), index, defaults
        self.memory = memory
        self._incoming = catalogue.originals / "incoming"
        self._locks: WeakValueDictionary[tuple[str, str], anyio.Lock] = WeakValueDictionary()
        self._incoming.mkdir(exist_ok=True)
        for left in self._incoming.iterdir():
            if not alive(int(left.name.partition("-")[0])):
                left.unlink()

    async def run(self, request: Index, ctx: Context) -> Indexed:
        """Read each source. A source that cannot be read is reported and does not lose the others."""
        began = time.perf_counter()
        if not request.sources:
            raise BadRequest("there is nothing to index; give at least one source")
        for number, source in enumerate(request.sources, 1):
            if bool(source.object) == bool(source.text):
                raise BadRequest(f"source {number} must have either `object` or `text`")
        collection = await self._collection(request.collection, ctx)
        progress = _Progress(ctx, len(request.sources))
        documents = [await self._read(collection, source, request.read, ctx, progress) for source in request.sources]
        self.index.sweep_soon()
        return Indexed(
            collection.name,
            documents,
            sum(document.chunks for document in documents),
            time.perf_counter() - began,
        )

    async def _collection(self, name: str, ctx: Context) -> Collection:
        """The collection, which is made if the caller sees none of this name."""
        known = await in_thread(self.catalogue.names)
        if is_id(name) or lookup(known, name, ctx):
            collection = find(known, name, ctx, "write")
            await embedding.check(ctx, collection)
            return collection
        embedder, fingerprint = await embedding.choose(ctx, None)
        wanted = Collection(
            id="",
            name=checked(name),
            owner=ctx.user.name,
            embedder=embedder,
            fingerprint=fingerprint,
            chunk_size=self.defaults.chunk_size,
            chunk_overlap=self.defaults.chunk_overlap,
        )
        try:
            return await in_thread(self.catalogue.create, wanted)
        except Conflict:  # another job of the same folder was faster
            return find(await in_thread(self.catalogue.names), name, ctx, "write")

    async def _read(
        self, collection: Collection, source: Source, wish: bool | None, ctx: Context, progress: _Progress
    ) -> Document:
        path = self._incoming / f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            received = await self._receive(source, path, ctx)
            lock = self._locks.setdefault((collection.id, received.name), anyio.Lock())
            async with lock:
                document = await self._bring_in(collection, source, received, ctx, progress)
                document = await self.memory.heed(collection, document, wish, ctx, progress.besides)
        except _Unreadable as exc:
            document = await in_thread(self.staging.reject, collection.id, exc.document, path)
        finally:
            path.unlink(missing_ok=True)
        progress.finish(document)
        return document

    async def _bring_in(
        self, collection: Collection, source: Source, received: _Received, ctx: Context, progress: _Progress
    ) -> Document:
        recipe = f"{RECIPE}:{collection.chunk_size}:{collection.chunk_overlap}"
        key = (collection.id, received.name, received.sha256, recipe)
        if same := await in_thread(self.catalogue.same, *key, source.tags):
            return msgspec.structs.replace(same, state="unchanged")
        staged = await in_thread(self.staging.staged, *key)
        if staged is None:
            progress.say(f"reading {received.name}")
            staged = await self._stage(collection, source, received, recipe, ctx)
        await self._embed(collection, staged, received.name, ctx, progress)
        return await in_thread(self.staging.publish, staged, source.tags)

    # From bytes to chunks

    async def _receive(self, source: Source, path: Path, ctx: Context) -> _Received:
        with storing(self._incoming):
            if source.object:
                try:
                    held = await ctx.bus.get(source.object, path)
                except NotFound as exc:
                    name = clean(source.name or source.object)
                    raise _Unreadable(str(exc), Document("", name, "failed", tags=source.tags)) from exc
                name = source.name or held.name or source.object
                return _Received(path, clean(name), held.sha256, held.size, source.media_type or held.media_type)
            data = source.text.encode()
            await anyio.Path(path).write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        first = source.text.strip().split("\n", 1)[0][:48]
        name = source.name or f"{first} ({sha256[:6]})"
        return _Received(path, clean(name), sha256, len(data), source.media_type or "text/plain")

    async def _stage(
        self, collection: Collection, source: Source, received: _Received, recipe: str, ctx: Context
    ) -> Staged:
        document = Document(
            "",
            received.name,
            "failed",
            size=received.size,
            sha256=received.sha256,
            media_type=received.media_type,
            tags=source.tags,
        )
        converted = await self._convert(source, received, document, ctx)
        text = (await ctx.bus.read(converted.object)).decode() if converted.object else converted.text
        document.pages, document.characters = converted.pages, len(text)
        letters = sum(len(word) for word in text.split()) if len(text) < 1_000_000 else len(text)
        if converted.scanned and letters < MIN_CHARACTERS_PER_PAGE * converted.pages:
            document.state = "needs_ocr"
            raise _Unreadable(
                f"{converted.scanned} of {converted.pages} pages are pictures without text, and want OCR", document
            )
        if not letters:
            raise _Unreadable("; ".join(["there is no text in it", *converted.warnings]), document)
        cutting = partial(cut, markdown=converted.markdown)
        pieces = await in_thread(cutting, text, converted.anchors, collection.chunk_size, collection.chunk_overlap)
        document.state, document.reason = "ready", "; ".join(converted.warnings)
        return await in_thread(self.staging.stage, collection.id, document, recipe, text, pieces, received.path)

    async def _convert(self, source: Source, received: _Received, document: Document, ctx: Context) -> Converted:
        if source.text:
            markdown = received.media_type == "text/markdown" or received.name.endswith(".md")
            return Converted(text=source.text, media_type=received.media_type, markdown=markdown)
        plugin = await self._converter(received, document, ctx)
        try:
            request = Convert(source.object, received.name, received.media_type)
            return await ctx.bus.call(request, to=plugin, timeout=CONVERT_TIMEOUT)
        except NOT_THE_DOCUMENTS_FAULT:
            raise
        except DeadlineExceeded:
            if ctx.remaining <= 0:
                raise
            raise _Unreadable(f"{plugin} was not done with it after {CONVERT_TIMEOUT:g} s", document) from None
        except ServiceError as exc:
            raise _Unreadable(str(exc), document) from exc

    async def _converter(self, received: _Received, document: Document, ctx: Context) -> str:
        """The first converter, in the order of [use], that takes the file."""
        await ctx.bus.about("convert")  # waits for one, or says that nobody is there
        for fresh in (10, 0):  # who has just come may not be known yet
            services = await ctx.bus.services("convert", fresh=fresh)
            for service in services:
                if service.rank >= 0 and takes(service, received.name, received.media_type):
                    return service.plugin
        suffixes = sorted({suffix for service in services for suffix in service.about.get("suffixes", ())})
        raise _Unreadable(
            f"no converter takes {PurePosixPath(received.name).suffix or received.media_type or 'it'}; "
            f"there are converters for {' '.join(suffixes) or 'nothing'}",
            document,
        )

    # From chunks to vectors

    async def _embed(
        self, collection: Collection, staged: Staged, name: str, ctx: Context, progress: _Progress
    ) -> None:
        done, after = staged.done, -1
        progress.begin(name, done, staged.chunks)
        while batch := await in_thread(self.staging.waiting, staged.number, after, BATCH):
            texts = [chunk.context for chunk in batch]
            vectors = await embedding.embed(ctx, collection.embedder, texts, "passage")
            await self.index.add(collection.id, batch, vectors)
            after, done = batch[-1].position, done + len(batch)
            progress.at(done)


class _Progress:
    """Progress of a request in chunks, over all its sources."""

    def __init__(self, ctx: Context, sources: int) -> None:
        self._ctx, self._sources = ctx, sources
        self._finished = self._before = self._total = 0
        self._done = 0
        self._name = ""

    def say(self, note: str) -> None:
        self._ctx.progress(self._before, self._total, self._numbered(note))

    def begin(self, name: str, done: int, chunks: int) -> None:
        self._name, self._total = name, self._before + chunks
        self.at(done)

    def at(self, done: int) -> None:
        self._ctx.progress(self._before + done, self._total, self._numbered(self._name))

    def besides(self, note: str) -> None:
        """What is done with a document whose chunks are."""
        self._ctx.progress(self._total, self._total, self._numbered(note))

    def finish(self, document: Document) -> None:
        self._finished += 1
        self._before = self._total = self._before + document.chunks
        self._ctx.progress(self._before, self._total, self._numbered(document.name))

    def _numbered(self, note: str) -> str:
        return note if self._sources == 1 else f"{note} ({min(self._finished + 1, self._sources)} of {self._sources})"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # ours has only begun: what carries its number is from a process before it


def takes(service: Service, name: str, media_type: str) -> bool:
    """Whether a converter declares the file's suffix or media type."""
    suffix = PurePosixPath(name.lower()).suffix
    suffixes: Sequence[str] = service.about.get("suffixes", ())
    types: Sequence[str] = service.about.get("media_types", ())
    return suffix in suffixes or media_type in types or f"{media_type.split('/')[0]}/*" in types


def clean(name: str) -> str:
    """A document's name as it is stored and shown: a relative path without tricks, at most 255 characters."""
    parts = re.sub(r"[\x00-\x1f\x7f]", "", name).replace("\\", "/").split("/")
    name = "/".join(part for part in parts if part.strip() not in ("", ".", ".."))
    if len(name) > MAX_NAME:
        suffix = PurePosixPath(name).suffix[:16]
        name = name[: MAX_NAME - len(suffix)] + suffix
    return name or "unnamed"
