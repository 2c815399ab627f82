"""What JetStream keeps for us: key-value buckets, and objects too large for a message."""

from __future__ import annotations

import hashlib
import io
import mimetypes
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import nats.errors
from nats.aio.client import Client
from nats.js import api
from nats.js.errors import (
    APIError,
    BucketNotFoundError,
    KeyNotFoundError,
    KeyWrongLastSequenceError,
    ObjectNotFoundError,
)
from nats.js.errors import NotFoundError as MissingError
from nats.js.kv import KeyValue
from nats.js.object_store import ObjectStore

from .errors import ServerError, ServiceError
from .types import Object

SETTLE = 0.3
"""Seconds that a watcher waits for values when it is told that there are none."""
LOOK = 2.0
"""Seconds between looks at whether the bus is still there."""
PATIENCE = 12.0
"""Seconds that a watcher waits for a bus that is away."""
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def ulid() -> str:
    """A new id that sorts by time (https://github.com/ulid/spec)."""
    number = (int(time.time() * 1000) << 80) | secrets.randbits(80)
    return "".join(CROCKFORD[(number >> shift) & 31] for shift in range(125, -1, -5))


class Bucket:
    """A key-value bucket."""

    def __init__(self, nc: Client, kv: KeyValue) -> None:
        self._nc, self._kv = nc, kv

    @classmethod
    async def open(cls, nc: Client, name: str, ttl: float | None = None) -> Bucket:
        js = nc.jetstream()
        with storage("key-value bucket", name):
            try:
                return cls(nc, await js.key_value(name))
            except BucketNotFoundError:
                return cls(nc, await js.create_key_value(api.KeyValueConfig(bucket=name, history=1, ttl=ttl)))

    async def find(self, key: str) -> bytes | None:
        try:
            return (await self._kv.get(key)).value
        except KeyNotFoundError:
            return None

    async def entry(self, key: str) -> tuple[bytes, int] | None:
        """A key's value and its revision."""
        try:
            entry = await self._kv.get(key)
        except KeyNotFoundError:
            return None
        return entry.value or b"", entry.revision or 0

    async def put(self, key: str, value: bytes) -> None:
        with storage("key", key):
            await self._kv.put(key, value)

    async def update(self, key: str, value: bytes, revision: int) -> bool:
        """Put a key that is still at this revision (0: not there yet); False if somebody else was faster."""
        try:
            with storage("key", key):
                await self._kv.update(key, value, revision) if revision else await self._kv.create(key, value)
        except KeyWrongLastSequenceError:
            return False
        return True

    async def delete(self, key: str) -> None:
        with storage("key", key):
            await self._kv.purge(key)

    @asynccontextmanager
    async def watch(self, keys: str) -> AsyncIterator[AsyncIterator[tuple[str, bytes] | None]]:
        """
        Keys with their values now, then None, then every change; all of it again when the bus was away for a moment.

        Raises ServerError when it stays away.
        """
        watchers = [await self._kv.watch(keys, ignore_deletes=True)]

        async def updates() -> AsyncIterator[tuple[str, bytes] | None]:
            reconnects, gone = self._nc.stats["reconnects"], 0.0
            seen = complete = early = False
            while True:
                try:
                    wait = SETTLE if early and not complete else LOOK
                    entry: Any = await watchers[-1].updates(timeout=wait)  # type: ignore[no-untyped-call]
                except nats.errors.TimeoutError:
                    if early and not complete:  # there was really nothing
                        complete = True
                        yield None
                    gone = 0.0 if self._nc.is_connected else gone + wait
                    if gone > PATIENCE:
                        raise ServerError(
                            "the bus went away and did not come back; start it again: aiirwkv up"
                        ) from None
                    if self._nc.is_connected and self._nc.stats["reconnects"] != reconnects:
                        reconnects = self._nc.stats["reconnects"]
                        watchers.append(await self._kv.watch(keys, ignore_deletes=True))
                    continue
                if entry:
                    seen = True
                    yield entry.key, entry.value
                # nats-py may say "that was all" before it has handed over what has arrived
                early = early or (entry is None and not seen)
                if seen and not complete and (entry is None or entry.delta == 0):
                    complete = True
                    yield None

        try:
            yield updates()
        finally:
            with anyio.move_on_after(5, shield=True), suppress(nats.errors.Error, APIError):
                for watcher in watchers:
                    await watcher.stop()  # type: ignore[no-untyped-call]

    async def values(self, keys: str) -> list[bytes]:
        """The values of all keys that match, oldest change first."""
        async with self.watch(keys) as updates:
            found: list[bytes] = []
            async for update in updates:
                if update is None:
                    break
                found.append(update[1])
            return found


