"""Indexing over the bus: honest states, exact spans, replacing, going on after an interruption."""

import anyio
import msgspec
import pytest
from aiirwkv import (
    BadRequest,
    Bus,
    Collections,
    CollectionsReply,
    Conflict,
    Document,
    Index,
    Jobs,
    NotFound,
    NoWorker,
    Search,
    Source,
)

from .conftest import HashEmbedder, World

HANDBOOK = "The museum opens at nine.\n\nA ticket costs five euro.\n\nDogs are not allowed in the garden."


async def test_a_file_is_found_by_its_words(bus: Bus, world: World, file) -> None:
    indexed = await bus.call(Index("guide", [await file("handbook.txt", HANDBOOK, tags=["rules"])]))
    (document,) = indexed.documents
    assert (document.state, document.name, document.reason) == ("ready", "handbook.txt", "")
    assert (document.characters, document.size, document.tags) == (len(HANDBOOK), len(HANDBOOK.encode()), ["rules"])
    assert indexed.chunks == document.chunks > 1
    hits = (await bus.call(Search("what does a ticket cost?", ["guide"], top=1))).hits
    assert hits[0].text == HANDBOOK[hits[0].start : hits[0].end] and "five euro" in hits[0].text
    assert (hits[0].document, hits[0].document_id) == ("handbook.txt", document.id)
    original = world.data / "knowledge" / "originals" / document.sha256[:2] / document.sha256
    assert original.read_text() == HANDBOOK
    assert not list((world.data / "knowledge" / "originals" / "incoming").iterdir())


async def test_spans_hold_with_chinese_and_emoji(bus: Bus, file) -> None:
    text = (
        "# 手册 😀\n\n"
        + "博物馆早上九点开门👩‍🚀。门票五欧元。\n\n" * 40
        + "# Second\n\nDogs 🐕 stay outside.\f"
        + "末页。" * 30
    )
    await bus.call(Index("中文 😀 'q\"", [await file("手册 😀.txt", text)]))
    chunks = (await bus.call(Collections("chunks", name="中文 😀 'q\"", document="手册 😀.txt"))).chunks
    assert len(chunks) > 20
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end]
        part = await bus.call(
            Collections("text", name="中文 😀 'q\"", document="手册 😀.txt", start=chunk.start, end=chunk.end)
        )
        assert (part.text, part.start, part.count) == (chunk.text, chunk.start, len(text))
    assert {chunk.page for chunk in chunks} == {1, 2}
    assert {chunk.heading for chunk in chunks} == {"手册 😀", "Second"}


async def test_text_across_stored_blocks(bus: Bus, file) -> None:
    text = "".join(f"{i:06} 号 " for i in range(20_000))
    await bus.call(Collections("create", name="long", chunk_size=2000))
    await bus.call(Index("long", [await file("long.txt", text)]))
    for start, end in [(0, 10), (65_530, 65_545), (131_000, 131_200), (len(text) - 3, len(text)), (5, 5)]:
        reply = await bus.call(Collections("text", name="long", document="long.txt", start=start, end=end))
        assert reply.text == text[start:end]
    whole = await bus.call(Collections("text", name="long", document="long.txt"))
    assert text.startswith(whole.text) and len(whole.text) == len(text)
    with pytest.raises(BadRequest, match="180000 characters"):
        await bus.call(Collections("text", name="long", document="long.txt", start=999_999))


async def test_same_bytes_are_unchanged(bus: Bus, world: World, file) -> None:
    await bus.call(Index("guide", [await file("a.txt", HANDBOOK)]))
    batches, calls = world.embedder.batches, world.converter.calls
    again = await bus.call(Index("guide", [await file("a.txt", HANDBOOK, tags=["new"])]))
    assert [document.state for document in again.documents] == ["unchanged"]
    assert (world.embedder.batches, world.converter.calls) == (batches, calls)
    (document,) = (await bus.call(Collections("documents", name="guide"))).documents
    assert (document.state, document.tags) == ("ready", ["new"])


async def test_a_changed_file_replaces_its_chunks(bus: Bus, file) -> None:
    first = (await bus.call(Index("guide", [await file("a.txt", HANDBOOK)]))).documents[0]
    changed = HANDBOOK.replace("nine", "ten")
    second = (await bus.call(Index("guide", [await file("a.txt", changed)]))).documents[0]
    assert (second.state, second.id) == ("ready", first.id) and second.sha256 != first.sha256
    texts = [hit.text for hit in (await bus.call(Search("the museum opens", ["guide"], top=50))).hits]
    assert any("ten" in text for text in texts) and not any("nine" in text for text in texts)
    assert not (await bus.call(Search("nine", ["guide"], mode="keyword"))).hits
    reply = await verified(bus, "guide")
    assert reply.count == second.chunks


