"""RAG in one click for RWKV: a small core, a bus, and plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import *  # noqa: F403
from .hooks import API as API
from .hooks import Context as Context
from .hooks import Plugin as Plugin
from .hooks import hookimpl as hookimpl
from .hooks import may as may
from .types import *  # noqa: F403

if TYPE_CHECKING:
    from .bus import Bus as Bus

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Bus":  # it brings the NATS client, which a plugin that is only imported does not need
        from .bus import Bus

        return Bus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
