"""A reader that goes away stops the writer: by leaving the block, and by a killed socket."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
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
