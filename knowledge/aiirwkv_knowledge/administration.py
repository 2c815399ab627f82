"""The actions on collections, their documents and chunks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from difflib import get_close_matches
from functools import partial
from typing import TypeVar

import msgspec
from aiirwkv import (
    BadRequest,
    Collection,
    Collections,
    CollectionsReply,
    Context,
    Document,
    NotFound,
)
from aiirwkv.hooks import Action

from . import embedding
from .catalogue import Catalogue
from .chunking import check_sizes
from .ingest import Defaults
from .memory import Memory
from .permissions import checked, find, readable
from .staging import Staging
from .vectors import VectorIndex, in_thread

T = TypeVar("T")

MAX_TEXT = 400_000
MAX_BYTES = 700_000
"""Of text in one reply, so that it fits a message; the rest is a further request with `offset` or `start`."""


class Administration:
    """One method per action."""

    def __init__(self, catalogue: Catalogue, index: VectorIndex, memory: Memory, defaults: Defaults) -> None:
        self.catalogue, self.staging, self.index, self.defaults = catalogue, Staging(catalogue), index, defaults
        self.memory = memory
        self._actions: dict[str, Callable[[Collections, Context], Awaitable[CollectionsReply]]] = {
            "create": self.create,
            "list": self.list,
            "rename": self.rename,
            "describe": self.describe,
            "delete": self.delete,
            "share": self.share,
            "documents": self.documents,
            "chunks": self.chunks,
            "text": self.text,
            "edit": self.edit,
            "verify": self.verify,
            "rebuild": self.rebuild,
        }

    async def run(self, request: Collections, ctx: Context) -> CollectionsReply:
        if request.action not in self._actions:
            raise BadRequest(f"the action {request.action!r} is not served yet; served are: {', '.join(self._actions)}")
        if request.offset < 0 or request.limit < 0:
            raise BadRequest("`offset` and `limit` must not be negative")
        if request.action != "list":
            request.need("name")
        return await self._actions[request.action](request, ctx)

    # Collections

    async def create(self, request: Collections, ctx: Context) -> CollectionsReply:
        embedder, fingerprint = await embedding.choose(ctx, request.embedder)
        collection = Collection(
            id="",
            name=checked(request.name),
            description=request.description or "",
            owner=ctx.user.name,
            embedder=embedder,
            fingerprint=fingerprint,
            chunk_size=_given(request.chunk_size, self.defaults.chunk_size),
            chunk_overlap=_given(request.chunk_overlap, self.defaults.chunk_overlap),
            read=bool(request.read),
        )
        check_sizes(collection.chunk_size, collection.chunk_overlap)
        return _reply(await in_thread(self.catalogue.create, collection))

    async def list(self, request: Collections, ctx: Context) -> CollectionsReply:
        wanted = request.query.casefold()
        known = await in_thread(self.catalogue.collections)
        found = [collection for collection in readable(known, ctx) if wanted in collection.name.casefold()]
        return CollectionsReply(found[request.offset : request.offset + request.limit], count=len(found))

    async def rename(self, request: Collections, ctx: Context) -> CollectionsReply:
        request.need("to")
        collection = await self._find(request, ctx, "own")
        await in_thread(partial(self.catalogue.change, collection.id, name=checked(request.to)))
        return await self._now(collection)

    async def describe(self, request: Collections, ctx: Context) -> CollectionsReply:
        """
        Show a collection, or set its description, chunk sizes and whether the model reads it.

        Chunk sizes hold for what is indexed from now on; reading begins with what is there.
        """
        if request.embedder is not None:
            raise BadRequest("the embedder of a collection is fixed; index the documents into a new collection")
        if request.document:
            return await self._describe_document(request, ctx)
        given = {
            field: value
            for field in ("description", "chunk_size", "chunk_overlap")
            if (value := getattr(request, field)) is not None
        }
        collection = await self._find(request, ctx, "write" if given or request.read is not None else "read")
        if given:
            check_sizes(
                _given(request.chunk_size, collection.chunk_size),
                _given(request.chunk_overlap, collection.chunk_overlap),
            )
            await in_thread(partial(self.catalogue.change, collection.id, **given))
        if request.read is None:
            return await self._now(collection)
        count, problems = await self.memory.switch(collection, request.read, ctx)
        return msgspec.structs.replace(await self._now(collection), count=count, problems=problems)

    async def _describe_document(self, request: Collections, ctx: Context) -> CollectionsReply:
        collection = await self._find(request, ctx, "read" if request.read is None else "write")
        document = await self._document(collection, request.document)
        if request.read is not None:
            document = await self.memory.heed(collection, document, request.read, ctx, partial(ctx.progress, 0, 1))
            ctx.progress(1, 1)
        return CollectionsReply(documents=[document], count=1)

    async def delete(self, request: Collections, ctx: Context) -> CollectionsReply:
        if request.document:
            collection = await self._find(request, ctx, "write")
            document = await self._document(collection, request.document)
            await in_thread(self.catalogue.remove, collection.id, document.id)
            reply = CollectionsReply(documents=[document], count=1)
        else:
            collection = await self._find(request, ctx, "own")
            reply = await self._now(collection)
            await in_thread(self.catalogue.drop, collection.id)
        self.index.sweep_soon()
        self.memory.sweep_soon()
        return reply

    async def share(self, request: Collections, ctx: Context) -> CollectionsReply:
        request.need("user")
        collection = await self._find(request, ctx, "own")
        shares = {user: access for user, access in collection.shares.items() if user != request.user}
        if request.access:
            shares[request.user] = request.access
        await in_thread(partial(self.catalogue.change, collection.id, shares=shares))
        return await self._now(collection)

    # Documents and chunks

    async def documents(self, request: Collections, ctx: Context) -> CollectionsReply:
        collection = await self._find(request, ctx, "read")
        found, count = await in_thread(
            self.catalogue.documents, collection.id, request.query, request.offset, request.limit
        )
        return CollectionsReply(documents=_fitting(found), count=count)

    async def chunks(self, request: Collections, ctx: Context) -> CollectionsReply:
        collection = await self._find(request, ctx, "read")
        document = (await self._document(collection, request.document)).id if request.document else ""
        found, count = await in_thread(
            self.catalogue.chunks, collection.id, document, request.query, request.offset, request.limit
        )
        return CollectionsReply(chunks=_fitting(found), count=count)

    async def text(self, request: Collections, ctx: Context) -> CollectionsReply:
        request.need("document")
        collection = await self._find(request, ctx, "read")
        document = await self._document(collection, request.document)
        end = document.characters if request.end is None else min(request.end, document.characters)
        if not 0 <= request.start <= max(end, 0):
            raise BadRequest(
                f"`start` {request.start} and `end` {request.end} are not a span of {document.name!r}, which has "
                f"{document.characters} characters"
            )
        text = await in_thread(self.catalogue.text, document.id, request.start, min(end, request.start + MAX_TEXT))
        text = text.encode()[:MAX_BYTES].decode(errors="ignore")
        return CollectionsReply(documents=[document], text=text, start=request.start, count=document.characters)

    async def edit(self, request: Collections, ctx: Context) -> CollectionsReply:
        request.need("chunk")
        if request.text is None and request.enabled is None:
            raise BadRequest("collections with action 'edit' needs `text` or `enabled`")
        collection = await self._find(request, ctx, "write")
        chunk = await in_thread(self.staging.chunk, collection.id, request.chunk)
        if request.text is not None:
            if not request.text.strip():
                raise BadRequest("a chunk cannot be empty; set `enabled` to false to hide it from searches")
            await embedding.check(ctx, collection)
            chunk = msgspec.structs.replace(chunk, text=request.text)
            vector = await embedding.embed(ctx, collection.embedder, [chunk.context], "passage")
            await self.index.rewrite(collection.id, chunk, vector)
        if request.enabled is not None:
            await in_thread(self.catalogue.enable, collection.id, request.chunk, request.enabled)
        await self.memory.changed(collection, request.chunk, ctx)
        passage = await in_thread(self.catalogue.chunk, collection.id, request.chunk)
        return CollectionsReply(chunks=[passage], count=1)

    # The vector index

    async def verify(self, request: Collections, ctx: Context) -> CollectionsReply:
        collection = await self._find(request, ctx, "read")
        count, problems = await self.index.verify(collection.id)
        reply = await self._now(collection)
        return msgspec.structs.replace(reply, count=count, problems=problems)

    async def rebuild(self, request: Collections, ctx: Context) -> CollectionsReply:
        collection = await self._find(request, ctx, "write")
        count = await self.index.rebuild(collection.id, ctx.progress)
        return msgspec.structs.replace(await self._now(collection), count=count)

    async def _find(self, request: Collections, ctx: Context, action: Action) -> Collection:
        return find(await in_thread(self.catalogue.names), request.name, ctx, action)

    async def _now(self, collection: Collection) -> CollectionsReply:
        return _reply(await in_thread(self.catalogue.collection, collection.id))

    async def _document(self, collection: Collection, name: str) -> Document:
        if document := await in_thread(self.catalogue.document, collection.id, name):
            return document
        names = [document.name for document in (await in_thread(self.catalogue.documents, collection.id))[0]]
        hint = f"; did you mean {near[0]!r}?" if (near := get_close_matches(name, names, n=1)) else ""
        raise NotFound(f"there is no document {name!r} in {collection.name!r}{hint}")


def _reply(collection: Collection) -> CollectionsReply:
    return CollectionsReply([collection], count=1)


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _fitting(rows: Iterable[T]) -> list[T]:
    """As many rows as fit one message."""
    fitting: list[T] = []
    size = 0
    for row in rows:
        size += len(msgspec.json.encode(row))
        if fitting and size > MAX_BYTES:
            break
        fitting.append(row)
    return fitting
