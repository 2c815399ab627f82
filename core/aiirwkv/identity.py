"""
Who calls: signed claims (Ed25519) that travel in a header.

`accounts` mints them and publishes its public key on the bus; workers check them. A claim is
base64url(JSON {user, roles, expires}) "." base64url(signature). Sharing is decided by `aiirwkv.may`.
"""

from __future__ import annotations

import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import TYPE_CHECKING

import msgspec

from .errors import Unauthorized
from .types import User

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from .bus import Bus

OWNER = User("owner", ("owner",))
"""The holder of the bus's credentials."""

BUCKET, KEY = "aiirwkv_identity", "public_key"
REFRESH = 30.0


class Claim(msgspec.Struct, frozen=True):
    """Who somebody is, and until when (seconds since 1970)."""

    user: str
    roles: tuple[str, ...]
    expires: float


def mint(key: Ed25519PrivateKey, user: User, expires: float) -> str:
    """A signed claim that its bearer is `user`, until `expires` (seconds since 1970)."""
    payload = urlsafe_b64encode(msgspec.json.encode(Claim(user.name, user.roles, expires)))
    return b".".join((payload, urlsafe_b64encode(key.sign(payload)))).decode()


async def publish_key(bus: Bus, public: bytes) -> None:
    """Put the public key (32 raw bytes) on the bus, where workers find it."""
    await (await bus.bucket(BUCKET)).put(KEY, public)


class Verifier:
    """Checks claims against the public key on the bus, which it reads again when a signature does not fit."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._key: bytes | None = None
        self._read = -REFRESH
        self._known: dict[str, Claim] = {}

    async def check(self, token: str, *, at: float | None = None) -> User:
        """The user of a claim that was valid `at` (now, if None); Unauthorized otherwise."""
        claim = self._known.get(token) or await self._verify(token)
        if claim.expires < (time.time() if at is None else at):
            raise Unauthorized(f"the claim of {claim.user!r} has expired; sign in again")
        return User(claim.user, claim.roles)

    async def _verify(self, token: str) -> Claim:
        payload, _, signature = token.partition(".")
        if not self._signed(payload, signature) and time.monotonic() - self._read > REFRESH:
            self._read = time.monotonic()
            self._key = await (await self._bus.bucket(BUCKET)).find(KEY)
        if not self._signed(payload, signature):
            known = "its signature does not fit" if self._key else "no accounts service has published its key"
            raise Unauthorized(f"the claim in the header Aiirwkv-User cannot be trusted: {known}; sign in again")
        claim = msgspec.json.decode(urlsafe_b64decode(payload), type=Claim)
        if len(self._known) > 1000:
            self._known.clear()
        self._known[token] = claim
        return claim

    def _signed(self, payload: str, signature: str) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        if self._key is None:
            return False
        try:
            Ed25519PublicKey.from_public_bytes(self._key).verify(urlsafe_b64decode(signature), payload.encode())
        except (InvalidSignature, ValueError):
            return False
        return True


def bearer(token: str) -> User:
    """Who a claim says he is, unchecked: a worker has checked it before, or will."""
    if not token:
        return OWNER
    try:
        claim = msgspec.json.decode(urlsafe_b64decode(token.partition(".")[0]), type=Claim)
    except (ValueError, msgspec.MsgspecError):
        return User("")
    return User(claim.user, claim.roles)