class Objects:
    """A bucket of objects."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @classmethod
    async def open(cls, nc: Client, name: str, ttl: float | None = None) -> Objects:
        js = nc.jetstream(timeout=30)
        with storage("object store", name):
            try:
                return cls(await js.object_store(name))
            except BucketNotFoundError:
                return cls(await js.create_object_store(name, config=api.ObjectStoreConfig(bucket=name, ttl=ttl)))

    async def put(self, source: bytes | Path, name: str, media_type: str, owner: str) -> Object:
        id = ulid()
        digest = hashlib.sha256()
        media_type = media_type or mimetypes.guess_type(name)[0] or "application/octet-stream"
        headers = {"Name": name.encode("unicode_escape").decode(), "Media-Type": media_type, "Owner": owner}
        try:
            stream = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
        except OSError as exc:
            raise ServiceError(f"cannot read {name or 'the source'}: {exc.strerror}") from None
        with stream, storage("object", name or id):
            reader = _Hashing(stream, digest.update)
            info = await self._store.put(id, reader, api.ObjectMeta(name=id, headers=headers))  # type: ignore[arg-type]
        return Object(id, name, info.size or 0, digest.hexdigest(), media_type, owner)

    async def find(self, id: str) -> Object | None:
        try:
            with storage("object", id):
                info = await self._store.get_info(id)
        except (ObjectNotFoundError, MissingError):
            return None
        headers = info.headers or {}
        name = headers.get("Name", "").encode().decode("unicode_escape")
        return Object(id, name, info.size or 0, "", headers.get("Media-Type", ""), headers.get("Owner", ""))

    async def get(self, found: Object, into: Path) -> Object:
        digest = hashlib.sha256()
        try:
            with into.open("wb") as file, storage("object", found.id), anyio.fail_after(600):
                writer: Any = _Writer(file, digest.update)
                await self._store.get(found.id, writeinto=writer)
        except OSError as exc:
            into.unlink(missing_ok=True)
            raise ServiceError(f"cannot write {into}: {exc.strerror}; is the disk full?") from None
        found.sha256 = digest.hexdigest()
        return found

    async def discard(self, id: str) -> None:
        with suppress(ObjectNotFoundError, MissingError):
            await self._store.delete(id)


class _Hashing(io.RawIOBase):
    """A reader that shows what it reads to a hash on the way."""

    def __init__(self, stream: Any, update: Callable[[bytes], object]) -> None:
        self._stream, self._update = stream, update

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._update(bytes(buffer[:count]))
        return count


class _Writer(io.RawIOBase):
    """A writer that shows what it writes to a hash on the way."""

    def __init__(self, stream: Any, update: Callable[[bytes], object]) -> None:
        self._stream, self._update = stream, update

    def write(self, data: Any) -> int:
        self._update(data)
        return int(self._stream.write(data))


class storage:
    """Turn JetStream's complaints into one line that says what to do."""

    def __init__(self, kind: str, name: str) -> None:
        self._what = f"{kind} {name!r}"

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, MissingError | KeyWrongLastSequenceError):
            return
        if isinstance(exc, APIError):
            text = exc.description or ""
            if exc.code == 503 or "resource" in text or "space" in text or "write" in text:
                text += "; the disk of the bus may be full: make room and try again, nothing stored is lost"
            raise ServerError(f"the bus cannot keep the {self._what}: {text}") from None
        if isinstance(exc, nats.errors.NoRespondersError):
            raise ServerError(
                f"the bus cannot keep the {self._what}: JetStream is not on; start nats-server with -js"
            ) from None
        if isinstance(exc, nats.errors.TimeoutError):
            raise ServerError(f"the bus did not answer in time about the {self._what}; is its disk full?") from None
