"""A run of tuning on disk, and what its process and the hook tell each other. Trains nothing."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from aiirwkv import Tune
from aiirwkv.errors import ServiceError

if TYPE_CHECKING:
    from aiirwkv import Bus

__all__ = ["Event", "Order", "Run"]

KEPT = 7 * 24 * 3600
"""Seconds that a broken-off run is kept: as long as its job can wait in the queue."""


class Order(msgspec.Struct, kw_only=True):
    """What the training process shall do. A run with the same order goes on where it was broken off."""

    request: Tune
    run: str
    owner: str
    base: str
    base_sha256: str
    weights: str
    device: str
    threads: int
    checkpoint_seconds: float


class Event(msgspec.Struct, omit_defaults=True):
    """What the training process says, one JSON line each: how far it is; or why it cannot go on; or that it is done."""

    step: int = 0
    note: str = ""
    error: str = ""
    code: int = 0
    done: bool = False


class Run:
    """
    A folder with the order, the data, the latest checkpoint, the log, and in the end the result.

    Everything that counts is written beside its place and moved there, so that it is whole or not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.order = path / "order.json"
        self.data = path / "data.jsonl"
        self.checkpoint = path / "latest.ckpt"
        self.log = path / "log"
        self.result = path / "result"

    async def prepare(self, order: Order, bus: Bus) -> None:
        """Go on with the same order; with another one, begin anew: write it down, and fetch the data."""
        text = msgspec.json.encode(order)
        try:
            if not self.order.is_file() or self.order.read_bytes() != text:
                self.remove()
                self.path.mkdir(parents=True)
                if order.request.object:
                    await bus.get(order.request.object, self.data)
                else:
                    self.data.write_text(order.request.text, encoding="utf-8")
                new = self.order.with_suffix(".new")
                new.write_bytes(text)
                os.replace(new, self.order)  # the order comes last: with it, the data is whole
            self.path.touch()
        except OSError as error:
            raise ServiceError(f"tune: cannot write {error.filename or self.path}: {error.strerror}") from None

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def last_words(self) -> str:
        """The last line of the log."""
        try:
            lines = self.log.read_text("utf-8", "replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]

    @staticmethod
    def tidy(runs: Path) -> None:
        """Remove runs that nobody has gone on with for a week."""
        for path in runs.glob("*"):
            if path.is_dir() and time.time() - path.stat().st_mtime > KEPT:
                shutil.rmtree(path, ignore_errors=True)
