"""How a conversation looks: the questions, the answers as they come, the composer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, MutableMapping
from typing import Any

from aiirwkv import Answer, Citation
from nicegui import ui
from nicegui.element import Element
from nicegui.events import GenericEventArguments

from .components import button, error, icon, tag
from .receipt import receipt
from .sanitise import markdown, paragraphs
from .talk import Turn

TICK = 0.1
"""Seconds between two updates of a streaming answer."""
LONGEST = 20_000
"""Characters a question may have."""
ANY = range(1, 100)
"""The citations of an answer that is still on its way."""


class TurnView:
    """
    The question as a quiet line, the answer set like text, and what it rests on.

    `on_cite` opens a source, `on_again` asks the question once more.
    """

    def __init__(self, turn: Turn, on_cite: Callable[[Citation], Any], on_again: Callable[[TurnView], Any]) -> None:
        self.turn, self._on_cite, self._on_again = turn, on_cite, on_again
        with tag("article", classes="turn"):
            tag("h2", turn.question, "asked")
            self._stages = tag("ol", classes="waiting", aria_label="What is happening")
            self._body = tag("div", classes="answer prose")
            self._body.on(
                "click",
                lambda event: self._cite(event.args),
                js_handler="(e) => { const c = e.target.closest('[data-cite]'); if (c) emit(c.dataset.cite); }",
            )
            self._after = tag("div", classes="after")
        self._reset()
        if turn.over:
            self._finish()

    def _reset(self) -> None:
        self._blocks: list[ui.html] = []
        self._shown: list[tuple[str, tuple[int, ...]]] = []
        self._ticked = 0
        self._body.clear()
        self._body.classes(remove="refused unsupported")
        self._after.clear()
        self._stages.clear()

    async def follow(self) -> None:
        """Show what comes, at most ten times a second, until the turn is over."""
        self._reset()
        while not self.turn.over:
            self._show_stages()
            self._show_text(self.turn.text, ANY)
            await asyncio.sleep(TICK)
            if self._body.is_deleted:  # the tab is gone, or shows another conversation
                return
        self._finish()

    def _finish(self) -> None:
        """The whole, checked answer and what belongs to it."""
        turn, answer = self.turn, self.turn.answer
        self._stages.set_visibility(False)
        if answer:
            self._show_text(answer.answer, [citation.number for citation in answer.citations])
            if answer.refused:
                self._body.classes("refused")
            elif not answer.supported:
                self._body.classes("unsupported")
                self._body.props["title"] = "These words do not stand in the passages as they are"
        else:
            self._show_text(turn.text, ())
        with self._after:
            if turn.error:
                error(turn.error, lambda: self._on_again(self))
            elif not answer:
                with tag("div", classes="choices"):
                    tag("span", "Stopped" if turn.stopped else "The answer broke off", "hint")
                    button("Ask again", lambda: self._on_again(self), symbol="retry", kind="plain")
            else:
                self._sources(answer)
                receipt(answer.receipt if answer.receipt.stages else turn.receipt or answer.receipt, self._on_cite)

    def _sources(self, answer: Answer) -> None:
        if not answer.citations:
            return
        with tag("ul", classes="sources", aria_label="Sources"):
            for citation in answer.citations:
                with tag("li"):
                    origin = tag("button", classes="origin", type="button")
                    with origin:
                        tag("span", str(citation.number), "cite")
                        tag("span", citation.text, "quote")
                        page = f" · p {citation.page}" if citation.page else ""
                        tag("span", citation.document + page, "hint name number", title=citation.document)
                    origin.on("click", lambda citation=citation: self._on_cite(citation), args=[])

    def _show_stages(self) -> None:
        stages, writing = self.turn.stages, bool(self.turn.text)
        self._stages.set_visibility(not writing)
        if len(stages) == self._ticked:
            return
        self._ticked = len(stages)
        self._stages.clear()
        with self._stages:
            for number, stage in enumerate(stages, 1):
                with tag("li", classes="now" if number == len(stages) else "past"):
                    if number < len(stages):
                        icon("check")
                    tag("span", stage)

    def _show_text(self, text: str, citations: Collection[int]) -> None:
        """One element per paragraph, so that a finished one is neither made nor sent again."""
        wanted = [(block, tuple(citations)) for block in paragraphs(text)]
        with self._body:
            for number, block in enumerate(wanted):
                if number == len(self._blocks):
                    self._blocks.append(ui.html(markdown(*block), sanitize=False))
                elif self._shown[number] != block:
                    self._blocks[number].content = markdown(*block)
        for surplus in self._blocks[len(wanted) :]:
            surplus.delete()
        del self._blocks[len(wanted) :]
        self._shown = wanted

    def _cite(self, number: Any) -> Any:
        """Open the source that a chip stands for."""
        for citation in self.turn.answer.citations if self.turn.answer else []:
            if str(citation.number) == number:
                return self._on_cite(citation)
        return None


class Composer:
    """Where one asks: Enter sends, Shift+Enter makes a new line; Stop stands where Send was."""

    def __init__(self, on_ask: Callable[[str], Any], on_stop: Callable[[], Any]) -> None:
        self._on_ask, self._on_stop = on_ask, on_stop
        self._busy = False

    def build(self) -> Element:
        """Lay it out."""
        with tag("div", classes="composer") as element:
            self.text = ui.textarea(placeholder="Ask your documents").classes("question")
            self.text.props(f"borderless dense autogrow maxlength={LONGEST} rows=1")
            self.text.props["aria-label"] = "Your question"
            self.text.on(
                "keydown",
                self._sent,
                js_handler="(e) => { if (e.key === 'Enter' && !e.shiftKey && !e.isComposing)"
                " { e.preventDefault(); emit(e.target.value); } }",
            )
            with tag("div", classes="under"):
                self.chip = tag("span", "", "chip")
                self._place = tag("span", classes="act")
        self.busy(False)
        return element

    def keep(self, tab: MutableMapping[str, Any]) -> None:
        """Keep the draft where a reload does not lose it."""
        self.text.value = tab.get("draft", "")
        self.text.on_value_change(lambda event: tab.update(draft=event.value))

    def busy(self, busy: bool) -> None:
        """Whether Stop stands where Send was."""
        self._busy = busy
        self._place.clear()
        with self._place:
            if busy:
                button("Stop", self._on_stop, symbol="stop", kind="primary")
            else:
                button("Send", symbol="send", kind="primary").on(
                    "click",
                    self._sent,
                    js_handler="(e) => emit(e.target.closest('.composer').querySelector('textarea').value)",
                )

    async def _sent(self, event: GenericEventArguments) -> None:
        question = str(event.args).strip()[:LONGEST]
        if question and not self._busy:
            await self._on_ask(question)
