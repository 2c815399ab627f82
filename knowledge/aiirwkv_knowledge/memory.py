"""Has a language model read documents once and for all, and drop what it keeps of them when it is no longer needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio
from aiirwkv import (
    Collection,
    Conflict,
    Context,
    Document,
    NotFound,
    NoWorker,
    ServiceError,
    States,
    StatesReply,
)

from .catalogue import Catalogue
from .remembered import NOT_READ, Portion, Remembered, Task
from .vectors import in_thread

if TYPE_CHECKING:
    from aiirwkv import Bus

log = logging.getLogger(__name__)

AT_ONCE = 8
"""Passages that the model reads at a time, in one batch."""
TIMEOUT = 3600.0
"""Seconds that reading one text may take."""
BATCH = 100
RETRY = 60.0

Say = Callable[[str], object]
"""Tell how far it is."""


class Memory:
    """
    `bus` gives the plugin's own: what nobody needs any more is dropped with the owner's rights, whoever had it read.
    """

    def __init__(self, catalogue: Catalogue, bus: Callable[[], Bus]) -> None:
        self._remembered, self._bus = Remembered(catalogue), bus
        self._work = anyio.Event()
        self._work.set()
        self._reading = 0

    async def heed(
        self, collection: Collection, document: Document, wish: bool | None, ctx: Context, say: Say
    ) -> Document:
        """After a document was indexed: have it read or forgotten, as is wished now, or is set for it."""
        if document.state not in ("ready", "unchanged"):
            return document
        if wish is not None:
            await in_thread(self._remembered.wish, document.id, wish)
        found = await in_thread(self._remembered.wished, document.id)
        now: Document | None = document
        if found.wanted and (wish or not document.read):
            now = await self.read(collection, document, ctx, say)
        elif found.kept and not found.wanted:
            now = await in_thread(self._remembered.forget, found.number)
            self.sweep_soon()
        if now:
            document.read, document.reason = now.read, now.reason
        return document

    async def read(self, collection: Collection, document: Document, ctx: Context, say: Say) -> Document | None:
        """
        Have the model read a document; what it has read already costs nothing. None: it was deleted meanwhile.

        Without a model, or when it fails, the document says why it is not read, in `reason`.
        """
        self._reading += 1
        number = 0
        try:
            number = (await in_thread(self._remembered.wished, document.id)).number
            task = await in_thread(self._remembered.task, document.id, await _limit(ctx))
            if task is None:
                return None
            number = task.number
            await self._read(collection, task, ctx, say)
            return await in_thread(self._remembered.done, task)
        except ServiceError as exc:
            if ctx.remaining <= 0:
                raise
            log.warning("%s in %s is not read by the model: %s", document.name, collection.name, exc)
            if document.read:  # what was read earlier still is
                return await in_thread(self._remembered.note, number, document.read, str(exc))
            return await in_thread(self._remembered.forget, number, str(exc))
        finally:
            self._reading -= 1
            self.sweep_soon()

    async def _read(self, collection: Collection, task: Task, ctx: Context, say: Say) -> None:
        """The first portion by itself, to learn how large a state is; then several at a time."""
        after, room = -1, 1
        while portions := await in_thread(self._remembered.portions, task, after, room):
            replies = await self._read_portions(collection, task, portions, ctx, say)
            if after < 0:
                needed, budget = replies[0].states[0].bytes * task.total, replies[0].cache.disk_budget
                if 0 < budget < needed:
                    raise Conflict(
                        f"the states of its {task.total} passages would have {needed >> 20} MB, and the model's worker "
                        f"may keep {budget >> 20} MB on disk"
                    )
            after, room = portions[-1].position, AT_ONCE

    async def _read_portions(
        self, collection: Collection, task: Task, portions: Sequence[Portion], ctx: Context, say: Say
    ) -> list[StatesReply]:
        """At the same time. When one fails, the others still tell what they have kept."""
        replies: list[StatesReply] = []
        failed: list[ServiceError] = []

        async def read(portion: Portion) -> None:
            try:
                replies.append(await self._read_portion(collection, task, portion, ctx, say))
            except ServiceError as exc:
                failed.append(exc)

        async with anyio.create_task_group() as tasks:
            for portion in portions:
                tasks.start_soon(read, portion)
        if failed:
            raise failed[0]
        return replies

    async def _read_portion(
        self, collection: Collection, task: Task, portion: Portion, ctx: Context, say: Say
    ) -> StatesReply:
        say(f"the model reads {portion.label}")
        asked = States("read", documents=[portion.text], label=f"{collection.name} / {portion.label}")
        reply = await ctx.bus.call(asked, timeout=TIMEOUT)
        if not reply.states:
            raise ServiceError("the model kept nothing of it; see its worker's log")
        if not await in_thread(self._remembered.keep, task.number, portion.chunk, reply.states[0].id):
            raise NotFound("it was deleted or replaced while it was being read")
        return reply

    async def switch(self, collection: Collection, on: bool, ctx: Context) -> tuple[int, list[str]]:
        """Set a collection with all in it; how many documents are read now, and why others are not."""
        documents = await in_thread(self._remembered.switch, collection.id, on)
        done, problems = 0, []
        for place, (number, document) in enumerate(documents):
            if not on:
                await in_thread(self._remembered.forget, number)
            elif now := await self.read(collection, document, ctx, partial(ctx.progress, place, len(documents))):
                done += now.read is not None
                problems += [f"{now.name}: {now.reason}"] if NOT_READ in now.reason else []
        ctx.progress(len(documents), len(documents))
        self.sweep_soon()
        return done, problems

    async def changed(self, collection: Collection, chunk: str, ctx: Context) -> None:
        """After a chunk was edited: what is kept of it, or of the whole document with it, no longer holds."""
        task = await in_thread(self._remembered.changed, chunk)
        if task is None or task.chunk is None:
            return
        if task.reading == "whole":
            reason = "one of its chunks was changed by hand; have it read again, passage by passage"
            await in_thread(self._remembered.forget, task.number, reason)
        else:
            await in_thread(self._remembered.forget_chunk, task.number, task.chunk)
            try:
                await self._read(collection, task, ctx, lambda note: None)
            except ServiceError as exc:
                await in_thread(self._remembered.note, task.number, task.reading, f"a changed chunk: {exc}")
        self.sweep_soon()

    # In the background

    def sweep_soon(self) -> None:
        """Have the model drop what is not needed."""
        self._work.set()

    async def maintain(self) -> None:
        """Runs as long as the plugin. While something is read nothing is dropped: it may be the same text."""
        while True:
            await self._work.wait()
            self._work = anyio.Event()
            try:
                await self._sweep()
            except ServiceError as exc:
                log.info("kept states that nobody needs wait to be dropped: %s", exc)
                with anyio.move_on_after(RETRY):
                    await self._work.wait()
                self.sweep_soon()

    async def _sweep(self) -> None:
        while not self._reading and (states := await in_thread(self._remembered.unneeded, BATCH)):
            for state in states:
                with suppress(NotFound):  # dropped before, to make room
                    await self._bus().call(States("drop", id=state))
                await in_thread(self._remembered.dropped, [state])


async def _limit(ctx: Context) -> int:
    """How many tokens the model reads well (0: not known). Says at once when there is no model."""
    for fresh in (10, 0):  # who has just come may not be known yet
        for service in await ctx.bus.services("states", fresh=fresh):
            if service.rank == 0:
                return int((service.about.get("limits") or {}).get("tokens", 0))
    raise NoWorker("nobody serves `states` now; start a worker of a model, then have it read again")
