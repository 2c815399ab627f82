"""Uploads: a streaming route of our own, because the framework's has no limit on the server's side."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import anyio
from aiirwkv import AiirwkvError, BadRequest, Index, ServiceError, Source, TooLarge
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from aiirwkv.bus import Bus

NAME_LENGTH = 200


def clean_name(name: str) -> str:
    """
    What a document may be called: one line without path separators, at most 200 characters.

    A name is data and never becomes a path; this only keeps what is shown honest and short.
    """
    name = re.split(r"[/\\]", name)[-1]
    name = re.sub(r"[\x00-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]", "", name).strip(" .")
    if len(name) > NAME_LENGTH:
        stem, dot, suffix = name.rpartition(".")
        ending = dot + suffix if stem and len(suffix) < 10 else ""
        name = name[: NAME_LENGTH - len(ending)] + ending
    return name or "document"


async def receive(body: AsyncIterator[bytes], file: Path, limit: int) -> int:
    """Write a request's body to `file` and return its size; TooLarge, and no file, above `limit` bytes."""
    size = 0
    try:
        async with await anyio.open_file(file, "xb") as out:
            async for part in body:
                size += len(part)
                if size > limit:
                    raise too_large(limit)
                await out.write(part)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return size


def too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"the file is larger than the {limit / 1e6:.0f} MB that [web] upload_limit allows; split it or raise that"
    )


class Uploads:
    """PUT /upload?collection=…&name=…: keeps the body in the object store and indexes it as a job."""

    def __init__(self, bus: Bus, folder: Path, limit: int) -> None:
        self._bus, self._folder, self._limit = bus, folder, limit
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in folder.iterdir():  # by a process that was killed
            left.unlink(missing_ok=True)

    async def put(self, request: Request) -> JSONResponse:
        """{"job": id, "name": …}, or {"error": words} with the error's code."""
        file = self._folder / uuid4().hex
        try:
            collection = request.query_params.get("collection", "")
            name = clean_name(request.query_params.get("name", ""))
            if not collection.strip():
                raise BadRequest("an upload needs `collection`: the name of the collection to read the file into")
            if int(request.headers.get("content-length", 0)) > self._limit:
                raise too_large(self._limit)
            await receive(request.stream(), file, self._limit)
            stored = await self._bus.put(file, name=name)
            job = await self._bus.submit(Index(collection, [Source(object=stored.id, name=name)]))
        except AiirwkvError as exc:
            code = exc.code if isinstance(exc, ServiceError) else 500
            return JSONResponse({"error": str(exc)}, code)
        except OSError as exc:
            return JSONResponse({"error": f"the file could not be stored: {exc.strerror}; nothing was changed"}, 507)
        except ClientDisconnect:
            return JSONResponse({"error": "the upload was broken off"}, 499)
        finally:
            file.unlink(missing_ok=True)
        return JSONResponse({"job": job.id, "name": name})
