"""The disk that models are on: room on it, one writer at a time, and a place to make something in."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiirwkv.errors import Conflict, ServiceError

__all__ = ["disk_errors", "file_sha256", "forget", "need_room", "only_one", "staging"]

ROOM = 64 << 20
"""Bytes that stay free."""


@contextmanager
def only_one(lock: Path, what: str) -> Iterator[None]:
    """The block, for one process and thread at a time; the others get a Conflict. Removes the lock file."""
    busy = Conflict(f"models: {what} is being written already; wait for that to end")
    try:
        file = lock.open("a")
    except FileNotFoundError:  # the one who held it has just removed its folder
        raise busy from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                raise FileNotFoundError
        except OSError:  # it is held, or was until just now
            raise busy from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def need_room(folder: Path, size: int) -> None:
    """Raises ServiceError when the disk of the folder has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < size + ROOM:
        raise ServiceError(
            f"models: the disk of {folder} is full: {free >> 20} MB are free, {(size + ROOM) >> 20} MB are needed; "
            "make room and try again, what has come is kept"
        )


def file_sha256(path: Path) -> str:
    """In hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def staging(folder: Path, name: str) -> Iterator[Path]:
    """A place to make something in, for one at a time. Nothing of it stays but a download with its record."""
    place = folder / f".{name}"
    place.mkdir(parents=True, exist_ok=True)
    with only_one(place / "lock", name):
        try:
            yield place
        finally:
            for path in (place / "made", place / "deleted"):
                shutil.rmtree(path, ignore_errors=True)
            if not any(place.glob("*.json")):
                shutil.rmtree(place, ignore_errors=True)


def forget(place: Path) -> None:
    """Without their records, downloads are not kept."""
    for path in place.glob("*.json"):
        path.unlink()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Errors of the disk as errors of the service."""
    try:
        yield
    except OSError as error:
        raise ServiceError(f"models: {error.filename or folder}: {error.strerror or error}") from None
