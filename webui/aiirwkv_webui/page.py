"""The page: a shelf, a conversation, and a source beside it."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import TYPE_CHECKING

from aiirwkv import AiirwkvError, Citation, Document, Models
from nicegui import Client, app, background_tasks, ui

from .arrivals import PATIENCE
from .components import button, count, tag
from .conversation import Composer, TurnView
from .library import SAMPLE, Library
from .source import SourcePane
from .talk import Talk

if TYPE_CHECKING:
    from aiirwkv.bus import Bus
    from aiirwkv.config import Web

SAMPLE_QUESTIONS = ["When does breakfast start?", "What is the Wi-Fi password?", "How much does a bicycle cost?"]
STYLES = ("tokens", "base", "library", "conversation", "receipt", "source", "narrow")
VERSION = version("aiirwkv-webui")
HEAD = "".join(f'<link rel="stylesheet" href="/static/{name}.css?{VERSION}">' for name in STYLES)
HEAD += f'<script src="/static/app.js?{VERSION}"></script>'
DEMONSTRATION = "Built-in demonstration model, for short questions in English · a real one is set in config.toml"


async def page(bus: Bus, web: Web) -> None:
    """Build the page for one browser tab, and keep it true until the tab is gone."""
    ui.add_head_html(HEAD)
    client = ui.context.client
    room = Room(bus, web)
    room.build()
    await client.connected()
    if client.is_deleted:  # it never came
        return
    life = background_tasks.create(room.live(client))
    client.on_delete(lambda: life.cancel())


class Room:
    """What one browser tab shows."""

    def __init__(self, bus: Bus, web: Web) -> None:
        self._bus, self._limit = bus, web.upload_limit
        self._talk = Talk()
        self._source = SourcePane(bus)
        self._library = Library(bus, self._changed, self._read)
        self._composer = Composer(self._ask, lambda: self._talk.stop())
        self._views: list[TurnView] = []
        self._shown: tuple[object, ...] = ()

    def build(self) -> None:
        """Lay it out."""
        with tag("div", classes="room", data_limit=str(self._limit)):
            self._library.build()
            with tag("section", classes="conversation", aria_label="Conversation"):
                with tag("header", classes="title"):
                    self._title = tag("h1", "")
                    self._facts = tag("span", "", "hint number")
                    self._fresh = button("New chat", self._new, symbol="plus")
                with tag("div", classes="scroll", id="scroll", tabindex="-1"):
                    self._turns = tag("div", classes="turns")
                with tag("div", classes="foot"):
                    self._composer.build()
                    self._model = tag("p", "", "hint")
            self._source.build()
            with tag("nav", classes="tabs", aria_label="Pages"):
                button("Chat", "() => aiirwkv.show('chat')", symbol="chat", kind="plain")
                button("Documents", "() => aiirwkv.show('library')", symbol="folder", kind="plain")

    async def live(self, client: Client) -> None:
        """Fill the page and keep it true, until cancelled."""
        with client:
            self._talk = app.storage.tab.setdefault("talk", self._talk)
            self._composer.keep(app.storage.tab)
            self._talk.join()
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._library.live())
                    tasks.create_task(self._name_model())
                    self._changed()
                    if self._talk.busy:
                        await self._follow(self._views[-1])
            finally:
                self._talk.leave()

    # Asking

    async def _ask(self, question: str) -> None:
        self._composer.text.value = ""
        self._talk.ask(self._bus, question, [self._library.name] if self._library.name else [])
        self._changed()
        ui.run_javascript("aiirwkv.toEnd()")
        await self._follow(self._views[-1])

    async def _again(self, view: TurnView) -> None:
        if not self._talk.busy:
            self._talk.start(self._bus, view.turn)
            await self._follow(view)

    async def _follow(self, view: TurnView) -> None:
        self._composer.busy(True)
        await view.follow()
        if not self._turns.is_deleted:
            self._composer.busy(False)

    def _new(self) -> None:
        self._talk.stop()
        self._talk.turns.clear()
        self._source.close()
        self._changed()

    async def _read(self, document: Document) -> None:
        await self._source.open(Citation(0, document.name, None, 0, 0, "", self._library.name, document.id))

    # What the page says

    def _changed(self) -> None:
        """Say again what is chosen, what was said, and what to do next."""
        library, turns = self._library, self._talk.turns
        current = library.current
        self._title.text = library.name
        self._facts.text = (
            f"{count(current.documents, 'document')} · {count(current.chunks, 'chunk')}" if current else ""
        )
        self._fresh.set_visibility(bool(turns))
        self._composer.chip.text = library.name
        self._composer.chip.set_visibility(bool(library.name))
        ready = bool(current and current.documents)
        state = (True,) if turns else (False, library.loaded, library.name, ready, library.arrivals.busy)
        if state != self._shown:
            self._shown = state
            self._views.clear()
            self._turns.clear()
            if not turns and library.loaded:
                with self._turns:
                    self._invite(ready)
        with self._turns:
            for turn in turns[len(self._views) :]:
                self._views.append(TurnView(turn, self._source.open, self._again))

    def _invite(self, ready: bool) -> None:
        """One thing to do."""
        with tag("div", classes="empty") as empty:
            if ready:
                tag("p", "What would you like to know?", "lead")
                if self._library.name == SAMPLE:
                    with tag("div", classes="choices"):
                        for question in SAMPLE_QUESTIONS:
                            button(question, lambda question=question: self._ask(question))
                else:
                    tag("p", "Answers come from this collection only, with the words they rest on.", "hint")
            elif self._library.arrivals.busy:
                tag("p", "Reading your files", "lead")
                tag("p", "You can ask as soon as the first one is ready.", "hint")
            else:
                empty.classes("droppable")
                tag("p", "Drop a file here", "lead")
                tag("p", "Text, Markdown, HTML, PDF or Word. It stays on this machine.", "hint")
                with tag("div", classes="choices"):
                    button("Choose files", "() => aiirwkv.pick()", symbol="upload", kind="primary")
                    button("Try the sample handbook", self._library.sample)

    async def _name_model(self) -> None:
        """The quiet line under the composer."""
        while True:
            try:
                models = (await self._bus.call(Models())).models
            except AiirwkvError:
                await asyncio.sleep(PATIENCE)
                continue
            if any(model.default and model.demonstration for model in models):
                self._model.text = DEMONSTRATION
            return
