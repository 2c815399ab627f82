"""Managing collections over the bus, and who may do what."""

import pytest
from aiirwkv import (
    BadRequest,
    Bus,
    Collections,
    Conflict,
    Forbidden,
    Index,
    NotFound,
    Search,
    ServiceError,
    Source,
    Users,
)
from aiirwkv_accounts import Accounts

from .conftest import World

TEXT = "The museum opens at nine.\n\nA ticket costs five euro.\n\nDogs are not allowed in the garden."


async def test_the_life_of_a_collection(bus: Bus) -> None:
    made = (await bus.call(Collections("create", name=" 知识库 😀 ", description="mine"))).collections[0]
    assert (made.name, made.owner, made.description, made.embedder) == ("知识库 😀", "owner", "mine", "hash")
    assert made.id.startswith("kb-") and '"dimension":64' in made.fingerprint and made.chunk_size == 16
    with pytest.raises(Conflict, match="already"):
        await bus.call(Collections("create", name="知识库 😀"))
    await bus.call(Index("知识库 😀", [Source(text=TEXT, name="a.txt")]))
    (listed,) = (await bus.call(Collections("list"))).collections
    assert (listed.documents, listed.chunks > 1) == (1, True)
    renamed = (await bus.call(Collections("rename", name="知识库 😀", to="library"))).collections[0]
    assert (renamed.name, renamed.id) == ("library", made.id)
    described = (await bus.call(Collections("describe", name=made.id, description="yours"))).collections[0]
    assert described.description == "yours"
    assert (await bus.call(Search("museum", ["library"]))).hits
    await bus.call(Collections("delete", name="library"))
    assert not (await bus.call(Collections("list"))).collections
    with pytest.raises(NotFound):
        await bus.call(Search("museum", ["library"]))


async def test_names_that_cannot_be(bus: Bus) -> None:
    for name in ("", "x" * 201, "tab\tname", "nul\x00", "kb-" + "0" * 32):
        with pytest.raises(BadRequest):
            await bus.call(Collections("create", name=name))
        with pytest.raises((BadRequest, NotFound)):
            await bus.call(Index(name, [Source(text=TEXT)]))
    assert not (await bus.call(Collections("list"))).collections


async def test_names_that_can_be(bus: Bus) -> None:
    for name in ("a/b", "a.b", "ab", "'; DROP TABLE collections; --", '"quoted"', "..", "é" * 200):
        await bus.call(Index(name, [Source(text=TEXT)]))
        assert (await bus.call(Search("museum", [name]))).hits[0].collection == name


async def test_composed_and_decomposed_names_are_one(bus: Bus) -> None:
    await bus.call(Index("Zürich", [Source(text=TEXT)]))
    assert (await bus.call(Search("museum", ["Zu\u0308rich"]))).hits


async def test_chunk_sizes_are_checked_and_used(bus: Bus) -> None:
    with pytest.raises(BadRequest, match="less than chunk_size"):
        await bus.call(Collections("create", name="c", chunk_size=50, chunk_overlap=50))
    await bus.call(Collections("create", name="c", chunk_size=500))
    assert (await bus.call(Index("c", [Source(text=TEXT, name="a.txt")]))).chunks == 1
    with pytest.raises(BadRequest, match="chunk_overlap is 500"):
        await bus.call(Collections("describe", name="c", chunk_overlap=500))
    await bus.call(Collections("describe", name="c", chunk_size=10))
    (again,) = (await bus.call(Index("c", [Source(text=TEXT, name="a.txt")]))).documents
    assert again.state == "ready" and again.chunks > 2
    with pytest.raises(BadRequest, match="embedder"):
        await bus.call(Collections("describe", name="c", embedder="other"))


async def test_an_embedder_that_is_not_there(bus: Bus) -> None:
    with pytest.raises(ServiceError, match="hash"):
        await bus.call(Collections("create", name="c", embedder="embed_nothing"))


async def test_documents_chunks_and_paging(bus: Bus) -> None:
    await bus.call(Index("c", [Source(text=f"Number {i}.\n\n{TEXT}", name=f"{i:02}.txt") for i in range(5)]))
    page = await bus.call(Collections("documents", name="c", offset=3, limit=10))
    assert ([document.name for document in page.documents], page.count) == (["03.txt", "04.txt"], 5)
    found = await bus.call(Collections("documents", name="c", query="02"))
    assert ([document.name for document in found.documents], found.count) == (["02.txt"], 1)
    chunks = await bus.call(Collections("chunks", name="c", document="01.txt", limit=1))
    assert len(chunks.chunks) == 1 < chunks.count and chunks.chunks[0].document == "01.txt"
    assert (await bus.call(Collections("chunks", name="c", query="dogs"))).count == 5
    with pytest.raises(NotFound, match="did you mean '0"):
        await bus.call(Collections("chunks", name="c", document="1.txt"))
    with pytest.raises(BadRequest, match="negative"):
        await bus.call(Collections("chunks", name="c", offset=-1))


