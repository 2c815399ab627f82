"""Who may talk to the web app: checks of Host and Origin, and the headers that confine its pages."""

from __future__ import annotations

import ipaddress
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
POLICY = (
    # NiceGUI's client evaluates handlers that the server sends; scripts in the page itself need the nonce
    "default-src 'none'; script-src 'self' 'unsafe-eval' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hostname(host: str) -> str:
    """The name in a Host header or an Origin, without scheme and port."""
    host = host.rpartition("://")[2]
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


class Guard:
    """
    Outermost layer of the app, which is served on `host`.

    On loopback only loopback names are answered, so that a foreign name which is made to point here (DNS rebinding)
    gets nothing; a foreign Origin never gets anything.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._loopback = is_loopback(host)

    def refusal(self, headers: Headers) -> str:
        """Why a request with these headers is refused; empty if it is not."""
        host = headers.get("host", "")
        if self._loopback and not is_loopback(hostname(host)):
            return f"this app answers on this machine only, not as {hostname(host)!r}; open it as http://127.0.0.1"
        origin = headers.get("origin")
        if origin is not None and origin.rpartition("://")[2] != host:
            return f"a page of another origin ({origin}) may not use this app"
        return ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        if reason := self.refusal(Headers(scope=scope)):
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008, "reason": "foreign origin"})
            return await PlainTextResponse(reason, 403, HEADERS)(scope, receive, send)
        await self._app(scope, receive, _Confined(send) if scope["type"] == "http" else send)


class _Confined:
    """Adds the security headers to a response and, in a page, the nonce to its scripts."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._nonce = secrets.token_urlsafe(16)
        self._start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers.update(HEADERS)
            headers["Content-Security-Policy"] = POLICY.format(nonce=self._nonce)
            if headers.get("content-type", "").startswith("text/html"):
                self._start, self._page = message, b""
                return None
        elif self._start is not None:
            self._page += message.get("body", b"")
            if message.get("more_body"):
                return None
            # NiceGUI escapes "<" in all that is said in its pages: each "<script" is one of its own
            page = self._page.replace(b"<script", f'<script nonce="{self._nonce}"'.encode())
            MutableHeaders(raw=self._start["headers"])["content-length"] = str(len(page))
            await self._send(self._start)
            self._start = None
            message = {"type": "http.response.body", "body": page}
        await self._send(message)
