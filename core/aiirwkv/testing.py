"""
For tests of plugins: a real bus with the plugins under test, and the fake plugin.

Installed as a pytest plugin: a test asks for `running` or for `bus`, and anyio's tests run on asyncio.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .config import FOLLOWS, Config, Use
from .hooks import Plugin, hookimpl
from .types import Chunk, Embed, Embeddings, Generate, Rerank, Scores

if TYPE_CHECKING:
    from .bus import Bus


class Fake(Plugin):
    """Letter-count vectors, an echoing language model, word overlap as a score; each after a short delay."""

    delay: float = 0.001
    dim: int = 26

    @hookimpl
    async def embed(self, request: Embed) -> Embeddings:
        import anyio

        await anyio.sleep(self.delay)
        rows = [[float(text.lower().count(chr(97 + i))) for i in range(self.dim)] for text in request.texts]
        return Embeddings.pack(rows, "letters")

    @hookimpl
    async def rerank(self, request: Rerank) -> Scores:
        words = set(request.query.lower().split())
        return Scores([float(len(words & set(text.lower().split()))) for text in request.texts], "overlap")

    @hookimpl
    async def generate(self, request: Generate) -> AsyncIterator[Chunk]:
        import anyio

        limit = request.max_tokens or 16
        words = request.prompt.split() or ["nothing"]
        for i in range(limit):
            await anyio.sleep(self.delay)
            self.written = getattr(self, "written", 0) + 1
            yield Chunk(words[i % len(words)] + " ")
        yield Chunk(finish="length")


@asynccontextmanager
async def running(
    plugins: Mapping[str, Plugin], data: Path, config: Config | None = None, process: str = "test"
) -> AsyncIterator[Bus]:
    """A nats-server and one worker in this process with the given plugins, each serving all that it can."""
    from .bus import Bus
    from .plugins import Registry
    from .server import embedded
    from .worker import serving

    async with embedded(data / "nats") as server, Bus.connect(server) as own, Bus.connect(server) as bus:
        registry = Registry()
        for name, plugin in plugins.items():
            registry.add(name, plugin.attach(data, own))
        if config is None:
            config = Config(use=_use(registry))
            config.bus.ack_wait = 2.0
        async with serving(own, registry, config, process):
            yield bus


def _use(registry: object) -> Use:
    from .plugins import Registry

    assert isinstance(registry, Registry)
    use = Use()
    for hook in use.__struct_fields__:
        together = [hook, *(other for other, first in FOLLOWS.items() if first == hook)]
        setattr(use, hook, list(dict.fromkeys(name for one in together for name in registry.providers(one))))
    return use


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    """A bus that the fake plugin serves."""
    async with running({"fake": Fake()}, tmp_path) as bus:
        yield bus


__all__ = ["Fake", "anyio_backend", "bus", "running"]
