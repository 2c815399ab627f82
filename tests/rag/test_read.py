"""Asking whole texts: one after another or each by itself, as the model has read them before."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiirwkv import (
    Answer,
    Bus,
    Chat,
    Chunk,
    Collections,
    CollectionsReply,
    Embed,
    Embeddings,
    Generate,
    Hit,
    Hits,
    Message,
    Model,
    Models,
    ModelsReply,
    NotFound,
    Passage,
    Plugin,
    Search,
    ServiceError,
    Usage,
    hookimpl,
)
from aiirwkv.config import Config, Use
from aiirwkv.testing import running
from aiirwkv_rag import Rag

LIBRARY = "The library closes at 18:30. Its head is Margaret Olsen."
POOL = "The pool is heated. It closes at 20:00. A swim costs 4 euros."
MUSEUM = "The museum stands in Mill Lane."
NO = "The documents do not say."


class Town(Plugin):
    """Three passages of three documents; the model answers each text as it is told, and the documents can be had."""

    demonstration: bool = False
    answers: dict[str, str] = {}
    sure: dict[str, float] = {}
    limits: dict[str, int] = {}
    read: dict[str, str] = {}
    fails: bool = False

    def passages(self) -> list[Hit]:
        places = {"c": LIBRARY, "b": POOL, "a": MUSEUM}
        return [
            Hit(f"{id}.txt", None, 0, len(text), text, 1.0, "town", f"doc-{id}", f"{id}-0", "", {}, self.read.get(id))
            for id, text in places.items()
        ]  # fmt: skip

    @hookimpl
    async def embed(self, request: Embed) -> Embeddings:
        rows = [[float(text.lower().count(chr(97 + i))) for i in range(26)] + [0.1] for text in request.texts]
        return Embeddings.pack(rows, "letters")

    @hookimpl
    async def search(self, request: Search) -> Hits:
        self.searched = request
        return Hits(self.passages())

    @hookimpl
    async def collections(self, request: Collections) -> CollectionsReply:
        """Every document goes on after the passage found, with a page of its own."""
        self.fetched = [*getattr(self, "fetched", []), request.action]
        hit = next((hit for hit in self.passages() if hit.document_id == request.document), None)
        if hit is None or hit.document == "b.txt":
            raise NotFound("it has been deleted")
        more = f"{hit.text}\n\nThe café on the roof serves soup."
        if request.action == "text":
            return CollectionsReply(text=more[request.start : request.start + 40], start=request.start, count=len(more))
        first = Passage("c-0", hit.document, 0, 0, len(hit.text), hit.text, 1)
        second = Passage("c-1", hit.document, 1, len(hit.text) + 2, len(more), more[len(hit.text) + 2 :], 2)
        return CollectionsReply(chunks=[first, second][request.offset : request.offset + 1], count=2)

    @hookimpl
    async def models(self, request: Models) -> ModelsReply:
        card: dict[str, Any] = {"limits": self.limits}
        return ModelsReply([Model("big", loaded=True, default=True, demonstration=self.demonstration, card=card)])

    @hookimpl
    async def generate(self, request: Generate) -> AsyncIterator[Chunk]:
        self.asked = [*getattr(self, "asked", []), request]
        self.active = getattr(self, "active", 0) + 1
        self.most = max(getattr(self, "most", 0), self.active)
        try:
            await anyio.sleep(0.02)
            if self.fails:
                raise ServiceError("the model stumbled")
            text = "\n".join(request.documents)
            said = next((answer for key, answer in self.answers.items() if text.startswith(key)), "Nothing.")
            for word in said.split(" "):
                yield Chunk(f"{word} ", logprobs=[self.sure.get(text, -0.1)])
            yield Chunk(finish="stop", model="big", usage=Usage(100, 90, 5, 1, 4000))
        finally:
            self.active -= 1


@pytest.fixture
def town() -> Town:
    return Town(answers={LIBRARY: "It closes at 18:30.", POOL: NO, MUSEUM: NO})


@pytest.fixture
async def bus(town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bus]:
    monkeypatch.setattr("aiirwkv_rag.plugin.REMEMBERED", 0.0)
    use = Use(generate="town", embed="town", index="town", chat="rag")
    async with running({"town": town, "rag": Rag()}, tmp_path, Config(use=use)) as bus:
        yield bus


async def ask(bus: Bus, read: Any = None, question: str = "When does the library close?", **more: Any) -> Answer:
    return await bus.call(Chat(question, read=read, **more))


async def test_in_parallel_each_text_is_asked_by_itself_at_the_same_time(bus: Bus, town: Town) -> None:
    answer = await ask(bus, "parallel")
    assert answer.answer == "It closes at 18:30. [1]" and answer.supported and not answer.refused
    (citation,) = answer.citations
    assert (citation.document, citation.text) == ("c.txt", "The library closes at 18:30.")
    assert sorted(asked.documents for asked in town.asked) == sorted([[LIBRARY], [POOL], [MUSEUM]])
    assert town.most == 3
    for asked in town.asked:  # nothing stands before the text, and the question comes last
        (message,) = asked.messages
        assert message.role == "user" and message.content.endswith("When does the library close?")
        assert NO in message.content
    stages = {stage.name: stage.note for stage in answer.receipt.stages}
    assert stages["ask"] == "3 texts at the same time, 270 of their tokens read before"
    assert stages["judge"] == "1 of 3 texts say something"
    assert (answer.usage.prompt, answer.usage.cached, answer.usage.hits, answer.usage.bytes) == (300, 270, 3, 12000)


async def test_the_receipt_shows_the_score_of_each_text(bus: Bus, town: Town) -> None:
    town.answers = {LIBRARY: "It closes at 18:30.", POOL: "It closes at 20:00.", MUSEUM: "Zyx qqq."}
    answer = await ask(bus, "parallel")
    assert answer.answer == "It closes at 18:30. [1]"
    scores = {seen.document: seen.scores["answer"] for seen in answer.receipt.considered}
    assert scores["c.txt"] > scores["b.txt"] > scores["a.txt"] >= 0
    assert {seen.document: (seen.kept, seen.reason) for seen in answer.receipt.considered} == {
        "c.txt": (True, "the answer to it is supported best"),
        "b.txt": (False, "another answer is supported better"),
        "a.txt": (False, "another answer is supported better"),
    }
    assert answer.receipt.prompt.startswith(LIBRARY)


async def test_a_model_that_is_sure_of_its_words_counts_more(bus: Bus, town: Town) -> None:
    town.answers = {LIBRARY: "It closes at 18:30.", POOL: "It closes at 20:00.", MUSEUM: NO}
    town.sure = {LIBRARY: -9.0}
    assert (await ask(bus, "parallel")).answer == "It closes at 20:00. [1]"


async def test_when_no_text_says_it_the_answer_is_a_refusal(bus: Bus, town: Town) -> None:
    town.answers = {LIBRARY: NO, POOL: NO, MUSEUM: ""}
    answer = await ask(bus, "parallel")
    assert answer.refused and answer.answer.startswith("The sources do not answer this.")
    answer = await ask(bus, "parallel", mode="first")
    assert answer.answer.startswith("Not from the sources:") and not answer.supported


async def test_one_after_another_in_an_order_of_their_own(bus: Bus, town: Town) -> None:
    town.answers = {MUSEUM: "It closes at 18:30. The pool is heated. [7]"}
    answer = await ask(bus, "concat")
    (asked,) = town.asked
    assert asked.documents == [MUSEUM, POOL, LIBRARY]  # by the documents' ids, whatever the question is
    assert answer.answer == "It closes at 18:30. The pool is heated. [2] [3]"
    assert [(citation.number, citation.document) for citation in answer.citations] == [(2, "b.txt"), (3, "c.txt")]
    assert all(seen.kept for seen in answer.receipt.considered)
    await ask(bus, "concat", "How much is a swim?")
    assert town.asked[1].documents == asked.documents


async def test_no_more_texts_than_the_model_reads_well(bus: Bus, town: Town) -> None:
    town.limits = {"passages": 2}
    await ask(bus, "parallel")
    assert len(town.asked) == 2 and [LIBRARY] in [asked.documents for asked in town.asked]


async def test_no_longer_texts_together_than_the_model_reads_well(bus: Bus, town: Town) -> None:
    town.limits = {"tokens": 30}
    await ask(bus, "concat")
    assert town.asked[0].documents == [MUSEUM, LIBRARY]


async def test_a_document_that_was_read_whole_is_asked_whole(bus: Bus, town: Town) -> None:
    town.read = {"c": "whole", "b": "whole", "a": "passages"}
    town.answers = {f"{LIBRARY}\n\nThe café on the roof": "The café on the roof serves soup.", POOL: NO, MUSEUM: NO}
    answer = await ask(bus, "parallel", "When does the library close? And the café on the roof?")
    documents = sorted(asked.documents[0] for asked in town.asked)
    assert documents == sorted([f"{LIBRARY}\n\nThe café on the roof serves soup.", POOL, MUSEUM])  # b was deleted
    (citation,) = answer.citations
    assert (citation.text, citation.page, citation.chunk) == ("The café on the roof serves soup.", 2, "c-1")
    assert citation.start == len(LIBRARY) + 2


async def test_not_whole_when_it_is_too_long_or_pages_are_asked_for(bus: Bus, town: Town) -> None:
    town.read = {"c": "whole"}
    await ask(bus, "parallel", where={"pages": ["1"]})
    town.limits = {"tokens": 20}
    await ask(bus, "parallel")
    assert [asked.documents[0] for asked in town.asked if asked.documents[0].startswith("The library")] == [LIBRARY] * 2


async def test_without_a_wish_only_what_lies_in_one_whole_document_is_asked_whole(bus: Bus, town: Town) -> None:
    town.read = {"c": "whole", "b": "whole", "a": "whole"}
    await ask(bus)
    assert town.asked[0].documents[0].startswith("[1] ")  # three documents: as ever
    town.limits, town.answers = {"passages": 1}, {LIBRARY: "It closes at 18:30."}
    answer = await ask(bus)
    assert town.asked[1].documents[0].startswith(f"{LIBRARY}\n\n") and answer.answer == "It closes at 18:30. [1]"
    town.read = {}
    await ask(bus)
    assert town.asked[2].documents[0].startswith("[1] ")


async def test_a_follow_up_is_asked_by_itself(bus: Bus, town: Town) -> None:
    earlier = [Message("user", "Is there a library?"), Message("assistant", "Yes [1].")]
    town.answers = {"": "When does the library close?"}
    await ask(bus, "parallel", "And when does it close?", messages=earlier)
    for asked in town.asked[1:]:
        assert [message.role for message in asked.messages] == ["user"]
        assert asked.messages[0].content.endswith("When does the library close?")


async def test_a_demonstration_model_is_judged_by_the_sentence_its_answer_stands_in(bus: Bus, town: Town) -> None:
    town.demonstration = True
    town.answers = {LIBRARY: "18:30", POOL: "20:00", MUSEUM: "at ten"}
    town.sure = {LIBRARY: -3.0, POOL: 0.0}
    for read in ("parallel", "concat"):
        town.asked = []
        answer = await ask(bus, read)
        if read == "parallel":
            assert answer.answer == "18:30 [1]" and answer.citations[0].text == "The library closes at 18:30."
        assert [message.content for message in town.asked[0].messages] == ["When does the library close?"]
    town.answers = {LIBRARY: "at ten"}
    assert "“The library closes at 18:30.” [1]" in (await ask(bus, "parallel")).answer
    assert not (await ask(bus, None)).refused and len(town.asked[-1].documents[0]) < len(LIBRARY)


async def test_a_model_that_fails_is_one_clear_error(bus: Bus, town: Town) -> None:
    town.fails = True
    for read in ("parallel", "concat"):
        with pytest.raises(ServiceError, match="the model stumbled"):
            await ask(bus, read)
