"""Commands that run things: up, worker, web, doctor."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..errors import AiirwkvError, ConfigError
from .common import State, cli, runs

if TYPE_CHECKING:
    from ..config import Config


@cli.command()
@click.option("--host", help="Where the web page listens [127.0.0.1].")
@click.option("--port", type=int, help="The web page's port [8080].")
@click.option("--no-web", is_flag=True, help="Without the web page.")
@click.pass_obj
@runs
async def up(state: State, host: str | None, port: int | None, no_web: bool) -> None:
    """Start everything: the bus, the workers, the web page."""
    import time

    import anyio

    from ..supervisor import system
    from ..terminal import JobLines

    began = time.monotonic()
    config = state.config
    config.web.host, config.web.port = host or config.web.host, config.web.port if port is None else port
    with JobLines() as lines:
        lines.say(f"AIIRWKV {__version__} · data in {state.data}")
        async with anyio.create_task_group() as tasks:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:

                async def end_on_signal() -> None:
                    async for _ in signals:
                        lines.say("ending: finishing what runs …")
                        tasks.cancel_scope.cancel()
                        return

                tasks.start_soon(end_on_signal)
                async with system(config, state.data, web=not no_web, say=lines.say) as found:
                    for cause in found.broken.values():
                        lines.say(f"! {cause}")
                    from ..connection import address

                    lines.say(f"bus    {address(found.bus)} (credentials in {found.data}/bus.url)")
                    where = f" · open {found.web}" if found.web else ""
                    lines.say(f"ready in {time.monotonic() - began:.1f} s{where} · Ctrl-C ends it")
                    await _watch(found.bus, lines)
        lines.say("ended")


async def _watch(config: Any, lines: Any) -> None:
    """Show every job until cancelled."""
    from ..bus import Bus

    async with Bus.connect(config, "terminal") as bus:
        async with bus.follow() as changes:
            began = True
            async for job in changes:
                if began and job.over:
                    continue  # what ended before we started
                began = False if not job.over else began
                lines.show(job)


@cli.command()
@click.argument("plugins", nargs=-1)
@click.option("--bus", "url", help="The NATS server's URL [bus.url, or the one that runs on the data directory].")
@click.option("--credentials", help="A .creds file.")
@click.option("--process", default="worker", help="This process's name in discovery and logs.")
@click.option("--supervised", is_flag=True, hidden=True)
@click.pass_obj
@runs
async def worker(
    state: State, plugins: tuple[str, ...], url: str | None, credentials: str | None, process: str, supervised: bool
) -> None:
    """Serve plugins in this process, until a signal ends it."""
    import logging

    from .. import logs
    from ..bus import Bus
    from ..worker import build, serving

    if not plugins and not supervised:
        raise click.UsageError("name the plugins to serve; aiirwkv plugins lists them", click.get_current_context())
    logs.to_stderr()
    config, data = state.config, state.data
    async with Bus.connect(_where(config, data, url, credentials), process) as bus:
        await logs.to_bus(bus, process)
        broken: dict[str, str] = {}
        registry = build(list(plugins), config, data, bus, broken if supervised else None)
        async with serving(bus, registry, config, process, broken if supervised else None) as served:
            for cause in broken.values():
                logging.getLogger("aiirwkv").error("%s", cause)
            names = ", ".join(name for name in registry.plugins if name != "core") or "nothing"
            logging.getLogger("aiirwkv").info("worker %s serves %s", served.id, names)
            await _ended()


@cli.command()
@click.pass_obj
@runs
async def web(state: State) -> None:
    """Serve only the web page, for a system that runs."""
    from importlib.metadata import entry_points

    import anyio

    from .. import logs
    from ..bus import Bus

    logs.to_stderr()
    config, data = state.config, state.data
    pages = list(entry_points(group="aiirwkv.web"))
    if not pages:
        raise ConfigError("no web page is installed; pip install aiirwkv-webui")
    async with Bus.connect(_where(config, data), "web") as bus, anyio.create_task_group() as tasks:
        await logs.to_bus(bus, "web")
        tasks.start_soon(pages[0].load(), bus, config.web, data)
        await _ended()
        tasks.cancel_scope.cancel()


def _where(config: Config, data: Path, url: str | None = None, credentials: str | None = None) -> Any:
    from ..supervisor import running

    if url:
        config.bus.url = url
    if credentials:
        config.bus.credentials = credentials
    if config.bus.url:
        return config.bus
    if found := running(data):
        return found.bus
    raise ConfigError(f"no bus to connect to: nothing runs on {data}; start aiirwkv up, or name one with [bus] url")


async def _ended() -> None:
    """Wait for SIGINT, SIGTERM, or the end of the supervisor; from then on this process has a minute to live."""
    import anyio

    async with anyio.create_task_group() as tasks:

        async def on_signal() -> None:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    break
            tasks.cancel_scope.cancel()

        async def on_orphaned(parent: int) -> None:
            while os.getppid() == parent:
                await anyio.sleep(1)
            tasks.cancel_scope.cancel()

        tasks.start_soon(on_signal)
        if parent := os.environ.get("AIIRWKV_SUPERVISOR"):
            tasks.start_soon(on_orphaned, int(parent))
    timer = threading.Timer(60, os._exit, (1,))
    timer.daemon = True
    timer.start()


@cli.command()
@click.pass_obj
@runs
async def doctor(state: State) -> None:
    """Check the installation, the configuration and the data directory."""
    import shutil

    from ..plugins import check, installed, load, load_class, origin
    from ..server import binary
    from ..supervisor import running

    bad = 0

    def report(what: str, test: Callable[[], object]) -> None:
        nonlocal bad
        try:
            click.echo(f"✓ {what}: {test()}")
        except (AiirwkvError, OSError) as exc:
            bad += 1
            click.echo(f"✗ {what}: {exc}")

    def free() -> str:
        left = shutil.disk_usage(state.data).free
        if left < 1 << 30:
            raise ConfigError(f"only {left >> 20} MB are free where {state.data} lies; make room")
        return f"{left >> 30} GB free"

    def configured() -> str:
        config = state.config
        check(config)
        for name, settings in config.plugins.items():
            load(name, settings)
        return ", ".join(f"{name}: {' '.join(names)}" for name, names in config.workers.items())

    report("python", lambda: sys.version.split()[0])
    report("nats-server", binary)
    report("data directory", lambda: state.data)
    report("disk", free)
    report("configuration", configured)
    for name, ep in sorted(installed().items()):
        report(f"plugin {name}", lambda name=name, ep=ep: load_class(name) and origin(ep))  # type: ignore[misc]
    report("running", lambda: ((found := running(state.data)) and (found.web or f"process {found.pid}")) or "nothing")
    report("logs", lambda: state.data / "logs")
    if bad:
        raise SystemExit(1)
