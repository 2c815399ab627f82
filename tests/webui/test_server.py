"""The server's life: it starts, keeps its secrets to itself, names a taken port, and ends when it is cancelled."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from aiirwkv import ServerError
from aiirwkv.config import Web
from aiirwkv_webui import serve
from aiirwkv_webui.server import listen


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_serve_until_cancelled(tmp_path: Path) -> None:
    web: Web = Web(port=free_port())
    bus: Any = None  # no page is opened here
    async with anyio.create_task_group() as tasks, httpx.AsyncClient(base_url=f"http://127.0.0.1:{web.port}") as client:
        tasks.start_soon(serve, bus, web, tmp_path)
        with anyio.fail_after(20):
            while True:
                try:
                    reply = await client.get("/healthz")
                    break
                except httpx.ConnectError:
                    await anyio.sleep(0.05)
        assert reply.json() == {"status": "ok"}
        assert (await client.put("/upload", params={"name": "a"}, content=b"x")).status_code == 400
        assert (await client.get("/static/tokens.css")).status_code == 200
        assert (await client.get("/docs")).headers["content-type"].startswith("text/html")  # no API browser
        assert "swagger" not in (await client.get("/docs")).text
        assert (tmp_path / "web").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "web" / "secret").stat().st_mode & 0o777 == 0o600
        began = time.monotonic()
        tasks.cancel_scope.cancel()
    assert time.monotonic() - began < 2
    listen("127.0.0.1", web.port).close()


def test_a_taken_port_is_named() -> None:
    with listen("127.0.0.1", 0) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ServerError, match=f"{port}.*config.toml"):
            listen("127.0.0.1", port)


def test_importing_the_package_is_light() -> None:
    heavy = (
        "import sys, aiirwkv_webui; print([m for m in ('nicegui', 'fastapi', 'uvicorn', 'nats') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout.strip() == "[]"
