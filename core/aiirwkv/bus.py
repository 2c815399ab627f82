"""The client side of the bus: call a hook, stream from one, submit a job, see who is there."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import anyio
import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from .config import BusConfig
from .connection import connection
from .errors import (
    BY_CODE,
    BadRequest,
    Busy,
    DeadlineExceeded,
    NotFound,
    NoWorker,
    ServerError,
    ServiceError,
    StreamBroken,
    TooLarge,
)
from .identity import bearer
from .store import Bucket, Objects, ulid
from .types import REQUESTS, Job, Object, Request, Service, StreamRequest

R = TypeVar("R")
C = TypeVar("C")

log = logging.getLogger(__name__)

PREFIX = "aiirwkv"
ERROR, ERROR_CODE = "Nats-Service-Error", "Nats-Service-Error-Code"
TIMEOUT = "Aiirwkv-Timeout"
SEQUENCE = "Aiirwkv-Sequence"
ALIVE = "Aiirwkv-Alive"
HEARTBEAT = "Aiirwkv-Heartbeat"
USER = "Aiirwkv-User"
JOB = "Aiirwkv-Job"
GROUP = "Aiirwkv-Group"
GENERATION = "Aiirwkv-Generation"
MESSAGE_ID = "Nats-Msg-Id"
NO_RESPONDERS = "503"

JOBS_STREAM = "AIIRWKV_JOBS"
JOBS_BUCKET = "aiirwkv_jobs"
OBJECTS_BUCKET = "aiirwkv_objects"
DAY = 86400.0
IDLE = 15.0
"""Seconds of silence after which a worker counts as dead; it sends a sign of life every two."""
WATCHED = 30.0
"""Calls that may take longer than this many seconds are answered as a stream of one, with signs of life."""
DISCOVERY_PATIENCE = 2.0


def subject(hook: str, to: str | None = None) -> str:
    """aiirwkv.<hook>[.<plugin>[.<worker>]]"""
    return ".".join(part for part in (PREFIX, hook, to) if part)


def check(msg: Msg, asked: str) -> Msg:
    """Raise the error a reply carries, if any."""
    headers = msg.headers or {}
    if headers.get("Status") == NO_RESPONDERS:
        raise NoWorker(nobody(asked))
    if code := headers.get(ERROR_CODE):
        # nats-py reads headers as ASCII and keeps other bytes as surrogates
        text = headers.get(ERROR, "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        raise BY_CODE.get(int(code), ServiceError)(text)
    return msg


def nobody(asked: str) -> str:
    _, hook, *plugin = asked.split(".")
    start = f"aiirwkv worker {plugin[0]}" if plugin else "aiirwkv up"
    return f"nobody serves {asked} now; start a worker for it ({start}), or see who is there: aiirwkv plugins ({hook})"


def _encode(request: Request[Any]) -> bytes:
    try:
        return msgspec.json.encode(request)
    except UnicodeEncodeError as error:
        raise BadRequest(f"{request.hook}: a text holds half a character (a lone surrogate): {error}") from None


class Bus:
    """
    A connection to NATS that speaks requests and replies.

    `claim` says on whose behalf it asks; `deadline` (monotonic seconds) bounds every call; `patience` is how many
    seconds a call waits for a worker that is missing or busy, which jobs do and people do not.
    """

    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.claim = ""
        self.job = ""
        self.deadline = float("inf")
        self.patience = 0.0
        self._buckets: dict[str, Bucket] = {}
        self._services: dict[str, tuple[float, list[Service]]] = {}
        self._about: dict[tuple[str, str | None], tuple[float, dict[str, Any]]] = {}
        self._objects: list[Objects] = []

    @classmethod
    @asynccontextmanager
    async def connect(cls, config: BusConfig | str, name: str = "client", *, claim: str = "") -> AsyncIterator[Bus]:
        """Connect for the length of the block. `config` may be just a URL."""
        async with connection(BusConfig(url=config) if isinstance(config, str) else config, name) as nc:
            bus = cls(nc)
            bus.claim = claim
            yield bus

    def bound(self, *, claim: str = "", deadline: float = float("inf"), job: str = "", patience: float = 0) -> Bus:
        """The same connection on behalf of somebody, within a deadline."""
        bus = copy(self)
        bus.claim, bus.deadline, bus.job, bus.patience = claim, deadline, job, patience
        return bus

    # Requests

    async def call(self, request: Request[R], *, to: str | None = None, timeout: float = 30) -> R:
        """
        Ask one worker and return its reply. `to` names a plugin, or plugin.worker; `timeout` is in seconds.

        Raises a ServiceError; NoWorker within milliseconds when nobody is there.
        """
        if isinstance(request, StreamRequest):
            request = msgspec.structs.replace(request, stream=False)
        parts = request.parts()
        return request.join([await self._patient(part, to, timeout) for part in parts])

    async def _patient(self, request: Request[R], to: str | None, timeout: float) -> R:
        give_up = time.monotonic() + self.patience
        wait = 0.1
        while True:
            try:
                return await self._call(request, to, timeout)
            except (NoWorker, Busy):
                if time.monotonic() + wait > min(give_up, self.deadline):
                    raise
            await anyio.sleep(wait)
            wait = min(2 * wait, 2.0)

    async def _call(self, request: Request[R], to: str | None, timeout: float) -> R:
        asked = subject(request.hook, to)
        timeout = min(timeout, self.deadline - time.monotonic())
        if timeout <= 0:
            raise DeadlineExceeded(f"{asked}: the deadline had passed before it was asked")
        if timeout > WATCHED:  # a worker that dies meanwhile is noticed, and leaving stops the work
            async with self._listen(request, asked, timeout, IDLE, {ALIVE: "1"}) as messages:
                async for data in messages:
                    watched: R = msgspec.json.decode(data, type=request.reply)
                    return watched
            raise StreamBroken(f"{asked} ended without a reply; ask again")
        try:
            body = _encode(request)
            msg = await self.nc.request(asked, body, timeout, headers=self._headers(timeout))
        except nats.errors.NoRespondersError:
            raise NoWorker(nobody(asked)) from None
        except nats.errors.TimeoutError:
            raise DeadlineExceeded(f"{asked} took longer than {timeout:.3g} s") from None
        except nats.errors.MaxPayloadError:
            raise TooLarge(self._too_large(asked, len(body))) from None
        except nats.errors.Error as exc:
            raise ServerError(f"the connection to the bus broke while {asked} was asked: {exc}") from None
        reply: R = msgspec.json.decode(check(msg, asked).data, type=request.reply)
        return reply

    @asynccontextmanager
    async def stream(
        self, request: StreamRequest[C, Any], *, to: str | None = None, timeout: float = 600, idle: float = IDLE
    ) -> AsyncIterator[AsyncIterator[C]]:
        """
        Stream from one worker. Leaving the block stops the worker.

        The worker notices because nobody listens to the inbox any more, so there is no cancel message to lose.
        `idle`: seconds of silence after which the worker counts as dead (it sends a sign of life every 2 s).
        """
        timeout = min(timeout, self.deadline - time.monotonic())
        async with self._listen(request, subject(request.hook, to), timeout, idle, {}) as messages:

            async def chunks() -> AsyncIterator[C]:
                async for data in messages:
                    yield msgspec.json.decode(data, type=request.chunk)

            yield chunks()

    @asynccontextmanager
    async def _listen(
        self, request: Request[Any], asked: str, timeout: float, idle: float, headers: dict[str, str]
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Send a request and give the messages that answer it, in order and without the signs of life."""
        inbox = self.nc.new_inbox()
        sub = await self.nc.subscribe(inbox)
        try:
            body = _encode(request)
            try:
                await self.nc.publish(asked, body, reply=inbox, headers=self._headers(timeout) | headers)
            except nats.errors.MaxPayloadError:
                raise TooLarge(self._too_large(asked, len(body))) from None
            yield self._messages(sub, asked, time.monotonic() + timeout, idle)
        finally:
            with anyio.CancelScope(shield=True):
                await sub.unsubscribe()
                await self.nc.flush()

    async def _messages(self, sub: Any, asked: str, deadline: float, idle: float) -> AsyncIterator[bytes]:
        expected = 0
        while True:
            wait = min(idle, deadline - time.monotonic())
            try:
                msg = check(await sub.next_msg(timeout=max(wait, 0.001)), asked)
            except nats.errors.TimeoutError:
                if wait < idle:
                    raise DeadlineExceeded(f"{asked} ran out of time") from None
                raise StreamBroken(f"{asked}: the worker went silent for {idle:g} s; ask again") from None
            if int((msg.headers or {}).get(SEQUENCE, expected)) != expected:
                raise StreamBroken(f"{asked}: piece {expected} of the stream is missing; ask again")
            expected += 1
            if not msg.data:
                return
            if HEARTBEAT not in (msg.headers or {}):
                yield msg.data

    def _headers(self, timeout: float) -> dict[str, str]:
        headers = {TIMEOUT: f"{timeout:.3f}"}
        if self.claim:
            headers[USER] = self.claim
        if self.job:
            headers[JOB] = self.job
        return headers

    def _too_large(self, asked: str, size: int) -> str:
        return (
            f"{asked}: the request has {size / 1e6:.1f} MB, a message carries at most "
            f"{self.nc.max_payload / 1e6:.1f} MB; put what is large into the object store and name it"
        )

    # Jobs

    async def submit(self, request: Request[Any], *, to: str | None = None, group: str = "", id: str = "") -> Job:
        """Have a request carried out durably; the same id twice is one job."""
        from .jobs import submit

        return await submit(self, request, to=to, group=group, id=id or ulid())

    @asynccontextmanager
    async def follow(self, id: str = "", *, group: str = "") -> AsyncIterator[AsyncIterator[Job]]:
        """The job, or the jobs of a group (all jobs if neither is named), now and at every change, until all ended."""
        from .jobs import changes

        bucket = await self.bucket(JOBS_BUCKET)
        async with bucket.watch(f"job.{id or '>'}") as updates:
            yield changes(updates, group=group, forever=not id and not group)

    # What JetStream keeps

    async def provide(self) -> None:
        """Make the work queue and the buckets, if need be, so that any client finds them."""
        from .jobs import provide_stream, records

        await provide_stream(self.nc.jetstream())
        await records(self)
        await self._store()

    async def put(self, source: bytes | Path, name: str = "", media_type: str = "") -> Object:
        """Put bytes or a file of any size into the object store, where it stays for a day."""
        return await (await self._store()).put(source, name, media_type, owner=bearer(self.claim).name)

    async def get(self, id: str, into: Path) -> Object:
        """Write an object to a file; NotFound if it is gone, or somebody else's."""
        return await (await self._store()).get(await self._mine(id), into)

    async def read(self, id: str) -> bytes:
        """An object's bytes, for objects that fit in memory."""
        async with anyio.TemporaryDirectory(prefix="aiirwkv-") as folder:
            path = Path(folder) / "object"
            await self.get(id, path)
            return path.read_bytes()

    async def discard(self, id: str) -> None:
        """Remove an object; it is no error if it is gone, NotFound if it is somebody else's."""
        store = await self._store()
        if await store.find(id):
            await self._mine(id)
            await store.discard(id)

    async def _mine(self, id: str) -> Object:
        user, found = bearer(self.claim), await (await self._store()).find(id)
        if found is None or not ("owner" in user.roles or found.owner == user.name):
            raise NotFound(f"there is no object {id!r}; an upload is kept for a day, put it again")
        return found

    async def _store(self) -> Objects:
        if not self._objects:
            self._objects.append(await Objects.open(self.nc, OBJECTS_BUCKET, ttl=DAY))
        return self._objects[0]

    async def bucket(self, name: str, *, ttl: float | None = None) -> Bucket:
        """A key-value bucket, made if need be."""
        if name not in self._buckets:
            self._buckets[name] = await Bucket.open(self.nc, name, ttl=ttl)
        return self._buckets[name]

    # Discovery

    async def services(self, hook: str | None = None, *, fresh: float = 0) -> list[Service]:
        """Who serves what, in the order of `[use]`; at most `fresh` seconds old."""
        at, found = self._services.get("all", (float("-inf"), []))
        if time.monotonic() - at > fresh:
            found = [service for info in await self.workers("INFO") for service in _services(info)]
            order = list(REQUESTS)
            found.sort(key=lambda s: (order.index(s.hook), s.rank < 0, s.rank, s.plugin, s.worker))
            self._services["all"] = (time.monotonic(), found)
        return [service for service in found if hook in (None, service.hook)]

    async def about(self, hook: str, plugin: str | None = None) -> dict[str, Any]:
        """What a plugin says of itself (None: the one that serves by default); at most ten seconds old."""
        at, known = self._about.get((hook, plugin), (float("-inf"), {}))
        if time.monotonic() - at < 10:
            return known

        def wanted(info: dict[str, Any]) -> list[Service]:
            fits = [service for service in _services(info) if service.hook == hook]
            return [s for s in fits if s.plugin == plugin or (plugin is None and s.rank == 0)]

        give_up = time.monotonic() + max(DISCOVERY_PATIENCE, self.patience)
        while time.monotonic() < give_up:
            for info in await self.workers("INFO", enough=lambda info: bool(wanted(info))):
                for service in wanted(info):
                    self._about[hook, plugin] = (time.monotonic(), service.about)
                    return service.about
            await anyio.sleep(0.1)
        raise NoWorker(nobody(subject(hook, plugin)))

    async def workers(
        self,
        verb: str = "PING",
        *,
        enough: Callable[[dict[str, Any]], bool] = lambda _: False,
        stall: float = 0.15,
        limit: float = 1.0,
    ) -> list[dict[str, Any]]:
        """
        What every worker answers to PING, INFO or STATS (ADR-32).

        Listens until one answer is `enough`, none has come for `stall` seconds, or `limit` seconds are over.
        """
        inbox = self.nc.new_inbox()
        sub = await self.nc.subscribe(inbox)
        found: list[dict[str, Any]] = []
        try:
            await self.nc.publish(f"$SRV.{verb}.{PREFIX}", b"", reply=inbox)
            end = time.monotonic() + limit
            wait = limit
            while (wait := min(wait, end - time.monotonic())) > 0:
                try:
                    msg = await sub.next_msg(timeout=wait)
                except nats.errors.TimeoutError:
                    break
                if (msg.headers or {}).get("Status") == NO_RESPONDERS:
                    break
                found.append(msgspec.json.decode(msg.data))
                if enough(found[-1]):
                    break
                wait = stall
        finally:
            with anyio.CancelScope(shield=True):
                await sub.unsubscribe()
        return found


def _services(reply: dict[str, Any]) -> list[Service]:
    return [
        msgspec.convert(
            {
                "hook": endpoint["name"],
                "worker": reply["id"],
                "version": reply["version"],
                "process": reply["metadata"].get("process", ""),
                "pid": int(reply["metadata"].get("pid", 0)),
                "plugin": endpoint["metadata"]["plugin"],
                "rank": int(endpoint["metadata"]["rank"]),
                "about": msgspec.json.decode(endpoint["metadata"]["about"]),
                "distribution": endpoint["metadata"].get("distribution", ""),
            },
            Service,
        )
        for endpoint in reply["endpoints"]
        if endpoint["name"] in REQUESTS
    ]
