"""The base of index plugins: the hooks `index`, `search` and `collections` over a catalogue and a vector store."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any, Self

import anyio
from aiirwkv import (
    Collections,
    CollectionsReply,
    ConfigError,
    Context,
    Hits,
    Index,
    Indexed,
    Plugin,
    Search,
    ServiceError,
    hookimpl,
)

from .administration import Administration
from .catalogue import Catalogue
from .chunking import check_sizes
from .ingest import Defaults, Ingest
from .memory import Memory
from .retrieval import search
from .store import VectorStore
from .vectors import VectorIndex, in_thread


class KnowledgePlugin(Plugin):
    """An index plugin is this plus `open_store`. Sizes are in tokens, counted as a quarter of the UTF-8 bytes."""

    chunk_size: int = 160
    chunk_overlap: int = 0

    async def open_store(self) -> VectorStore:
        """The vector store, ready for use."""
        raise NotImplementedError

    async def close_store(self) -> None:
        """Release what `open_store` took."""

    async def __aenter__(self) -> Self:
        try:
            check_sizes(self.chunk_size, self.chunk_overlap)
        except ServiceError as exc:
            raise ConfigError(str(exc)) from None
        async with AsyncExitStack() as stack:
            self._catalogue = await in_thread(Catalogue, self.data / "knowledge")
            stack.callback(self._catalogue.close)
            store = await self.open_store()
            stack.push_async_callback(self.close_store)
            self._index = VectorIndex(self._catalogue, store)
            defaults = Defaults(self.chunk_size, self.chunk_overlap)
            memory = Memory(self._catalogue, lambda: self.bus)
            self._ingest = Ingest(self._catalogue, self._index, memory, defaults)
            self._administration = Administration(self._catalogue, self._index, memory, defaults)
            await self._index.check()
            tasks = await stack.enter_async_context(anyio.create_task_group())
            tasks.start_soon(self._index.maintain)
            tasks.start_soon(memory.maintain)
            stack.callback(tasks.cancel_scope.cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    def stats(self) -> dict[str, Any]:
        return {"collections": len(self._catalogue.names())}

    @hookimpl
    async def index(self, request: Index, ctx: Context) -> Indexed:
        return await self._ingest.run(request, ctx)

    @hookimpl
    async def search(self, request: Search, ctx: Context) -> Hits:
        return await search(self._catalogue, self._index, request, ctx)

    @hookimpl
    async def collections(self, request: Collections, ctx: Context) -> CollectionsReply:
        return await self._administration.run(request, ctx)
