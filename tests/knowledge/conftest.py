"""A bus with real Chroma, a hash embedder, and a converter of plain text."""

import hashlib
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from aiirwkv import Anchor, BadRequest, Bus, Convert, Converted, Embed, Embeddings, Plugin, Source, hookimpl
from aiirwkv.testing import running
from aiirwkv_index_chroma import IndexChroma


class HashEmbedder(Plugin):
    """A vector of word counts, hashed into `dim` places: texts that share words are near each other."""

    dim: int = 64
    revision: str = "1"
    languages: list[str] = []
    delay: float = 0.0
    fail_after: int = -1
    batches: int = 0
    texts: int = 0

    def about(self) -> dict[str, Any]:
        about = {"model": "hash", "revision": self.revision, "dimension": self.dim, "max_tokens": 512}
        return about | {"languages": self.languages}

    @hookimpl
    async def embed(self, request: Embed) -> Embeddings:
        if request.kind == "passage":
            if self.batches == self.fail_after:
                raise BadRequest("the embedder of the test stops here")
            await anyio.sleep(self.delay)
            self.batches += 1
            self.texts += len(request.texts)
        return Embeddings.pack([self.vector(text) for text in request.texts], "hash")

    def vector(self, text: str) -> list[float]:
        row = [0.01] * self.dim
        for word in text.lower().replace(".", " ").replace("?", " ").split():
            row[int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest()) % self.dim] += 1.0
        length = math.sqrt(sum(value * value for value in row))
        return [value / length for value in row]


class TextConverter(Plugin):
    """Text files; a form feed begins a page, a line with # is a heading, "BROKEN" cannot be read."""

    large: int = 512 * 1024
    calls: int = 0

    def about(self) -> dict[str, Any]:
        return {"suffixes": [".txt", ".md", ".scan"], "media_types": ["text/plain"]}

    @hookimpl
    async def convert(self, request: Convert, ctx: Any) -> Converted:
        self.calls += 1
        text = (await ctx.bus.read(request.object)).decode()
        if "BROKEN" in text:
            raise BadRequest(f"{request.name} is broken: it says so itself")
        if request.name.endswith(".scan"):
            return Converted(text="", pages=3, scanned=3)
        anchors = []
        place = 0
        for number, page in enumerate(text.split("\f") if "\f" in text else [], 1):
            anchors.append(Anchor("page", place, place + len(page), page=number))
            place += len(page) + 1
        place = 0
        for line in text.split("\n"):
            if line.startswith("#"):
                level = len(line) - len(line.lstrip("#"))
                anchors.append(Anchor("heading", place, place + len(line), title=line[level:].strip(), level=level))
            place += len(line) + 1
        pages = text.count("\f") + 1 if "\f" in text else 0
        if len(text) > self.large:
            return Converted(object=(await ctx.bus.put(text.encode(), "text")).id, anchors=anchors, pages=pages)
        return Converted(text=text, anchors=anchors, pages=pages)


class World:
    """The plugins of a test and the bus that they serve."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.embedder = HashEmbedder()
        self.converter = TextConverter()
        self.index = IndexChroma(chunk_size=16)
        self.others: dict[str, Plugin] = {}

    def serving(self) -> AbstractAsyncContextManager[Bus]:
        plugins = {"hash": self.embedder, "text": self.converter, "index_chroma": self.index, **self.others}
        return running({name: plugin for name, plugin in plugins.items() if plugin}, self.data)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
async def bus(world: World) -> AsyncIterator[Bus]:
    async with world.serving() as bus:
        yield bus


@pytest.fixture
def file(bus: Bus) -> Callable[..., Any]:
    """Uploads text as a file: a source to index."""

    async def upload(name: str, text: str, **fields: Any) -> Source:
        return Source(object=(await bus.put(text.encode(), name)).id, **fields)

    return upload


def stored(reply: Any) -> Any:
    """A reply as another program would see it."""
    return msgspec.json.decode(msgspec.json.encode(reply))
