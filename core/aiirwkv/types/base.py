"""Requests, replies and streams in general."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Generic, Self, TypeVar

import msgspec

from ..errors import BadRequest

R = TypeVar("R")
C = TypeVar("C")


class Reply(msgspec.Struct):
    """Base of replies. Unknown fields are ignored, so a newer worker can say more."""


class Piece(Reply, omit_defaults=True):
    """Base of the pieces of a stream, kept small on the wire."""


class Request(msgspec.Struct, Generic[R], omit_defaults=True, forbid_unknown_fields=True):
    """Base of requests. Unknown fields are refused, so a typo is an error and not a default."""

    hook: ClassVar[str]
    reply: ClassVar[Any]

    def parts(self) -> list[Self]:
        """The requests that `Bus.call` really sends: itself, or several that fit one message each."""
        return [self]

    def join(self, replies: list[R]) -> R:
        """The reply to `self`, from the replies to its parts."""
        return replies[0]

    def shape(self, reply: R) -> R:
        """The reply in the form this request asked for; the worker calls it before sending."""
        return reply

    def need(self, *fields: str) -> None:
        """Refuse the request unless each of these optional fields says something."""
        if missing := [field for field in fields if getattr(self, field) in (None, "", [], {})]:
            action = f" with action {do!r}" if (do := getattr(self, "action", None)) else ""
            raise BadRequest(f"{self.hook}{action} needs `{'`, `'.join(missing)}`")


class StreamRequest(Request[R], Generic[C, R], kw_only=True):
    """A request answered by a stream of pieces C, or, with `stream` false, by one whole reply R."""

    chunk: ClassVar[Any]
    stream: bool = True


def fold(request: StreamRequest[C, R], chunks: Iterable[C]) -> R:
    """The whole reply that a stream's pieces make."""
    whole: R = request.reply.fold(list(chunks))
    return whole
