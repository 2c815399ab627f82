"""Which documents, tags and pages a search keeps to."""

from __future__ import annotations

import re

import msgspec
from aiirwkv import BadRequest

PAGES = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


class Where(msgspec.Struct, frozen=True):
    """A document passes by name or id, a chunk by any of the tags of its document, or by its page."""

    documents: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pages: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, where: dict[str, list[str]]) -> Where:
        if unknown := sorted(where.keys() - set(cls.__struct_fields__)):
            raise BadRequest(f"`where` knows no {unknown[0]!r}; it takes {', '.join(cls.__struct_fields__)}")
        return cls(
            tuple(where.get("documents", ())),
            tuple(where.get("tags", ())),
            tuple(_pages(text) for text in where.get("pages", ())),
        )

    def __bool__(self) -> bool:
        return bool(self.documents or self.tags or self.pages)

    def sql(self) -> tuple[str, list[str | int]]:
        """A condition on documents d and chunks c to be put behind others, and its values."""
        parts: list[str] = []
        values: list[str | int] = []
        if self.documents:
            parts.append("(d.name IN (SELECT value FROM json_each(?)) OR d.id IN (SELECT value FROM json_each(?)))")
            values += [msgspec.json.encode(self.documents).decode()] * 2
        if self.tags:
            parts.append("EXISTS (SELECT 1 FROM json_each(d.tags) WHERE value IN (SELECT value FROM json_each(?)))")
            values.append(msgspec.json.encode(self.tags).decode())
        if self.pages:
            parts.append(f"({' OR '.join(['c.page BETWEEN ? AND ?'] * len(self.pages))})")
            values += [number for span in self.pages for number in span]
        return "".join(f" AND {part}" for part in parts), values


def _pages(text: str) -> tuple[int, int]:
    match = PAGES.fullmatch(text.strip())
    if not match:
        raise BadRequest(f"`where` cannot read the page {text!r}; write it as '3', or a range as '3-7'")
    return int(match[1]), int(match[2] or match[1])
