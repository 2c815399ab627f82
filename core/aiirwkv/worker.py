"""The serving side of the bus: plugins' hooks as NATS micro services (ADR-32), retired without losing a request."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import msgspec
import nats.errors
from anyio.abc import TaskGroup, TaskStatus
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from . import discovery
from .bus import ALIVE, ERROR, ERROR_CODE, HEARTBEAT, JOB, NO_RESPONDERS, SEQUENCE, TIMEOUT, USER, Bus, subject
from .config import Config
from .errors import AiirwkvError, BadRequest, Busy, DeadlineExceeded, NoWorker, PluginError, TooLarge, Unauthorized
from .hooks import Action, Owned, Plugin, may
from .identity import OWNER, Verifier
from .jobs import CoreJobs, find
from .plugins import Registry, load, origin_of
from .runner import JobRunner
from .types import REQUESTS, Job, Request, StreamRequest, User, fold

log = logging.getLogger(__name__)

SILENCE = 2.0
"""Seconds of silence after which a stream says that it is alive."""
DEADLINE = 600.0
"""Seconds a request has whose caller named no deadline."""
GRACE = 20.0
"""Seconds that running requests have to finish when the worker leaves."""
CORE = "core"


@dataclass
class CallContext:
    """What a hook may use besides its request; see `hooks.Context`."""

    bus: Bus
    user: User
    deadline: float
    job: Job | None = None
    report: Callable[[float, float, str], None] | None = None

    @property
    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def progress(self, done: float, total: float = 0, note: str = "") -> None:
        if self.report:
            self.report(done, total, note)

    def may(self, action: Action, thing: Owned) -> bool:
        return may(self.user, action, thing)


@dataclass
class Endpoint:
    """One hook of one plugin, and its statistics."""

    hook: str
    plugin: str
    instance: Plugin
    rank: int
    subjects: list[str]
    active: int = 0
    requests: int = 0
    errors: int = 0
    nanoseconds: int = 0
    last_error: str = ""
    subs: list[Subscription] = field(default_factory=list)


class Worker:
    """Serves loaded plugins on the bus until told to stop."""

    tasks: TaskGroup

    def __init__(
        self,
        bus: Bus,
        registry: Registry,
        config: Config,
        *,
        process: str = "worker",
        broken: dict[str, str] | None = None,
    ) -> None:
        self.bus, self.registry, self.config, self.process = bus, registry, config, process
        self.broken = broken or {}
        if CORE not in registry.plugins:
            registry.add(CORE, CoreJobs().attach(Path(), bus))
        self.id: str = bus.nc._nuid.next().decode()
        self.verifier = Verifier(bus)
        self.jobs = JobRunner(self, config.bus.ack_wait)
        self.started = datetime.now(UTC)
        self._stopping = anyio.Event()
        self._probe = bus.nc.new_inbox()
        self._streams: dict[str, anyio.CancelScope] = {}
        self.endpoints = [self._endpoint(hook, plugin) for hook in REQUESTS for plugin in registry.providers(hook)]

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`: no new requests then, finish the running ones, hand jobs back, leave."""
        async with anyio.create_task_group() as pullers:
            async with anyio.create_task_group() as self.tasks:
                control = await self._subscribe()
                for endpoint in self.endpoints:
                    if endpoint.plugin != CORE:
                        await pullers.start(self.jobs.serve, endpoint)
                await self.bus.nc.flush()
                task_status.started()
                await self._stopping.wait()
                # The order matters: a subscription that is drained has handed every message over, so that leaving the
                # task group waits for all of them; only then may the connection go.
                for sub in [*(sub for endpoint in self.endpoints for sub in endpoint.subs), *control]:
                    await sub.drain()  # type: ignore[no-untyped-call]
                await self.jobs.retire()
                self.tasks.cancel_scope.deadline = anyio.current_time() + GRACE
            pullers.cancel_scope.cancel()
        await self.bus.nc.flush()

    def stop(self) -> None:
        self._stopping.set()

    def _endpoint(self, hook: str, plugin: str) -> Endpoint:
        order = [CORE] if hook == "jobs" else self.config.use.plugins(hook)
        rank = order.index(plugin) if plugin in order else -1
        subjects = [subject(hook, plugin), subject(hook, f"{plugin}.{self.id}")]
        if rank == 0:
            subjects.insert(0, subject(hook))
        return Endpoint(hook, plugin, self.registry.plugins[plugin], rank, subjects)

    async def _subscribe(self) -> list[Subscription]:
        nc = self.bus.nc
        await nc.subscribe(f"{self._probe}.*", cb=self._on_probe)
        for endpoint in self.endpoints:
            for name in endpoint.subjects:
                endpoint.subs.append(await nc.subscribe(name, queue=endpoint.plugin, cb=self._receiver(endpoint)))
        return [
            await nc.subscribe(f"$SRV.{verb}{suffix}", cb=discovery.responder(self, answer))
            for verb, answer in discovery.ANSWERS.items()
            for suffix in ("", ".aiirwkv", f".aiirwkv.{self.id}")
        ]

    # Requests

    def _receiver(self, endpoint: Endpoint) -> Any:
        async def receive(msg: Msg) -> None:  # nats-py waits for this, so hand over at once
            self.tasks.start_soon(self._handle, endpoint, msg)

        return receive

    async def _handle(self, endpoint: Endpoint, msg: Msg) -> None:
        began = time.perf_counter_ns()
        endpoint.requests += 1
        endpoint.active += 1
        try:
            if endpoint.active > type(endpoint.instance).concurrent_requests:
                raise Busy(
                    f"{endpoint.plugin} has {endpoint.active - 1} {endpoint.hook} requests already; try again, or "
                    f"start another worker: aiirwkv worker {endpoint.plugin}"
                )
            await self._answer(endpoint, msg)
        except Exception as exc:
            endpoint.errors += 1
            endpoint.last_error = f"{type(exc).__name__}: {exc}"
            if not isinstance(exc, AiirwkvError):
                log.exception("%s of %s failed", endpoint.hook, endpoint.plugin, extra={"plugin": endpoint.plugin})
            await self._refuse(msg, exc)
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await self._refuse(msg, NoWorker(f"the worker left before {endpoint.hook} was done; ask again"))
            raise
        finally:
            endpoint.active -= 1
            endpoint.nanoseconds += time.perf_counter_ns() - began

    async def _refuse(self, msg: Msg, exc: Exception) -> None:
        if msg.reply:
            text = str(exc) if isinstance(exc, AiirwkvError) else f"{type(exc).__name__}: {exc}; see the worker's log"
            text = " ".join(text.encode("utf-8", "replace").decode().split())[:500]
            code = str(getattr(exc, "code", 500))
            with suppress(nats.errors.Error):  # nobody can be told while the bus is away
                await self.bus.nc.publish(msg.reply, headers={ERROR: text, ERROR_CODE: code})

    async def _answer(self, endpoint: Endpoint, msg: Msg) -> None:
        headers = msg.headers or {}
        request = decode(endpoint.hook, msg.data)
        try:
            timeout = float(headers.get(TIMEOUT, DEADLINE))
            if timeout != timeout:
                raise ValueError("nan")
        except ValueError:
            raise BadRequest(f"the header {TIMEOUT} is {headers[TIMEOUT]!r}; it takes seconds, like 30") from None
        if not timeout > 0:
            raise DeadlineExceeded(f"{endpoint.hook}: the deadline had already passed when the request arrived")
        claim, job = headers.get(USER, ""), headers.get(JOB, "")
        ctx = self._context(claim, await self.caller(claim, job), time.monotonic() + timeout, job)
        result = self._invoke(endpoint, request, ctx)
        try:
            with anyio.fail_after(timeout):
                if isinstance(request, StreamRequest) and request.stream:
                    await self._stream(msg, result)
                elif headers.get(ALIVE):
                    await self._stream(msg, self._once(request, result))
                elif msg.reply:
                    await self.bus.nc.publish(msg.reply, self._fitting(request, await whole(request, result)))
                else:
                    await whole(request, result)
        except TimeoutError:
            raise DeadlineExceeded(f"{endpoint.hook} took longer than {timeout:.3g} s") from None

    async def caller(self, claim: str, job: str = "", *, at: float | None = None) -> User:
        """Who a claim says it is; without one, the owner. A running job's claim holds as of its submission."""
        if not claim:
            return OWNER
        try:
            return await self.verifier.check(claim, at=at)
        except Unauthorized:
            record = await find(self.bus, job) if job else None
            if record and record.state == "running" and record.claim == claim:
                return await self.verifier.check(claim, at=record.created)
            raise

    def _context(self, claim: str, user: User, deadline: float, job: str = "") -> CallContext:
        return CallContext(self.bus.bound(claim=claim, deadline=deadline, job=job), user, deadline)

    def _invoke(self, endpoint: Endpoint, request: Request[Any], ctx: CallContext) -> Any:
        if os.environ.get("AIIRWKV_TRACE"):
            log.info("%s.%s for %s: %s", endpoint.hook, endpoint.plugin, ctx.user.name, request)
        return self.registry.call(endpoint.hook, endpoint.plugin, request=request, ctx=ctx)

    async def run_job(self, endpoint: Endpoint, body: bytes, job: Job, report: Callable[..., None]) -> Any:
        """The reply of a hook to a job's request."""
        request = decode(endpoint.hook, body)
        user = await self.caller(job.claim, at=job.created)
        bus = self.bus.bound(claim=job.claim, job=job.id, patience=30)
        ctx = CallContext(bus, user, float("inf"), job, report)
        began = time.perf_counter_ns()
        endpoint.requests += 1
        try:
            return request.shape(await whole(request, self._invoke(endpoint, request, ctx)))
        except Exception as exc:
            endpoint.errors += 1
            endpoint.last_error = f"{type(exc).__name__}: {exc}"
            raise
        finally:
            endpoint.nanoseconds += time.perf_counter_ns() - began

    async def _once(self, request: Request[Any], result: Any) -> AsyncIterator[msgspec.Raw]:
        """A whole reply as a stream of one piece."""
        yield msgspec.Raw(self._fitting(request, await whole(request, result)))

    def _fitting(self, request: Request[Any], reply: Any) -> bytes:
        """The reply as bytes that fit one message."""
        data = msgspec.json.encode(request.shape(reply))
        if len(data) > self.bus.nc.max_payload:
            hint = 'ask with format = "base64", or for fewer texts' if hasattr(request, "format") else "ask for less"
            raise TooLarge(
                f"{request.hook}: the reply has {len(data) / 1e6:.1f} MB, a message carries at most "
                f"{self.bus.nc.max_payload / 1e6:.1f} MB; {hint}"
            )
        return data

    async def _stream(self, msg: Msg, chunks: Any) -> None:
        token = self.bus.nc._nuid.next().decode()
        sent, last = 0, time.monotonic()

        async def send(data: bytes, **more: str) -> None:
            nonlocal sent, last
            headers = {SEQUENCE: str(sent)} | more
            sent, last = sent + 1, time.monotonic()
            # The reply subject makes the server tell us when nobody listens any more.
            await self.bus.nc.publish(msg.reply, data, reply=f"{self._probe}.{token}", headers=headers)

        async def beat() -> None:
            while True:
                await anyio.sleep(SILENCE / 4)
                if time.monotonic() - last >= SILENCE:
                    await send(b"{}", **{HEARTBEAT: "1"})

        with anyio.CancelScope() as scope:
            self._streams[token] = scope
            try:
                async with anyio.create_task_group() as beating:
                    beating.start_soon(beat)
                    async with aclosing(chunks):
                        async for chunk in chunks:
                            await send(msgspec.json.encode(chunk))
                    beating.cancel_scope.cancel()
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                del self._streams[token]
        if not scope.cancelled_caught:
            await send(b"")

    async def _on_probe(self, msg: Msg) -> None:
        if (msg.headers or {}).get("Status") == NO_RESPONDERS:
            scope = self._streams.get(msg.subject.rpartition(".")[2])
            if scope:
                scope.cancel()


