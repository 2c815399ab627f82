"""A web server that breaks, lies and changes its mind as a test tells it to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Page:
    """What is at an address. `cuts`: after how many bytes of its body each connection breaks, one after the other."""

    data: bytes = b""
    etag: str = '"first"'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    always_cut: int | None = None
    ranges: bool = True
    if_range: bool = True
    length: int | None = None
    chunked: bool = False
    pause: float = 0.0
    later: Page | None = None
    """What is there from the second request on."""


@dataclass
class Asked:
    path: str
    headers: dict[str, str]
    sent: int = 0


class Site:
    def __init__(self, url: str) -> None:
        self.url = url
        self.pages: dict[str, Page] = {}
        self.asked: list[Asked] = []

    def put(self, path: str, data: bytes = b"", **said: object) -> str:
        self.pages[path] = Page(data, **said)  # type: ignore[arg-type]
        return self.url + path


@contextmanager
def serving() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked = Asked(self.path, {name.lower(): value for name, value in self.headers.items()})
            site.asked.append(asked)
            page = site.pages.get(path, Page(b"no such page", status=404))
            if page.later:
                site.pages[path] = page.later
            data, status, headers = page.data, page.status, dict(page.headers)
            if page.etag:
                headers["ETag"] = page.etag
            begin = 0
            wanted = asked.headers.get("range", "")
            same = not page.if_range or asked.headers.get("if-range") == page.etag
            if wanted and status == 200 and page.ranges and same:
                begin = int(wanted.removeprefix("bytes=").rstrip("-"))
                status = 206 if begin < len(data) else 416
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            body = data[begin:] if status != 416 else b""
            self.close_connection = True
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if page.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(len(body) if page.length is None else page.length))
            self.end_headers()
            end = page.cuts.pop(0) if page.cuts else page.always_cut
            whole, body = end is None, body[:end]
            step = 4096 if page.pause else 1 << 16
            try:
                for at in range(0, len(body), step):
                    piece = body[at : at + step]
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if page.chunked else piece)
                    asked.sent += len(piece)
                    time.sleep(page.pause)
                if page.chunked and whole:
                    self.wfile.write(b"0\r\n\r\n")
            except OSError:  # the client left
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