async def test_a_reply_fits_a_message(bus: Bus) -> None:
    text = "\n\n".join(f"{i} " + "词" * 600 for i in range(500))
    await bus.call(Collections("create", name="c", chunk_size=600))
    await bus.call(Index("c", [Source(text=text, name="a.txt")]))
    reply = await bus.call(Collections("chunks", name="c"))
    assert 0 < len(reply.chunks) < reply.count == 500
    rest = await bus.call(Collections("chunks", name="c", offset=len(reply.chunks)))
    assert rest.chunks[0].number == len(reply.chunks)


async def test_deleting_a_document(bus: Bus, world: World) -> None:
    indexed = await bus.call(Index("c", [Source(text=TEXT, name="a.txt"), Source(text=TEXT, name="b.txt")]))
    sha256 = indexed.documents[0].sha256
    original = world.data / "knowledge" / "originals" / sha256[:2] / sha256
    await bus.call(Collections("delete", name="c", document="a.txt"))
    assert {hit.document for hit in (await bus.call(Search("museum", ["c"], top=50))).hits} == {"b.txt"}
    reply = await bus.call(Collections("verify", name="c"))
    assert reply.problems == [] and original.exists()  # the other document has the same bytes
    await bus.call(Collections("delete", name="c", document=indexed.documents[1].id))
    assert not (await bus.call(Search("museum", ["c"]))).hits
    assert (await bus.call(Collections("verify", name="c"))).count == 0
    assert not original.exists()
    with pytest.raises(NotFound):
        await bus.call(Collections("delete", name="c", document="a.txt"))


async def test_editing_a_chunk(bus: Bus, world: World) -> None:
    await bus.call(Index("c", [Source(text=TEXT, name="a.txt")]))
    chunk = (await bus.call(Collections("chunks", name="c", query="ticket"))).chunks[0]
    edited = (await bus.call(Collections("edit", name="c", chunk=chunk.id, text="A zebra costs six."))).chunks[0]
    assert (edited.text, edited.start, edited.end) == ("A zebra costs six.", chunk.start, chunk.end)
    for mode in ("dense", "keyword", "hybrid"):
        assert (await bus.call(Search("zebra", mode=mode))).hits[0].chunk == chunk.id
    assert not (await bus.call(Search("ticket", mode="keyword"))).hits
    with pytest.raises(BadRequest, match="cannot be empty"):
        await bus.call(Collections("edit", name="c", chunk=chunk.id, text=" "))
    with pytest.raises(BadRequest, match="`text` or `enabled`"):
        await bus.call(Collections("edit", name="c", chunk=chunk.id))
    with pytest.raises(NotFound, match="no chunk"):
        await bus.call(Collections("edit", name="c", chunk="nothing", text="x"))


async def test_not_served_yet(bus: Bus) -> None:
    for action in ("export", "import"):
        with pytest.raises(BadRequest, match="not served yet"):
            await bus.call(Collections(action, name="c"))


async def test_unknown_names(bus: Bus) -> None:
    for request in requests("nothing", "x"):
        with pytest.raises(NotFound, match="there is no collection 'nothing'; see what there is with: aiirwkv coll"):
            await bus.call(request)


# Who may


async def user(bus: Bus, name: str, *roles: str) -> Bus:
    await bus.call(Users("add", name, list(roles)))
    return bus.bound(claim=(await bus.call(Users("claim", name))).token)


@pytest.fixture
def world(world: World) -> World:
    world.others["accounts"] = Accounts()
    return world


