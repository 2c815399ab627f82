"""
What the bus costs, in one run: our call against plain nats-py, and against a pyzmq ROUTER-DEALER proxy.

Round trips of a small request, one and sixteen at a time; then the embedding of 32 texts over the bus against the same
call in the same process. Run it on a quiet machine: python bench/bus.py [--seconds 3] [--no-embed]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import nats
import zmq
import zmq.asyncio
from aiirwkv import Bus, Embed, Embeddings, Plugin, hookimpl
from aiirwkv.config import BusConfig, Config, Use
from aiirwkv.plugins import Registry, load
from aiirwkv.server import embedded
from aiirwkv.worker import serving

BODY = msgspec.json.encode(Embed(["hello"]))
REPLY = msgspec.json.encode(Embeddings(2, [[1.0, 2.0]]))


class Instant(Plugin):
    """Answers at once, so that only the way there and back is measured."""

    @hookimpl
    async def embed(self, request: Embed) -> Embeddings:
        return Embeddings(2, [[1.0, 2.0]])


async def serve_ours(config: BusConfig, ready: object) -> None:
    async with Bus.connect(config) as bus:
        registry = Registry()
        registry.add("instant", Instant().attach(Path(), bus))
        async with serving(bus, registry, Config(use=Use(embed="instant")), "bench"):
            ready.set()  # type: ignore[attr-defined]
            await anyio.sleep_forever()


async def serve_plain(config: BusConfig, ready: object) -> None:
    nc = await nats.connect(config.url, user=config.user, password=config.password)

    async def answer(msg: object) -> None:
        msgspec.json.decode(msg.data, type=Embed)  # type: ignore[attr-defined]
        await nc.publish(msg.reply, REPLY)  # type: ignore[attr-defined]

    await nc.subscribe("plain", cb=answer)
    await nc.flush()
    ready.set()  # type: ignore[attr-defined]
    await asyncio.sleep(3600)


async def serve_zmq(config: BusConfig, ready: object) -> None:
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.connect("tcp://127.0.0.1:17782")
    ready.set()  # type: ignore[attr-defined]
    while True:
        *route, body = await socket.recv_multipart()
        msgspec.json.decode(body, type=Embed)
        await socket.send_multipart([*route, REPLY])


def zmq_proxy(ready: object) -> None:
    context = zmq.Context.instance()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    front.bind("tcp://127.0.0.1:17781")
    back.bind("tcp://127.0.0.1:17782")
    ready.set()  # type: ignore[attr-defined]
    zmq.proxy(front, back)


def run(serve: Callable[..., Awaitable[None]], config: BusConfig, ready: object) -> None:
    anyio.run(serve, config, ready, backend_options={"use_uvloop": serve is serve_ours})  # as worker processes do


@asynccontextmanager
async def process(target: Callable[..., object], *arguments: object) -> AsyncIterator[None]:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    child = context.Process(target=target, args=(*arguments, ready), daemon=True)
    child.start()
    if not await anyio.to_thread.run_sync(ready.wait, 30):
        raise RuntimeError("a server of the benchmark did not start")
    try:
        yield
    finally:
        child.kill()
        child.join()


async def rounds(ask: Callable[[], Awaitable[object]], seconds: float) -> tuple[list[float], float]:
    """Sorted times of single round trips, and requests per second with sixteen in flight."""
    for _ in range(200):
        await ask()
    times = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        await ask()
        times.append(time.perf_counter() - began)
    count = 0
    end = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await ask()
            count += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(16):
            tasks.start_soon(client)
    return sorted(times), count / seconds


class ZmqClient:
    """Requests over a DEALER socket, matched to their replies by number."""

    def __init__(self) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.connect("tcp://127.0.0.1:17781")
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._number = 0
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            number, body = await self._socket.recv_multipart()
            self._waiting.pop(number).set_result(body)

    async def ask(self) -> object:
        self._number += 1
        number = self._number.to_bytes(8, "big")
        self._waiting[number] = asyncio.get_running_loop().create_future()
        reply = self._waiting[number]
        await self._socket.send_multipart([number, BODY])
        return msgspec.json.decode(await reply, type=Embeddings)


async def transports(config: BusConfig, seconds: float) -> None:
    rows: dict[str, tuple[list[float], float]] = {}
    async with process(run, serve_plain, config):
        nc = await nats.connect(config.url, user=config.user, password=config.password)

        async def ask_plain() -> object:
            return msgspec.json.decode((await nc.request("plain", BODY, 5)).data, type=Embeddings)

        rows["nats-py, plain subscribe"] = await rounds(ask_plain, seconds)
        await nc.close()
    async with process(run, serve_ours, config), Bus.connect(config) as bus:
        request = Embed(["hello"])
        rows["AIIRWKV bus"] = await rounds(lambda: bus.call(request), seconds)
    async with process(zmq_proxy), process(run, serve_zmq, config):
        rows["pyzmq ROUTER-DEALER proxy, asyncio"] = await rounds(ZmqClient().ask, seconds)
    base_times, base_rate = rows["nats-py, plain subscribe"]
    print(f"{'round trip':36} {'p50 µs':>8} {'ratio':>6} {'p99 µs':>8} {'ratio':>6} {'req/s @16':>10} {'ratio':>6}")
    for name, (times, rate) in rows.items():
        p50, p99 = (times[int(len(times) * q)] for q in (0.5, 0.99))
        base50, base99 = (base_times[int(len(base_times) * q)] for q in (0.5, 0.99))
        print(f"{name:36} {p50 * 1e6:8.0f} {p50 / base50:6.2f} {p99 * 1e6:8.0f} {p99 / base99:6.2f} "
              f"{rate:10.0f} {rate / base_rate:6.2f}")  # fmt: skip


async def serve_embedder(config: BusConfig, ready: object) -> None:
    async with Bus.connect(config) as bus:
        registry = Registry()
        registry.add("embed_minilm", load("embed_minilm", {}).attach(Path(), bus))
        async with serving(bus, registry, Config(), "bench"):
            ready.set()  # type: ignore[attr-defined]
            await anyio.sleep_forever()


async def embedding(config: BusConfig, data: Path, repeats: int = 15) -> None:
    """Alternate, so that both legs see the same machine."""
    texts = [
        f"Passage {i}: the northern depot keeps {i * 7} spare wheels beside the second gate. " * 6 for i in range(32)
    ]
    request = Embed(texts)
    plugin = load("embed_minilm", {}).attach(data)
    async with plugin, process(run, serve_embedder, config), Bus.connect(config) as bus:
        here, over = [], []
        for turn in range(repeats + 2):
            began = time.perf_counter()
            await plugin.embed(request)  # type: ignore[attr-defined]
            middle = time.perf_counter()
            await bus.call(request, timeout=120)
            if turn >= 2:
                here.append(middle - began)
                over.append(time.perf_counter() - middle)
    print(f"\n{'embed 32 texts (MiniLM)':36} {'median ms':>10} {'best ms':>8}")
    print(f"{'in process':36} {statistics.median(here) * 1e3:10.1f} {min(here) * 1e3:8.1f}")
    print(f"{'over the bus':36} {statistics.median(over) * 1e3:10.1f} {min(over) * 1e3:8.1f}")
    ratios = sorted(b / a for a, b in zip(here, over, strict=True))
    print(f"{'ratio':36} {statistics.median(ratios):10.3f} {min(over) / min(here):8.3f}   (target 1.05)")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--no-embed", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        async with embedded(Path(folder)) as config:
            await transports(config, options.seconds)
            if not options.no_embed:
                await embedding(config, Path(folder))


if __name__ == "__main__":
    anyio.run(main)
