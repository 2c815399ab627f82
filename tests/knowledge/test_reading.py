"""Documents that the model reads once: what is read, what is kept, when it is forgotten."""

import sqlite3
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiirwkv import (
    BadRequest,
    Bus,
    CacheStats,
    Collections,
    Conflict,
    Document,
    Forbidden,
    Index,
    KeptState,
    NotFound,
    Plugin,
    Search,
    Source,
    States,
    StatesReply,
    Users,
    headed,
    hookimpl,
)
from aiirwkv_accounts import Accounts
from aiirwkv_knowledge.catalogue import Catalogue
from aiirwkv_knowledge.schema import FIRST

from .conftest import World

TEXT = "The museum opens at nine.\n\nA ticket costs five euro.\n\nDogs are not allowed in the garden."


class Reader(Plugin):
    """Keeps a state per owner and text, and cannot read "unreadable"."""

    tokens: int = 0
    budget: int = 1 << 30
    asked: int = 0

    def about(self) -> dict[str, Any]:
        return {"limits": {"passages": 0, "tokens": self.tokens}}

    @property
    def kept(self) -> dict[str, KeptState]:
        self.__dict__.setdefault("_kept", {})
        found: dict[str, KeptState] = self.__dict__["_kept"]
        return found

    @property
    def texts(self) -> list[str]:
        return [self.__dict__["read"][id] for id in self.kept]

    @hookimpl
    async def states(self, request: States, ctx: Any) -> StatesReply:
        if request.action == "drop":
            assert request.id, "a drop without an id drops everything"
            if request.id not in self.kept:
                raise NotFound("no such state")
            assert "owner" in ctx.user.roles
            return StatesReply([self.kept.pop(request.id)])
        assert request.action == "read" and request.pin and not request.messages
        self.asked += 1
        (text,) = request.documents
        if "unreadable" in text:
            raise Conflict("the model stumbled")
        id = sha256(f"{ctx.user.name} {text}".encode()).hexdigest()[:16]
        self.kept[id] = KeptState(id, label=request.label, owner=ctx.user.name, bytes=1000, pinned=True)
        self.__dict__.setdefault("read", {})[id] = text
        return StatesReply([self.kept[id]], CacheStats(disk_budget=self.budget))


@pytest.fixture
def reader(world: World) -> Reader:
    world.others["reader"] = Reader()
    return world.others["reader"]  # type: ignore[return-value]


@pytest.fixture
async def bus(world: World, reader: Reader):  # type: ignore[no-untyped-def]
    async with world.serving() as bus:
        yield bus


async def indexed(bus: Bus, name: str = "a.txt", text: str = TEXT, **fields: Any) -> Document:
    (document,) = (await bus.call(Index("c", [Source(text=text, name=name)], **fields))).documents
    return document


async def listed(bus: Bus, name: str = "a.txt") -> Document:
    (document,) = (await bus.call(Collections("documents", name="c", query=name))).documents
    return document


async def kept(reader: Reader, texts: list[str]) -> None:
    """Wait until just these are kept."""
    with anyio.fail_after(5):
        while sorted(reader.texts) != sorted(texts):
            await anyio.sleep(0.01)


async def test_nothing_is_read_unless_it_is_asked_for(bus: Bus, reader: Reader) -> None:
    assert (await indexed(bus)).read is None and not reader.asked


async def test_a_document_is_read_whole(bus: Bus, reader: Reader) -> None:
    document = await indexed(bus, read=True)
    assert (document.read, document.reason, reader.texts) == ("whole", "", [TEXT])
    (state,) = reader.kept.values()
    assert state.label == "c / a.txt"
    assert (await listed(bus)).read == "whole"
    assert {hit.read for hit in (await bus.call(Search("ticket", ["c"]))).hits} == {"whole"}
    assert (await indexed(bus)).read == "whole" and reader.asked == 1
    assert (
        await indexed(bus, read=True)
    ).read == "whole" and reader.asked == 2  # it may have been dropped to make room


async def test_a_document_longer_than_the_model_reads_well_is_read_by_passages(bus: Bus, reader: Reader) -> None:
    reader.tokens = 20
    text = f"# Museum\n\n{TEXT}\n\n# Garden\n\n" + "Roses are cut in March. " * 30
    upload = await bus.put(text.encode(), "a.md")
    (document,) = (await bus.call(Index("c", [Source(object=upload.id, name="a.md")], read=True))).documents
    chunks = (await bus.call(Collections("chunks", name="c"))).chunks
    assert document.read == "passages" and len(chunks) > 8
    hits = (await bus.call(Search("museum roses", ["c"], top=50))).hits
    assert set(reader.texts) == {headed(hit.heading, hit.text) for hit in hits}
    assert any(text.startswith("Garden\nRoses") for text in reader.texts)
    labels = [state.label for state in reader.kept.values()]
    assert f"c / a.md, passage 1 of {len(chunks)}" in labels


