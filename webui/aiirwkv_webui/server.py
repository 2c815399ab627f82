"""The web app's server: its routes, its storage, its life in the caller's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import uvicorn
from aiirwkv import ServerError

from .guard import Guard, is_loopback
from .upload import Uploads

if TYPE_CHECKING:
    from aiirwkv.bus import Bus
    from aiirwkv.config import Web
    from fastapi import FastAPI

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
CLOSING = 1
"""Seconds that open requests have at the end."""


class Server(uvicorn.Server):
    """uvicorn without signal handlers: it is stopped by cancelling `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(bus: Bus, web: Web, data: Path) -> None:
    """Serve until cancelled."""
    listener = listen(web.host, web.port)
    if not is_loopback(web.host):
        log.warning("there is no sign-in yet: whoever reaches %s:%s acts as the owner", web.host, web.port)
    app = build(bus, web, data / "web")
    config = uvicorn.Config(
        Guard(app, web.host),
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSING,
    )
    server = Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        await asyncio.shield(serving)
    finally:
        server.should_exit = True
        with anyio.CancelScope(shield=True):
            await asyncio.wait([serving], timeout=2 * CLOSING)
        listener.close()


def build(bus: Bus, web: Web, data: Path) -> FastAPI:
    """The app with all its routes. NiceGUI keeps one app per process, so call it once."""
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    data.chmod(0o700)
    os.environ["NICEGUI_STORAGE_PATH"] = str(data / "storage")  # read when nicegui is imported
    from fastapi import FastAPI
    from nicegui import ui
    from starlette.staticfiles import StaticFiles

    from .page import page

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/healthz", lambda: {"status": "ok"})
    app.add_route("/upload", Uploads(bus, data / "uploads", web.upload_limit).put, methods=["PUT"])
    app.mount("/static", StaticFiles(directory=STATIC))
    ui.page("/")(lambda: page(bus, web))
    ui.run_with(
        app,
        title="AIIRWKV",
        favicon=STATIC / "icon.svg",
        dark=None,
        language="en-US",
        reconnect_timeout=10,
        binding_refresh_interval=None,
        tailwind=False,
        gzip_middleware_factory=None,  # Guard reads the pages
        storage_secret=secret(data / "secret"),
        session_middleware_kwargs={"same_site": "strict"},
        show_welcome_message=False,
    )
    return app


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ServerError names what holds it up."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as exc:
        raise ServerError(
            f"the web app cannot listen on {host}:{port}: {exc.strerror}; choose another [web] port in config.toml"
        ) from None


def secret(file: Path) -> str:
    """The key that signs session cookies, made at the first start; only the owner may read it."""
    with contextlib.suppress(FileExistsError):
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(secrets.token_urlsafe(32))
    return file.read_text()
