"""A whole running system for tests of commands, clients and answers: one `aiirwkv up` per test session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiirwkv.config import BusConfig


@dataclass
class Up:
    """A running `aiirwkv up`."""

    data: Path
    process: subprocess.Popen[str]
    log: Path

    @property
    def bus(self) -> BusConfig:
        found = json.loads((self.data / "up.json").read_text())["bus"]
        return BusConfig(url=found["url"], user=found["user"], password=found["password"])

    def cli(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return aiirwkv(self.data, *arguments, **options)

    def json(self, *arguments: str) -> Any:
        """The last line that a command prints with --json."""
        done = self.cli(*arguments, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


def command(data: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "aiirwkv", "--data", str(data), *arguments]


def aiirwkv(data: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(data, *arguments), capture_output=True, text=True, timeout=120, **options)


def launch(data: Path, log: Path, *arguments: str, **options: Any) -> Up:
    """Start `aiirwkv up` and wait until it says that it is ready."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command(data, "up", *arguments), stdout=output, stderr=subprocess.STDOUT, text=True, **options
        )
    end = time.monotonic() + 60
    while "ready in" not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    return Up(data, process, log)


def descendants(data: Path) -> list[int]:
    """Processes that work on a data directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if str(data).encode() in words and not zombie:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("system")
    started = launch(folder / "data", folder / "up.log", "--no-web")
    try:
        yield started
    finally:
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(60) == 0


__all__ = ["Up", "aiirwkv", "command", "descendants", "launch", "up"]
