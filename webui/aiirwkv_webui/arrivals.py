"""Files on their way into a collection: uploads in the browser, then index jobs on the bus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiirwkv import AiirwkvError, Job, Jobs
from nicegui import app, ui
from nicegui.events import GenericEventArguments

from .components import Row, tag, time_left

if TYPE_CHECKING:
    from aiirwkv.bus import Bus

SHOWN = 8
"""Rows at once; the others wait behind them."""
PATIENCE = 2.0
"""Seconds between two looks for a service that is not there yet."""


class Arrivals:
    """
    One row per file that is not a document yet, or never became one.

    `collection` tells which collection is looked at. `on_change` is called when rows change, `on_end` when a job ends.
    """

    def __init__(
        self, bus: Bus, collection: Callable[[], str], on_change: Callable[[], Any], on_end: Callable[[], Any]
    ) -> None:
        self._bus, self._collection, self._on_change, self._on_end = bus, collection, on_change, on_end
        self._uploads: dict[str, dict[str, Any]] = {}
        self._jobs: dict[str, Job] = {}
        self._rows: dict[str, Row] = {}
        self._begun: dict[str, float] = {}

    def build(self) -> None:
        """Lay out the empty list."""
        self._list = tag("ul", classes="files", aria_label="Files on their way", aria_live="polite")
        ui.on("upload", self._uploading)

    @property
    def busy(self) -> bool:
        """Whether files are on their way into the collection looked at."""
        uploads = any(not upload.get("error") for upload in self._mine().values())
        return uploads or any(not job.over for job in self._pending())

    @property
    def empty(self) -> bool:
        """Whether there is nothing to tell of the collection looked at."""
        return not self._mine() and not self._pending()

    async def follow(self) -> None:
        """Follow the index jobs of everybody, until cancelled."""
        while True:
            try:
                async with self._bus.follow() as jobs:
                    async for job in jobs:
                        if job.hook == "index":
                            self._heard(job)
            except AiirwkvError:
                await asyncio.sleep(PATIENCE)

    def show(self) -> None:
        """Bring the rows up to date."""
        uploads = self._mine()
        jobs = {job.id: job for job in self._pending()[: max(SHOWN - len(uploads), 1)]}
        for key in self._rows.keys() - uploads.keys() - jobs.keys():
            self._rows.pop(key).element.delete()
        with self._list:
            for key, upload in uploads.items():
                self._show_upload(self._row(key, str(upload["name"])), upload)
            for id, job in jobs.items():
                self._show_job(self._row(id, _name(job)), job)
        self._on_change()

    def _row(self, key: str, name: str) -> Row:
        if key not in self._rows:
            self._rows[key] = Row(name)
        return self._rows[key]

    # Uploads

    def _mine(self) -> dict[str, dict[str, Any]]:
        return {key: upload for key, upload in self._uploads.items() if upload["collection"] == self._collection()}

    def _uploading(self, event: GenericEventArguments) -> None:
        """The browser says how far an upload is: {key, name, collection, sent, total, error, over}."""
        upload = dict(event.args)
        if upload.get("over") and not upload.get("error"):
            self._uploads.pop(f"upload-{upload['key']}", None)
        else:
            self._uploads[f"upload-{upload['key']}"] = upload
        self.show()

    def _show_upload(self, row: Row, upload: dict[str, Any]) -> None:
        key = int(upload["key"])
        if upload.get("error"):
            again = ("Try again", lambda: ui.run_javascript(f"aiirwkv.again({key})"))
            dismiss = ("Dismiss", lambda: ui.run_javascript(f"aiirwkv.cancel({key})"))
            row.show("bad", "alert", str(upload["error"]), retry=again, close=dismiss)
        else:
            share = float(upload["sent"]) / max(float(upload["total"]), 1)
            stop = ("Cancel", lambda: ui.run_javascript(f"aiirwkv.cancel({key})"))
            row.show("busy", "upload", f"Uploading · {share:.0%}", share, close=stop)

    # Jobs

    def _pending(self) -> list[Job]:
        """Jobs of the collection that made no document; those that run come first."""
        hidden, collection = app.storage.user.get("hidden", []), self._collection()
        jobs = [job for job in self._jobs.values() if job.state != "done" and job.id not in hidden]
        jobs = [job for job in jobs if (job.request or {}).get("collection") == collection]
        return sorted(jobs, key=lambda job: (job.over, job.state == "queued", job.created))

    def _heard(self, job: Job) -> None:
        before = self._jobs.get(job.id)
        self._jobs[job.id] = job
        if job.state == "running":
            self._begun.setdefault(job.id, time.monotonic())
        if job.over and before and not before.over:
            self._on_end()
        self.show()

    def _show_job(self, row: Row, job: Job) -> None:
        cancel = ("Cancel", lambda: self._steer("cancel", job))
        retry = ("Try again", lambda: self._steer("retry", job))
        dismiss = ("Dismiss", lambda: self._hide(job))
        if job.state == "failed":
            row.show("bad", "alert", job.error, retry=retry, close=dismiss)
        elif job.state == "cancelled":
            row.show("warn", "close", "Cancelled", retry=retry, close=dismiss)
        elif job.state == "running":
            share = job.done / job.total if job.total else -1.0
            words = job.note or "Reading"
            spent = time.monotonic() - self._begun[job.id]
            if spent > 3 and 0.02 < share < 1:
                words += f" · {time_left(spent * (1 - share) / share)}"
            row.show("busy", "clock", words, share, close=cancel)
        else:
            row.show("busy", "clock", job.note or "Waiting its turn", -1.0, close=cancel)

    async def _steer(self, action: Any, job: Job) -> None:
        self._begun.pop(job.id, None)
        try:
            await self._bus.call(Jobs(action, id=job.id))
        except AiirwkvError as exc:
            self._row(job.id, _name(job)).show("bad", "alert", str(exc), close=("Dismiss", lambda: self._hide(job)))

    def _hide(self, job: Job) -> None:
        app.storage.user["hidden"] = [*app.storage.user.get("hidden", []), job.id][-500:]
        self.show()


def _name(job: Job) -> str:
    sources = (job.request or {}).get("sources") or [{}]
    name = str(sources[0].get("name") or "pasted text")
    return name if len(sources) == 1 else f"{name} and {len(sources) - 1} more"
