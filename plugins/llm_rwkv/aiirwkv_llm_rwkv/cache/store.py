"""Where kept states lie, in memory and on disk, under byte budgets, and which of them has to go."""

from __future__ import annotations

import logging
import math
import threading
import time
from functools import partial
from pathlib import Path

from aiirwkv.errors import Conflict
from torch import Tensor

from .disk import Folder, Writer, delete
from .file import Damaged, Header, checksum, encode
from .index import Entry, Index, Ranking

__all__ = ["Store"]

LONG = 256  # tokens from which on a state is worth a file though nothing has continued from it yet
PATIENCE = 60.0  # seconds for all that is to be written

log = logging.getLogger(__name__)


class Store:
    """
    What is worth least leaves memory, for the disk if it is worth a file; and what is worth least there is deleted.

    Worth, after GreedyDual-Size-Frequency (Cherkasova 1998) and Marconi (Pan et al. 2025): tokens spared per byte,
    times uses, on top of a clock that rises to the score of what was dropped last, so that old merit fades.

    Who calls a method holds `lock`, unless it says otherwise. Files are read by the caller and written by one thread.
    """

    def __init__(self, folder: Path | None, memory: int, disk: int, fingerprint: str) -> None:
        self.memory, self.disk, self.fingerprint = memory, disk if folder else 0, fingerprint
        self.lock = threading.Lock()
        self.index = Index()
        self.in_memory = self.on_disk = self.dropped = 0
        self._leaving = 0  # bytes in memory that only wait to be written
        self._residents = Ranking(lambda entry: entry.payload is not None and not entry.leaving)
        self._files = Ranking(lambda entry: entry.filed > 0 and not entry.header.pinned)
        self._pinned: set[Entry] = set()
        self._unusable: list[tuple[Path, int]] = []
        self._rubbish: list[Path] = []  # files to be deleted, which may take a while
        self._clock = 0.0
        self._started = time.time()
        self._folder: Folder | None = None
        self._writer: Writer | None = None
        if folder is not None and disk > 0:
            try:
                self._adopt(Folder(folder))
            except OSError as error:
                log.warning("states are kept in memory only: %s", error)
                self.disk = 0

    def add(self, entry: Entry, parent: Entry | None) -> None:
        """A new entry, or a better one for the same text. Raises Conflict when it is pinned and does not fit."""
        old = self.index.entries.get(entry.key)
        if entry.header.pinned:
            self._afford(entry, old)
        if old is not None:
            self.forget(old)
        assert entry.payload is not None
        self.index.add(entry, parent)
        self.in_memory += entry.payload.numel()
        if entry.header.pinned:
            self._pinned.add(entry)
            if self._writer is not None:
                self._writer.put(partial(self._write, entry))
        self.touch(entry)

    def touch(self, entry: Entry) -> None:
        """It has been used just now."""
        entry.used = time.time()
        if entry.leaving and entry.payload is not None:
            entry.leaving = False
            self._leaving -= entry.payload.numel()
        entry.score = math.inf  # room is made by others
        self._shrink()
        entry.score = self._clock + entry.worth()
        self._rank(entry)
        self._shrink()  # unless it alone exceeds the budget

    def forget(self, entry: Entry) -> None:
        """Drop it everywhere. The next longer kept prefixes are worth more without it."""
        worths = {child: child.worth() for child in entry.children}
        self.index.remove(entry)
        entry.gone = True
        self._pinned.discard(entry)
        self._release(entry)
        self._unfile(entry)
        for child, worth in worths.items():
            child.score += child.worth() - worth
            self._rank(child)

    def load(self, entry: Entry) -> tuple[Header, Tensor | None]:
        """
        The payload, out of the file if it must be; None if that cannot be read. A damaged file is deleted.

        The caller does not hold the lock.
        """
        with self.lock:
            if entry.payload is not None or not entry.filed or self._folder is None:
                return entry.header, entry.payload
        try:
            header, payload = self._folder.load(entry)
        except (OSError, Damaged) as error:
            with self.lock:
                if not entry.gone:
                    log.warning("the kept state %s cannot be used, its text is read again: %s", entry.id, error)
                    if isinstance(error, (Damaged, FileNotFoundError)):
                        self.forget(entry)
            return entry.header, None
        with self.lock:
            if not entry.gone and entry.payload is None:
                header.hits = entry.header.hits
                entry.header, entry.payload = header, payload
                self.in_memory += payload.numel()
                self.touch(entry)
        return header, payload

    def flush(self) -> bool:
        """Wait until all that is to be written now is written. The caller does not hold the lock."""
        return self._writer is None or self._writer.flush(PATIENCE)

    def close(self) -> None:
        """Write what is worth it, the best first. The caller does not hold the lock."""
        writer, self._writer = self._writer, None
        if writer is None or self._folder is None:
            return
        with self.lock:
            entries = sorted(self.index.entries.values(), key=lambda entry: entry.score, reverse=True)
            for entry in entries:
                if not entry.filed and _deserves(entry):
                    writer.put(partial(self._write, entry))
        writer.close(PATIENCE)
        self._sweep()
        for entry in entries:
            if entry.filed and entry.used > self._started:
                self._folder.date(entry)

    def _adopt(self, folder: Folder) -> None:
        """What lies there from earlier. Other models' states are the first to be deleted."""
        entries, self._unusable = folder.scan()
        self._folder, self._writer = folder, Writer()
        self.on_disk = sum(size for _, size in self._unusable) + sum(entry.filed for entry in entries)
        self._pinned.update(entry for entry in entries if entry.header.pinned)
        for entry in sorted(entries, key=lambda entry: entry.tokens):
            self.index.add(entry, self.index.entries.get(bytes.fromhex(entry.header.parent or "")))
        mean = sum(entry.worth() for entry in entries) / max(len(entries), 1)
        for number, entry in enumerate(entries):  # scored as in a full cache that has seen them in this order
            mine = entry.header.fingerprint == self.fingerprint
            entry.score = entry.worth() + mean * number / len(entries) if mine else -math.inf
            self._rank(entry)
        self._clock = mean
        self._make_room(0)
        self._sweep()

    def _rank(self, entry: Entry) -> None:
        if entry.payload is not None:
            self._residents.push(entry)
        if entry.filed:
            self._files.push(entry)

    def _afford(self, entry: Entry, old: Entry | None) -> None:
        need = _size(entry)
        taken = sum(other.filed or _size(other) for other in self._pinned if other is not old)
        if taken + need > self.disk:
            raise Conflict(
                f"the state needs {need / 1e6:.1f} MB on disk, and pinned states have {taken / 1e6:.1f} MB of "
                f"{self.disk / 1e6:.1f} MB already; drop some states or raise plugins.llm_rwkv.states_disk"
            )

    def _shrink(self) -> None:
        """Down to the budget for memory, not counting what leaves it as soon as it is written."""
        while self.in_memory - self._leaving > self.memory and (entry := self._residents.least()):
            assert entry.payload is not None
            self._clock = max(self._clock, entry.score)
            slow = self._leaving > self.memory // 4 and not entry.header.pinned  # the disk, for all that comes
            if entry.filed:
                self._release(entry)
            elif self._writer is not None and _deserves(entry) and not slow:
                entry.leaving = True
                self._leaving += entry.payload.numel()
                self._writer.put(partial(self._write, entry))
            else:
                self.forget(entry)
                self.dropped += 1

    def _release(self, entry: Entry) -> None:
        if entry.payload is not None:
            self.in_memory -= entry.payload.numel()
            if entry.leaving:
                self._leaving -= entry.payload.numel()
            entry.leaving, entry.payload = False, None

    def _unfile(self, entry: Entry) -> None:
        if entry.filed and self._folder is not None:
            self.on_disk -= entry.filed
            entry.filed = 0
            self._rubbish.append(self._folder.path(entry))
            if self._writer is not None:
                self._writer.put(self._sweep)
            else:
                self._sweep()

    def _sweep(self) -> None:
        while self._rubbish:
            delete(self._rubbish.pop())

    def _make_room(self, need: int, entry: Entry | None = None) -> bool:
        """On disk, for this entry: of what is worth less and not pinned."""
        if need > self.disk:
            return False
        while self.on_disk + need > self.disk:
            if self._unusable:
                path, size = self._unusable.pop()
                self._rubbish.append(path)
                self.on_disk -= size
                continue
            least = self._files.least()
            if least is None or (entry and not entry.header.pinned and least.score > entry.score):
                return False
            self._clock = max(self._clock, least.score)
            self._unfile(least)
            if least.payload is None:
                self.forget(least)
                self.dropped += 1
        return True

    def _write(self, entry: Entry) -> None:
        """In the writer's thread, without the lock."""
        assert self._folder is not None
        with self.lock:
            payload = None if entry.gone or entry.filed else entry.payload
        size = 0
        if payload is not None:
            entry.header.checksum = checksum(payload)
            start = encode(entry.header)
            with self.lock:
                room = not entry.gone and self._make_room(len(start) + payload.numel(), entry)
            self._sweep()
            if room and self._folder.save(entry, start, payload):
                size = len(start) + payload.numel()
        with self.lock:
            self._written(entry, size)
        self._sweep()

    def _written(self, entry: Entry, size: int) -> None:
        """To a file of so many bytes; 0: it had one, or could not be written."""
        entry.filed = entry.filed or size
        self.on_disk += size
        if entry.gone:
            self._unfile(entry)
            return
        self._rank(entry)
        if entry.leaving and entry.filed:
            self._release(entry)
        elif entry.leaving:
            if entry.header.pinned:
                log.warning("the pinned state %s (%s) had to be dropped", entry.id, entry.header.label)
            self.forget(entry)
            self.dropped += 1


def _deserves(entry: Entry) -> bool:
    """A file."""
    return entry.header.pinned or entry.header.hits > 0 or entry.tokens >= LONG


def _size(entry: Entry) -> int:
    """Of its file."""
    return len(encode(entry.header)) + entry.header.nbytes
