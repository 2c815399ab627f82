"""Durable delivery: a job is a request in a JetStream work queue, run by the same hook, with a record in a bucket."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Literal

import msgspec
from nats.js import JetStreamContext, api
from nats.js.errors import APIError, BadRequestError
from nats.js.errors import NotFoundError as MissingError

from .bus import DAY, GENERATION, GROUP, JOB, JOBS_BUCKET, JOBS_STREAM, MESSAGE_ID, PREFIX, USER, Bus
from .errors import AiirwkvError, Conflict, NotFound, TooLarge
from .hooks import Context, Plugin, hookimpl
from .identity import bearer
from .store import Bucket, storage
from .types import Job, Jobs, JobsReply, Request

LIMIT = 512 * 1024
"""Bytes that a job's request or result may have; larger ones travel as objects."""
KEPT = 30 * DAY


def job_subject(hook: str, plugin: str = "") -> str:
    return ".".join(part for part in (PREFIX, "job", hook, plugin) if part)


async def provide_stream(js: JetStreamContext) -> None:
    """Make the work queue, if need be."""
    config = api.StreamConfig(
        name=JOBS_STREAM,
        subjects=[f"{PREFIX}.job.>"],
        retention=api.RetentionPolicy.WORK_QUEUE,
        max_age=7 * DAY,
        duplicate_window=120,
    )
    with storage("stream", JOBS_STREAM):
        try:
            await js.add_stream(config)
        except BadRequestError as exc:
            if exc.err_code != 10058:  # it exists with settings of the operator's own
                raise


async def records(bus: Bus) -> Bucket:
    return await bus.bucket(JOBS_BUCKET, ttl=KEPT)


async def find(bus: Bus, id: str) -> Job | None:
    data = await (await records(bus)).find(f"job.{id}")
    return msgspec.json.decode(data, type=Job) if data else None


async def save(bus: Bus, job: Job) -> None:
    job.updated = time.time()
    await (await records(bus)).put(f"job.{job.id}", msgspec.json.encode(job))


async def replace(bus: Bus, job: Job, revision: int) -> bool:
    """Save a job unless its record has changed since it was read; whether it was saved."""
    job.updated = time.time()
    return await (await records(bus)).update(f"job.{job.id}", msgspec.json.encode(job), revision)


async def submit(bus: Bus, request: Request[Any], *, to: str | None, group: str, id: str) -> Job:
    """Put a request into the work queue, with a record that says it is queued."""
    body = msgspec.json.encode(request)
    if len(body) > LIMIT:
        raise TooLarge(
            f"a job's request has at most {LIMIT >> 10} KiB, this {request.hook} has {len(body) >> 10}; put what is "
            "large into the object store and name it"
        )
    job = Job(id, request.hook, to or "", group=group, created=time.time(), request=msgspec.Raw(body))
    job.claim, job.user = bus.claim, bearer(bus.claim).name
    if not await replace(bus, job, 0):
        return await find(bus, id) or job
    await provide_stream(bus.nc.jetstream())
    try:
        await _publish(bus, job)
    except AiirwkvError:
        await (await records(bus)).delete(f"job.{id}")
        raise
    return job


async def _publish(bus: Bus, job: Job) -> None:
    headers = {
        MESSAGE_ID: f"{job.id}-{job.generation}",
        JOB: job.id,
        GENERATION: str(job.generation),
        GROUP: job.group,
        USER: job.claim,
    }
    with storage("job", job.id):
        await bus.nc.jetstream().publish(
            job_subject(job.hook, job.plugin),
            msgspec.json.encode(job.request),
            headers={key: value for key, value in headers.items() if value},
        )


async def changes(updates: AsyncIterator[tuple[str, bytes] | None], *, group: str, forever: bool) -> AsyncIterator[Job]:
    """Jobs as they change, until every one of them is over."""
    open_jobs: set[str] = set()
    known = False
    async for update in updates:
        if update is None:
            known = True
        else:
            job = msgspec.json.decode(update[1], type=Job)
            if group and job.group != group:
                continue
            job.claim = ""
            (open_jobs.discard if job.over else open_jobs.add)(job.id)
            yield job
        if known and not open_jobs and not forever:
            return


