"""A reader that goes away stops the writer: by leaving the block, and by a killed socket."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from aiirwkv import Embed, Embeddings, StreamBroken, hookimpl
from aiirwkv.testing import Fake, running

READER = """
import sys, anyio
from aiirwkv import Bus, Generate
from aiirwkv.config import BusConfig
async def main():
    async with Bus.connect(BusConfig(url=sys.argv[1], user=sys.argv[2], password=sys.argv[3])) as bus:
        async with bus.stream(Generate("a", max_tokens=100000)) as chunks:
            async for _ in chunks:
                print("token", flush=True)
anyio.run(main)
"""


async def test_a_killed_reader_stops_the_writer(tmp_path: Path) -> None:
    fake = Fake(delay=0.02)
    async with running({"fake": fake}, tmp_path) as bus:
        server = bus.nc.connected_url
        password = (tmp_path / "nats" / "password").read_text()
        reader = subprocess.Popen(
            [sys.executable, "-c", READER, f"nats://{server.hostname}:{server.port}", "aiirwkv", password],
            stdout=subprocess.PIPE,
        )
        assert reader.stdout
        await anyio.to_thread.run_sync(reader.stdout.readline)
        os.kill(reader.pid, signal.SIGKILL)
        reader.wait()
        before = fake.written
        await anyio.sleep(0.5)
        assert fake.written - before <= 4  # three tokens, and one that was on its way
        reader.stdout.close()


class Heavy(Fake):
    """Embeds for a long time, and counts how often it began and was stopped."""

    began: int = 0
    stopped: int = 0

    @hookimpl
    async def embed(self, request: Embed) -> Embeddings:
        self.began += 1
        try:
            await anyio.sleep(60)
        except BaseException:
            self.stopped += 1
            raise
        return Embeddings()


async def test_leaving_a_long_call_stops_the_work(tmp_path: Path) -> None:
    heavy = Heavy()
    async with running({"heavy": heavy}, tmp_path) as bus:
        with anyio.move_on_after(0.3):
            await bus.call(Embed(["a"]), timeout=300)
        with anyio.fail_after(3):  # told at the next sign of life
            while not heavy.stopped:
                await anyio.sleep(0.05)
        assert heavy.began == 1


async def test_a_long_call_notices_a_dead_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiirwkv.bus.IDLE", 1.0)
    monkeypatch.setattr("aiirwkv.worker.SILENCE", 100.0)  # as good as dead
    monkeypatch.setattr("aiirwkv.worker.GRACE", 0.1)
    async with running({"heavy": Heavy()}, tmp_path) as bus:
        with pytest.raises(StreamBroken, match="went silent"), anyio.fail_after(5):
            await bus.call(Embed(["a"]), timeout=300)
