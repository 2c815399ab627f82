"""Who may talk to the web app, and how its pages are confined."""

from __future__ import annotations

import re

import httpx
import pytest
from aiirwkv_webui.guard import Guard, hostname, is_loopback
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect


async def page(request: Request) -> HTMLResponse:
    return HTMLResponse("<script>a</script><p>&lt;script</p><script type='module'>b</script>")


async def text(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


APP = Starlette(
    routes=[Route("/", page), Route("/text", text, methods=["GET", "PUT"]), WebSocketRoute("/socket", socket)]
)


def client(host: str = "127.0.0.1", name: str = "127.0.0.1:8080") -> TestClient:
    return TestClient(Guard(APP, host), base_url=f"http://{name}")


@pytest.mark.parametrize("name", ["127.0.0.1:8080", "localhost:8080", "localhost", "[::1]:8080"])
def test_loopback_names_are_answered(name: str) -> None:
    assert client(name=name).get("/text").text == "ok"


@pytest.mark.parametrize(
    "name", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "192.168.0.7"]
)
def test_on_loopback_another_name_gets_nothing(name: str) -> None:
    reply = client(name=name).get("/text")
    assert reply.status_code == 403 and "127.0.0.1" in reply.text


def test_on_an_open_host_other_names_are_answered() -> None:
    assert client(host="0.0.0.0", name="rag.lan").get("/text").text == "ok"


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:9999", "null", "http://evil.example:8080"])
def test_a_foreign_origin_gets_nothing(origin: str) -> None:
    assert client().put("/text", headers={"Origin": origin}).status_code == 403
    with pytest.raises(WebSocketDisconnect):
        with client().websocket_connect("ws://127.0.0.1:8080/socket", headers={"Origin": origin}):
            pass


def test_our_own_origin_is_served() -> None:
    origin = {"Origin": "http://127.0.0.1:8080"}
    assert client().put("/text", headers=origin).text == "ok"
    with client().websocket_connect("ws://127.0.0.1:8080/socket", headers=origin) as websocket:
        assert websocket.receive_text() == "hello"


def test_pages_are_confined() -> None:
    reply = client().get("/")
    policy = reply.headers["content-security-policy"]
    nonce = re.search(r"'nonce-([^']+)'", policy)
    assert nonce and reply.text.count(f'<script nonce="{nonce[1]}"') == 2 and "&lt;script<" in reply.text
    assert int(reply.headers["content-length"]) == len(reply.content)
    assert "http" not in policy and "frame-ancestors 'none'" in policy and "'unsafe-inline'" not in policy.split(";")[1]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert f"'nonce-{nonce[1]}'" not in client().get("/").headers["content-security-policy"]
    assert "content-security-policy" in client().get("/text").headers


def test_hosts() -> None:
    assert hostname("[::1]:80") == "::1" and hostname("http://a.b:80") == "a.b"
    assert is_loopback("127.8.9.1") and not is_loopback("0.0.0.0") and not is_loopback("localhost.evil.example")


async def test_a_refusal_is_confined_too() -> None:
    transport = httpx.ASGITransport(Guard(APP, "127.0.0.1"))
    async with httpx.AsyncClient(transport=transport, base_url="http://evil.example") as foreign:
        assert (await foreign.get("/")).headers["x-frame-options"] == "DENY"
