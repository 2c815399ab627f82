"""Clients that share no code with us: a raw socket, and the official NATS client for JavaScript."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Up

HERE = Path(__file__).parents[1] / "clients"


@pytest.fixture(scope="module")
def museum(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Up:
    path = tmp_path_factory.mktemp("museum") / "museum.txt"
    path.write_text("The museum opens at nine.\nA ticket for adults costs 12 euros.\n")
    assert up.cli("index", str(path), "-c", "museum").returncode == 0
    return up


def raw(up: Up, subject: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything a NATS server asks of a client, in twelve lines."""
    host, port = up.bus.url.removeprefix("nats://").split(":")  # type: ignore[union-attr]
    with socket.create_connection((host, int(port)), timeout=60) as wire, wire.makefile("rb") as lines:
        lines.readline()
        data = json.dumps(body).encode()
        login = {"verbose": False, "headers": True, "no_responders": True, "user": up.bus.user, "pass": up.bus.password}
        wire.sendall(b"CONNECT %s\r\nSUB me.1 1\r\nPUB %s me.1 %d\r\n%s\r\n"
                     % (json.dumps(login).encode(), subject.encode(), len(data), data))  # fmt: skip
        replies = []
        while True:
            verb, *words = lines.readline().split()
            if verb in (b"MSG", b"HMSG"):
                head, size = (int(words[-2]) if verb == b"HMSG" else 0), int(words[-1])
                payload = lines.read(size + 2)[:-2]
                replies.append({"headers": payload[:head].decode(), "body": payload[head:]})
                if not payload[head:] or b"Aiirwkv-Sequence" not in payload[:head]:
                    return replies


def test_a_raw_socket_asks_streams_and_hears_of_errors(museum: Up) -> None:
    [reply] = raw(museum, "aiirwkv.embed", {"texts": ["hello"]})
    assert len(json.loads(reply["body"])["vectors"][0]) == 384
    [reply] = raw(museum, "aiirwkv.search", {"query": "ticket", "collections": ["museum"]})
    assert json.loads(reply["body"])["hits"][0]["document"] == "museum.txt"
    question = {"question": "How much is a ticket for adults?", "collections": ["museum"]}
    [reply] = raw(museum, "aiirwkv.chat", question | {"stream": False})
    assert "12 euros" in json.loads(reply["body"])["answer"]
    *pieces, last = raw(museum, "aiirwkv.chat", question)
    assert last["body"] == b"" and json.loads(pieces[-1]["body"])["answer"]["citations"][0]["number"] == 1
    [receipt] = raw(museum, "aiirwkv.job.index", {"collection": "museum", "sources": [{"text": "Dogs stay outside."}]})
    assert json.loads(receipt["body"])["stream"] == "AIIRWKV_JOBS"
    [reply] = raw(museum, "aiirwkv.embed", {"textss": []})
    assert "Nats-Service-Error-Code: 400" in reply["headers"]
    [reply] = raw(museum, "aiirwkv.nothing", {})
    assert "503" in reply["headers"].splitlines()[0]
    [reply] = raw(museum, "$SRV.INFO.aiirwkv", {})
    assert json.loads(reply["body"])["type"] == "io.nats.micro.v1.info_response"


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JavaScript client, installed."""
    if not shutil.which("npm"):
        pytest.skip("node is not installed here")
    folder = tmp_path_factory.mktemp("js")
    for name in ("package.json", "client.mjs"):
        shutil.copy(HERE / name, folder)
    done = subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=folder, capture_output=True,
                          text=True, timeout=100)  # fmt: skip
    if done.returncode:
        pytest.skip(f"npm cannot install the client here: {done.stderr[-300:]}")
    return folder


def test_the_official_javascript_client(museum: Up, modules: Path) -> None:
    question = {"question": "When does the museum open?", "collections": ["museum"]}
    calls: list[Any] = [
        ["embed", "aiirwkv.embed", {"texts": ["hello"]}],
        ["search", "aiirwkv.search", {"query": "ticket", "collections": ["museum"]}],
        ["chat", "aiirwkv.chat", question | {"stream": False}],
        ["stream", "aiirwkv.chat", question],
        ["job", "aiirwkv.job.index", {"collection": "museum", "sources": [{"text": "The shop sells maps."}]}],
        ["wrong", "aiirwkv.search", {"queri": "x"}],
        ["discovery"],
    ]
    arguments = [museum.bus.url or "", museum.bus.user or "", museum.bus.password or "", *map(json.dumps, calls)]
    done = subprocess.run(["node", "client.mjs", *arguments], cwd=modules, capture_output=True, text=True, timeout=100,
                          env=dict(os.environ))  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert len(out["embed"]["vectors"][0]) == 384 and out["search"]["hits"][0]["document"] == "museum.txt"
    assert "nine" in out["chat"]["answer"] and out["chat"]["citations"]
    assert "nine" in out["stream"][-1]["answer"]["answer"]
    assert out["job"]["stream"] == "AIIRWKV_JOBS" and out["wrong"]["code"] == "400"
    assert {info["name"] for info in out["discovery"]} == {"aiirwkv"} and len(out["discovery"]) >= 5
