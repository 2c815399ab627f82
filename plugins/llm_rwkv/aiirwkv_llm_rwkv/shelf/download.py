"""
One file from the web or a model hub, however often the transfer breaks.

Whoever may call this makes this machine ask for any address it can reach, also inside its own network. So only the
owner may: the plugin sees to that. Here, only http and https are spoken, wherever a redirect leads.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

import msgspec
from aiirwkv.errors import BadRequest, Conflict, Forbidden, NotFound, ServiceError

from .disk import file_sha256, need_room, only_one
from .source import Source, checked

__all__ = ["Stopped", "download", "stoppable"]

TIMEOUT = 20.0
"""Seconds without a byte after which a connection counts as broken."""
TRIES = 6
"""Connections in a row that may bring nothing new."""
CHUNK = 1 << 20

Progress = Callable[[int, int], None]
T = TypeVar("T")


class Stopped(ServiceError):
    """It was told to stop; what has come so far is kept."""


class Broken(Exception):
    """A connection that is worth another try, after so many seconds if the server says how many."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


async def stoppable(work: Callable[[threading.Event], T]) -> T:
    """Run it in a thread. Cancelling sets the event, and waits a moment for the work to end."""
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task}, timeout=1)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody asks for it any more
        raise


class Record(msgspec.Struct):
    """What a part of a file is a part of; kept beside it. `tag`: an ETag or a date, to tell if the file changes."""

    url: str
    tag: str = ""
    total: int = 0
    sha256: str = ""


def download(
    source: Source,
    target: Path,
    *,
    sha256: str = "",
    copies: int = 0,
    progress: Progress = lambda done, total: None,
    stop: threading.Event | None = None,
    pause: float = 1.0,
) -> str:
    """
    Fetch the file to `target` and return its sha256, which is checked if it is given or the hub tells it.

    A transfer that breaks is taken up where it broke, also by a later call: until the file is whole, it is
    `target`.part, with a record in `target`.json that stays until the caller removes it. `copies` of the file must fit
    the disk besides. `progress` gets bytes and their total (0: unknown); `pause`: seconds before the second try,
    doubled before each further one.

    Raises BadRequest, NotFound, Forbidden, Conflict (somebody else writes it; a wrong hash, after which nothing is
    left), Stopped, and ServiceError (the server or the disk: call again).
    """
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise BadRequest(f"models: `sha256` is {sha256!r}; it must have 64 hexadecimal digits")
    with only_one(target.with_name(f"{target.name}.lock"), target.name):
        return _Transfer(source, target, sha256.lower(), copies, progress, stop or threading.Event()).run(pause)


