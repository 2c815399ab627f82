"""Chroma as a vector store: one Chroma collection per collection, ids and vectors only."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
from aiirwkv import ConfigError, PluginError, ServiceError
from aiirwkv_knowledge.database import storage_error, storing

log = logging.getLogger(__name__)

T = TypeVar("T")

BATCH = 200
"""Vectors per call: Chroma holds Python's lock during one, and the worker must give signs of life."""
PAGE = 10_000
DATABASE = "chroma.sqlite3"
CONFIGURATION = {"hnsw": {"space": "cosine", "ef_search": 200}}
LOCK_PATIENCE = 10.0
CANNOT_WRITE = ("disk is full", "disk I/O error", "readonly", "unable to open", "No space", "File too large")


class ChromaStore:
    """
    Serves VectorStore. One thread at a time calls Chroma.

    Only one process may open an embedded Chroma (a second one's writes would not be found), so its folder is locked.
    """

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self._folder, self._url = folder, url
        self._client: Any = None
        self._lock = -1
        self._turn = anyio.CapacityLimiter(1)

    async def open(self) -> None:
        if self._url is None:
            await self._take_lock()
        elif urlsplit(self._url).scheme not in ("http", "https") or not urlsplit(self._url).hostname:
            raise ConfigError(f"[plugins.index_chroma] url is {self._url!r}; write it as http://HOST:PORT")
        try:
            await self._in_turn(lambda client: client.heartbeat())
        except ServiceError as exc:
            if self._url is None:
                raise
            log.warning("%s", exc)  # the keyword leg works without it, and it is tried again

    async def close(self) -> None:
        if self._client is not None:
            await anyio.to_thread.run_sync(self._client.close, limiter=self._turn)
            self._client = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # VectorStore

    async def upsert(self, collection: str, ids: Sequence[str], vectors: bytes) -> None:
        def upsert(client: Any) -> None:
            import numpy as np

            rows = np.frombuffer(vectors, "<f4").reshape(len(ids), -1)
            there = client.get_or_create_collection(collection, embedding_function=None, configuration=CONFIGURATION)
            for start in range(0, len(ids), BATCH):
                end = start + BATCH
                there.upsert(ids=list(ids[start:end]), embeddings=rows[start:end])

        await self._in_turn(upsert)

    async def delete(self, collection: str, ids: Sequence[str]) -> None:
        await self._in_set(collection, lambda there: there.delete(ids=list(ids)), None)

    async def query(
        self, collection: str, vector: bytes, top: int, among: Collection[str] | None = None
    ) -> list[tuple[str, float]]:
        def query(there: Any) -> list[tuple[str, float]]:
            import numpy as np

            wanted: list[str] | None = None
            if among is not None:
                wanted = there.get(ids=list(among), include=[])["ids"]  # an id it lacks would be an error in query
                if not wanted:
                    return []
            found = there.query(
                query_embeddings=np.frombuffer(vector, "<f4")[None], n_results=top, ids=wanted, include=["distances"]
            )
            return [(id, 1 - distance) for id, distance in zip(found["ids"][0], found["distances"][0], strict=True)]

        return await self._in_set(collection, query, [])

    async def count(self, collection: str) -> int | None:
        try:
            return await self._in_set(collection, lambda there: int(there.count()), None)
        except _Damaged:
            return None

    async def ids(self, collection: str) -> set[str]:
        def ids(there: Any) -> set[str]:
            found: set[str] = set()
            while page := there.get(limit=PAGE, offset=len(found), include=[])["ids"]:
                found.update(page)
            return found

        return await self._in_set(collection, ids, set())

    async def drop(self, collection: str) -> None:
        from chromadb.errors import NotFoundError

        def drop(client: Any) -> None:
            with suppress(NotFoundError):
                client.delete_collection(collection)

        try:
            await self._in_turn(drop)
        except _Damaged:
            if self._url is not None:
                raise
            await anyio.to_thread.run_sync(self._put_aside, limiter=self._turn)

    # Chroma

    async def _in_set(self, collection: str, work: Callable[[Any], T], missing: T) -> T:
        from chromadb.errors import NotFoundError

        def found(client: Any) -> T:
            try:
                return work(client.get_collection(collection, embedding_function=None))
            except NotFoundError:
                return missing

        return await self._in_turn(found)

    async def _in_turn(self, work: Callable[[Any], T]) -> T:
        return await anyio.to_thread.run_sync(self._guarded, work, limiter=self._turn)

    def _guarded(self, work: Callable[[Any], T]) -> T:
        try:
            if self._client is None:
                self._client = self._connect()
            return work(self._client)
        except ServiceError:
            raise
        except Exception as exc:
            raise self._explained(exc) from exc
        except BaseException as exc:
            if not _is_panic(exc):
                raise
            self._give_up_client()
            raise self._explained(exc) from exc

    def _explained(self, exc: BaseException) -> ServiceError:
        from chromadb.errors import ChromaError, InternalError

        if self._url is None:
            if not (self._folder / DATABASE).exists():
                self._give_up_client()  # somebody has removed the folder: begin a new one
                return _Damaged(f"the Chroma index in {self._folder} has gone; it is made again from the catalogue")
            if any(sign in str(exc) for sign in CANNOT_WRITE):
                self._give_up_client()  # after a failed write Chroma would wait for its own lock, for ever
                return storage_error(self._folder, f"Chroma says: {exc}")
        elif not isinstance(exc, ChromaError):
            self._give_up_client()
            return ServiceError(
                f"cannot reach the Chroma server at {self._url}: {exc}; start it, or take `url` out of "
                "[plugins.index_chroma]"
            )
        kind = _Damaged if isinstance(exc, InternalError) or _is_panic(exc) else ServiceError
        return kind(f"Chroma in {self._url or self._folder} failed: {exc}; the action `rebuild` makes its index again")

    def _connect(self) -> Any:
        import chromadb
        from chromadb.config import Settings
        from chromadb.errors import InternalError

        settings = Settings(anonymized_telemetry=False)
        if self._url is not None:
            url = urlsplit(self._url)
            secure = url.scheme == "https"
            port = url.port or (443 if secure else 80)
            return chromadb.HttpClient(url.hostname or "", port, ssl=secure, settings=settings)
        try:
            return chromadb.PersistentClient(self._folder, settings)
        except BaseException as exc:
            if not isinstance(exc, InternalError) and not _is_panic(exc):
                raise
            if any(sign in str(exc) for sign in CANNOT_WRITE):
                raise
            log.warning("the Chroma index in %s cannot be opened: %s", self._folder, exc)
        self._put_aside()
        return chromadb.PersistentClient(self._folder, settings)

    def _put_aside(self) -> None:
        """Keep a damaged index for whoever wants to look at it, and begin an empty one."""
        self._give_up_client()
        aside = self._folder.with_name(f"chroma-damaged-{time.time_ns()}")
        with storing(self._folder):
            self._folder.rename(aside)
            self._folder.mkdir()
        log.warning("the damaged Chroma index is put aside as %s; it can be deleted", aside)

    def _give_up_client(self) -> None:
        from chromadb.api.shared_system_client import SharedSystemClient

        if self._client is not None:
            with suppress(Exception):
                self._client.close()
            self._client = None
        SharedSystemClient.clear_system_cache()  # or Chroma hands out the failed client again

    async def _take_lock(self) -> None:
        with storing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder.with_name("chroma.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        give_up = time.monotonic() + LOCK_PATIENCE  # the worker before us may be on its way out
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise PluginError(
                        f"another process has the Chroma index in {self._folder} open; end it, or run a Chroma server "
                        "and give its `url` in [plugins.index_chroma]"
                    ) from None
            await anyio.sleep(0.2)


def _is_panic(exc: BaseException) -> bool:
    """Chroma's Rust side panicked; its exception is no Exception, and cannot be imported."""
    return type(exc).__name__ == "PanicException"


class _Damaged(ServiceError):
    """The index is there and cannot be read."""
