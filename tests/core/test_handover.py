"""Workers leave and come while requests flow: nothing is lost, as long as they retire in the right order."""

from pathlib import Path

import anyio
import pytest
from aiirwkv import AiirwkvError, Bus, Embed, Generate
from aiirwkv.config import Config, Use
from aiirwkv.plugins import Registry
from aiirwkv.server import embedded
from aiirwkv.testing import Fake
from aiirwkv.worker import Worker

CONFIG = Config(use=Use(embed="fake", generate="fake"))


class Careless(Worker):
    """Leaves in the wrong order: drops what runs, then its subscriptions."""

    async def run(self, *, task_status=anyio.TASK_STATUS_IGNORED):  # type: ignore[no-untyped-def]
        async with anyio.create_task_group() as self.tasks:
            await self._subscribe()
            await self.bus.nc.flush()
            task_status.started()
            await self._stopping.wait()
            await self.leave()

    async def leave(self) -> None:
        self.tasks.cancel_scope.cancel()


class Swapped(Careless):
    """Does the right things in the wrong order: the connection goes first."""

    async def leave(self) -> None:
        await self.bus.nc.drain()


async def relay(url: object, kind: type[Worker], drains: int) -> tuple[int, int]:
    """(answered, lost) while one of two workers is replaced `drains` times under load."""
    answered = lost = 0
    async with anyio.create_task_group() as tasks:

        async def start() -> anyio.Event:
            ready, leave = anyio.Event(), anyio.Event()

            async def live() -> None:
                async with Bus.connect(url) as bus, anyio.create_task_group() as own:  # type: ignore[arg-type]
                    registry = Registry()
                    registry.add("fake", Fake(delay=0.004).attach(Path(), bus))
                    worker = kind(bus, registry, CONFIG)
                    await own.start(worker.run)
                    ready.set()
                    await leave.wait()
                    worker.stop()

            tasks.start_soon(live)
            await ready.wait()
            return leave

        async with Bus.connect(url) as client:  # type: ignore[arg-type]
            over = anyio.Event()

            async def ask() -> None:
                nonlocal answered, lost
                while not over.is_set():
                    try:
                        await client.call(Embed(["a"]), timeout=3)
                        answered += 1
                    except AiirwkvError:
                        lost += 1

            async def listen() -> None:
                nonlocal answered, lost
                while not over.is_set():
                    try:
                        async with client.stream(Generate("a b", max_tokens=8), idle=3) as chunks:
                            assert len([chunk async for chunk in chunks]) == 9
                        answered += 1
                    except AiirwkvError:
                        lost += 1

            standing = [await start(), await start()]
            async with anyio.create_task_group() as load:
                for _ in range(12):
                    load.start_soon(ask)
                for _ in range(4):
                    load.start_soon(listen)
                for _ in range(drains):
                    standing.append(await start())
                    standing.pop(0).set()
                    await anyio.sleep(0.03)
                over.set()
            for leave in standing:
                leave.set()
    return answered, lost


@pytest.mark.timeout(180)
async def test_300_drains_under_load_lose_nothing(tmp_path: Path) -> None:
    async with embedded(tmp_path) as server:
        answered, lost = await relay(server, Worker, 300)
    assert lost == 0 and answered > 3000


@pytest.mark.parametrize("kind", [Careless, Swapped])
async def test_the_same_load_notices_a_wrong_order(tmp_path: Path, kind: type[Worker]) -> None:
    async with embedded(tmp_path) as server:
        _, lost = await relay(server, kind, 20)
    assert lost > 0
