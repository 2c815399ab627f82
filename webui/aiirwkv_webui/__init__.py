"""The web app: one more client of the bus, in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiirwkv.bus import Bus
    from aiirwkv.config import Web

__all__ = ["serve"]


async def serve(bus: Bus, web: Web, data: Path) -> None:
    """
    Serve the web app on web.host:web.port until cancelled; it then closes its connections within two seconds.

    What it keeps (sessions, uploads on their way) lies in `data`/web. Raises ServerError if the port is taken.
    """
    from .server import run

    await run(bus, web, data)