class _Transfer:
    """One file on its way."""

    def __init__(
        self, source: Source, target: Path, sha256: str, copies: int, progress: Progress, stop: threading.Event
    ) -> None:
        self.source, self.target, self.copies, self.progress, self.stop = source, target, copies, progress, stop
        self.asked = sha256
        self.size = 0  # what the hub says before it redirects
        self.part = target.with_name(f"{target.name}.part")
        self.note = target.with_name(f"{target.name}.json")
        try:
            self.record = msgspec.json.decode(self.note.read_bytes(), type=Record)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            self.record = Record("")
        if self.record.url != source.url:
            self.forget()
        self.promised = sha256 or self.record.sha256

    @property
    def done(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def forget(self) -> None:
        """What has come is of no use."""
        self.record = Record(self.source.url)
        for path in (self.part, self.note, self.target):
            path.unlink(missing_ok=True)

    def run(self, pause: float) -> str:
        if not self.target.exists():
            self.fetch(pause)
            os.replace(self.part, self.target)
        found = file_sha256(self.target)
        if self.promised and found != self.promised:
            self.forget()
            raise Conflict(
                f"models: {self.source.public} was fetched, but its sha256 is {found}, not {self.promised}; it was "
                "deleted: ask its publisher which one is right, or pull it again"
            )
        return found

    def fetch(self, pause: float) -> None:
        """Connect until the file is whole, or several times in a row bring nothing new."""
        reached, failures = self.done, 0
        while True:
            try:
                return self.connect()
            except Broken as broken:
                if self.done > reached:
                    reached, failures = self.done, 0
                failures += 1
                if failures == TRIES:
                    raise ServiceError(
                        f"models: {self.source.public} cannot be fetched: {broken}, {TRIES} times in a row; what has "
                        "come is kept, pull it again later"
                    ) from None
                self.wait(max(broken.wait, min(pause * 2 ** (failures - 1), 30.0)))

    def wait(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Stopped("models: it was stopped; what has come is kept")

    def connect(self) -> None:
        """Fetch what is missing, over one connection. Raises Broken when it ends too early."""
        done = self.done
        if done and done == self.record.total:
            return
        if done and not self.record.tag:  # it cannot be told whether it is still the same file
            done = 0
        response = self.open(done)
        with response:
            begin = self.begin(response, done)
            self.need_room(begin)
            try:
                with self.part.open("ab" if begin else "wb") as file:
                    self.receive(response, file.write, begin)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                self.failed_writing(error)

    def open(self, done: int) -> http.client.HTTPResponse:
        """The answer to a request for what follows `done` bytes, wherever that leads."""
        url, origin = self.source.url, urlsplit(self.source.url)[:2]
        headers = {"User-Agent": "aiirwkv", "Accept-Encoding": "identity"}
        if done:
            headers |= {"Range": f"bytes={done}-", "If-Range": self.record.tag}
        for _ in range(10):
            parts = checked(url)
            secret = self.source.token and parts[:2] == origin
            own = {"Authorization": f"Bearer {self.source.token}"} if secret else {}
            try:
                request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers=headers | own)
                response: http.client.HTTPResponse = _opener().open(request, timeout=TIMEOUT)
            except (OSError, http.client.HTTPException) as error:
                raise _broken(error, parts.hostname) from None
            self.listen(response)
            if response.status not in (301, 302, 303, 307, 308):
                return response
            response.close()
            url = urljoin(url, response.headers.get("Location", ""))
            if parts.scheme == "https" and not url.startswith("https:"):
                raise BadRequest(f"models: {self.source.public} leads away from https, to {urlsplit(url).netloc}")
        raise BadRequest(f"models: {self.source.public} leads from one address to the next without an end")

    def listen(self, response: http.client.HTTPResponse) -> None:
        """What a hub says of the file itself, before it sends us to where the bytes are."""
        headers = response.headers
        tag = headers.get("X-Linked-Etag") or (headers.get("ETag") if headers.get("X-Repo-Commit") else "") or ""
        if found := re.fullmatch(r'(?:W/)?"?([0-9a-fA-F]{64})"?', tag):
            self.promised = found[1].lower()
            if self.asked and self.asked != self.promised:
                self.forget()
                raise Conflict(
                    f"models: {self.source.public} has the sha256 {self.promised}, as the hub says, not {self.asked}"
                )
        self.size = _number(headers.get("X-Linked-Size")) or self.size

    def begin(self, response: http.client.HTTPResponse, done: int) -> int:
        """Where in the file the body begins; writes down what file it is of. Raises what a bad status means."""
        status, headers, host = response.status, response.headers, urlsplit(self.source.url).hostname
        if status in (401, 403):
            raise Forbidden(
                f"models: {host} does not give out {self.source.public} ({status}): if it is private or gated, set "
                "HF_TOKEN, for the worker, to a token that may read it"
            )
        if status in (404, 410):
            raise NotFound(f"models: there is no {self.source.public} ({status}); check the name of the file")
        if status in (408, 425, 429) or status >= 500:
            raise Broken(f"{host} answers {status}", min(_number(headers.get("Retry-After")), 60))
        tag = headers.get("ETag", "")
        tag = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")
        if status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            total = _number(found[2]) if found else 0
            same = tag in ("", self.record.tag) and total in (0, self.record.total)
            if not found or int(found[1]) != done or not same:
                self.forget()
                raise Broken("the file changed on the way")
            return done
        if status == 416:
            self.forget()
            raise Broken("the file became shorter on the way")
        if status != 200:
            raise BadRequest(f"models: {host} answers {status} {response.reason} to {self.source.public}")
        if headers.get_content_type() == "text/html":
            raise BadRequest(f"models: {self.source.public} is a web page, not a file to download")
        total = self.size or _number(headers.get("Content-Length"))
        self.record = Record(self.source.url, tag, total, self.promised)
        self.note.write_bytes(msgspec.json.encode(self.record))
        return 0

    def receive(self, response: http.client.HTTPResponse, write: Callable[[bytes], object], done: int) -> None:
        record, told, checked = self.record, 0.0, done
        while True:
            self.wait(0)
            try:
                chunk = response.read1(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _broken(error, urlsplit(self.source.url).hostname) from None
            if not chunk:
                break
            write(chunk)
            done += len(chunk)
            if record.total and done > record.total:
                self.forget()
                raise Broken(f"it sent more than the {record.total} bytes it had said")
            if time.monotonic() - told > 0.2:
                told = time.monotonic()
                self.progress(done, record.total)
            if done - checked > 64 * CHUNK:
                checked = done
                self.need_room(done)
        if done < record.total:
            raise Broken(f"the connection ended after {done} of {record.total} bytes")
        record.total = done
        self.progress(done, done)

    def need_room(self, done: int) -> None:
        need_room(self.part.parent, max(self.record.total - done, 0) + self.copies * self.record.total)

    def failed_writing(self, error: OSError) -> NoReturn:
        if error.errno == errno.ENOSPC:
            self.need_room(self.done)
        raise ServiceError(f"models: {self.part} cannot be written: {error.strerror}") from None


def _opener() -> OpenerDirector:
    """Speaks http and https, through the proxies of the environment, and leaves redirects and errors to us."""
    opener = OpenerDirector()
    for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    return opener


def _broken(error: Exception, host: str | None) -> Exception:
    import ssl

    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return Forbidden(f"models: {host} has no valid certificate: {reason.verify_message}")
    return Broken(f"{host}: {reason or type(error).__name__}")


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0
