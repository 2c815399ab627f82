"""
`up`: a nats-server if need be, workers and the web page as child processes, kept alive, ended in the right order.

It serves nothing itself.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO

import anyio
import msgspec

from .bus import Bus
from .config import BusConfig, Config, Web
from .connection import address
from .errors import ConfigError, ServerError
from .plugins import check
from .processes import end, spawn
from .server import embedded

log = logging.getLogger(__name__)

READY = 60.0
"""Seconds the workers have to be ready."""
BACKOFF = (0.2, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds before a child that died is started again; the first again once it has lived for a minute."""

Say = Callable[[str], None]


@dataclass
class System:
    """What runs: where the bus is, where the page is, and which plugins could not be started."""

    bus: BusConfig
    data: str
    web: str = ""
    pid: int = field(default_factory=os.getpid)
    broken: dict[str, str] = field(default_factory=dict)


def locked(data: Path) -> IO[str] | None:
    """The data directory's lock, or None if somebody holds it."""
    file = open(data / "lock", "a+")  # noqa: SIM115 - held as long as the system runs
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def running(data: Path) -> System | None:
    """The system that runs on a data directory, if one does."""
    if lock := locked(data):
        lock.close()
        return None
    try:
        return msgspec.json.decode((data / "up.json").read_bytes(), type=System)
    except (OSError, msgspec.MsgspecError):
        return None


@asynccontextmanager
async def system(config: Config, data: Path, *, web: bool = True, say: Say = log.info) -> AsyncIterator[System]:
    """Everything that config.toml names, for the length of the block."""
    check(config)
    lock = locked(data)
    if lock is None:
        other = running(data)
        who = f"process {other.pid}{', which serves ' + other.web if other and other.web else ''}" if other else "one"
        raise ConfigError(
            f"the data directory {data} is in use by another aiirwkv ({who}); use that one, end it, or choose another "
            "directory with --data"
        )
    web = web and config.web.enabled and bool(_web_plugin())
    if web:
        _free(config.web)
    (data / "logs").mkdir(exist_ok=True, mode=0o700)
    with lock:
        async with AsyncExitStack() as stack:
            bus_config = config.bus
            if not config.bus.url:
                bus_config = await stack.enter_async_context(embedded(data / "nats", config.bus))
            bus = await stack.enter_async_context(Bus.connect(bus_config, "up"))
            await bus.provide()
            found = System(bus_config, str(data), f"http://{config.web.host}:{config.web.port}" if web else "")
            family = Family(_environment(bus_config, config.web, data), data / "logs", say)
            await stack.enter_async_context(family)
            for name, plugins in config.workers.items():
                family.start(name, ["worker", "--supervised", "--process", name, *plugins])
            if web:
                family.start("web", ["web"])
            await _ready(bus, family, config, found, web)
            _publish(found)
            stack.callback((data / "up.json").unlink, missing_ok=True)
            yield found


class Family:
    """Child processes that are started again when they die; the web page ends first, then the workers."""

    def __init__(self, env: dict[str, str], logs: Path, say: Say) -> None:
        self._env, self._logs, self._say = env, logs, say
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Family:
        return self

    async def __aexit__(self, *exc: object) -> None:
        with anyio.CancelScope(shield=True):
            for keeper in self._keepers.values():
                keeper.cancel()
            await asyncio.gather(*self._keepers.values(), return_exceptions=True)
            if web := self._processes.pop("web", None):
                await end(web, grace=5)
            await asyncio.gather(*(end(process, grace=40) for process in self._processes.values()))

    def start(self, name: str, arguments: list[str]) -> None:
        self._keepers[name] = asyncio.create_task(self._keep(name, arguments), name=f"keep {name}")

    def last_words(self, name: str) -> str:
        """The last line of a child's log."""
        path = self._logs / f"{name}.log"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return lines[-1] if lines else "it said nothing"

    async def _keep(self, name: str, arguments: list[str]) -> None:
        tries = 0
        while True:
            began = time.monotonic()
            with open(self._logs / f"{name}.log", "ab") as output:
                process = await spawn([sys.executable, "-m", "aiirwkv", *arguments], output=output, env=self._env)
            self._processes[name] = process
            code = await process.wait()
            if time.monotonic() - began > 60:
                tries = 0
            delay = BACKOFF[min(tries, len(BACKOFF) - 1)]
            tries += 1
            why = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._say(f"{name} ended ({why}: {self.last_words(name)}); starting it again in {delay:g} s")
            await asyncio.sleep(delay)


