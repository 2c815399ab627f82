"""What a worker tells of itself, as NATS micro services do (ADR-32): `nats micro ls`, `info`, `stats`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from nats.aio.msg import Msg

from . import __version__
from .hooks import API
from .plugins import origin_of

if TYPE_CHECKING:
    from .worker import Worker


def responder(worker: Worker, answer: Callable[[Worker], dict[str, Any]]) -> Any:
    """A subscription's callback that replies with the answer."""

    async def respond(msg: Msg) -> None:
        await msg.respond(msgspec.json.encode(answer(worker)))

    return respond


def _identity(worker: Worker, kind: str) -> dict[str, Any]:
    return {
        "type": f"io.nats.micro.v1.{kind}_response",
        "name": "aiirwkv",
        "id": worker.id,
        "version": __version__,
        "metadata": {
            "plugins": ",".join(sorted(worker.registry.plugins)),
            "process": worker.process,
            "pid": str(os.getpid()),
            "api": str(API),
            "broken": msgspec.json.encode(worker.broken).decode(),
        },
    }


def _told(tell: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a plugin says; if it fails to, why, so that the others are heard all the same."""
    try:
        return tell()
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}


def ping(worker: Worker) -> dict[str, Any]:
    """Who is there."""
    return _identity(worker, "ping")


def info(worker: Worker) -> dict[str, Any]:
    """Which hooks it serves under which subjects, and what each plugin says about itself."""
    endpoints = [
        {
            "name": endpoint.hook,
            "subject": endpoint.subjects[0],
            "queue_group": endpoint.plugin,
            "metadata": {
                "plugin": endpoint.plugin,
                "rank": str(endpoint.rank),
                "distribution": origin_of(endpoint.instance),
                "about": msgspec.json.encode(_told(endpoint.instance.about)).decode(),
            },
        }
        for endpoint in worker.endpoints
    ]
    description = "AIIRWKV: RAG in one click for RWKV"
    return _identity(worker, "info") | {"description": description, "endpoints": endpoints}


def stats(worker: Worker) -> dict[str, Any]:
    """How much each hook was used, how long it took (nanoseconds), what failed last."""
    endpoints = [
        {
            "name": endpoint.hook,
            "subject": endpoint.subjects[0],
            "queue_group": endpoint.plugin,
            "num_requests": endpoint.requests,
            "num_errors": endpoint.errors,
            "last_error": endpoint.last_error,
            "processing_time": endpoint.nanoseconds,
            "average_processing_time": endpoint.nanoseconds // max(endpoint.requests, 1),
            "data": {"active": endpoint.active, **_told(endpoint.instance.stats)},
        }
        for endpoint in worker.endpoints
    ]
    started = worker.started.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return _identity(worker, "stats") | {"started": started, "endpoints": endpoints}


ANSWERS = {"PING": ping, "INFO": info, "STATS": stats}
