"""Users, and the signed claims that say who they are. Passwords and sign-in are not here: who may ask, gets a claim."""

from __future__ import annotations

import time
from typing import Self

from aiirwkv import BadRequest, Context, Forbidden, Plugin, User, Users, UsersReply, hookimpl
from aiirwkv.identity import mint, publish_key

from .directory import Directory
from .key import private_key

__all__ = ["Accounts"]

LONGEST = 30 * 86400.0
"""Seconds a claim may be valid that an owner asks for."""
OWN = 86400.0
"""Seconds a claim may be valid that a user asks for: whoever was removed cannot go on for long."""


class Accounts(Plugin):
    """Keeps users and the key that signs their claims, and publishes the public key on the bus."""

    async def __aenter__(self) -> Self:
        folder = self.data / "accounts"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.key = private_key(folder / "key")
        self.directory = Directory(folder / "users.db")
        await publish_key(self.bus, self.key.public_key().public_bytes_raw())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.directory.close()

    @hookimpl
    async def users(self, request: Users, ctx: Context) -> UsersReply:
        match request.action:
            case "me":
                return UsersReply([ctx.user])
            case "claim":
                return self._claim(request, ctx.user)
        if "owner" not in ctx.user.roles:
            raise Forbidden(f"users, {request.action}: only an owner may do this, and {ctx.user.name!r} is none")
        match request.action:
            case "list":
                return UsersReply(self.directory.all())
            case "add":
                request.need("name")
                return UsersReply([self.directory.add(request.name, request.roles)])
            case "remove":
                request.need("name")
                return UsersReply([self.directory.remove(request.name)])

    def _claim(self, request: Users, caller: User) -> UsersReply:
        name = request.name or caller.name
        if name != caller.name and "owner" not in caller.roles:
            raise Forbidden(f"users, claim: {caller.name!r} may have a claim for itself only, not for {name!r}")
        longest = LONGEST if "owner" in caller.roles else OWN
        if not 1 <= request.seconds <= longest:
            raise BadRequest(f"users, claim: `seconds` is {request.seconds:g}, and must be from 1 to {longest:.0f}")
        user = self.directory.get(name)
        expires = time.time() + request.seconds
        return UsersReply([user], mint(self.key, user, expires), expires)