def decode(hook: str, body: bytes) -> Request[Any]:
    """The typed request, or a BadRequest that says what is wrong where."""
    try:
        request: Request[Any] = msgspec.json.decode(body or b"{}", type=REQUESTS[hook])
        return request
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise BadRequest(f"{hook}: {exc}") from None


async def whole(request: Request[Any], result: Any) -> Any:
    """A hook's reply: awaited, or folded from a stream's pieces."""
    if not isinstance(request, StreamRequest):
        return await result
    async with aclosing(result):
        return fold(request, [chunk async for chunk in result])


@asynccontextmanager
async def serving(
    bus: Bus, registry: Registry, config: Config, process: str, broken: dict[str, str] | None = None
) -> AsyncIterator[Worker]:
    """
    Enter the plugins, serve them for the length of the block, retire.

    With `broken` given, a plugin that cannot be started is noted there with the cause, and the others are served.
    """
    async with AsyncExitStack() as stack:
        for name in list(registry.plugins):
            try:
                await _enter(stack, registry, name)
            except PluginError as exc:
                if broken is None:
                    raise
                broken[name] = str(exc)
                registry.remove(name)
        worker = Worker(bus, registry, config, process=process, broken=broken)
        error: Exception | None = None
        async with anyio.create_task_group() as tasks:
            await tasks.start(worker.run)
            try:
                yield worker
            except Exception as exc:  # raised again outside of the task group, which would wrap it
                error = exc
            finally:
                worker.stop()
        if error:
            raise error


async def _enter(stack: AsyncExitStack, registry: Registry, name: str) -> None:
    plugin = registry.plugins[name]
    try:
        await stack.enter_async_context(plugin)
        msgspec.json.encode((plugin.about(), plugin.stats()))
    except PluginError as exc:
        raise PluginError(f"plugin {name!r} ({origin_of(plugin)}) cannot be started: {exc}") from exc
    except (Exception, SystemExit) as exc:
        if not isinstance(exc, AiirwkvError):
            log.exception("plugin %s cannot be started", name, extra={"plugin": name})
        cause = str(exc) if isinstance(exc, AiirwkvError) else f"{type(exc).__name__}: {exc}"
        raise PluginError(f"plugin {name!r} ({origin_of(plugin)}) cannot be started: {cause}") from exc


def build(names: list[str], config: Config, data: Path, bus: Bus, broken: dict[str, str] | None = None) -> Registry:
    """The named plugins, with their settings and surroundings; `broken` as in `serving`."""
    registry = Registry()
    for name in names:
        try:
            registry.add(name, load(name, config.plugins.get(name, {})).attach(data, bus))
        except PluginError as exc:
            if broken is None:
                raise
            broken[name] = str(exc)
    return registry