class CoreJobs(Plugin):
    """Serves the `jobs` hook; every worker has it."""

    @hookimpl
    async def jobs(self, request: Jobs, ctx: Context) -> JobsReply:
        if request.action == "list":
            found = [job for job in await self._all() if self._visible(job, ctx)]
            found = [job for job in found if request.state in (None, job.state) and request.group in ("", job.group)]
            return JobsReply([_public(job) for job in found[-request.limit :]])
        if request.group and not request.id:
            jobs = [job for job in await self._all() if job.group == request.group and self._visible(job, ctx)]
            if not jobs:
                raise NotFound(f"there is no group of jobs {request.group!r}")
        else:
            request.need("id")
            jobs = [await self._get(request.id, ctx)]
        if request.action == "get":
            return JobsReply([_public(job) for job in jobs])
        if request.group and not request.id:
            jobs = [job for job in jobs if _applies(request.action, job)]
        return JobsReply([_public(await self._steer(request.action, job.id)) for job in jobs])

    async def _steer(self, action: Literal["cancel", "pause", "resume", "retry"] | str, id: str) -> Job:
        """Change a job's record as wished, however often it changes meanwhile."""
        bucket = await records(self.bus)
        while True:
            entry = await bucket.entry(f"job.{id}")
            if entry is None:
                raise Conflict(f"job {id} has not been looked at yet; try again when a worker for it runs")
            job = msgspec.json.decode(entry[0], type=Job)
            if not _applies(action, job):
                raise Conflict(f"job {job.id} is {job.state}: it cannot be {PARTICIPLES[action]}")
            if action in ("cancel", "pause") and job.state == "running":
                await bucket.put(f"control.{job.id}", action.encode())
                return job
            if action in ("cancel", "pause"):
                job.state = "cancelled" if action == "cancel" else "paused"
            elif job.request is None:
                raise Conflict(f"job {job.id} is too large to be kept; submit it again")
            else:
                job.state, job.stalled, job.reached, job.error, job.code = "queued", 0, -1.0, "", 0
                job.generation += 1  # the messages of before are void
            if await replace(self.bus, job, entry[1]):
                break
        if job.state == "queued":
            await bucket.delete(f"control.{job.id}")
            await _publish(self.bus, job)
        return job

    async def _get(self, id: str, ctx: Context) -> Job:
        job = await find(self.bus, id) if re.fullmatch(r"[\w-]{1,64}", id, re.ASCII) else None
        if job is None and id.isdigit():
            job = await self._waiting(int(id))
        if job is None or not self._visible(job, ctx):
            raise NotFound(f"there is no job {id!r}; see them with: aiirwkv jobs")
        return job

    async def _all(self) -> list[Job]:
        """All records, and what raw clients queued that nobody has looked at yet; oldest first."""
        values = await (await records(self.bus)).values("job.>")
        jobs = {job.id: job for job in (msgspec.json.decode(value, type=Job) for value in values)}
        js = self.bus.nc.jetstream()
        with suppress(MissingError):
            state = (await js.stream_info(JOBS_STREAM)).state
            if state.messages > sum(not job.over for job in jobs.values()):
                for sequence in range(state.first_seq, min(state.last_seq, state.first_seq + 1000) + 1):
                    if (job := await self._waiting(sequence)) and job.id not in jobs:
                        jobs[job.id] = job
        return sorted(jobs.values(), key=lambda job: (job.created, job.id))

    async def _waiting(self, sequence: int) -> Job | None:
        """A job that lies in the queue without a record."""
        try:
            msg = await self.bus.nc.jetstream().get_msg(JOBS_STREAM, sequence)
        except (MissingError, APIError):
            return None
        headers = msg.headers or {}
        if headers.get(JOB):
            return None
        _, _, hook, *plugin = (msg.subject or "").split(".")
        stamp = getattr(msg, "time", None)
        created = stamp.timestamp() if stamp else 0.0
        return Job(str(sequence), hook, plugin[0] if plugin else "", created=created)

    @staticmethod
    def _visible(job: Job, ctx: Context) -> bool:
        return "owner" in ctx.user.roles or job.user == ctx.user.name


PARTICIPLES = {"cancel": "cancelled", "pause": "paused", "resume": "resumed", "retry": "retried"}


def _applies(action: str, job: Job) -> bool:
    if action == "cancel":
        return not job.over
    if action == "pause":
        return job.state in ("queued", "running")
    return job.state == "paused" if action == "resume" else job.state in ("failed", "cancelled")


def _public(job: Job) -> Job:
    return msgspec.structs.replace(job, claim="")
