"""Runs jobs: pulls them from the work queue, keeps them alive, writes down how they go, hands them over."""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import nats.errors
from anyio.abc import TaskStatus
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext, api
from nats.js.errors import APIError

from .bus import GENERATION, GROUP, JOB, JOBS_STREAM, MESSAGE_ID, USER
from .errors import AiirwkvError, Busy, NoWorker, ServiceError
from .jobs import LIMIT, job_subject, provide_stream, records, replace, save
from .store import storage
from .types import REQUESTS, Job

if TYPE_CHECKING:
    from .worker import Endpoint, Worker

log = logging.getLogger(__name__)

BEAT = 0.5
"""Seconds between looks at a running job."""
PULL = 30.0
"""Seconds that one request for a job waits at the server."""
STALLED = 3
"""Deliveries in a row without progress after which a job has failed."""


class JobRunner:
    """Pulls jobs for one worker's plugins and runs them with a heartbeat."""

    def __init__(self, worker: Worker, ack_wait: float) -> None:
        self.worker, self.bus, self.ack_wait = worker, worker.bus, ack_wait
        self._running: dict[str, anyio.CancelScope] = {}
        self._retiring = False
        self._subscriptions: list[Subscription] = []

    async def serve(self, endpoint: Endpoint, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Pull and run jobs for one hook of one plugin until cancelled."""
        js = self.bus.nc.jetstream()
        await provide_stream(js)
        consumer = await self._consumer(js, endpoint)
        slots = anyio.Semaphore(type(endpoint.instance).concurrent_jobs)
        arrived: list[bool] = []
        wake = anyio.Event()

        async def receive(msg: Msg) -> None:  # nats-py waits for this, so hand over at once
            if "Status" not in (msg.headers or {}):
                arrived.append(True)
                self.worker.tasks.start_soon(self._deliver, endpoint, msg, slots)
            wake.set()

        inbox = self.bus.nc.new_inbox()
        self._subscriptions.append(await self.bus.nc.subscribe(inbox, cb=receive))
        task_status.started()
        ask = msgspec.json.encode({"batch": 1, "expires": int(PULL * 1e9)})
        while not self._retiring:
            await slots.acquire()
            arrived.clear()
            wake = anyio.Event()
            await self.bus.nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}.{consumer}", ask, reply=inbox)
            await self._arrival(wake)
            if not arrived:  # otherwise the delivery gives the slot back
                slots.release()
                await anyio.sleep(0.05)

    async def _arrival(self, wake: anyio.Event) -> None:
        """Wait for the answer to a pull, which is lost when the bus was away."""
        reconnects = self.bus.nc.stats["reconnects"]
        with anyio.move_on_after(PULL + 5):
            while not wake.is_set() and self.bus.nc.stats["reconnects"] == reconnects:
                with anyio.move_on_after(1):
                    await wake.wait()

    async def retire(self) -> None:
        """Take no more jobs, and hand the running ones back at once."""
        self._retiring = True
        for sub in self._subscriptions:
            await sub.drain()  # type: ignore[no-untyped-call]
        for scope in self._running.values():
            scope.cancel()

    async def _consumer(self, js: JetStreamContext, endpoint: Endpoint) -> str:
        """
        The durable consumer of a hook's plugin. The plugin that serves the hook by default also takes the jobs that
        name no plugin, away from the one that did so before.
        """
        name = f"{endpoint.hook}--{endpoint.plugin}"
        own = job_subject(endpoint.hook, endpoint.plugin)
        subjects = [job_subject(endpoint.hook), own] if endpoint.rank == 0 else [own]
        if endpoint.rank == 0:
            for info in await js.consumers_info(JOBS_STREAM):
                filters = info.config.filter_subjects or [info.config.filter_subject or ""]
                if info.name != name and subjects[0] in filters:
                    await self._configure(js, info.name, [s for s in filters if s != subjects[0]])
        await self._configure(js, name, subjects)
        return name

    async def _configure(self, js: JetStreamContext, name: str, subjects: list[str]) -> None:
        with storage("consumer", name):
            await js.add_consumer(
                JOBS_STREAM,
                api.ConsumerConfig(
                    durable_name=name,
                    filter_subjects=subjects,
                    ack_policy=api.AckPolicy.EXPLICIT,
                    ack_wait=self.ack_wait,
                    max_deliver=-1,
                ),
            )

    async def _deliver(self, endpoint: Endpoint, msg: Msg, slots: anyio.Semaphore) -> None:
        try:
            if self._retiring:
                await msg.nak()
            elif job := await self._begin(endpoint, msg):
                await self._run(endpoint, msg, job)
        except Exception as exc:  # whatever it is, the worker lives on
            level = logging.WARNING if isinstance(exc, AiirwkvError | nats.errors.Error | APIError) else logging.ERROR
            log.log(level, "a job for %s could not be kept track of and will come again: %s", endpoint.hook, exc,
                    exc_info=level == logging.ERROR)  # fmt: skip
        finally:
            slots.release()

    async def _begin(self, endpoint: Endpoint, msg: Msg) -> Job | None:
        """The record of a job that shall run now; None if it need not or may not."""
        headers = msg.headers or {}
        named = headers.get(JOB) or headers.get(MESSAGE_ID) or ""
        id = named if re.fullmatch(r"[\w-]{1,64}", named, re.ASCII) else str(msg.metadata.sequence.stream)
        bucket = await records(self.bus)
        while True:
            entry = await bucket.entry(f"job.{id}")
            if entry is None:
                job, revision = Job(id, endpoint.hook, group=headers.get(GROUP, ""), created=_time(msg)), 0
                job.request = msgspec.Raw(msg.data) if len(msg.data) <= LIMIT else None
                job.claim = headers.get(USER, "")
            else:
                job, revision = msgspec.json.decode(entry[0], type=Job), entry[1]
                void = headers.get(GENERATION, "0") != str(job.generation) or job.claim != headers.get(USER, "")
                if void or job.over or job.state == "paused" or job.id in self._running:
                    await msg.ack()
                    return None
            if refusal := await self._refusal(job, msg):
                await self._fail(msg, job, *refusal)
                return None
            job.plugin = endpoint.plugin
            job.stalled = job.stalled + 1 if job.attempt and job.done <= job.reached else 0
            job.reached = max(job.reached, job.done)
            if job.stalled >= STALLED:
                cause = job.error or "the worker died each time; see its log (aiirwkv doctor names the folder)"
                await self._fail(msg, job, f"gave up after {STALLED} tries in a row without progress: {cause}", 500)
                return None
            job.attempt += 1
            job.state, job.note = "running", ""
            if await replace(self.bus, job, revision):  # otherwise somebody has just paused or cancelled it
                return job

    async def _refusal(self, job: Job, msg: Msg) -> tuple[str, int] | None:
        """Why a job may not run, if so."""
        try:
            job.user = (await self.worker.caller(job.claim, at=job.created)).name
            msgspec.json.decode(msg.data or b"{}", type=REQUESTS[job.hook])
        except (ServiceError, msgspec.MsgspecError) as exc:
            return f"{job.hook}: {exc}", getattr(exc, "code", 400)
        return None

    async def _run(self, endpoint: Endpoint, msg: Msg, job: Job) -> None:
        wish: list[str] = []
        progress = Progress(job)
        with anyio.CancelScope() as scope:
            self._running[job.id] = scope
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._beat, msg, job, progress, wish, scope)
                    try:
                        result = await self.worker.run_job(endpoint, msg.data, job, progress)
                    finally:
                        tasks.cancel_scope.cancel()
            except* Exception as group:
                error: BaseException = group
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                await self._failed(endpoint, msg, job, error)
            else:
                if not scope.cancel_called:
                    await self._done(msg, job, result)
            finally:
                self._running.pop(job.id, None)
        if scope.cancel_called and job.state == "running":
            with anyio.CancelScope(shield=True):
                await self._stopped(msg, job, wish[0] if wish else "")

    async def _beat(self, msg: Msg, job: Job, progress: Progress, wish: list[str], scope: anyio.CancelScope) -> None:
        """Keep the job ours, write its progress down, and obey cancel and pause."""
        alive = time.monotonic()
        bucket = await records(self.bus)
        while True:
            await anyio.sleep(min(BEAT, self.ack_wait / 4))
            try:
                if control := await bucket.find(f"control.{job.id}"):
                    wish.append(control.decode())
                    scope.cancel()
                    return
                if time.monotonic() - alive > self.ack_wait / 3:
                    await msg.in_progress()
                    alive = time.monotonic()
                if progress.changed:
                    progress.changed = False
                    await save(self.bus, job)
            except (nats.errors.Error, APIError, AiirwkvError) as exc:  # the bus may be away for a moment
                log.warning("job %s: %s", job.id, exc)

    async def _done(self, msg: Msg, job: Job, result: Any) -> None:
        body = msgspec.json.encode(result)
        if len(body) > LIMIT:
            users = self.bus.bound(claim=job.claim)
            body = msgspec.json.encode({"object": (await users.put(body, f"{job.id}.json", "application/json")).id})
        job.state, job.result, job.error, job.code = "done", msgspec.Raw(body), "", 0
        await self._close(msg, job)

    async def _failed(self, endpoint: Endpoint, msg: Msg, job: Job, error: BaseException) -> None:
        code = getattr(error, "code", 500)
        text = str(error) if isinstance(error, AiirwkvError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, AiirwkvError):
            log.error("job %s of %s.%s failed", job.id, endpoint.hook, endpoint.plugin, exc_info=error)
        waiting = isinstance(error, NoWorker | Busy)
        stuck = job.done <= job.reached and job.stalled + 1 >= STALLED
        if (400 <= code < 500 and not waiting) or stuck:
            await self._fail(msg, job, text, code)
            return
        job.error, job.code, job.state = text, code, "queued"
        job.note = f"will be tried again: {text}"
        await save(self.bus, job)
        await msg.nak(delay=min(2**job.attempt, 30))

    async def _fail(self, msg: Msg, job: Job, text: str, code: int) -> None:
        job.state, job.error, job.code = "failed", text, code
        await self._close(msg, job)

    async def _stopped(self, msg: Msg, job: Job, wish: str) -> None:
        if wish in ("cancel", "pause"):
            job.state = "cancelled" if wish == "cancel" else "paused"
            await self._close(msg, job)
        else:  # this worker leaves; another one takes over at once, and it is nobody's fault
            job.state, job.reached = "queued", -1.0
            await save(self.bus, job)
            await msg.nak()

    async def _close(self, msg: Msg, job: Job) -> None:
        """Write down how it ended, and only then take it out of the queue."""
        await save(self.bus, job)
        await (await records(self.bus)).delete(f"control.{job.id}")
        with suppress(nats.errors.TimeoutError):
            await msg.ack_sync(timeout=5)


class Progress:
    """What `ctx.progress` writes to; the heartbeat sends it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.changed = False

    def __call__(self, done: float, total: float = 0, note: str = "") -> None:
        self.job.done, self.job.total, self.job.note = done, total, note
        self.changed = True


def _time(msg: Msg) -> float:
    stamp = msg.metadata.timestamp
    return stamp.timestamp() if stamp else time.time()
