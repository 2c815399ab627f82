"""Worker processes come and go while a system serves: what is asked meanwhile is answered."""

import os
import signal
import subprocess

import anyio
from aiirwkv import Bus, Embed

from tests.conftest import Up, command


async def test_a_worker_process_that_is_told_to_end_finishes_what_runs(up: Up) -> None:
    async with Bus.connect(up.bus) as bus:
        lost: list[Exception] = []
        answered = 0
        over = anyio.Event()

        async def ask() -> None:
            nonlocal answered
            while not over.is_set():
                try:
                    await bus.call(Embed(["a short sentence"] * 8), timeout=20)
                    answered += 1
                except Exception as exc:
                    lost.append(exc)

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(ask)
            for _ in range(3):
                before = {service.worker for service in await bus.services("embed")}
                second = subprocess.Popen(command(up.data, "worker", "embed_minilm", "--process", "second"),
                                          stderr=subprocess.DEVNULL)  # fmt: skip
                with anyio.fail_after(30):
                    while not {service.worker for service in await bus.services("embed")} - before:
                        await anyio.sleep(0.1)
                await anyio.sleep(0.3)
                os.kill(second.pid, signal.SIGTERM)
                assert await anyio.to_thread.run_sync(second.wait, 30) == 0
            over.set()
        assert not lost and answered > 20
