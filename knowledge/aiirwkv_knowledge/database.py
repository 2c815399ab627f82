"""A SQLite file with one writer, many readers, a schema version, and errors that name the directory."""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aiirwkv import PluginError, ServiceError

CANNOT_WRITE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EMFILE,
}
BUSY_TIMEOUT_MS = 30_000


def storage_error(folder: Path, cause: str) -> ServiceError:
    """What is said when `folder` cannot take more."""
    return ServiceError(
        f"cannot write to {folder}: {cause}; make room on the disk or give this user the right to write there, then "
        "try again; nothing that was stored is lost"
    )


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Turn a full disk, a missing right or a damaged database into one line that names the directory."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in CANNOT_WRITE:
            raise
        raise storage_error(folder, exc.strerror or str(exc)) from exc
    except sqlite3.DatabaseError as exc:
        # The low byte is the primary result code: https://sqlite.org/rescode.html
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise storage_error(folder, str(exc)) from exc
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise ServiceError(f"{folder} holds a damaged database ({exc}); put back a backup of it") from exc
        raise


class Database:
    """
    A SQLite file in WAL mode. `migrations[n]` leads from schema version n to n + 1.

    Its methods block: call them in a thread.
    """

    def __init__(self, path: Path, migrations: Sequence[str]) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._idle: deque[sqlite3.Connection] = deque()
        with storing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._open()
        try:
            self._migrate(migrations)
        except BaseException:
            self.close()
            raise

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            db.execute(f"PRAGMA {pragma}")
        return db

    def _migrate(self, migrations: Sequence[str]) -> None:
        with self.writing() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(migrations):
                raise PluginError(
                    f"{self.path} was written by a newer AIIRWKV (schema {version}, this one knows {len(migrations)}); "
                    "install that version, or give another data directory"
                )
            for script in migrations[version:]:
                for statement in script.split(";\n"):
                    db.execute(statement)
            db.execute(f"PRAGMA user_version={len(migrations)}")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of the block is stored, or nothing."""
        with self._lock, storing(self.path.parent):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    with suppress(sqlite3.Error):
                        self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view; never waits for a writer."""
        with storing(self.path.parent):
            db = self._idle.pop() if self._idle else self._open()
            try:
                db.execute("BEGIN")
                yield db
            finally:
                db.rollback()
                self._idle.append(db)

    def close(self) -> None:
        for db in (self._writer, *self._idle):
            db.close()
        self._idle.clear()


def insert(db: sqlite3.Connection, table: str, **values: Any) -> int:
    """Add a row; its number."""
    places = ", ".join("?" * len(values))
    cursor = db.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({places})", tuple(values.values()))
    return int(cursor.lastrowid or 0)
