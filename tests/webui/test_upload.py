"""The upload route: a stream with a limit on the server's side, and names that are only data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from aiirwkv import Index, Indexed, Plugin, TooLarge, hookimpl
from aiirwkv.bus import Bus
from aiirwkv.testing import running
from aiirwkv_webui.upload import Uploads, clean_name, receive
from starlette.applications import Starlette
from starlette.routing import Route

LIMIT = 100_000


class Shelf(Plugin):
    """Takes what is to be indexed."""

    @hookimpl
    async def index(self, request: Index) -> Indexed:
        self.taken = request
        return Indexed(request.collection)


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    async with running({"shelf": Shelf()}, tmp_path) as bus:
        yield bus


@pytest.fixture
async def client(bus: Bus, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = Starlette(routes=[Route("/upload", Uploads(bus, tmp_path / "uploads", LIMIT).put, methods=["PUT"])])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        yield client


async def parts(size: int) -> AsyncIterator[bytes]:
    for start in range(0, size, 10_000):
        yield b"x" * min(10_000, size - start)


async def test_an_upload_becomes_an_object_and_a_job(client: httpx.AsyncClient, bus: Bus, tmp_path: Path) -> None:
    reply = await client.put("/upload", params={"collection": "C", "name": "a.txt"}, content=parts(50_000))
    assert reply.status_code == 200 and reply.json()["name"] == "a.txt"
    async with bus.follow(reply.json()["job"]) as jobs:
        job = [job async for job in jobs][-1]
    assert job.state == "done" and job.result["collection"] == "C"
    assert await bus.read(job.request["sources"][0]["object"]) == b"x" * 50_000
    assert not list((tmp_path / "uploads").iterdir())


async def test_above_the_limit_nothing_stays(client: httpx.AsyncClient, tmp_path: Path) -> None:
    params = {"collection": "C", "name": "a.txt"}
    said = await client.put("/upload", params=params, content=b"x" * (LIMIT + 1))
    unsaid = await client.put("/upload", params=params, content=parts(LIMIT + 1))
    for reply in (said, unsaid):
        assert reply.status_code == 413 and "upload_limit" in reply.json()["error"]
    assert not list((tmp_path / "uploads").iterdir())


async def test_the_stream_stops_at_the_limit(tmp_path: Path) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 10_000
            yield b"x" * 10_000

    with pytest.raises(TooLarge):
        await receive(endless(), tmp_path / "part", LIMIT)
    assert read <= LIMIT + 10_000 and not (tmp_path / "part").exists()


async def test_an_upload_needs_a_collection(client: httpx.AsyncClient) -> None:
    reply = await client.put("/upload", params={"name": "a.txt"}, content=b"x")
    assert reply.status_code == 400 and "collection" in reply.json()["error"]


async def test_what_a_killed_process_left_is_removed(bus: Bus, tmp_path: Path) -> None:
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "left").write_bytes(b"x")
    Uploads(bus, tmp_path / "uploads", LIMIT)
    assert not list((tmp_path / "uploads").iterdir())


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("lease 2024.pdf", "lease 2024.pdf"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\windows\\system.ini", "system.ini"),
        ("a/b\\c.txt", "c.txt"),
        ("a\x00.txt", "a.txt"),
        ("two\nlines\r.txt", "twolines.txt"),
        ("gnp\u202etxt.exe", "gnptxt.exe"),
        ("..", "document"),
        ("", "document"),
        ("/", "document"),
        ("合同（2024）.pdf", "合同（2024）.pdf"),
        ("<img src=x onerror=pwned()>.txt", "<img src=x onerror=pwned()>.txt"),
        ("x" * 500 + ".pdf", "x" * 196 + ".pdf"),
        ("y" * 500, "y" * 200),
    ],
)
def test_a_name_is_one_short_line_without_a_path(name: str, kept: str) -> None:
    assert clean_name(name) == kept
