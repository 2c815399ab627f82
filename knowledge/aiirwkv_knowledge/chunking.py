"""Cut extracted text into chunks at paragraphs, sentences and words, and keep where each came from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

import msgspec
from aiirwkv import Anchor, BadRequest

T = TypeVar("T")

BYTES_PER_TOKEN = 4
MAX_SIZE = 8192


def tokens(text: str) -> int:
    """About how many tokens a text has: a quarter of its UTF-8 bytes (4 Latin letters, 1⅓ Chinese characters)."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


class Piece(msgspec.Struct, frozen=True):
    """A chunk: `text` is the extracted text from character `start` to `end`."""

    start: int
    end: int
    text: str
    page: int | None = None
    heading: str = ""


def check_sizes(size: int, overlap: int) -> None:
    """Refuse chunk sizes (in tokens, as `tokens` counts) that cannot work."""
    if not 8 <= size <= MAX_SIZE:
        raise BadRequest(f"chunk_size is {size}; it must lie between 8 and {MAX_SIZE} tokens")
    if not 0 <= overlap < size:
        raise BadRequest(f"chunk_overlap is {overlap}; it must be at least 0 and less than chunk_size ({size})")


def cut(text: str, anchors: Sequence[Anchor], size: int, overlap: int, *, markdown: bool = False) -> list[Piece]:
    """
    Chunks of at most `size` tokens that share up to `overlap` with the one before.

    A chunk lies on one page, so that the page of a citation is right, and carries the headings above its beginning.
    """
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    check_sizes(size, overlap)
    splitter = (MarkdownSplitter if markdown else TextSplitter).from_callback(tokens, size, overlap=overlap)
    heading = _headings(anchors)
    return [
        Piece(start + place, start + place + len(chunk), chunk, page, heading(start + place))
        for start, end, page in _pages(anchors, len(text))
        for place, chunk in splitter.chunk_indices(text[start:end])
        if chunk.strip()
    ]


def _pages(anchors: Sequence[Anchor], length: int) -> list[tuple[int, int, int | None]]:
    """The text's parts by page: start, end, page. What lies between two pages belongs to the first."""
    starts = sorted((anchor.start, anchor.page) for anchor in anchors if anchor.kind == "page")
    parts: list[tuple[int, int | None]] = [(0, None), *starts]
    ends = [*(start for start, _ in starts), length]
    return [(start, end, page) for (start, page), end in zip(parts, ends, strict=True) if start < end]


def _headings(anchors: Sequence[Anchor]) -> Callable[[int], str]:
    """The headings above a place, outermost first, joined by " › "."""
    marks = sorted((anchor for anchor in anchors if anchor.kind == "heading"), key=lambda anchor: anchor.start)

    def enter(path: list[Anchor], heading: Anchor) -> list[Anchor]:
        return [above for above in path if above.level < heading.level] + [heading]

    outside: list[Anchor] = []
    paths = list(accumulate(marks, enter, initial=outside))[1:]
    titles = [" › ".join(anchor.title for anchor in path if anchor.title) for path in paths]
    return _last_before([anchor.start for anchor in marks], titles, "")


def _last_before(starts: list[int], values: list[T], otherwise: T) -> Callable[[int], T]:
    """A function that gives the value of the last start at or before a place."""

    def find(place: int) -> T:
        index = bisect_right(starts, place) - 1
        return values[index] if index >= 0 else otherwise

    return find
