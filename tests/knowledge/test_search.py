"""Searching over the bus: legs, filters, receipt, several collections, and what happens when a part is away."""

from pathlib import Path

import pytest
from aiirwkv import (
    BadRequest,
    Bus,
    Collections,
    Index,
    NotFound,
    NoWorker,
    Plugin,
    Rerank,
    Scores,
    Search,
    Source,
    hookimpl,
)
from aiirwkv.testing import running
from aiirwkv_index_chroma import IndexChroma

from .conftest import HashEmbedder, World

SOURCES = [
    Source(text="The museum opens at nine. Tickets cost five euro.", name="museum.txt", tags=["city", "culture"]),
    Source(text="The harbour is open all night. Boats cost ten euro.", name="harbour.txt", tags=["city"]),
    Source(text="微调模型需要数据。文档在第一章。", name="手册.txt"),
    Source(text="Wolves hunt in packs during the winter.", name="animals/wolves.txt", tags=["nature"]),
]


@pytest.fixture
async def guide(bus: Bus) -> Bus:
    await bus.call(Index("guide", SOURCES))
    return bus


async def test_chinese_queries_of_two_characters_hit(guide: Bus) -> None:
    for query in ("文档", "微调", "章", "第一章", "数据"):
        for mode in ("keyword", "hybrid"):
            hits = (await guide.call(Search(query, ["guide"], mode=mode))).hits
            assert hits[0].document == "手册.txt"


async def test_an_embedder_that_cannot_read_the_query_does_not_spoil_it(world: World) -> None:
    async with world.serving() as bus:
        await bus.call(Index("guide", SOURCES))
        assert len((await bus.call(Search("数据", ["guide"]))).hits) == len(SOURCES)
    world.embedder.languages = ["en"]
    async with world.serving() as bus:
        reply = await bus.call(Search("数据", ["guide"]))
        assert [hit.document for hit in reply.hits] == ["手册.txt"]
        assert any("hash reads no Cjk" in stage.note for stage in reply.receipt.stages)
        # Words that nobody has written: better some passages than none.
        assert (await bus.call(Search("没有", ["guide"]))).hits
        assert len((await bus.call(Search("museum", ["guide"]))).hits) == len(SOURCES)


async def test_english_words_are_stemmed(guide: Bus) -> None:
    hits = (await guide.call(Search("the hunting of a wolf pack", ["guide"], mode="keyword"))).hits
    assert [hit.document for hit in hits] == ["animals/wolves.txt"]


async def test_modes_and_scores(guide: Bus) -> None:
    legs = {mode: (await guide.call(Search("the museum opens at nine", mode=mode))) for mode in MODES}
    assert all(reply.hits[0].document == "museum.txt" for reply in legs.values())
    dense, keyword, hybrid = (legs[mode].hits[0] for mode in MODES)
    assert dense.score == dense.scores["dense"] and 0 < dense.score <= 1.0001
    assert keyword.score == keyword.scores["keyword"] > 0
    assert hybrid.score == hybrid.scores["fused"] <= 1.0001 and {"dense", "keyword"} < hybrid.scores.keys()
    stages = {mode: [stage.name for stage in legs[mode].receipt.stages] for mode in MODES}
    assert stages == {
        "dense": ["embed", "dense", "fuse"],
        "keyword": ["keyword", "fuse"],
        "hybrid": ["embed", "dense", "keyword", "fuse"],
    }
    assert all(stage.seconds > 0 for stage in legs["hybrid"].receipt.stages)


MODES = ("dense", "keyword", "hybrid")


async def test_the_dense_leg_is_the_stores_ranking(guide: Bus, world: World) -> None:
    """Cosines are those of the embedder's vectors, best first."""
    hits = (await guide.call(Search("open all night", mode="dense", top=50))).hits
    query = world.embedder.vector("open all night")
    for hit in hits:
        vector = world.embedder.vector(hit.text)
        assert hit.score == pytest.approx(sum(a * b for a, b in zip(query, vector, strict=True)), abs=1e-4)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


async def test_the_receipt_tells_what_was_dropped(guide: Bus) -> None:
    reply = await guide.call(Search("cost euro", ["guide"], top=1))
    considered = reply.receipt.considered
    assert [item.kept for item in considered] == [True] + [False] * (len(considered) - 1) and len(considered) > 1
    assert considered[0].document == reply.hits[0].document and considered[0].scores == reply.hits[0].scores
    assert "only 1" in considered[1].reason and considered[1].text
    assert (reply.receipt.query, reply.receipt.collections) == ("cost euro", ["guide"])


async def test_filters_are_obeyed(guide: Bus) -> None:
    wanted = [
        ({"documents": ["harbour.txt"]}, {"harbour.txt"}),
        ({"documents": ["harbour.txt", "museum.txt"]}, {"harbour.txt", "museum.txt"}),
        ({"tags": ["city"]}, {"harbour.txt", "museum.txt"}),
        ({"tags": ["culture", "nature"]}, {"museum.txt", "animals/wolves.txt"}),
        ({"tags": ["city"], "documents": ["museum.txt"]}, {"museum.txt"}),
        ({"tags": ["no such tag"]}, set()),
    ]
    for where, documents in wanted:
        for mode in MODES:
            hits = (await guide.call(Search("cost of wolves in the city museum harbour", mode=mode, where=where))).hits
            assert {hit.document for hit in hits} == documents


