"""The shelf beside the conversation: collections, their documents, and a place to drop files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from aiirwkv import AiirwkvError, Collection, Collections, Document, Index, Source
from nicegui import app, ui

from .arrivals import PATIENCE, Arrivals
from .components import Row, button, count, error, icon, tag

if TYPE_CHECKING:
    from aiirwkv.bus import Bus

FIRST = "My documents"
"""The collection that a first file goes to."""
SAMPLE, SAMPLE_FILE = "Sample handbook", "lantern-house-handbook.txt"
SHOWN = 200
"""Documents listed at once."""
TOGETHER = 0.3
"""Seconds to wait for more jobs that end, before looking once for all of them."""


class Library:
    """What the reader owns. `on_change` is called when something here changes, `on_open` opens a document."""

    def __init__(self, bus: Bus, on_change: Callable[[], Any], on_open: Callable[[Document], Any]) -> None:
        self._bus, self._on_change, self._on_open = bus, on_change, on_open
        self.name = ""
        """The chosen collection; empty if there is none."""
        self.collections: list[Collection] = []
        self.documents: list[Document] = []
        self.loaded = False
        self._naming = False
        self._trouble = ""
        self._stale = asyncio.Event()
        self.arrivals = Arrivals(bus, lambda: self.name or FIRST, on_change, self._stale.set)

    @property
    def current(self) -> Collection | None:
        return next((collection for collection in self.collections if collection.name == self.name), None)

    def build(self) -> None:
        """Lay out the shelf; `live` then fills it."""
        with tag("section", classes="library", id="library", aria_label="Documents"):
            with tag("header", classes="brand"):
                tag("img", classes="mark", src="/static/icon.svg", alt="")
                tag("span", "AIIRWKV", "wordmark")
            self._shelf()
            self._zone = tag("div", classes="drop")
            with self._zone:
                button("Add files", "() => aiirwkv.pick()", symbol="upload")
                tag("span", "or drop them here", "hint wide")
            self.arrivals.build()
            self._listed()

    async def live(self) -> None:
        """Keep what is shown true, until cancelled."""
        self._point_at(str(app.storage.user.get("collection", "")))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.arrivals.follow())
            while True:
                await self.refresh()
                try:
                    await asyncio.wait_for(self._stale.wait(), None if self.loaded and not self._trouble else PATIENCE)
                    await asyncio.sleep(TOGETHER)
                except TimeoutError:
                    pass
                self._stale.clear()

    async def choose(self, name: str) -> None:
        """Look at another collection; it need not exist yet."""
        app.storage.user["collection"] = name
        self._point_at(name)
        self.documents = []
        await self.refresh()
        self.arrivals.show()

    async def refresh(self) -> None:
        """Ask again what there is; what cannot be had now is said on the shelf."""
        try:
            self.collections = (await self._bus.call(Collections("list"))).collections
            if not self.current and self.collections and self.arrivals.empty:
                self._point_at(self.collections[0].name)
            if self.current:
                listed = await self._bus.call(Collections("documents", name=self.name))
                self.documents = sorted(listed.documents, key=lambda document: -document.created)
            self.loaded, self._trouble = True, ""
        except AiirwkvError as exc:
            self._trouble = str(exc)
        self._shelf.refresh()
        self._listed.refresh()
        self._on_change()

    async def sample(self) -> None:
        """Read the sample handbook."""
        text = (files(__package__) / "samples" / SAMPLE_FILE).read_text(encoding="utf-8")
        try:
            await self._bus.submit(Index(SAMPLE, [Source(text=text, name=SAMPLE_FILE, media_type="text/plain")]))
        except AiirwkvError as exc:
            self._trouble = str(exc)
            self._shelf.refresh()
        else:
            await self.choose(SAMPLE)

    def _point_at(self, name: str) -> None:
        self.name = name
        self._zone.props["data-collection"] = name or FIRST

    # The shelf

    @ui.refreshable_method
    def _shelf(self) -> None:
        """The collections."""
        with tag("nav", classes="shelf", aria_label="Collections"):
            if self._trouble:
                error(self._trouble)
            for collection in self.collections:
                self._entry(collection)
            if self._naming or self.loaded:
                with tag("div", classes="foot"):  # stays in view below many collections
                    if self._naming:
                        self._name_field()
                    else:
                        button("New collection", lambda: self._name_new(True), symbol="plus", kind="plain")

    def _entry(self, collection: Collection) -> None:
        chosen = collection.name == self.name
        entry = tag("button", classes="entry" + (" chosen" if chosen else ""), type="button")
        if chosen:
            entry.props["aria-current"] = "true"
        with entry:
            icon("folder")
            tag("span", collection.name, "name", title=collection.name)
            tag("span", str(collection.documents), "hint number", aria_label=count(collection.documents, "document"))
        entry.on("click", lambda: self.choose(collection.name), args=[])

    def _name_field(self) -> None:
        field = ui.input(placeholder="Name, then Enter").classes("field").props("borderless dense autofocus")
        field.props["aria-label"] = "Name of the new collection"
        field.on("keydown.enter", lambda: self._create(field.value), args=[])
        field.on("keydown.escape", lambda: self._name_new(False), args=[])
        field.on("blur", lambda: self._name_new(bool(field.value.strip())), args=[])
        self._refusal = tag("div")

    def _name_new(self, naming: bool) -> None:
        self._naming = naming
        self._shelf.refresh()

    async def _create(self, name: str) -> None:
        if not (name := name.strip()):
            return
        try:
            await self._bus.call(Collections("create", name=name))
        except AiirwkvError as exc:
            self._refusal.clear()
            with self._refusal:
                error(str(exc))
        else:
            self._naming = False
            await self.choose(name)

    # Its documents

    @ui.refreshable_method
    def _listed(self) -> None:
        """The documents of the chosen collection."""
        with tag("ul", classes="files documents", aria_label="Documents of the collection"):
            for document in self.documents[:SHOWN]:
                self._document(document)
            if len(self.documents) > SHOWN:
                tag("li", f"and {count(len(self.documents) - SHOWN, 'document')} more", "hint more")

    def _document(self, document: Document) -> None:
        row = Row(document.name, (lambda: self._on_open(document)) if document.characters else None)
        remove = (f"Delete {document.name}", lambda: self._delete(document))
        if document.state in ("ready", "unchanged"):
            row.show("good", "check", f"ready · {count(document.chunks, 'chunk')}", trash=remove)
        elif document.state == "needs_ocr":
            row.show("warn", "alert", document.reason or "needs OCR: its pages are images", trash=remove)
        else:
            row.show("bad", "alert", document.reason or "could not be read", trash=remove)

    async def _delete(self, document: Document) -> None:
        with ui.dialog() as dialog, tag("div", classes="card"):
            tag("p", f"Delete {document.name} and its {count(document.chunks, 'chunk')}?", "question")
            tag("p", "It leaves this collection. The file on your disk stays.", "hint")
            with tag("div", classes="choices"):
                button("Keep", dialog.close)
                button("Delete", lambda: dialog.submit(True), symbol="trash", kind="bad")
        if await dialog:
            try:
                await self._bus.call(Collections("delete", name=self.name, document=document.id))
            except AiirwkvError as exc:
                self._trouble = str(exc)
            await self.refresh()
        dialog.delete()