async def test_progress_says_that_the_model_reads(bus: Bus, reader: Reader) -> None:
    job = await bus.submit(Index("c", [Source(text=TEXT, name="a.txt")], read=True))
    async with bus.follow(job.id) as changes:
        seen = [change async for change in changes]
    assert seen[-1].state == "done" and [change.done for change in seen] == sorted(change.done for change in seen)


async def test_without_a_model_the_document_is_indexed_all_the_same(world: World) -> None:
    async with world.serving() as bus:
        document = await indexed(bus, read=True)
        assert (document.state, document.read) == ("ready", None)
        assert document.reason.startswith("not read by the model: nobody serves `states` now")
        assert (await bus.call(Search("ticket", ["c"]))).hits
    world.others["reader"] = Reader()
    async with world.serving() as bus:
        again = await indexed(bus)  # it is still wished
        assert (again.state, again.read, again.reason) == ("unchanged", "whole", "")


async def test_a_model_that_fails_is_told_of_and_keeps_nothing_halfway(bus: Bus, reader: Reader) -> None:
    reader.tokens = 20
    document = await indexed(bus, text=f"{TEXT}\n\nThis is unreadable.\n\n{TEXT}", read=True)
    assert document.state == "ready" and document.read is None
    assert document.reason == "not read by the model: the model stumbled"
    await kept(reader, [])


async def test_states_that_would_not_fit_are_not_even_begun(bus: Bus, reader: Reader) -> None:
    reader.tokens, reader.budget = 20, 2500
    document = await indexed(bus, text=TEXT * 3, read=True)
    assert document.read is None and "the states of its" in document.reason and reader.asked == 1
    await kept(reader, [])


async def test_a_collection_is_switched(bus: Bus, reader: Reader) -> None:
    await indexed(bus, "a.txt")
    await indexed(bus, "b.txt", "unreadable")
    await indexed(bus, "c.txt", "The tower is tall.")
    reply = await bus.call(Collections("describe", name="c", read=True))
    assert reply.collections[0].read and reply.count == 2
    assert reply.problems == ["b.txt: not read by the model: the model stumbled"]
    await kept(reader, [TEXT, "The tower is tall."])
    assert (await indexed(bus, "d.txt", "The bridge is long.")).read == "whole"  # what comes, too
    reply = await bus.call(Collections("describe", name="c", read=False))
    assert not reply.collections[0].read and reply.problems == []
    await kept(reader, [])
    assert [(d.read, d.reason) for d in (await bus.call(Collections("documents", name="c"))).documents] == [
        (None, "")
    ] * 4
    (made,) = (await bus.call(Collections("create", name="new", read=True))).collections
    assert made.read and (await bus.call(Index("new", [Source(text=TEXT)]))).documents[0].read == "whole"


async def test_a_document_is_switched_and_stays_so_when_it_changes(bus: Bus, reader: Reader) -> None:
    await indexed(bus)
    reply = await bus.call(Collections("describe", name="c", document="a.txt", read=True))
    assert reply.documents[0].read == "whole"
    changed = TEXT.replace("nine", "ten")
    assert (await indexed(bus, text=changed)).read == "whole"
    await kept(reader, [changed])
    reply = await bus.call(Collections("describe", name="c", document="a.txt", read=False))
    assert reply.documents[0].read is None
    await kept(reader, [])
    await bus.call(Collections("describe", name="c", read=True))
    await bus.call(Collections("describe", name="c", document="a.txt", read=False))
    assert (await indexed(bus)).read is None  # set apart from its collection
    assert (await bus.call(Collections("describe", name="c", document="a.txt"))).documents[0].name == "a.txt"


async def test_a_text_that_two_documents_share_is_forgotten_with_the_last_of_them(bus: Bus, reader: Reader) -> None:
    await indexed(bus, "a.txt", read=True)
    await indexed(bus, "b.txt", read=True)
    await indexed(bus, "c.txt", "The tower is tall.", read=True)
    await bus.call(Collections("delete", name="c", document="a.txt"))
    await bus.call(Collections("delete", name="c", document="c.txt"))
    await kept(reader, [TEXT])
    await bus.call(Collections("delete", name="c"))
    await kept(reader, [])


