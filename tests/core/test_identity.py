"""Who calls: claims that are forged, expired, or somebody else's."""

import time
from pathlib import Path

import anyio
import msgspec
import pytest
from aiirwkv import (
    Bus,
    Context,
    Embed,
    Embeddings,
    Index,
    Indexed,
    Jobs,
    NotFound,
    Plugin,
    Unauthorized,
    User,
    hookimpl,
)
from aiirwkv.hooks import may
from aiirwkv.identity import mint, publish_key
from aiirwkv.testing import running
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY = Ed25519PrivateKey.generate()


class WhoAmI(Plugin):
    """Says who called, through a nested call; as a job after a wait."""

    wait: float = 0.0

    @hookimpl
    async def embed(self, request: Embed, ctx: Context) -> Embeddings:
        return Embeddings(model=ctx.user.name)

    @hookimpl
    async def index(self, request: Index, ctx: Context) -> Indexed:
        await anyio.sleep(self.wait)
        return Indexed((await ctx.bus.call(Embed(["x"]))).model)


def claim(name: str, *roles: str, seconds: float = 60, key: Ed25519PrivateKey = KEY) -> str:
    return mint(key, User(name, roles), time.time() + seconds)


@pytest.fixture
async def bus(tmp_path: Path):  # type: ignore[no-untyped-def]
    async with running({"who": WhoAmI()}, tmp_path) as bus:
        await publish_key(bus, KEY.public_key().public_bytes_raw())
        yield bus


async def test_a_claim_travels_with_nested_calls(bus: Bus) -> None:
    assert (await bus.call(Embed(["x"]))).model == "owner"
    ada = bus.bound(claim=claim("ada"))
    assert (await ada.call(Embed(["x"]))).model == "ada"
    assert (await ada.call(Index("c", []))).collection == "ada"


@pytest.mark.parametrize(
    "token",
    [
        claim("ada", seconds=-1),
        claim("ada", "owner", key=Ed25519PrivateKey.generate()),
        claim("ada")[:-4] + "AAAA",
        "nonsense",
        "a.b",
        claim("ada").partition(".")[0] + ".",
    ],
    ids=["expired", "forged", "changed", "nonsense", "not base64", "unsigned"],
)
async def test_forged_and_expired_claims_are_401(bus: Bus, token: str) -> None:
    with pytest.raises(Unauthorized, match="sign in again"):
        await bus.bound(claim=token).call(Embed(["x"]))
    msg = await bus.nc.request("aiirwkv.embed", b'{"texts":[]}', headers={"Aiirwkv-User": token})
    assert msg.headers["Nats-Service-Error-Code"] == "401"


async def test_a_job_counts_as_of_its_submission(tmp_path: Path) -> None:
    async with running({"who": WhoAmI(wait=2.5)}, tmp_path) as bus:
        await publish_key(bus, KEY.public_key().public_bytes_raw())
        ada = bus.bound(claim=claim("ada", seconds=2))
        job = await ada.submit(Index("c", []))
        async with bus.follow(job.id) as changes:
            last = [change async for change in changes][-1]
        assert last.state == "done" and msgspec.convert(last.result, Indexed).collection == "ada"
        with pytest.raises(Unauthorized, match="expired"):  # the same claim serves for nothing else
            await ada.call(Embed(["x"]))
        with pytest.raises(Unauthorized):
            await bus.bound(claim=ada.claim, job=job.id).call(Embed(["x"]))


async def test_jobs_are_seen_by_their_user_and_the_owner(bus: Bus) -> None:
    ada, bob = (bus.bound(claim=claim(name)) for name in ("ada", "bob"))
    job = await ada.submit(Index("c", []))
    assert [seen.id for seen in (await ada.call(Jobs("list"))).jobs] == [job.id]
    assert [seen.id for seen in (await bus.call(Jobs("list"))).jobs] == [job.id]
    assert (await bob.call(Jobs("list"))).jobs == []
    for action in ("get", "cancel", "pause", "retry"):
        with pytest.raises(NotFound):
            await bob.call(Jobs(action, job.id))  # type: ignore[arg-type]


async def test_an_upload_belongs_to_who_put_it(bus: Bus) -> None:
    ada, bob = (bus.bound(claim=claim(name)) for name in ("ada", "bob"))
    put = await ada.put(b"secret", "a.txt")
    assert await ada.read(put.id) == await bus.read(put.id) == b"secret"
    with pytest.raises(NotFound, match="there is no object"):
        await bob.read(put.id)


class Thing(msgspec.Struct):
    owner: str
    shares: dict[str, str] = {}


def test_may() -> None:
    ada, bob, root = User("ada"), User("bob", ("staff",)), User("root", ("owner",))
    thing = Thing("ada", {"bob": "read"})
    assert may(ada, "own", thing) and may(root, "own", thing)  # type: ignore[arg-type]
    assert may(bob, "read", thing) and not may(bob, "write", thing)  # type: ignore[arg-type]
    thing.shares = {"role:staff": "write"}
    assert may(bob, "write", thing) and not may(bob, "own", thing)  # type: ignore[arg-type]
    thing.shares = {}
    assert not may(bob, "read", thing)  # type: ignore[arg-type]
