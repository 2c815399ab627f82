"""Search: a dense and a keyword leg, fused, with a receipt of what each found."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from difflib import get_close_matches

from aiirwkv import (
    BadRequest,
    Collection,
    Conflict,
    Considered,
    Context,
    Hit,
    Hits,
    NotFound,
    Receipt,
    Rerank,
    Search,
    ServiceError,
    Stage,
)

from . import embedding
from .catalogue import Catalogue
from .fusion import fuse
from .languages import unreadable
from .passages import Passages
from .permissions import find, readable
from .vectors import VectorIndex, in_thread
from .where import Where

MAX_TOP = 200
MAX_QUERY = 20_000
DEPTH = 100
"""Passages each leg brings to the fusion, at least; more when more are asked for."""
SHOWN = 20
"""Dropped passages that the receipt lists."""
EXCERPT = 200
RERANKED = 30
"""Passages that a reranker reads, at least."""


async def search(catalogue: Catalogue, index: VectorIndex, request: Search, ctx: Context) -> Hits:
    """Find passages in the collections that the caller may read."""
    if not 1 <= request.top <= MAX_TOP:
        raise BadRequest(f"`top` is {request.top}; it must lie between 1 and {MAX_TOP}")
    if not request.query.strip():
        raise BadRequest("the query is empty; say what to look for")
    if len(request.query) > MAX_QUERY:
        raise BadRequest(f"the query has {len(request.query)} characters; at most {MAX_QUERY} are searched for")
    where = Where.parse(request.where)
    run = _Run(catalogue, index, request, where, ctx)
    await run.choose()
    if request.mode != "keyword":
        await run.dense()
    if request.mode != "dense":
        await run.keyword()
    run.fuse()
    await run.rerank()
    return run.result()


class _Run:
    """One search on its way."""

    def __init__(self, catalogue: Catalogue, index: VectorIndex, request: Search, where: Where, ctx: Context) -> None:
        self.catalogue, self.passages, self.index = catalogue, Passages(catalogue), index
        self.request, self.where, self.ctx = request, where, ctx
        self.depth = max(DEPTH, 2 * request.top)
        self.receipt = Receipt(query=request.query)
        self.collections: list[Collection] = []
        self.labels: dict[str, str] = {}
        self.hits: dict[str, Hit] = {}
        self.legs: list[tuple[list[str], bool]] = []
        self.ranked: list[Hit] = []

    async def choose(self) -> None:
        """Which collections are searched."""
        known = await in_thread(self.catalogue.names)
        if self.request.collections:
            found = [find(known, name, self.ctx, "read") for name in self.request.collections]
        else:
            found = readable(known, self.ctx)
            if not found:
                raise NotFound("there is no collection to search yet; make one: aiirwkv index FILE --collection NAME")
        self.collections = list({collection.id: collection for collection in found}.values())
        names = [collection.name for collection in self.collections]
        self.labels = {c.id: c.name if names.count(c.name) == 1 else c.id for c in self.collections}
        self.receipt.collections = list(self.labels.values())
        for name in self.where.documents:
            await self._need_document(name)

    async def _need_document(self, name: str) -> None:
        for collection in self.collections:
            if await in_thread(self.catalogue.document, collection.id, name):
                return
        places = ", ".join(repr(label) for label in self.receipt.collections)
        names = [d.name for c in self.collections for d in (await in_thread(self.catalogue.documents, c.id))[0]]
        hint = f"; did you mean {near[0]!r}?" if (near := get_close_matches(name, names, n=1)) else ""
        raise NotFound(f"there is no document {name!r} in {places}{hint}")

    async def dense(self) -> None:
        """One ranking per embedder: cosines of different embedders say nothing about each other."""
        for identity in dict.fromkeys((c.embedder, c.fingerprint) for c in self.collections):
            group = [c for c in self.collections if (c.embedder, c.fingerprint) == identity]
            found: dict[str, float] = {}
            trusted = True
            try:
                with self._stage("embed") as stage:
                    stage.note = f"query by {group[0].embedder}"
                    vector = await embedding.embed(self.ctx, group[0].embedder, [self.request.query], "query")
                    about = await embedding.check(self.ctx, group[0])
                with self._stage("dense") as stage:
                    for collection in group:
                        found |= await self._dense(collection, vector)
                    stage.note = _passages(found)
                    if script := unreadable(self.request.query, about.get("languages", ())):
                        stage.note += f", unless words find any: {group[0].embedder} reads no {script.title()}"
                        trusted = False
            except ServiceError as exc:
                self._go_on_without(exc, stage)
            self._leg(found, trusted)

    async def _dense(self, collection: Collection, vector: bytes) -> dict[str, float]:
        hits = await self.index.search(collection.id, vector, self.depth, self.where)
        for hit in hits:
            self._note(hit, "dense")
        return {hit.chunk: hit.score for hit in hits}

    def _go_on_without(self, exc: ServiceError, stage: Stage) -> None:
        """The keyword leg can answer alone when the embedder or the vector store cannot; the receipt says so."""
        refused = isinstance(exc, Conflict) and self.request.collections
        if self.request.mode == "dense" or refused or self.ctx.remaining <= 0:
            raise exc
        stage.note = f"left out: {exc}"

    async def keyword(self) -> None:
        """One ranking by BM25 over all collections."""
        with self._stage("keyword") as stage:
            found: dict[str, float] = {}
            for collection in self.collections:
                for hit in await in_thread(
                    self.passages.by_words, collection.id, self.request.query, self.where, self.depth
                ):
                    self._note(hit, "keyword")
                    found[hit.chunk] = hit.score
            stage.note = _passages(found)
        self._leg(found)

    def _leg(self, found: dict[str, float], trusted: bool = True) -> None:
        self.legs.append((sorted(found, key=lambda id: -found[id])[: self.depth], trusted))

    def _note(self, hit: Hit, leg: str) -> None:
        known = self.hits.setdefault(hit.chunk, hit)
        known.scores[leg] = hit.score
        known.collection = self.labels.get(hit.collection, hit.collection)

    def fuse(self) -> None:
        """One ranking from the legs'."""
        with self._stage("fuse") as stage:
            trusted = [ids for ids, trusted in self.legs if ids and trusted]
            scores = fuse(trusted or [ids for ids, _ in self.legs])
            self.ranked = [self.hits[id] for id in scores]
            for hit in self.ranked:
                hit.scores["fused"] = scores[hit.chunk]
                hit.score = hit.scores["fused" if self.request.mode == "hybrid" else self.request.mode]
            stage.note = f"{_passages(self.ranked)} in one ranking"

    async def rerank(self) -> None:
        """The best passages in the order of a reranker, in one call: the one named, else the one of [use], if any."""
        plugin = self.request.rerank
        if plugin is None:
            services = await self.ctx.bus.services("rerank", fresh=60)
            plugin = next((service.plugin for service in services if service.rank == 0), "none")
        best = self.ranked[: max(RERANKED, self.request.top)]
        if plugin == "none" or not best:
            return
        with self._stage("rerank") as stage:
            try:
                asked = Rerank(self.request.query, [hit.text for hit in best])
                reply = await self.ctx.bus.call(asked, to=plugin, timeout=60)
            except ServiceError as exc:
                if self.request.rerank or self.ctx.remaining <= 0:
                    raise
                stage.note = f"left out: {exc}"
                return
            for hit, score in zip(best, reply.scores, strict=True):
                hit.score = hit.scores["rerank"] = score
            self.ranked[: len(best)] = sorted(best, key=lambda hit: -hit.score)
            stage.note = f"{_passages(best)} by {plugin}"

    def result(self) -> Hits:
        """The best, and the receipt with what was dropped."""
        kept = self.ranked[: self.request.top]
        self.receipt.considered = [
            Considered(
                hit.collection,
                hit.document,
                hit.start,
                hit.end,
                hit.scores,
                rank <= len(kept),
                f"rank {rank}" if rank <= len(kept) else f"rank {rank}, only {len(kept)} were asked for",
                hit.page,
                hit.text[:EXCERPT],
            )
            for rank, hit in enumerate(self.ranked[: len(kept) + SHOWN], 1)
        ]
        return Hits(kept, self.receipt)

    @contextmanager
    def _stage(self, name: str) -> Iterator[Stage]:
        stage = Stage(name, 0.0)
        self.receipt.stages.append(stage)
        began = time.perf_counter()
        try:
            yield stage
        finally:
            stage.seconds = time.perf_counter() - began


def _passages(found: Sized) -> str:
    return f"{len(found)} passage{'s' * (len(found) != 1)}"