async def test_what_could_not_be_dropped_is_dropped_when_the_model_is_back(world: World, reader: Reader) -> None:
    async with world.serving() as bus:
        await indexed(bus, read=True)
    del world.others["reader"]
    async with world.serving() as bus:
        await bus.call(Collections("delete", name="c"))
        await anyio.sleep(0.05)
    world.others["reader"] = reader
    assert reader.kept
    async with world.serving() as bus:
        await kept(reader, [])


async def test_a_chunk_that_is_changed_by_hand(bus: Bus, reader: Reader) -> None:
    await indexed(bus, text=TEXT, read=True)
    chunks = (await bus.call(Collections("chunks", name="c"))).chunks
    await bus.call(Collections("edit", name="c", chunk=chunks[0].id, enabled=False))
    await kept(reader, [])
    document = await listed(bus)
    assert document.read is None and "changed by hand" in document.reason
    document = (await bus.call(Collections("describe", name="c", document="a.txt", read=True))).documents[0]
    assert (document.read, document.reason) == ("passages", "")  # the text as a whole holds what is not to be found
    await kept(reader, [chunk.text for chunk in chunks[1:]])
    await bus.call(Collections("edit", name="c", chunk=chunks[1].id, text="A ticket costs six euro."))
    await bus.call(Collections("edit", name="c", chunk=chunks[0].id, enabled=True))
    await kept(reader, [chunks[0].text, "A ticket costs six euro.", *(chunk.text for chunk in chunks[2:])])
    await bus.call(Collections("edit", name="c", chunk=chunks[1].id, text="unreadable"))
    document = await listed(bus)
    assert document.read == "passages" and document.reason.endswith("a changed chunk: the model stumbled")


async def test_who_may_have_it_read(world: World, reader: Reader) -> None:
    world.others["accounts"] = Accounts()
    async with world.serving() as bus:

        async def user(name: str) -> Bus:
            await bus.call(Users("add", name))
            return bus.bound(claim=(await bus.call(Users("claim", name))).token)

        anna, bob = await user("anna"), await user("bob")
        await indexed(anna, read=True)
        assert [state.owner for state in reader.kept.values()] == ["anna"]
        for document in ("", "a.txt"):
            with pytest.raises(NotFound):
                await bob.call(Collections("describe", name="c", document=document, read=False))
        await anna.call(Collections("share", name="c", user="bob", access="read"))
        for document in ("", "a.txt"):
            with pytest.raises(Forbidden):
                await bob.call(Collections("describe", name="c", document=document, read=False))
        await anna.call(Collections("share", name="c", user="bob", access="write"))
        await bob.call(Collections("delete", name="c", document="a.txt"))
        await kept(reader, [])


async def test_an_interrupted_reading_goes_on(world: World, reader: Reader) -> None:
    reader.tokens = 20
    async with world.serving() as bus:
        document = await indexed(bus, text=TEXT * 2)
    with sqlite3.connect(world.data / "knowledge" / "catalogue.db") as db:  # as a worker leaves it that was killed
        (number,) = db.execute("SELECT number FROM documents").fetchone()
        db.execute("UPDATE documents SET wanted = 1")
        db.execute("INSERT INTO states VALUES (?, 1, 'lost')", (number,))
    async with world.serving() as bus:
        again = await indexed(bus, text=TEXT * 2)
        assert (again.state, again.read, len(reader.kept)) == ("unchanged", "passages", document.chunks)


def test_an_older_data_directory_opens(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "catalogue.db") as db:
        for statement in FIRST.split(";\n"):
            db.execute(statement)
        db.execute("INSERT INTO collections VALUES ('kb-1', 'old', '', 'owner', '{}', 'hash', '{}', 16, 0, 1.0)")
        db.execute(
            "INSERT INTO documents VALUES (1, 'doc-1', 'kb-1', 'a.txt', 1, 'ready', '', '', 0, 3, 3, 'x', '', '[]', 1)"
        )
        db.execute("PRAGMA user_version=1")
    catalogue = Catalogue(tmp_path)
    (collection,) = catalogue.collections()
    ((document,), _) = catalogue.documents("kb-1")
    assert (collection.name, collection.read, document.name, document.read) == ("old", False, "a.txt", None)
    catalogue.close()
    Catalogue(tmp_path).close()


async def test_bad_wishes(bus: Bus) -> None:
    with pytest.raises(NotFound, match="there is no document"):
        await indexed(bus)
        await bus.call(Collections("describe", name="c", document="b.txt", read=True))
    with pytest.raises(BadRequest, match="read"):
        await bus.call(Index("c", [Source(text=TEXT)], read="yes"))  # type: ignore[arg-type]
