"""Log lines on standard error, and as JSON on `aiirwkv.log.<plugin>.<worker>`, where JetStream keeps the last ones."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

import msgspec
import nats.errors
from nats.js import api
from nats.js.errors import APIError

from .bus import DAY, PREFIX, Bus

STREAM = "AIIRWKV_LOGS"


def to_stderr() -> None:
    """Readable lines on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "nats", "chromadb", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


async def to_bus(bus: Bus, process: str) -> None:
    """Also on the bus from now on; the stream keeps the last 10 000 lines or 16 MB of a week."""
    with suppress(APIError, nats.errors.Error):
        await bus.nc.jetstream().add_stream(
            api.StreamConfig(
                name=STREAM,
                subjects=[f"{PREFIX}.log.>"],
                max_msgs=10_000,
                max_bytes=16 << 20,
                max_age=7 * DAY,
                discard=api.DiscardPolicy.OLD,
            )
        )
    logging.getLogger().addHandler(BusHandler(bus, process))


class BusHandler(logging.Handler):
    """Publishes records; it drops them while the bus is away, since standard error has them too."""

    def __init__(self, bus: Bus, process: str) -> None:
        super().__init__(logging.INFO)
        self._bus, self._process = bus, process
        self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("nats"):
            return
        plugin = getattr(record, "plugin", "") or record.name.partition(".")[0].removeprefix("aiirwkv_") or "core"
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "plugin": plugin,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = logging.Formatter().formatException(record.exc_info)[-20_000:]
        subject = f"{PREFIX}.log.{plugin.replace(' ', '_')}.{self._process}"
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._send, subject, msgspec.json.encode(line))

    def _send(self, subject: str, data: bytes) -> None:
        task = asyncio.ensure_future(self._bus.nc.publish(subject, data))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