async def test_two_users_do_not_see_each_other(bus: Bus) -> None:
    anna, bob = await user(bus, "anna"), await user(bus, "bob")
    await anna.call(Index("diary", [Source(text="Anna's secret is a zebra.", name="day.txt")]))
    (hers,) = (await anna.call(Collections("list"))).collections
    document = (await anna.call(Collections("documents", name="diary"))).documents[0].id
    assert hers.owner == "anna"
    assert not (await bob.call(Collections("list"))).collections
    for name in ("diary", hers.id):
        for request in requests(name, document):
            with pytest.raises(NotFound) as refused:
                await bob.call(request)
            with pytest.raises(NotFound) as missing:
                await bob.call(type(request)(**{**fields(request), **renamed(request, "diarx" + name[5:])}))
            assert str(refused.value).replace(name, "") == str(missing.value).replace("diarx" + name[5:], "")
    with pytest.raises(NotFound, match="there is no collection"):
        await bob.call(Index(hers.id, [Source(text="Bob was here.")]))
    assert (await bob.call(Index("mine", [Source(text="Bob likes bread.")]))).chunks == 1
    for mode in ("dense", "keyword", "hybrid"):
        reply = await bob.call(Search("anna's secret zebra", mode=mode, top=50))
        assert "zebra" not in repr(reply.hits) and reply.receipt.collections == ["mine"]
    with pytest.raises(NotFound, match="see what there is") as hint:
        await bob.call(Search("x", ["diaru"]))
    assert "did you mean" not in str(hint.value)
    # The same name is another collection.
    await bob.call(Index("diary", [Source(text="Bob's day was long.")]))
    assert [hit.text for hit in (await bob.call(Search("day zebra", ["diary"]))).hits] == ["Bob's day was long."]
    assert [hit.text for hit in (await anna.call(Search("day", ["diary"]))).hits] == ["Anna's secret is a zebra."]


def requests(name: str, document: str) -> list[Search | Collections]:
    actions = ["rename", "describe", "delete", "share", "documents", "chunks", "text", "edit", "verify", "rebuild"]
    more = {"to": "x", "user": "bob", "document": document, "chunk": "x", "text": "y"}
    needs = {"rename": ["to"], "share": ["user"], "text": ["document"], "edit": ["chunk", "text"]}
    asked = [Collections(action, name=name, **{key: more[key] for key in needs.get(action, [])}) for action in actions]
    return [Search("zebra", [name]), *asked]


def fields(request: Search | Collections) -> dict[str, object]:
    return {field: getattr(request, field) for field in request.__struct_fields__}


def renamed(request: Search | Collections, name: str) -> dict[str, object]:
    return {"collections": [name]} if isinstance(request, Search) else {"name": name}


async def test_shares(bus: Bus) -> None:
    anna, bob, carol = await user(bus, "anna"), await user(bus, "bob", "team"), await user(bus, "carol")
    await anna.call(Index("plans", [Source(text=TEXT, name="a.txt")]))
    await anna.call(Collections("share", name="plans", user="role:team", access="read"))
    assert (await bob.call(Search("museum"))).hits
    for request in (
        Index("plans", [Source(text="Bob was here.", name="b.txt")]),
        Collections("delete", name="plans", document="a.txt"),
        Collections("describe", name="plans", description="x"),
        Collections("rebuild", name="plans"),
        Collections("delete", name="plans"),
        Collections("rename", name="plans", to="x"),
        Collections("share", name="plans", user="carol", access="read"),
    ):
        with pytest.raises(Forbidden, match=r"bob may not .* ask its owner, anna"):
            await bob.call(request)
    shared = (await anna.call(Collections("share", name="plans", user="bob", access="write"))).collections[0]
    assert shared.shares == {"role:team": "read", "bob": "write"}
    assert (await bob.call(Index("plans", [Source(text="Bob was here.", name="b.txt")]))).chunks == 1
    with pytest.raises(Forbidden):
        await bob.call(Collections("delete", name="plans"))
    with pytest.raises(NotFound):
        await carol.call(Collections("describe", name="plans"))
    await anna.call(Collections("share", name="plans", user="bob"))
    await anna.call(Collections("share", name="plans", user="role:team"))
    with pytest.raises(NotFound):
        await bob.call(Collections("describe", name="plans"))


async def test_the_owner_of_the_system_sees_all_and_is_asked_which(bus: Bus) -> None:
    anna, bob = await user(bus, "anna"), await user(bus, "bob")
    await anna.call(Index("diary", [Source(text="Anna's zebra.")]))
    await bob.call(Index("diary", [Source(text="Bob's bread.")]))
    found = (await bus.call(Collections("list"))).collections
    assert {collection.owner for collection in found} == {"anna", "bob"}
    with pytest.raises(Conflict, match="2 collections are called 'diary'"):
        await bus.call(Search("zebra", ["diary"]))
    assert {hit.collection for hit in (await bus.call(Search("zebra bread"))).hits} == {c.id for c in found}
