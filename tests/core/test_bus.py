"""Requests, streams, errors and deadlines, through the bus."""

from pathlib import Path
from typing import ClassVar

import anyio
import pytest
from aiirwkv import (
    BadRequest,
    Bus,
    Busy,
    Collections,
    CollectionsReply,
    DeadlineExceeded,
    Embed,
    Generate,
    NotFound,
    NoWorker,
    Rerank,
    TooLarge,
    Tune,
    hookimpl,
)
from aiirwkv.config import Config
from aiirwkv.plugins import Registry
from aiirwkv.testing import Fake, running
from aiirwkv.worker import serving


async def test_call(bus: Bus) -> None:
    reply = await bus.call(Embed(["abba"]))
    assert reply.dim == 26 and reply.rows()[0][:3] == [2, 2, 0]
    assert (await bus.call(Embed(["abba"]), to="fake")).model == "letters"
    assert (await bus.call(Rerank("a b", ["b c", "d"]))).scores == [1, 0]


async def test_many_texts_travel_in_several_messages(bus: Bus) -> None:
    reply = await bus.call(Embed([f"{'a' * (i % 7)}" for i in range(150)]))
    assert [row[0] for row in reply.rows()] == [i % 7 for i in range(150)]


async def test_nobody_there_is_told_at_once(bus: Bus) -> None:
    with pytest.raises(NoWorker, match="nobody serves aiirwkv"), anyio.fail_after(1):
        await bus.call(Tune("x"))
    with pytest.raises(NoWorker), anyio.fail_after(1):
        async with bus.stream(Generate("x"), to="other") as chunks:
            async for _ in chunks:
                pass


async def test_half_a_character_is_refused(bus: Bus) -> None:
    for timeout in (5, 60):
        with pytest.raises(BadRequest, match="embed: a text holds half a character"):
            await bus.call(Embed(["\ud800"]), timeout=timeout)


async def test_stream(bus: Bus) -> None:
    async with bus.stream(Generate("a b c", max_tokens=5)) as chunks:
        got = [chunk async for chunk in chunks]
    assert "".join(chunk.text for chunk in got) == "a b c a b " and got[-1].finish == "length"
    whole = await bus.call(Generate("a b c", max_tokens=5))
    assert whole.text == "a b c a b " and whole.finish == "length"


async def test_leaving_the_stream_stops_the_work(tmp_path: Path) -> None:
    fake = Fake(delay=0.01)
    async with running({"fake": fake}, tmp_path) as bus:
        async with bus.stream(Generate("a", max_tokens=1000)) as chunks:
            async for _ in chunks:
                break
        before = fake.written
        await anyio.sleep(0.3)
        assert fake.written - before <= 3


async def test_deadline(tmp_path: Path) -> None:
    async with running({"fake": Fake(delay=0.5)}, tmp_path) as bus:
        with pytest.raises(DeadlineExceeded):
            await bus.call(Embed(["a"]), timeout=0.1)
        with pytest.raises(DeadlineExceeded):
            async with bus.stream(Generate("a"), timeout=0.1) as chunks:
                async for _ in chunks:
                    pass
        with pytest.raises(DeadlineExceeded, match="passed"):
            await bus.call(Embed(["a"]), timeout=0)


async def test_bad_requests_name_the_fault(bus: Bus) -> None:
    for body, complaint in [
        (b'{"textss": ["a"]}', "embed: Object contains unknown field `textss`"),
        (b'{"texts": "a"}', "embed: Expected `array`, got `str` - at `$.texts`"),
        (b"{", "embed: Input data was truncated"),
        (b"\xff\xfe", "embed: JSON is malformed"),
    ]:
        msg = await bus.nc.request("aiirwkv.embed", body)
        assert (
            msg.headers["Nats-Service-Error"].startswith(complaint) and msg.headers["Nats-Service-Error-Code"] == "400"
        )
    msg = await bus.nc.request("aiirwkv.embed", b'{"texts":[]}', headers={"Aiirwkv-Timeout": "soon"})
    assert "takes seconds" in msg.headers["Nats-Service-Error"]
    msg = await bus.nc.request("aiirwkv.embed", b'{"texts":[]}', headers={"Aiirwkv-Timeout": "-1"})
    assert msg.headers["Nats-Service-Error-Code"] == "504"
    with pytest.raises(BadRequest):
        await bus.call(Embed(["a"], kind="x"))  # type: ignore[arg-type]


async def test_what_is_too_large_is_refused_with_the_way_out(bus: Bus) -> None:
    with pytest.raises(TooLarge, match="object store"):
        await bus.call(Embed(["x" * 2_000_000]))
    msg = await bus.nc.request("aiirwkv.embed", b'{"texts": [' + b",".join([b'"abc"'] * 20000) + b"]}")
    assert msg.headers["Nats-Service-Error-Code"] == "413" and "format" in msg.headers["Nats-Service-Error"]


class Narrow(Fake):
    concurrent_requests: ClassVar[int] = 2


async def test_a_full_worker_says_so_at_once_and_patience_waits(tmp_path: Path) -> None:
    async with running({"narrow": Narrow(delay=0.5)}, tmp_path) as bus:
        busy: list[Busy] = []
        patient = bus.bound(patience=10)

        async def ask(one: Bus) -> None:
            try:
                await one.call(Embed(["a"]))
            except Busy as exc:
                busy.append(exc)

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(ask, bus)
            tasks.start_soon(ask, patient)
        assert len(busy) in (2, 3) and "aiirwkv worker narrow" in str(busy[0])


class Silent(Fake):
    """Has no collections, and complains in Chinese."""

    @hookimpl
    async def collections(self, request: Collections) -> CollectionsReply:
        if request.name:
            raise NotFound(f"there is no collection {request.name!r}")
        return CollectionsReply()


async def test_an_empty_reply_is_a_reply_and_errors_speak_any_language(tmp_path: Path) -> None:
    async with running({"silent": Silent()}, tmp_path) as bus:
        for timeout in (5, 600):  # plain, and as a stream of one
            assert (await bus.call(Collections("list"), timeout=timeout)).collections == []
            with pytest.raises(NotFound, match="there is no collection '中文库 – ü'"):
                await bus.call(Collections("list", "中文库 – ü"), timeout=timeout)


class Shy(Fake):
    def about(self) -> dict[str, object]:
        raise ValueError("no comment")


async def test_a_plugin_that_cannot_say_what_it_is_counts_as_broken(tmp_path: Path) -> None:
    broken: dict[str, str] = {}
    async with running({"fake": Fake()}, tmp_path) as bus:
        registry = Registry()
        registry.add("shy", Shy().attach(tmp_path, bus))
        registry.add("fine", Fake().attach(tmp_path, bus))
        async with serving(bus, registry, Config(), "both", broken):
            assert "no comment" in broken["shy"]
            assert {service.plugin for service in await bus.services("embed")} == {"fake", "fine"}
