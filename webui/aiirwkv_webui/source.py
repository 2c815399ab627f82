"""The pane beside the conversation: a document's text, opened at a span that is lit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiirwkv import AiirwkvError, Citation, Collections
from nicegui import ui

from .components import button, error, tag
from .sanitise import lit

if TYPE_CHECKING:
    from aiirwkv.bus import Bus

AROUND = 4000
"""Characters fetched before and after the span, and with each further step."""


class SourcePane:
    """Shows one document at a time."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._from = self._to = 0

    def build(self) -> None:
        """Lay it out, closed."""
        self.pane = tag("aside", classes="source", id="source", aria_label="Source", hidden=True)

    def close(self) -> None:
        """Close the pane and go back to where the reader was."""
        self.pane.props["hidden"] = True
        ui.run_javascript("aiirwkv.back()")

    async def open(self, citation: Citation) -> None:
        """Open the document of a citation at its span; an empty span shows the beginning."""
        self._citation = citation
        self._from, self._to = max(citation.start - AROUND, 0), citation.end + AROUND
        self.pane.clear()
        self.pane.props["hidden"] = False
        with self.pane:
            with tag("header", classes="title"):
                if citation.number:
                    tag("span", str(citation.number), "cite still", aria_hidden="true")
                tag("h2", citation.document, "name", title=citation.document)
                button("Close the source", self.close, symbol="close", bare=True)
            with tag("div", classes="scroll", tabindex="0", aria_label=f"Text of {citation.document}"):
                self._text = tag("div", classes="document")
            facts = [f"p {citation.page}"] if citation.page else []
            facts += [f"support {citation.support:.2f}"] if citation.support else []
            if facts:
                tag("footer", " · ".join(facts), "hint number")
        await self._show()
        ui.run_javascript("aiirwkv.reveal()")

    async def _show(self) -> None:
        cited = self._citation
        try:
            reply = await self._bus.call(
                Collections(
                    "text",
                    name=cited.collection,
                    document=cited.document_id or cited.document,
                    start=self._from,
                    end=self._to,
                )
            )
        except AiirwkvError as exc:
            self._text.clear()
            with self._text:
                error(str(exc), self._show)
            return
        text, start = reply.text, reply.start
        more = len(text) >= self._to - self._from
        self._text.clear()
        with self._text:
            if start > 0:
                button("Show what comes before", self._earlier, kind="plain")
            ui.html(lit(text, cited.start - start, cited.end - start), sanitize=False).classes("prose written")
            if more:
                button("Show what follows", self._later, kind="plain")

    async def _earlier(self) -> None:
        self._from = max(self._from - AROUND, 0)
        await self._show()

    async def _later(self) -> None:
        self._to += AROUND
        await self._show()
