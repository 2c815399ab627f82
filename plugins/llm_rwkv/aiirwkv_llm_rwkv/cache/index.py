"""Kept states by the text they have read: hashes of prefixes, which are kept, and which is worth least."""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from aiirwkv.types import KeptState
from torch import Tensor

from .file import Header

__all__ = ["STRIDE", "Entry", "Index", "Prefixes", "Ranking"]

STRIDE = 256  # tokens between two hashes of a prefix that are made at once
WELL_KNOWN = 99  # more hits than these make a state no more valuable, so that it is forgotten one day


class Prefixes:
    """The keys of a text's prefixes: one pass over its token ids, and little more for each length asked for."""

    def __init__(self, root: bytes, tokens: Sequence[int]) -> None:
        self.data = array("i", tokens).tobytes()
        self.length = len(self.data) // 4
        hasher = blake2b(root, digest_size=16)
        self._hashers = [hasher.copy()]
        for end in range(STRIDE, self.length + 1, STRIDE):
            hasher.update(self.data[4 * (end - STRIDE) : 4 * end])
            self._hashers.append(hasher.copy())

    def key(self, length: int) -> bytes:
        """Of the first `length` tokens: blake2b of the root and their ids."""
        mark = length // STRIDE
        hasher = self._hashers[mark].copy()
        hasher.update(self.data[4 * mark * STRIDE : 4 * length])
        return hasher.digest()

    def marks(self) -> list[str]:
        """Short hashes of the first 0, STRIDE, 2 STRIDE, … tokens. They tell where to look, and prove nothing."""
        return [hasher.hexdigest()[:16] for hasher in self._hashers]


@dataclass(eq=False)
class Entry:
    """A kept state: in memory as `payload`, in a file of `filed` bytes, or both."""

    key: bytes
    header: Header
    used: float
    payload: Tensor | None = None
    filed: int = 0
    score: float = 0.0
    leaving: bool = False
    """It leaves memory as soon as it is written."""
    gone: bool = False
    parent: Entry | None = None
    children: set[Entry] = field(default_factory=set)

    @property
    def id(self) -> str:
        return self.key.hex()

    @property
    def tokens(self) -> int:
        return self.header.tokens

    def about(self) -> KeptState:
        """For people."""
        header = self.header
        return KeptState(
            id=self.id,
            model=header.model,
            label=header.label,
            owner=header.owner,
            tokens=header.tokens,
            bytes=header.nbytes,
            memory=self.payload is not None,
            disk=self.filed > 0,
            pinned=header.pinned,
            hits=header.hits,
            created=header.created,
            used=self.used,
        )

    def worth(self) -> float:
        """Tokens per byte that it spares beyond the next shorter kept prefix, more often the more it was used."""
        spared = self.tokens - (self.parent.tokens if self.parent else 0)
        return (1 + min(self.header.hits, WELL_KNOWN)) * spared / self.header.nbytes


class Index:
    """
    Which prefixes are kept. Finding the longest costs one hash per STRIDE tokens, and few more.

    An entry is filed under the last mark in it, so that only lengths that can be its own are tried.
    """

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self._ends: dict[str, Counter[int]] = {}
        self._passed: Counter[str] = Counter()

    def longest(self, text: Prefixes, limit: int, fits: Callable[[Entry], bool] = lambda entry: True) -> Entry | None:
        """The entry of the longest prefix of at most `limit` tokens that `fits`."""
        marks = text.marks()
        for mark in reversed(marks[: limit // STRIDE + 1]):
            for length in sorted(self._ends.get(mark, ()), reverse=True):
                if length <= limit:
                    entry = self.entries.get(text.key(length))
                    if entry is not None and fits(entry):
                        return entry
        return None

    def shared(self, text: Prefixes) -> int:
        """How many tokens, in whole STRIDEs, some kept text begins with as well; whether kept there or not."""
        marks = text.marks()
        return next((STRIDE * number for number in range(len(marks) - 1, 0, -1) if marks[number] in self._passed), 0)

    def add(self, entry: Entry, parent: Entry | None) -> None:
        self.entries[entry.key] = entry
        path = entry.header.path
        self._ends.setdefault(path[-1], Counter())[entry.tokens] += 1
        self._passed.update(path)
        if parent is not None:
            entry.parent = parent
            parent.children.add(entry)

    def remove(self, entry: Entry) -> list[Entry]:
        """The entries that are worth more now: those for which it was the next shorter kept prefix."""
        del self.entries[entry.key]
        path = entry.header.path
        ends = self._ends[path[-1]]
        ends[entry.tokens] -= 1
        if not ends[entry.tokens]:
            del ends[entry.tokens]
        if not ends:
            del self._ends[path[-1]]
        for mark in path:
            self._passed[mark] -= 1
            if not self._passed[mark]:
                del self._passed[mark]
        if entry.parent is not None:
            entry.parent.children.discard(entry)
            entry.parent.children |= entry.children
        for child in entry.children:
            child.parent = entry.parent
        return list(entry.children)


class Ranking:
    """Of the entries in a tier the one with the lowest score: a heap, whose outdated lines are skipped."""

    def __init__(self, member: Callable[[Entry], bool]) -> None:
        """`member` says whether an entry stands in the ranking, now."""
        self._member = member
        self._heap: list[tuple[float, int, Entry]] = []
        self._count = itertools.count()
        self._most = 1024

    def push(self, entry: Entry) -> None:
        """Whenever its score has changed, or it has come into the tier."""
        heapq.heappush(self._heap, (entry.score, next(self._count), entry))
        if len(self._heap) > self._most:
            self._heap = sorted({line[2].key: line for line in self._heap if self._valid(line)}.values())
            self._most = 2 * len(self._heap) + 1024

    def least(self) -> Entry | None:
        """It stays in the ranking as long as it is a member."""
        while self._heap and not self._valid(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def _valid(self, line: tuple[float, int, Entry]) -> bool:
        score, _, entry = line
        return score == entry.score and not entry.gone and self._member(entry)
