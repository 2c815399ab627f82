"""Connect to NATS as we need it: for good, with credentials and TLS, and with a flush that is a fence."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import nats.errors
from nats.aio.client import Client

from .config import BusConfig
from .errors import ServerError

log = logging.getLogger(__name__)

CONNECT = 4.0
"""Seconds that the first connection may take."""


class FencedClient(Client):
    """
    A NATS client whose flush is a fence.

    nats-py (2.16) writes flush's PING ahead of the commands still in its buffer, so the PONG proves nothing about
    them: a subscription may not be there yet, and drain may drop a request. Write the buffer first. A flush that is
    cancelled half-way breaks the read loop when its PONG arrives, so it is shielded.
    """

    async def flush(self, timeout: int = 10) -> None:
        with anyio.CancelScope(shield=True):
            await self._flush_pending(force_flush=True)
            await super().flush(timeout)


@asynccontextmanager
async def connection(config: BusConfig, name: str) -> AsyncIterator[Client]:
    """A connection for the length of the block; ServerError says why there is none."""
    nc = FencedClient()
    complaints: list[str] = []

    async def on_error(exc: Exception) -> None:
        complaints.append(str(exc) or type(exc).__name__)
        if nc.is_connected:
            log.warning("bus: %s", complaints[-1])

    try:
        with anyio.fail_after(CONNECT):
            await nc.connect(
                config.url or "nats://127.0.0.1:4222",
                name=f"aiirwkv-{name}",
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.5,  # type: ignore[arg-type]
                ping_interval=20,
                allow_reconnect=True,
                connect_timeout=5,
                error_cb=on_error,
                **_security(config),
            )
    except (OSError, nats.errors.Error, TimeoutError) as exc:
        with anyio.move_on_after(1, shield=True):
            await nc.close()
        why = "; ".join(dict.fromkeys(complaints)) or str(exc) or "no answer"
        raise ServerError(
            f"cannot reach the bus at {address(config)}: {why}; is it running, and are [bus] url and credentials right?"
        ) from None
    try:
        yield nc
    finally:
        # A cancelled drain would swallow the cancellation and leave the connection half open.
        with anyio.move_on_after(10, shield=True):
            await (nc.drain() if nc.is_connected else nc.close())


def _security(config: BusConfig) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if config.credentials:
        options["user_credentials"] = config.credentials
    if config.user:
        options |= {"user": config.user, "password": config.password or ""}
    if config.tls_ca or config.tls_cert:
        import ssl

        try:
            context = ssl.create_default_context(cafile=config.tls_ca)
            if config.tls_cert:
                context.load_cert_chain(config.tls_cert, config.tls_key)
        except OSError as exc:
            raise ServerError(f"[bus] tls_ca, tls_cert or tls_key cannot be used: {exc}") from None
        options["tls"] = context
    return options


def address(config: BusConfig) -> str:
    """The URL without secrets, for people."""
    scheme, _, rest = (config.url or "nats://127.0.0.1:4222").rpartition("://")
    return f"{scheme or 'nats'}://{rest.rpartition('@')[2]}"