async def test_honest_states(bus: Bus, file) -> None:
    sources = [
        await file("good.txt", HANDBOOK),
        await file("broken.txt", "BROKEN"),
        await file("pages.scan", "x"),
        await file("empty.txt", ""),
        await file("blank.txt", " \n\t\n"),
        await file("model.xyz", "x"),
        Source(object="01NOSUCHOBJECT00000000000", name="gone.txt"),
        Source(text="Pasted: the tower is tall."),
    ]
    indexed = await bus.call(Index("mixed", sources))
    states = {document.name: (document.state, document.chunks > 0) for document in indexed.documents}
    pasted = indexed.documents[-1].name
    assert states == {
        "good.txt": ("ready", True),
        "broken.txt": ("failed", False),
        "pages.scan": ("needs_ocr", False),
        "empty.txt": ("failed", False),
        "blank.txt": ("failed", False),
        "model.xyz": ("failed", False),
        "gone.txt": ("failed", False),
        pasted: ("ready", True),
    }
    assert pasted.startswith("Pasted: the tower is tall.")
    reasons = {document.name: document.reason for document in indexed.documents}
    assert "says so itself" in reasons["broken.txt"] and "OCR" in reasons["pages.scan"]
    assert "no text" in reasons["empty.txt"] and "no text" in reasons["blank.txt"]
    assert "no converter takes .xyz" in reasons["model.xyz"] and ".txt" in reasons["model.xyz"]
    assert "put it again" in reasons["gone.txt"]
    listed = (await bus.call(Collections("documents", name="mixed"))).documents
    assert {(document.name, document.reason) for document in listed} == set(reasons.items())


async def test_a_broken_update_keeps_the_earlier_version(bus: Bus, file) -> None:
    await bus.call(Index("guide", [await file("a.txt", HANDBOOK)]))
    failed = (await bus.call(Index("guide", [await file("a.txt", "BROKEN")]))).documents[0]
    assert failed.state == "failed" and "earlier version stays" in failed.reason
    (document,) = (await bus.call(Collections("documents", name="guide"))).documents
    assert document.state == "ready" and "says so itself" in document.reason
    assert (await bus.call(Search("museum opens", ["guide"]))).hits
    repaired = (await bus.call(Index("guide", [await file("a.txt", HANDBOOK)]))).documents[0]
    assert (repaired.state, repaired.reason) == ("unchanged", "")


async def test_a_failed_document_is_read_when_it_comes_repaired(bus: Bus, file) -> None:
    first = (await bus.call(Index("guide", [await file("a.txt", "BROKEN")]))).documents[0]
    second = (await bus.call(Index("guide", [await file("a.txt", HANDBOOK)]))).documents[0]
    assert (first.state, second.state, second.id) == ("failed", "ready", first.id)


async def test_a_source_is_an_object_or_text(bus: Bus) -> None:
    for source in (Source(), Source(object="x", text="y")):
        with pytest.raises(BadRequest, match="source 1"):
            await bus.call(Index("guide", [source]))
    with pytest.raises(BadRequest, match="nothing to index"):
        await bus.call(Index("guide", []))
    assert not (await bus.call(Collections("list"))).collections


async def test_names_are_only_names(bus: Bus, world: World) -> None:
    names = {
        "../../etc/passwd.txt": "etc/passwd.txt",
        "/abs/path.txt": "abs/path.txt",
        "folder\\note.txt": "folder/note.txt",
        "nul\x00byte.txt": "nulbyte.txt",
        "😀" * 300 + ".txt": "😀" * 251 + ".txt",
        "..": "unnamed",
    }
    indexed = await bus.call(Index("guide", [Source(text=HANDBOOK, name=name) for name in names]))
    assert [document.name for document in indexed.documents] == list(names.values())
    assert {document.state for document in indexed.documents} == {"ready"}
    folder = world.data / "knowledge" / "originals"
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [indexed.documents[0].sha256]


async def test_large_text_travels_as_an_object(bus: Bus, world: World, file) -> None:
    world.converter.large = 10
    (document,) = (await bus.call(Index("guide", [await file("a.txt", HANDBOOK)]))).documents
    assert (document.state, document.characters) == ("ready", len(HANDBOOK))


async def test_progress_is_counted_in_chunks(bus: Bus, file) -> None:
    text = "\n\n".join(f"Sentence number {i} tells of thing {i}." for i in range(200))
    job = await bus.submit(Index("guide", [await file("many.txt", text), await file("b.txt", HANDBOOK)]))
    with anyio.fail_after(60):
        async with bus.follow(job.id) as changes:
            seen = [change async for change in changes]
    indexed = msgspec.convert(seen[-1].result, dict)
    assert seen[-1].state == "done" and seen[-1].done == seen[-1].total == indexed["chunks"] > 64
    assert [change.done for change in seen] == sorted(change.done for change in seen)


