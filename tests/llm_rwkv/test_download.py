"""Downloads from a server that breaks, lies, changes its mind, and knows who may have what."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiirwkv import BadRequest, Conflict, Forbidden, NotFound, ServiceError
from aiirwkv_llm_rwkv.shelf import disk
from aiirwkv_llm_rwkv.shelf.download import Stopped, download, stoppable
from aiirwkv_llm_rwkv.shelf.source import Source, source

from .site import Page, Site, serving

DATA = random.Random(0).randbytes(300_000)
NEWER = random.Random(1).randbytes(280_000)
PATH = "/models/a.pth"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as site:
        yield site


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "a.pth"


def fetch(site: Site, target: Path, **options: Any) -> str:
    return download(Source(site.url + PATH), target, pause=0.01, **options)


def left(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()}


def test_a_file_comes_whole_and_tells_its_progress(site: Site, target: Path) -> None:
    site.put(PATH, DATA)
    told: list[tuple[int, int]] = []
    assert fetch(site, target, progress=lambda *step: told.append(step)) == digest(DATA)
    assert target.read_bytes() == DATA and left(target) == {"a.pth", "a.pth.json"}
    assert told == sorted(told) and told[-1] == (len(DATA), len(DATA)) and {total for _, total in told} == {len(DATA)}
    assert fetch(site, target, sha256=digest(DATA)) == digest(DATA) and len(site.asked) == 1, "it was there already"


def test_what_breaks_goes_on_where_it_broke(site: Site, target: Path) -> None:
    site.put(PATH, DATA, cuts=[100_000, 0, 50_000, 120_000])
    assert fetch(site, target, sha256=digest(DATA).upper()) == digest(DATA)
    assert [asked.headers.get("range") for asked in site.asked] == [
        None, "bytes=100000-", "bytes=100000-", "bytes=150000-", "bytes=270000-",
    ]  # fmt: skip
    assert {asked.headers.get("if-range") for asked in site.asked[1:]} == {'"first"'}
    assert sum(asked.sent for asked in site.asked) == len(DATA), "nothing came twice"


def test_a_later_call_goes_on_too(site: Site, target: Path) -> None:
    site.put(PATH, DATA, always_cut=0, cuts=[200_000])
    with pytest.raises(
        ServiceError, match=r"ended after 200000 of 300000 bytes, 6 times in a row; what has come is kept"
    ):
        fetch(site, target)
    assert left(target) == {"a.pth.part", "a.pth.json"} and len(site.asked) == 6
    site.put(PATH, DATA)
    assert fetch(site, target) == digest(DATA)
    assert site.asked[-1].headers["range"] == "bytes=200000-" and site.asked[-1].sent == 100_000


@pytest.mark.parametrize("kind", ["ignores ranges", "has no tag"])
def test_where_it_cannot_go_on_it_begins_again(kind: str, site: Site, target: Path) -> None:
    if kind == "ignores ranges":
        site.put(PATH, DATA, cuts=[200_000], ranges=False)
    else:
        site.put(PATH, DATA, cuts=[200_000], etag="")
    assert fetch(site, target) == digest(DATA) and target.read_bytes() == DATA
    assert site.asked[-1].sent == len(DATA)


@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changes_on_the_way_is_not_mixed_up(if_range: bool, site: Site, target: Path) -> None:
    newer = Page(NEWER, etag='"second"', if_range=if_range)
    site.put(PATH, DATA, cuts=[200_000], later=newer)
    assert fetch(site, target) == digest(NEWER) and target.read_bytes() == NEWER


def test_a_file_that_becomes_shorter(site: Site, target: Path) -> None:
    site.put(PATH, DATA, cuts=[200_000], later=Page(DATA[:100_000], if_range=False))
    assert fetch(site, target) == digest(DATA[:100_000])


def test_a_date_tells_changes_too(site: Site, target: Path) -> None:
    date = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    site.put(PATH, DATA, cuts=[200_000], etag="", headers=date, if_range=False)
    assert fetch(site, target) == digest(DATA) and site.asked[-1].headers["if-range"] == date["Last-Modified"]
    assert site.asked[-1].sent == 100_000


def test_a_server_that_promises_more_than_it_sends(site: Site, target: Path) -> None:
    site.put(PATH, DATA, length=400_000)
    with pytest.raises(ServiceError, match=r"(ended after 300000 of 400000 bytes|became shorter).*, 6 times in a row"):
        fetch(site, target)
    assert not target.exists()


def test_a_server_that_sends_less_than_there_is(site: Site, target: Path) -> None:
    site.put(PATH, DATA, length=200_000)
    with pytest.raises(Conflict, match=f"its sha256 is {digest(DATA[:200_000])}, not {digest(DATA)}; it was deleted"):
        fetch(site, target, sha256=digest(DATA))
    assert left(target) == set()
    site.put(PATH, DATA, length=200_000, headers={"X-Linked-Size": str(len(DATA))})
    assert fetch(site, target) == digest(DATA), "the hub had said how much there is, so the rest was asked for"


def test_a_server_that_sends_more_than_the_hub_said(site: Site, target: Path) -> None:
    site.put(PATH, DATA, headers={"X-Linked-Size": "200000"})
    with pytest.raises(ServiceError, match="it sent more than the 200000 bytes it had said"):
        fetch(site, target)
    assert not target.exists()


def test_a_length_that_nobody_tells(site: Site, target: Path) -> None:
    site.put(PATH, DATA, chunked=True, cuts=[200_000, 250_000])
    told: list[tuple[int, int]] = []
    assert fetch(site, target, progress=lambda *step: told.append(step)) == digest(DATA)
    assert told[0][1] == 0 and told[-1] == (len(DATA), len(DATA))


def test_a_wrong_hash(site: Site, target: Path) -> None:
    site.put(PATH, DATA)
    with pytest.raises(Conflict, match="its sha256 is"):
        fetch(site, target, sha256="0" * 64)
    assert left(target) == set()
    with pytest.raises(BadRequest, match="64 hexadecimal digits"):
        fetch(site, target, sha256="abc")


def hub(site: Site, **said: str) -> None:
    """As model hubs do: the address sends on to where the bytes are, and says what they hash to."""
    site.put("/o/n/resolve/main/a.pth", status=302, headers={"Location": "/cdn/1?secret=2", **said})
    site.put("/cdn/1", DATA, cuts=[100_000], etag='"of the store"')


def test_a_hub_says_the_hash(site: Site, target: Path) -> None:
    there = source(hub="o/n", file="a.pth", mirror=site.url)
    hub(site, **{"X-Linked-Etag": f'"{digest(DATA)}"', "X-Linked-Size": str(len(DATA))})
    assert download(there, target, pause=0.01) == digest(DATA)
    assert [asked.path.partition("?")[0] for asked in site.asked] == ["/o/n/resolve/main/a.pth", "/cdn/1"] * 2
    target.unlink()
    hub(site, **{"X-Linked-Etag": f'"{digest(NEWER)}"'})
    with pytest.raises(Conflict, match=f"not {digest(NEWER)}"):
        download(there, target, pause=0.01)
    site.put("/o/n/resolve/main/a.pth", DATA, etag=f'"{digest(NEWER)}"', headers={"X-Repo-Commit": "1"})
    with pytest.raises(Conflict, match=f"not {digest(NEWER)}"):
        download(there, target, pause=0.01)
    before = sum(asked.sent for asked in site.asked)
    hub(site, **{"X-Linked-Etag": f'"{digest(DATA)}"'})
    with pytest.raises(Conflict, match="as the hub says, not 0000"):
        download(there, target, sha256="0" * 64)
    assert left(target) == set() and sum(asked.sent for asked in site.asked) == before, "not a byte was fetched"


def test_a_token_stays_with_the_hub(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving() as store:
        site.put("/o/n/resolve/main/a.pth", status=302, headers={"Location": f"{store.url}/x"})
        store.put("/x", DATA)
        there = source(hub="o/n", file="a.pth", mirror=site.url)
        assert "hf_secret" not in repr(there)
        download(there, target)
        assert site.asked[0].headers["authorization"] == "Bearer hf_secret"
        assert "authorization" not in store.asked[0].headers
    assert source(site.url + PATH).token == "" and source(site.url + PATH, mirror=site.url).token == "hf_secret"


@pytest.mark.parametrize(
    ("status", "error", "complaint"),
    [
        (404, NotFound, "there is no http.*404.; check the name"),
        (401, Forbidden, "401.: if it is private or gated, set HF_TOKEN"),
        (403, Forbidden, "set HF_TOKEN"),
        (400, BadRequest, "answers 400 Bad Request"),
    ],
)
def test_what_a_server_refuses(status: int, error: type[Exception], complaint: str, site: Site, target: Path) -> None:
    site.put(PATH, b"{}", status=status)
    with pytest.raises(error, match=complaint):
        fetch(site, target)
    assert len(site.asked) == 1 and left(target) == set()


def test_a_busy_server_is_asked_again(site: Site, target: Path) -> None:
    busy = Page(status=503, later=Page(status=429, headers={"Retry-After": "1"}, later=Page(DATA)))
    site.pages[PATH] = busy
    began = time.monotonic()
    assert fetch(site, target) == digest(DATA) and time.monotonic() - began > 1
    site.put("/down", status=500)
    with pytest.raises(ServiceError, match="answers 500, 6 times in a row"):
        download(Source(f"{site.url}/down"), target.with_name("b"), pause=0.0)


def test_a_host_that_is_not_there(target: Path) -> None:
    with pytest.raises(ServiceError, match=r"127.0.0.1: .*refused, 6 times in a row"):
        download(Source("http://127.0.0.1:9/a.pth"), target, pause=0.0)


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("file:///etc/passwd", "neither http:// nor https://"),
        ("ftp://example.org/a", "neither http:// nor https://"),
        (PATH, "without an end"),
        ("", "without an end"),
        ("http://\x00/", "no address of a file"),
    ],
)
def test_a_redirect_leads_nowhere_else(location: str, complaint: str, site: Site, target: Path) -> None:
    site.put(PATH, status=302, headers={"Location": location})
    with pytest.raises(BadRequest, match=complaint):
        fetch(site, target)
    assert left(target) == set()


def test_a_web_page_is_no_model(site: Site, target: Path) -> None:
    site.put(PATH, b"<html>", headers={"Content-Type": "text/html; charset=utf-8"})
    with pytest.raises(BadRequest, match="is a web page"):
        fetch(site, target)


def test_a_full_disk(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.put(PATH, DATA, cuts=[200_000])
    free = len(DATA) + disk.ROOM
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(ServiceError, match=r"the disk of .* is full: 64 MB are free, 64 MB are needed; make room"):
        fetch(site, target, copies=1)
    assert not target.with_name("a.pth.part").exists()
    assert fetch(site, target) == digest(DATA)


def test_a_disk_that_fills_up_meanwhile(site: Site, target: Path) -> None:
    site.put(PATH, DATA)
    target.with_name("a.pth.part").symlink_to("/dev/full")
    target.with_name("a.pth.json").write_text(f'{{"url": "{site.url + PATH}"}}')
    with pytest.raises(ServiceError, match=r"a.pth.part cannot be written: No space left on device"):
        fetch(site, target)


def test_only_one_writes(site: Site, target: Path) -> None:
    site.put(PATH, DATA, pause=0.005)
    first: list[str] = []
    thread = threading.Thread(target=lambda: first.append(fetch(site, target)))
    thread.start()
    while not target.with_name("a.pth.part").exists():
        time.sleep(0.005)
    with pytest.raises(Conflict, match=r"a.pth is being written already"):
        fetch(site, target)
    thread.join()
    assert first == [digest(DATA)]


def test_the_lock_of_a_dead_process_holds_nobody_up(site: Site, target: Path) -> None:
    site.put(PATH, DATA)
    target.with_name("a.pth.lock").touch()
    target.with_name("a.pth.json").write_text("{damaged")
    target.with_name("a.pth.part").write_bytes(b"from elsewhere")
    assert fetch(site, target) == digest(DATA) and left(target) == {"a.pth", "a.pth.json"}


async def test_cancelling_stops_it_and_keeps_what_has_come(site: Site, target: Path) -> None:
    site.put(PATH, DATA, pause=0.01)
    part = target.with_name("a.pth.part")
    task = asyncio.ensure_future(stoppable(lambda stop: fetch(site, target, stop=stop)))
    while not (part.exists() and part.stat().st_size):
        await asyncio.sleep(0.01)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 0.9 and left(target) == {"a.pth.part", "a.pth.json"}
    come = part.stat().st_size
    assert 0 < come < len(DATA)
    site.put(PATH, DATA)
    assert await stoppable(lambda stop: fetch(site, target, stop=stop)) == digest(DATA)
    assert site.asked[-1].sent == len(DATA) - come
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match="what has come is kept"):
        fetch(site, target.with_name("b"), stop=stop)


def test_where_a_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    there = source(hub="BlinkDL/rwkv7-g1", file="sub folder/g1.pth")
    assert there.url == "https://huggingface.co/BlinkDL/rwkv7-g1/resolve/main/sub%20folder/g1.pth"
    assert source("https://huggingface.co/o/n/blob/main/a.pth").url == "https://huggingface.co/o/n/resolve/main/a.pth"
    assert source("https://example.org/o/blob/a.pth").url == "https://example.org/o/blob/a.pth"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert source(hub="o/n", file="a.pth").url == "https://mirror.example/o/n/resolve/main/a.pth"
    assert source(hub="o/n", file="a.pth", mirror="http://m").url == "http://m/o/n/resolve/main/a.pth"
    there = Source("https://example.org/x/a.pth?token=1#2")
    assert (there.file, there.public) == ("a.pth", "https://example.org/x/a.pth")


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({}, "either `url` or `hub`"),
        ({"url": "http://a/b", "hub": "o/n"}, "either `url` or `hub`"),
        ({"url": "file:///etc/passwd"}, "neither http:// nor https://"),
        ({"url": "/etc/passwd"}, "neither http:// nor https://"),
        ({"url": "http:///a.pth"}, "no address"),
        ({"url": "http://[::1/a.pth"}, "no address"),
        ({"url": "http://host:99999999/a"}, "no address"),
        ({"url": "http://host/a b\r\nHost: x"}, "no address"),
        ({"url": "http://hôst/a"}, "no address"),
        ({"url": "http://ada:secret@host/a.pth"}, "no user and password"),
        ({"hub": "nobody", "file": "a.pth"}, "must be owner/name"),
        ({"hub": "../x", "file": "a.pth"}, "must be owner/name"),
        ({"hub": "o/n"}, "must name a file"),
        ({"hub": "o/n", "file": "../../../api/whoami"}, "must name a file"),
    ],
)
def test_what_is_no_place_of_a_file(asked: dict[str, str], complaint: str) -> None:
    with pytest.raises(BadRequest, match=complaint):
        source(**asked)
