"""What our connection does better than the client it is made of."""

import asyncio
from pathlib import Path

import msgspec
from aiirwkv.connection import connection
from aiirwkv.server import embedded


async def test_a_flush_comes_after_what_was_said_before(tmp_path: Path) -> None:
    """On the wire: SUB, and only then the PING whose PONG says that it has arrived."""
    said = bytearray()
    async with embedded(tmp_path) as config:
        host, port = (config.url or "").removeprefix("nats://").split(":")

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection(host, int(port))

            async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter, keep: bool) -> None:
                while data := await source.read(65536):
                    said.extend(data if keep else b"")
                    sink.write(data)
                sink.close()

            await asyncio.gather(copy(reader, back, True), copy(there, writer, False))

        proxy = await asyncio.start_server(relay, "127.0.0.1", 0)
        url = f"nats://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        async with connection(msgspec.structs.replace(config, url=url), "test") as nc:
            for number in range(20):
                said.clear()
                await nc.subscribe(f"somewhere.{number}")
                await nc.flush()
                assert said.index(b"SUB somewhere") < said.index(b"PING"), bytes(said)
        proxy.close()