async def test_going_on_after_an_interruption(world: World) -> None:
    """The embedder fails in the middle; asked again, only what is missing is done, and nothing twice."""
    text = "\n\n".join(f"Sentence number {i} tells of thing {i}." for i in range(400))
    source = Source(text=text, name="many.txt")
    world.embedder.fail_after = 3
    async with world.serving() as bus:
        with pytest.raises(BadRequest, match="stops here"):
            await bus.call(Index("guide", [source]))
        assert not (await bus.call(Search("sentence number 5", ["guide"]))).hits
        assert not (await bus.call(Collections("documents", name="guide"))).documents
    world.embedder.fail_after, before = -1, world.embedder.texts
    assert before == 3 * 64
    async with world.serving() as bus:
        (document,) = (await bus.call(Index("guide", [source]))).documents
        assert document.state == "ready"
        assert world.embedder.texts == document.chunks
        chunks = (await bus.call(Collections("chunks", name="guide"))).chunks
        assert [chunk.number for chunk in chunks] == list(range(document.chunks))
        assert len({chunk.start for chunk in chunks}) == document.chunks
        assert (await verified(bus, "guide")).count == document.chunks
        hits = (await bus.call(Search("thing 399", ["guide"], top=200))).hits
        assert len({hit.chunk for hit in hits}) == len(hits)


async def test_a_job_killed_between_batches_goes_on(bus: Bus, world: World, file) -> None:
    world.embedder.delay = 0.2
    text = "\n\n".join(f"Sentence number {i} tells of thing {i}." for i in range(1200))
    job = await bus.submit(Index("guide", [await file("many.txt", text)]))
    with anyio.fail_after(60):
        while world.embedder.batches < 2:
            await anyio.sleep(0.005)
        await bus.call(Jobs("pause", job.id))
        async with bus.follow(job.id) as changes:
            async for change in changes:
                if change.state == "paused":
                    break
        assert world.embedder.batches < 1200 / 64
        world.embedder.delay = 0.0
        await bus.call(Jobs("resume", job.id))
        async with bus.follow(job.id) as changes:
            states = [change.state async for change in changes]
    assert states[-1] == "done"
    (document,) = (await bus.call(Collections("documents", name="guide"))).documents
    assert world.embedder.texts <= document.chunks + 64  # at most the batch that was under way is done again
    assert (await verified(bus, "guide")).count == document.chunks


async def test_two_at_once_are_one(bus: Bus, file) -> None:
    source = await file("a.txt", HANDBOOK)
    documents: list[Document] = []

    async def index() -> None:
        documents.extend((await bus.call(Index("guide", [source]))).documents)

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(index)
    assert sorted(document.state for document in documents) == ["ready", "unchanged", "unchanged", "unchanged"]
    assert len((await bus.call(Collections("list"))).collections) == 1
    assert (await verified(bus, "guide")).count == documents[0].chunks


async def test_deleted_while_it_is_read(bus: Bus, world: World) -> None:
    text = "\n\n".join(f"Sentence number {i} tells of thing {i}." for i in range(2000))
    failures: list[Exception] = []

    async def index() -> None:
        try:
            await bus.call(Index("guide", [Source(text=text, name="many.txt")]), timeout=60)
        except (Conflict, NotFound) as exc:
            failures.append(exc)

    world.embedder.delay = 0.1
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(index)
        while world.embedder.batches < 2:
            await anyio.sleep(0.005)
        await bus.call(Collections("delete", name="guide"))
    assert len(failures) == 1 and "deleted" in str(failures[0])
    assert not (await bus.call(Collections("list"))).collections


async def test_no_embedder_is_said(world: World) -> None:
    world.embedder = None  # type: ignore[assignment]
    async with world.serving() as bus:
        with pytest.raises(NoWorker, match="embed"):
            await bus.call(Index("guide", [Source(text=HANDBOOK)]))
        with pytest.raises(NoWorker, match="embed"):
            await bus.call(Collections("create", name="guide"))


async def test_another_embedder_is_refused(world: World) -> None:
    async with world.serving() as bus:
        await bus.call(Index("guide", [Source(text=HANDBOOK, name="a.txt")]))
    world.embedder = HashEmbedder(revision="2")
    async with world.serving() as bus:
        for request in (Search("museum", ["guide"]), Index("guide", [Source(text="New text.")])):
            with pytest.raises(Conflict, match=r"bring the old one back, or index the documents again into a new"):
                await bus.call(request)
        assert (await bus.call(Search("museum", ["guide"], mode="keyword"))).hits
        everywhere = await bus.call(Search("museum"))
        assert everywhere.hits and any("left out" in stage.note for stage in everywhere.receipt.stages)


async def verified(bus: Bus, name: str) -> CollectionsReply:
    reply = await bus.call(Collections("verify", name=name))
    assert reply.problems == []
    return reply
