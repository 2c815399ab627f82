"""The folder of kept states, and the thread that writes to it. What is kept, and for how long, is decided elsewhere."""

from __future__ import annotations

import logging
import os
import queue
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from .file import SUFFIX, Damaged, Header, peek, read, write
from .index import Entry

__all__ = ["Folder", "Writer", "delete"]

HOUR = 3600.0

log = logging.getLogger(__name__)


class Folder:
    """One file per entry, named by its id. It is made if need be, for this user's eyes only."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        self.folder = folder
        self._failing = False
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)

    def scan(self) -> tuple[list[Entry], list[tuple[Path, int]]]:
        """
        The entries that lie in it, after their headers, the last used last; and what is no usable state, with its size.

        Raises OSError.
        """
        entries: list[Entry] = []
        unusable: list[tuple[Path, int]] = []
        reasons: list[str] = []
        for path in self.folder.iterdir():
            status = path.lstat()
            if path.suffix == ".tmp" and status.st_mtime < time.time() - HOUR:
                delete(path)
            if path.suffix != SUFFIX:
                continue
            try:
                header, size = peek(path)
                if path.stem != header.key:
                    raise Damaged("its name is another one's")
                entries.append(Entry(bytes.fromhex(header.key), header, status.st_mtime, filed=size))
            except (OSError, Damaged) as error:
                reasons.append(f"{path.name}: {error}")
                if stat.S_ISREG(status.st_mode):
                    unusable.append((path, status.st_size))
        if reasons:
            log.warning("%d files in %s are not usable states; the first, %s", len(reasons), self.folder, reasons[0])
        return sorted(entries, key=lambda entry: entry.used), unusable

    def load(self, entry: Entry) -> tuple[Header, Tensor]:
        """Header and payload. Raises Damaged and OSError."""
        header, payload = read(self.path(entry))
        if (header.key, header.fingerprint) != (entry.id, entry.header.fingerprint):
            raise Damaged("it is another one's")
        return header, payload

    def save(self, entry: Entry, start: bytes, payload: Tensor) -> bool:
        """Whether the file could be written; that it could not is logged once, until it works again."""
        try:
            write(self.path(entry), start, payload)
        except OSError as error:
            if not self._failing:
                log.warning("kept states cannot be written, and stay in memory for now: %s", error)
            self._failing = True
            return False
        self._failing = False
        return True

    def date(self, entry: Entry) -> None:
        """Let the file tell when it was last used."""
        with suppress(OSError):
            os.utime(self.path(entry), (entry.used, entry.used))

    def path(self, entry: Entry) -> Path:
        return self.folder / (entry.id + SUFFIX)


def delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("a kept state cannot be deleted: %s", error)


class Writer:
    """A thread that does one thing after the other."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="states", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def flush(self, seconds: float) -> bool:
        """Wait until all is done that was put before; false if that takes longer."""
        done = threading.Event()
        self._queue.put(done.set)
        return done.wait(seconds)

    def close(self, seconds: float) -> None:
        """Do what was put before, for so long at most."""
        self._queue.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception:  # an error in one thing must not end the others
                log.exception("a kept state could not be written")
