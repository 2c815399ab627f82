"""Embed texts with a collection's own embedder, and notice when it is no longer the same."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from aiirwkv import Collection, Conflict, Context, Embed, Embeddings, NoWorker, ServiceError

IDENTITY = ("model", "revision", "dimension", "pooling", "normalised")
"""What an embedder says of itself that decides whether vectors can be compared."""
TIMEOUT = 300.0


def fingerprint(about: dict[str, Any]) -> str:
    """What an embedder is, as JSON."""
    return msgspec.json.encode({key: about[key] for key in IDENTITY if key in about}).decode()


async def choose(ctx: Context, embedder: str | None) -> tuple[str, str]:
    """The embedder for a new collection, the default one unless named, and its fingerprint."""
    services = await ctx.bus.services("embed")
    for service in services:
        if service.plugin == embedder or (embedder is None and service.rank >= 0):
            return service.plugin, fingerprint(service.about)
    if embedder is None:  # ask again with patience, for the error that says what to do
        await ctx.bus.about("embed")
        return await choose(ctx, embedder)
    there = ", ".join(sorted({service.plugin for service in services})) or "none"
    raise NoWorker(f"no worker runs the embedder {embedder!r} now (there: {there}); start it, or choose another one")


async def check(ctx: Context, collection: Collection) -> dict[str, Any]:
    """Refuse an embedder that is not the one that the collection was made with; what it says of itself."""
    about = await ctx.bus.about("embed", collection.embedder)
    now = fingerprint(about)
    if now != collection.fingerprint:
        raise Conflict(
            f"collection {collection.name!r} was made with {collection.embedder} {collection.fingerprint}, which is "
            f"now {now}: bring the old one back, or index the documents again into a new collection"
        )
    return about


async def embed(ctx: Context, embedder: str, texts: list[str], kind: Literal["query", "passage"]) -> bytes:
    """One vector per text, as rows of little-endian float32."""
    reply = await ctx.bus.call(Embed(texts, kind=kind, format="base64"), to=embedder, timeout=TIMEOUT)
    data = reply.data or Embeddings.pack(reply.vectors).data
    if not data or len(data) % (4 * len(texts)):
        raise ServiceError(f"{embedder} gave {len(data)} bytes of vectors for {len(texts)} texts; see its log")
    return data