async def test_pages(bus: Bus, file) -> None:
    text = "\f".join(f"Page {i} tells of apples." for i in range(1, 8))
    await bus.call(Index("paged", [await file("book.txt", text)]))
    hits = (await bus.call(Search("apples", where={"pages": ["2", "5-6"]}, top=50))).hits
    assert {hit.page for hit in hits} == {2, 5, 6}


async def test_bad_requests_say_what_to_do(guide: Bus) -> None:
    wrong = [
        (Search("x", top=0), BadRequest, "between 1 and 200"),
        (Search("x", top=201), BadRequest, "between 1 and 200"),
        (Search("  "), BadRequest, "empty"),
        (Search("x" * 30_000), BadRequest, "20000"),
        (Search("x", where={"author": ["me"]}), BadRequest, "documents, tags, pages"),
        (Search("x", where={"pages": ["two"]}), BadRequest, "'3-7'"),
        (Search("x", ["guid"]), NotFound, "did you mean 'guide'"),
        (Search("x", ["something else"]), NotFound, "aiirwkv collections"),
        (Search("x", where={"documents": ["musem.txt"]}), NotFound, "did you mean 'museum"),
    ]
    for request, error, says in wrong:
        with pytest.raises(error, match=says):
            await guide.call(request)


async def test_odd_queries_do_no_harm(guide: Bus) -> None:
    for query in ('"', 'a" OR words:b', "' ; DROP TABLE chunks", "NEAR(", "*", "-", "\x00", "😀", "^a:b"):
        for mode in MODES:
            await guide.call(Search(query, mode=mode))
    assert (await guide.call(Search("museum", mode="keyword"))).hits


async def test_several_collections(guide: Bus) -> None:
    await guide.call(Index("more", [Source(text="The museum of boats opens at eleven.", name="boats.txt")]))
    both = (await guide.call(Search("museum opens", ["guide", "more"]))).hits
    assert {hit.collection for hit in both[:2]} == {"guide", "more"}
    assert {hit.collection for hit in (await guide.call(Search("museum opens", ["more"]))).hits} == {"more"}
    everywhere = (await guide.call(Search("museum opens"))).hits
    assert {hit.chunk for hit in everywhere} == {hit.chunk for hit in both}


async def test_nothing_to_search_yet(bus: Bus) -> None:
    with pytest.raises(NotFound, match="aiirwkv index"):
        await bus.call(Search("museum"))


async def test_without_the_embedder_the_keyword_leg_answers(world: World) -> None:
    async with world.serving() as bus:
        await bus.call(Index("guide", SOURCES))
    world.embedder = None  # type: ignore[assignment]
    async with world.serving() as bus:
        reply = await bus.call(Search("museum", ["guide"]))
        assert reply.hits[0].document == "museum.txt"
        assert any(stage.name == "embed" and "left out" in stage.note for stage in reply.receipt.stages)
        with pytest.raises(NoWorker):
            await bus.call(Search("museum", ["guide"], mode="dense"))


async def test_a_disabled_chunk_is_not_found(guide: Bus) -> None:
    chunk = (await guide.call(Search("wolves", mode="keyword"))).hits[0].chunk
    await guide.call(Collections("edit", name="guide", chunk=chunk, enabled=False))
    for mode in MODES:
        assert chunk not in {hit.chunk for hit in (await guide.call(Search("wolves", mode=mode, top=200))).hits}
    await guide.call(Collections("edit", name="guide", chunk=chunk, enabled=True))
    assert (await guide.call(Search("wolves"))).hits[0].chunk == chunk


async def test_many_hidden_neighbours_do_not_starve_a_search(bus: Bus, world: World) -> None:
    """The nearest hundreds are disabled: the store is asked for more until something may be shown."""
    text = "\n\n".join(f"Apple apple apple number {i} apple apple." for i in range(300))
    await bus.call(Index("apples", [Source(text=text, name="hidden.txt"), Source(text="One apple.", name="seen.txt")]))
    chunks = (await bus.call(Collections("chunks", name="apples", document="hidden.txt"))).chunks
    for chunk in chunks:
        world.index._catalogue.enable(chunk_collection(world), chunk.id, False)
    hits = (await bus.call(Search("apple apple", mode="dense"))).hits
    assert [hit.document for hit in hits] == ["seen.txt"]


def chunk_collection(world: World) -> str:
    (collection,) = world.index._catalogue.names()
    return collection.id


class ByLength(Plugin):
    """A reranker that likes short passages best."""

    @hookimpl
    async def rerank(self, request: Rerank) -> Scores:
        return Scores([-float(len(text)) for text in request.texts], "length")


async def test_a_reranker_has_the_last_word(tmp_path: Path) -> None:
    plugins = {"hash": HashEmbedder(), "chroma": IndexChroma(), "length": ByLength()}
    async with running(plugins, tmp_path) as bus:
        await bus.call(Index("guide", SOURCES))
        reply = await bus.call(Search("the museum opens at nine", ["guide"]))
        lengths = [len(hit.text) for hit in reply.hits]
        assert lengths == sorted(lengths) and reply.hits[0].score == -lengths[0]
        assert reply.receipt.stages[-1].name == "rerank" and "4 passages by length" in reply.receipt.stages[-1].note
        plain = await bus.call(Search("the museum opens at nine", ["guide"], rerank="none"))
        assert plain.hits[0].document == "museum.txt" and "rerank" not in plain.hits[0].scores
        with pytest.raises(NoWorker, match="other"):
            await bus.call(Search("museum", ["guide"], rerank="other"))
