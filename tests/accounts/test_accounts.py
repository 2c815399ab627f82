"""Users and their claims, over a real bus."""

import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiirwkv import BadRequest, Bus, Conflict, Forbidden, NotFound, Unauthorized, Users
from aiirwkv.identity import Verifier
from aiirwkv.testing import running
from aiirwkv_accounts import Accounts
from aiirwkv_accounts.directory import Directory
from aiirwkv_accounts.key import private_key


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    async with running({"accounts": Accounts()}, tmp_path) as bus:
        yield bus


async def anna(bus: Bus, *roles: str) -> Bus:
    """The bus on behalf of the user anna."""
    await bus.call(Users("add", "anna", list(roles)))
    return bus.bound(claim=(await bus.call(Users("claim", "anna"))).token)


async def test_the_owner_exists_from_the_start(bus: Bus) -> None:
    assert [(user.name, user.roles) for user in (await bus.call(Users("list"))).users] == [("owner", ("owner",))]
    assert (await bus.call(Users())).users[0].name == "owner"
    with pytest.raises(Conflict, match="cannot be removed"):
        await bus.call(Users("remove", "owner"))


async def test_a_claim_says_who_calls(bus: Bus) -> None:
    hers = await anna(bus, "reader")
    (user,) = (await hers.call(Users("me"))).users
    assert (user.name, user.roles) == ("anna", ("reader",))
    reply = await hers.call(Users("claim", seconds=60))
    assert 50 < reply.expires - time.time() <= 60
    assert (await Verifier(bus).check(reply.token)).name == "anna"


async def test_a_user_extends_himself_by_a_day_an_owner_by_a_month(bus: Bus) -> None:
    hers = await anna(bus)
    assert (await hers.call(Users("claim", seconds=86400))).token
    with pytest.raises(BadRequest, match="`seconds` is 86401, and must be from 1 to 86400"):
        await hers.call(Users("claim", seconds=86401))
    assert (await bus.call(Users("claim", "anna", seconds=30 * 86400))).token


async def test_only_an_owner_manages_users(bus: Bus) -> None:
    hers = await anna(bus)
    for request in (Users("list"), Users("add", "bob"), Users("remove", "anna"), Users("claim", "owner")):
        with pytest.raises(Forbidden, match="anna"):
            await hers.call(request)
    assert [user.name for user in (await bus.call(Users("list"))).users] == ["owner", "anna"]


async def test_a_forged_claim_is_refused(bus: Bus) -> None:
    hers = await anna(bus)
    payload, signature = hers.claim.split(".")
    for claim in ("nonsense", f"{payload[:-4]}AAA=.{signature}", f"{payload}.{signature[::-1]}"):
        with pytest.raises(Unauthorized):
            await bus.bound(claim=claim).call(Users())


async def test_an_expired_claim_is_refused(bus: Bus) -> None:
    await bus.call(Users("add", "anna"))
    reply = await bus.call(Users("claim", "anna", seconds=1))
    verifier = Verifier(bus)
    await verifier.check(reply.token)
    with pytest.raises(Unauthorized, match="expired"):
        await verifier.check(reply.token, at=reply.expires + 0.1)


async def test_a_removed_user_gets_no_claim_and_may_come_back(bus: Bus) -> None:
    hers = await anna(bus, "editor")
    with pytest.raises(Conflict, match="exists already"):
        await bus.call(Users("add", "anna"))
    await bus.call(Users("remove", "anna"))
    for client in (bus, hers):
        with pytest.raises(NotFound):
            await client.call(Users("claim", "anna"))
    await bus.call(Users("add", "anna"))
    assert (await bus.call(Users("claim", "anna"))).users[0].roles == ()


async def test_errors_say_what_to_do(bus: Bus) -> None:
    await anna(bus)
    with pytest.raises(NotFound, match="did you mean 'anna'"):
        await bus.call(Users("claim", "ana"))
    for seconds in (0.5, 31 * 86400):
        with pytest.raises(BadRequest, match="seconds"):
            await bus.call(Users("claim", seconds=seconds))
    with pytest.raises(BadRequest, match="needs `name`"):
        await bus.call(Users("add"))
    for name in (" anna", "   ", "\t", "a\nb", "a\x1b[2Jb", "x" * 65, "role:admin", ":"):
        with pytest.raises(BadRequest, match="printable"):
            await bus.call(Users("add", name))


def test_the_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "key"
    first, second = private_key(path), private_key(path)
    assert first.private_bytes_raw() == second.private_bytes_raw()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_users_stay(tmp_path: Path) -> None:
    for _ in range(2):
        directory = Directory(tmp_path / "users.db")
        if len(directory.all()) == 1:
            directory.add("Zoë O'Neil; DROP TABLE users", ["a", "b", "a"])
        names = [(user.name, user.roles) for user in directory.all()]
        directory.close()
    assert names == [("owner", ("owner",)), ("Zoë O'Neil; DROP TABLE users", ("a", "b"))]
