"""
Every error AIIRWKV raises.

AiirwkvError
├─ ConfigError                config.toml, an option or the data directory says something we cannot use
├─ PluginError                a plugin cannot be found, imported, configured or started
├─ ServerError                the nats-server or a worker process cannot be started or reached
└─ ServiceError          500  a request failed; travels as Nats-Service-Error headers
   ├─ BadRequest         400  the request itself is wrong: a typo, a wrong type, a missing field
   ├─ Unauthorized       401  the signed claim is forged, expired, or cannot be checked
   ├─ Forbidden          403  the caller is known and may not do this
   ├─ NotFound           404  no such thing, or none that this caller may see
   ├─ Conflict           409  the thing exists already, or is in a state that forbids this
   ├─ TooLarge           413  a request or reply does not fit one message
   ├─ Busy               429  the worker's queue is full; try again or start another worker
   ├─ StreamBroken       502  a stream went silent, lost a chunk, or its worker died
   ├─ NoWorker           503  nobody serves this subject now
   └─ DeadlineExceeded   504  the time given ran out

The messages say what, where, why and what to do; they are shown to people as they are.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AiirwkvError",
    "BadRequest",
    "Busy",
    "ConfigError",
    "Conflict",
    "DeadlineExceeded",
    "Forbidden",
    "NoWorker",
    "NotFound",
    "PluginError",
    "ServerError",
    "ServiceError",
    "StreamBroken",
    "TooLarge",
    "Unauthorized",
]


class AiirwkvError(Exception):
    """Base of all errors."""


class ConfigError(AiirwkvError):
    """config.toml, an option or the data directory says something we cannot use."""


class PluginError(AiirwkvError):
    """A plugin cannot be found, imported, configured or started."""


class ServerError(AiirwkvError):
    """The nats-server or a worker process cannot be started or reached."""


class ServiceError(AiirwkvError):
    """A request failed in the service that handled it."""

    code: ClassVar[int] = 500


class BadRequest(ServiceError):
    """The request itself is wrong: a typo, a wrong type, a missing field."""

    code = 400


class Unauthorized(ServiceError):
    """The signed claim is forged, expired, or cannot be checked."""

    code = 401


class Forbidden(ServiceError):
    """The caller is known and may not do this."""

    code = 403


class NotFound(ServiceError):
    """No such thing, or none that this caller may see."""

    code = 404


class Conflict(ServiceError):
    """The thing exists already, or is in a state that forbids this."""

    code = 409


class TooLarge(ServiceError):
    """A request or reply does not fit one message."""

    code = 413


class Busy(ServiceError):
    """The worker's queue is full; try again or start another worker."""

    code = 429


class StreamBroken(ServiceError):
    """A stream went silent, lost a chunk, or its worker died."""

    code = 502


class NoWorker(ServiceError):
    """Nobody serves this subject now."""

    code = 503


class DeadlineExceeded(ServiceError):
    """The time given ran out."""

    code = 504


BY_CODE: dict[int, type[ServiceError]] = {
    cls.code: cls
    for cls in (
        ServiceError,
        BadRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        Conflict,
        TooLarge,
        Busy,
        StreamBroken,
        NoWorker,
        DeadlineExceeded,
    )
}
