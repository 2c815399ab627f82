"""Keeps a vector store in step with the catalogue: adds, forgets, checks, and makes it again."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread
from aiirwkv import Busy, Hit, ServiceError

from .catalogue import Catalogue
from .ledger import Ledger
from .passages import Passages
from .staging import Staging, Waiting
from .store import VectorStore
from .where import Where

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

BATCH = 200
"""Vectors per call of the store: a call must not hold up the worker's sign of life."""
EXACT_FILTER = 2000
"""Up to so many chunks a filter is given to the store as ids; above, its answer is filtered."""
PATIENCE = 5.0
"""Seconds that a search waits for an index that is being made again."""
RETRY = 30.0


async def in_thread(function: Callable[[*Ts], T], *args: *Ts) -> T:
    return await anyio.to_thread.run_sync(function, *args)


class VectorIndex:
    """
    The dense index of all collections.

    A vector goes to the store before the catalogue counts it as done, and is forgotten after the catalogue has
    dropped it: whatever is interrupted, the catalogue never counts on a vector that the store lacks.
    """

    def __init__(self, catalogue: Catalogue, store: VectorStore) -> None:
        self._catalogue, self._store = catalogue, store
        self._staging, self._passages, self._ledger = Staging(catalogue), Passages(catalogue), Ledger(catalogue)
        self._locks: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        self._unsound: dict[str, anyio.Event] = {}
        self._work = anyio.Event()

    async def add(self, collection: str, chunks: Sequence[Waiting], vectors: bytes) -> None:
        """Store the vectors of chunks in both places."""
        async with self._locks[collection]:
            await self._store.upsert(collection, [chunk.id for chunk in chunks], vectors)
            await in_thread(self._staging.add, collection, chunks, vectors)

    async def rewrite(self, collection: str, chunk: Waiting, vector: bytes) -> None:
        """Store the new text and vector of one chunk."""
        async with self._locks[collection]:
            await self._store.upsert(collection, [chunk.id], vector)
            await in_thread(self._staging.rewrite, collection, chunk, vector)

    async def search(self, collection: str, vector: bytes, top: int, where: Where) -> list[Hit]:
        """The nearest passages that a search may show, best first; `score` is the cosine similarity."""
        await self._sound(collection)
        among = None
        if where:
            among = await in_thread(self._passages.matching, collection, where, EXACT_FILTER + 1)
            if not among:
                return []
            among = among if len(among) <= EXACT_FILTER else None
        wanted = top
        while True:
            scores = dict(await self._store.query(collection, vector, wanted, among))
            if not scores and await self._lost(collection):
                await self._sound(collection)
                continue
            hits = await in_thread(self._passages.visible, collection, scores, where)
            # Ask for more when too many of the nearest may not be shown.
            if len(hits) >= top or len(scores) < wanted or among is not None:
                return hits[:top]
            wanted *= 4

    # In the background

    async def check(self) -> None:
        """Note the collections whose vectors the store has lost; `maintain` makes them again."""
        for collection in await in_thread(self._catalogue.names):
            await self._lost(collection.id)

    async def _lost(self, collection: str) -> bool:
        async with self._locks[collection]:
            expected = await in_thread(self._ledger.vector_count, collection)
            found = await self._store.count(collection) if expected else 0
        if expected and (found is None or found < expected):
            log.warning("collection %s: the vector store has %s of %d vectors", collection, found or 0, expected)
            self._unsound.setdefault(collection, anyio.Event())
            self._work.set()
            return True
        return False

    async def _sound(self, collection: str) -> None:
        """Wait a little for an index that is being made again."""
        if unsound := self._unsound.get(collection):
            with anyio.move_on_after(PATIENCE):
                await unsound.wait()
            if collection in self._unsound:
                raise Busy("the vector index is being made again from the catalogue; ask again in a minute")

    def sweep_soon(self) -> None:
        """Have the store forget what the catalogue has dropped."""
        self._work.set()

    async def maintain(self) -> None:
        """Runs as long as the plugin: mends and sweeps when there is something to do."""
        while True:
            with anyio.move_on_after(RETRY):
                await self._work.wait()
            self._work = anyio.Event()
            try:
                while self._unsound:
                    collection = next(iter(self._unsound))
                    log.warning("making the vector index of %s again from the catalogue", collection)
                    await self.rebuild(collection)
                await self.sweep()
            except ServiceError as exc:
                log.warning("%s; trying again in %g s", exc, RETRY)

    async def sweep(self) -> None:
        """Have the store forget what the catalogue has dropped, now."""
        while batch := await in_thread(self._ledger.forgotten, BATCH):
            chunks: defaultdict[str, list[str]] = defaultdict(list)
            for _, collection, chunk in batch:
                chunks[collection].append(chunk)
            for collection, ids in chunks.items():
                async with self._locks[collection]:
                    await (self._store.drop(collection) if "" in ids else self._store.delete(collection, ids))
            await in_thread(self._ledger.forget, [number for number, _, _ in batch])
        await in_thread(self._catalogue.clear_originals)

    async def rebuild(self, collection: str, progress: Callable[[int, int], object] = lambda done, total: None) -> int:
        """Make a collection's vectors again from the catalogue; how many there are."""
        async with self._locks[collection]:
            sound = self._unsound.setdefault(collection, anyio.Event())
            await self._store.drop(collection)
            ids = await in_thread(self._ledger.vector_ids, collection)
            for start in range(0, len(ids), BATCH):
                found, vectors = await in_thread(self._ledger.vectors, ids[start : start + BATCH])
                if found:
                    await self._store.upsert(collection, found, vectors)
                progress(min(start + BATCH, len(ids)), len(ids))
            self._unsound.pop(collection, None)
            sound.set()
        await self.check()  # the store may have had to give up all sets to drop a damaged one
        return len(ids)

    async def verify(self, collection: str) -> tuple[int, list[str]]:
        """Compare the store with the catalogue: how many vectors there should be, and what is wrong, in words."""
        await self.sweep()
        async with self._locks[collection]:
            expected = set(await in_thread(self._ledger.vector_ids, collection))
            found = await self._store.ids(collection) if await self._store.count(collection) is not None else set()
        problems = await in_thread(partial(self._ledger.problems, collection))
        if missing := len(expected - found):
            problems.append(f"{missing} of {len(expected)} vectors are missing from the vector store; run `rebuild`")
        if stray := len(found - expected):
            problems.append(f"{stray} vectors of the vector store belong to no chunk; run `rebuild`")
        return len(expected), problems
