"""Durable jobs: progress, result, cancel, pause, resume, retry, redelivery, large inputs."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import ClassVar

import anyio
import msgspec
import pytest
from aiirwkv import (
    BadRequest,
    Bus,
    Conflict,
    Context,
    Embed,
    Index,
    Indexed,
    Job,
    Jobs,
    NotFound,
    Plugin,
    Source,
    TooLarge,
    User,
    hookimpl,
)
from aiirwkv.config import Config, Use
from aiirwkv.identity import mint, publish_key
from aiirwkv.testing import Fake, running
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class Slow(Plugin):
    """Counts to `steps`; fails or refuses when told to."""

    steps: int = 40
    fail: str = ""
    runs: int = 0

    @hookimpl
    async def index(self, request: Index, ctx: Context) -> Indexed:
        self.runs += 1
        if self.fail == "request":
            raise BadRequest("this document is password-protected; remove the password")
        for step in range(self.steps):
            if self.fail == "crash":
                raise RuntimeError("boom")
            ctx.progress(step, self.steps, f"step {step}")
            await anyio.sleep(0.05)
        return Indexed(request.collection, chunks=self.steps)


async def until(bus: Bus, id: str, *states: str, timeout: float = 10) -> Job:
    with anyio.fail_after(timeout):
        while True:
            [job] = (await bus.call(Jobs("get", id))).jobs
            if job.state in states:
                return job
            await anyio.sleep(0.02)


async def test_a_job_reports_progress_and_its_result(tmp_path: Path) -> None:
    async with running({"slow": Slow()}, tmp_path) as bus:
        job = await bus.submit(Index("c", [Source(text="x")]))
        async with bus.follow(job.id) as states:
            seen = [state async for state in states]
        assert [state.state for state in seen][-1] == "done" and seen[0].state in ("queued", "running")
        assert any(state.state == "running" and 0 < state.done < 40 and state.total == 40 for state in seen)
        assert msgspec.convert(seen[-1].result, Indexed).chunks == 40 and seen[-1].user == "owner"
        [listed] = (await bus.call(Jobs("list"))).jobs
        assert listed.id == job.id and listed.claim == ""
        same = await bus.submit(Index("c", [Source(text="x")]), id=job.id)
        assert same.state == "done"


async def test_any_client_can_publish_a_job(tmp_path: Path) -> None:
    async with running({"slow": Slow(steps=2)}, tmp_path) as bus:
        receipt = json.loads((await bus.nc.request("aiirwkv.job.index", b'{"collection":"c","sources":[]}')).data)
        assert receipt["stream"] == "AIIRWKV_JOBS"
        assert (await until(bus, str(receipt["seq"]), "done")).result["chunks"] == 2
        receipt = json.loads((await bus.nc.request("aiirwkv.job.index.slow", b'{"collectio":"c"}')).data)
        job = await until(bus, str(receipt["seq"]), "failed")
        assert job.code == 400 and "collectio" in job.error


async def test_cancel_pause_resume_retry(tmp_path: Path) -> None:
    slow = Slow(steps=60)
    async with running({"slow": slow}, tmp_path) as bus:
        first = await bus.submit(Index("c", []), group="g")
        second = await bus.submit(Index("c", []), group="g")
        await until(bus, first.id, "running")
        await bus.call(Jobs("pause", first.id))
        assert (await until(bus, first.id, "paused", timeout=2)).error == ""
        await until(bus, second.id, "running")
        await bus.call(Jobs("cancel", second.id))
        await until(bus, second.id, "cancelled", timeout=2)
        with pytest.raises(Conflict, match="cannot be paused"):
            await bus.call(Jobs("pause", second.id))
        slow.steps = 3
        await bus.call(Jobs("resume", first.id))
        assert (await until(bus, first.id, "done")).attempt >= 2
        await bus.call(Jobs("retry", second.id))
        await until(bus, second.id, "done")
        with pytest.raises(NotFound, match="no job"):
            await bus.call(Jobs("get", "nonsense"))


async def test_queued_jobs_can_be_cancelled_and_paused(tmp_path: Path) -> None:
    async with running({"fake": Fake()}, tmp_path) as bus:  # nobody serves index yet
        one, two = [await bus.submit(Index("c", [])) for _ in range(2)]
        receipt = json.loads((await bus.nc.request("aiirwkv.job.index", b'{"collection":"c","sources":[]}')).data)
        assert len((await bus.call(Jobs("list", state="queued"))).jobs) == 3
        await bus.call(Jobs("cancel", one.id))
        await bus.call(Jobs("pause", two.id))
        config = Config(use=Use(index="slow"))
        from aiirwkv.plugins import Registry
        from aiirwkv.worker import serving

        slow = Slow(steps=1)
        registry = Registry()
        registry.add("slow", slow.attach(tmp_path, bus))
        async with serving(bus, registry, config, "late"):
            await until(bus, str(receipt["seq"]), "done")
            assert slow.runs == 1
            await bus.call(Jobs("resume", two.id))
            await until(bus, two.id, "done")
            assert slow.runs == 2 and (await until(bus, one.id, "cancelled")).attempt == 0


async def test_a_refused_job_fails_at_once_and_a_crashing_one_after_three_tries(tmp_path: Path) -> None:
    slow = Slow(fail="request")
    async with running({"slow": slow}, tmp_path) as bus:
        job = await until(bus, (await bus.submit(Index("c", []))).id, "failed")
        assert job.code == 400 and "password-protected" in job.error and slow.runs == 1
        slow.fail, slow.runs = "crash", 0
        job = await until(bus, (await bus.submit(Index("c", []))).id, "failed", timeout=20)
        assert "boom" in job.error and slow.runs == 3


async def test_a_worker_that_leaves_hands_its_job_over(tmp_path: Path) -> None:
    from aiirwkv.plugins import Registry
    from aiirwkv.worker import serving

    async with running({"fake": Fake()}, tmp_path) as bus:
        config = Config(use=Use(index="slow"))
        first, second = Slow(steps=400), Slow(steps=2)
        registries = [Registry(), Registry()]
        for registry, plugin in zip(registries, (first, second), strict=True):
            registry.add("slow", plugin.attach(tmp_path, bus))
        async with serving(bus, registries[0], config, "first"):
            job = await bus.submit(Index("c", []))
            await until(bus, job.id, "running")
            await anyio.sleep(0.2)
        async with serving(bus, registries[1], config, "second"):
            done = await until(bus, job.id, "done", timeout=5)
            assert done.stalled == 0 and second.runs == 1


async def test_large_objects_travel_in_parts(tmp_path: Path) -> None:
    async with running({"fake": Fake()}, tmp_path) as bus:
        block = os.urandom(1 << 20)
        source = tmp_path / "large"
        with source.open("wb") as file:
            for _ in range(200):
                file.write(block)
        put = await bus.put(source, "grosse Datei – 大.bin")
        got = await bus.get(put.id, tmp_path / "copy")
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        assert put.size == 200 << 20 and put.sha256 == got.sha256 == digest and got.name == "grosse Datei – 大.bin"
        await bus.discard(put.id)
        await bus.discard(put.id)
        with pytest.raises(NotFound, match="upload is kept for a day"):
            await bus.get(put.id, tmp_path / "gone")
        assert await bus.read((await bus.put(b"abc", "a.txt")).id) == b"abc"
        with pytest.raises(TooLarge, match="object store"):
            await bus.submit(Index("c", [Source(text="x" * 600_000)]))


class Wide(Slow):
    """Runs two jobs at once."""

    concurrent_jobs: ClassVar[int] = 2


async def test_a_queued_job_that_is_paused_and_resumed_runs_once(tmp_path: Path) -> None:
    wide = Wide(steps=20)
    async with running({"wide": wide}, tmp_path) as bus:
        ahead = [await bus.submit(Index("c", [])) for _ in range(2)]
        for job in ahead:
            await until(bus, job.id, "running")
        job = await bus.submit(Index("c", []))
        for _ in range(3):  # each leaves a message in the queue
            await bus.call(Jobs("pause", job.id))
            await bus.call(Jobs("resume", job.id))
        done = await until(bus, job.id, "done")
        await anyio.sleep(0.5)
        assert wide.runs == 3 and done.attempt == 1


async def test_a_large_result_belongs_to_the_jobs_user(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    async with running({"fake": Fake(dim=20_000)}, tmp_path) as bus:
        await publish_key(bus, key.public_key().public_bytes_raw())
        ada = bus.bound(claim=mint(key, User("ada"), time.time() + 60))
        job = await ada.submit(Embed(["a" * 10] * 30))
        done = await until(bus, job.id, "done")
        assert len(json.loads(await ada.read(done.result["object"]))["vectors"]) == 30


async def test_following_a_group_sees_every_job_end(tmp_path: Path) -> None:
    """nats-py's watcher may say that it has told all before it has told anything: one in twenty times here."""
    async with running({"fake": Fake()}, tmp_path) as bus:
        for number in range(100):
            submitted = {(await bus.submit(Embed(["a"]), group=f"g{number}")).id for _ in range(3)}
            async with bus.follow(group=f"g{number}") as changes:
                ended = {job.id async for job in changes if job.over}
            assert ended == submitted