def _environment(bus: BusConfig, web: Web, data: Path) -> dict[str, str]:
    """What the children need to know beyond config.toml."""
    env = {"AIIRWKV_DATA": str(data), "AIIRWKV_SUPERVISOR": str(os.getpid())}
    for table, settings in {"BUS": bus, "WEB": web}.items():
        for key in settings.__struct_fields__:
            if (value := getattr(settings, key)) is not None:
                env[f"AIIRWKV_{table}__{key.upper()}"] = json.dumps(value)
    return env


async def _ready(bus: Bus, family: Family, config: Config, found: System, web: bool) -> None:
    """Wait until every worker answers on the bus and the page answers HTTP."""
    missing = set(config.workers)
    with anyio.move_on_after(READY):
        while missing:
            for identity in await bus.workers():
                missing.discard(identity["metadata"]["process"])
                found.broken |= json.loads(identity["metadata"]["broken"])
        while web and not await _answers(config.web):
            await anyio.sleep(0.05)
        return
    late = sorted(missing) or ["web"]
    raise ServerError(
        f"{', '.join(late)} was not ready after {READY:g} s: {family.last_words(late[0])}; see "
        f"{found.data}/logs/{late[0]}.log"
    )


async def _answers(web: Web) -> bool:
    host = "127.0.0.1" if web.host in ("0.0.0.0", "::") else web.host
    try:
        reader, writer = await asyncio.open_connection(host, web.port)
        writer.write(f"GET /healthz HTTP/1.0\r\nHost: {host}:{web.port}\r\n\r\n".encode())
        status = await reader.readline()
        writer.close()
    except OSError:
        return False
    return b" 200 " in status


def _free(web: Web) -> None:
    with socket.socket(socket.AF_INET6 if ":" in web.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((web.host, web.port))
        except OSError as exc:
            raise ConfigError(
                f"port {web.port} of {web.host} cannot be used for the web page: {exc.strerror}; choose another with "
                "--port, or [web] port in config.toml"
            ) from None


def _web_plugin() -> bool:
    return bool(list(entry_points(group="aiirwkv.web")))


def _publish(found: System) -> None:
    """Tell other commands of this user where the bus is: `nats --server "$(cat FILE)"` works too."""
    credentials = f"{found.bus.user}:{found.bus.password}@" if found.bus.user else ""
    scheme, _, host = address(found.bus).partition("://")
    for name, data in {
        "up.json": msgspec.json.encode(found),
        "bus.url": f"{scheme}://{credentials}{host}".encode(),
    }.items():
        path = Path(found.data, name)
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)


@asynccontextmanager
async def session(config: Config, data: Path, *, claim: str = "", say: Say = log.info) -> AsyncIterator[Bus]:
    """A bus to talk to: the one config.toml names, the one that runs on this data directory, or one for the block."""
    async with AsyncExitStack() as stack:
        if config.bus.url:
            bus_config = config.bus
        elif found := await _started(data):
            bus_config = found.bus
        else:
            say("nothing is running on this data directory; starting AIIRWKV for this call")
            started = await stack.enter_async_context(system(config, data, web=False, say=say))
            for cause in started.broken.values():
                say(f"! {cause}")
            bus_config = started.bus
        yield await stack.enter_async_context(Bus.connect(bus_config, "cli", claim=claim))


async def _started(data: Path) -> System | None:
    """The system that runs on a data directory, once it is ready."""
    with anyio.move_on_after(READY):
        while True:
            if found := running(data):
                return found
            if lock := locked(data):
                lock.close()
                return None
            await anyio.sleep(0.2)
    return None
