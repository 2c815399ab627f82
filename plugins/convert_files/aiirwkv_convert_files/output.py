"""The extracted text as it is written: character offsets, pages, headings and tables are noted on the way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

NOT_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")  # controls, stray byte order marks
BREAK = re.compile("\r\n|[\r\x0b\x0c\x85]")
HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$")
UNDERLINE = re.compile(r" {0,3}(=+|-{2,})[ \t]*$")
FENCE = re.compile(r" {0,3}(```+|~~~+)")
BLOCK = re.compile(r"[ \t]*([#>|+*-]|\d+[.)] )")  # a line that an underline does not make a heading
MAX_ANCHORS = 8000  # what a reply can carry


class Unreadable(Exception):
    """Why a file cannot be read, in words for the person who gave it."""


class Output:
    """
    Text is appended to a file; `position` counts its characters.

    anchors: places as `aiirwkv.types.Anchor` has them. A heading's anchor spans its section, up to the next heading of
    its level or above.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8", errors="replace", newline="\n")
        self.position = 0
        self.blank = True
        self.lost = 0
        self.title = ""
        self.pages = 0
        self.scanned = 0
        self.is_markdown = False
        self.anchors: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self._fence = ""
        self._line = ""

    def write(self, text: str) -> int:
        """Append text; returns where it begins."""
        start = self.position
        text = NOT_TEXT.sub("", BREAK.sub("\n", text))
        self.lost += text.count("\ufffd")
        self.blank = self.blank and (not text or text.isspace())
        self.position += len(text)
        self.file.write(text)
        return start

    def markdown(self, text: str) -> None:
        """Append markdown, noting its headings. To be called with whole lines."""
        self.is_markdown = True
        for line in BREAK.sub("\n", text).splitlines(keepends=True):
            before, self._line = self._line, line
            start = self.write(line)
            if fence := FENCE.match(line):
                if not self._fence:
                    self._fence = fence[1]
                elif fence[1].startswith(self._fence):
                    self._fence = ""
            elif self._fence:
                continue
            elif heading := HEADING.match(line):
                self.heading(len(heading[1]), heading[2] or "", start)
            elif (under := UNDERLINE.match(line)) and before.strip() and not BLOCK.match(before):
                self.heading(1 if under[1][0] == "=" else 2, before, start - len(before))
                self._line = ""

    def heading(self, level: int, title: str, start: int) -> None:
        if title := " ".join(re.sub(r"[*_`]{1,3}(?=\S)(.*?\S)[*_`]{1,3}", r"\1", title).split())[:300]:
            self.anchor("heading", start, title=title, level=level)

    def table(self, rows: Iterable[Sequence[str]], title: str = "") -> None:
        """Append rows as a markdown table; the first one is its header."""
        start = self.position
        for line in table(rows):
            self.write(line)
        if self.position > start:
            self.anchor("table", start, title=title)

    def page(self, text: str) -> None:
        """Append a page's text."""
        self.pages += 1
        start = self.write(text)
        self.anchor("page", start, page=self.pages)
        self.write("\n\n")

    def anchor(self, kind: str, start: int, **values: Any) -> None:
        """Note a place that begins at `start` and ends here."""
        self.anchors.append({"kind": kind, "start": start, "end": self.position, **values})

    def close(self) -> None:
        """End the sections and the file."""
        self.file.close()
        open_sections: list[dict[str, Any]] = []
        for heading in sorted((a for a in self.anchors if a["kind"] == "heading"), key=lambda a: a["start"]):
            while open_sections and open_sections[-1]["level"] >= heading["level"]:
                open_sections.pop()["end"] = heading["start"]
            open_sections.append(heading)
        for heading in open_sections:
            heading["end"] = self.position
        if len(self.anchors) > MAX_ANCHORS:
            self.anchors.sort(key=lambda a: a.get("level", 0))
            self.warnings.append(f"only the first {MAX_ANCHORS} of {len(self.anchors)} pages and headings are kept")
            del self.anchors[MAX_ANCHORS:]
        self.anchors.sort(key=lambda a: (a["start"], a.get("level", 0)))


def table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a markdown table; rows without content and trailing empty cells are left out."""
    width = 0
    for row in rows:
        cells = [" ".join(cell.split()).replace("|", "\\|") for cell in row]
        while cells and not cells[-1]:
            cells.pop()
        if not cells:
            continue
        first = not width
        width = max(width, len(cells))
        yield "| " + " | ".join(cells + [""] * (width - len(cells))) + " |\n"
        if first:
            yield "|" + " --- |" * width + "\n"
