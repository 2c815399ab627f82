"""The whole way of a question over a real bus, with a scripted search and model in place of the real ones."""

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from aiirwkv import (
    Answer,
    Bus,
    Chat,
    Chunk,
    Embed,
    Embeddings,
    Generate,
    Hit,
    Hits,
    Message,
    Model,
    Models,
    ModelsReply,
    Plugin,
    Search,
    hookimpl,
)
from aiirwkv.config import Config, Use
from aiirwkv.testing import running
from aiirwkv_rag import Rag

LIBRARY = "The library closes at 18:30. Its head is Margaret Olsen."
POOL = "The pool is heated. A swim costs 4 euros."


class Scripted(Plugin):
    """Finds two passages, embeds by letters, and says what it was told to."""

    says: tuple[str, ...] = ("It closes at 18:30 [1].",)
    demonstration: bool = False
    finds: bool = True
    endless: bool = False

    @hookimpl
    async def embed(self, request: Embed) -> Embeddings:
        rows = [[float(text.lower().count(chr(97 + i))) for i in range(26)] + [0.1] for text in request.texts]
        return Embeddings.pack(rows, "letters")

    @hookimpl
    async def search(self, request: Search) -> Hits:
        self.searched = request
        hits = [Hit(f"{i}.txt", None, 0, len(text), text, 1.0, "c") for i, text in enumerate((LIBRARY, POOL), 1)]
        return Hits(hits if self.finds else [])

    @hookimpl
    async def models(self, request: Models) -> ModelsReply:
        card = {"refusal": "The text does not say."} if self.demonstration else {}
        name = "big"
        return ModelsReply([Model(name, loaded=True, default=True, demonstration=self.demonstration, card=card)])

    @hookimpl
    async def generate(self, request: Generate) -> AsyncIterator[Chunk]:
        self.asked = [*getattr(self, "asked", []), request]
        try:
            while self.endless:
                self.written = getattr(self, "written", 0) + 1
                yield Chunk("word ")
                await anyio.sleep(0.005)
            for word in self.says[min(len(self.asked), len(self.says)) - 1].split(" "):
                yield Chunk(word + " ")
            yield Chunk(finish="stop", model="big")
        finally:
            self.ended = True


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
async def bus(scripted: Scripted, tmp_path: Path) -> AsyncIterator[Bus]:
    use = Use(generate="scripted", embed="scripted", index="scripted", chat="rag")
    async with running({"scripted": scripted, "rag": Rag()}, tmp_path, Config(use=use)) as bus:
        yield bus


async def ask(bus: Bus, question: str = "When does the library close?", **more: object) -> Answer:
    return await bus.call(Chat(question, **more))  # type: ignore[arg-type]


async def test_a_large_model_reads_numbered_passages_and_its_marks_are_checked(bus: Bus, scripted: Scripted) -> None:
    scripted.says = ("It closes at 18:30 [1][7]. The pool is heated [2].",)
    answer = await ask(bus)
    assert answer.answer == "It closes at 18:30 [1]. The pool is heated [2]."
    assert [(c.number, c.document, c.text) for c in answer.citations] == [
        (1, "1.txt", "The library closes at 18:30."),
        (2, "2.txt", "The pool is heated."),
    ]
    assert answer.supported and not answer.refused and not answer.demonstration
    (asked,) = scripted.asked
    assert asked.documents == [f"[1] 1.txt\n{LIBRARY}", f"[2] 2.txt\n{POOL}"]
    assert [message.role for message in asked.messages] == ["system", "user"]
    assert all(seen.kept for seen in answer.receipt.considered)


async def test_marks_that_the_model_forgot_are_added(bus: Bus, scripted: Scripted) -> None:
    scripted.says = ("The library closes at 18:30.",)
    answer = await ask(bus)
    assert answer.answer == "The library closes at 18:30. [1]"
    assert answer.citations[0].text == "The library closes at 18:30."


async def test_what_the_sources_do_not_support_is_marked(bus: Bus, scripted: Scripted) -> None:
    scripted.says = ("Zyx qqq vvv [1].",)
    answer = await ask(bus)
    assert not answer.supported and answer.citations[0].support < 0.5


async def test_a_refusal_says_what_was_found_instead(bus: Bus, scripted: Scripted) -> None:
    scripted.says = ("The documents do not say.",)
    answer = await ask(bus)
    assert answer.refused and not answer.supported
    assert answer.answer.startswith("The sources do not answer this.")
    assert answer.citations[0].text == "The library closes at 18:30." in answer.answer


async def test_sources_first_lets_the_model_speak_when_they_do_not_say(bus: Bus, scripted: Scripted) -> None:
    scripted.says = (
        "The documents do not say.",
        "Perhaps at six.",
    )
    answer = await ask(bus, mode="first")
    assert answer.answer.strip() == "Not from the sources: Perhaps at six."
    assert not answer.refused and not answer.supported and not answer.citations
    assert scripted.asked[1].documents == []


async def test_free_mode_has_no_gate(bus: Bus, scripted: Scripted) -> None:
    scripted.finds = False
    assert (await ask(bus, mode="sources")).refused
    assert not getattr(scripted, "asked", [])
    answer = await ask(bus, mode="free")
    assert not answer.refused and answer.answer == "It closes at 18:30."


async def test_nothing_found_is_said(bus: Bus, scripted: Scripted) -> None:
    scripted.finds = False
    answer = await ask(bus, collections=["town"])
    assert answer.refused and "nothing was found (town)" in answer.answer


async def test_a_demonstration_models_wrong_answer_gives_way_to_a_quote(bus: Bus, scripted: Scripted) -> None:
    scripted.demonstration, scripted.says = True, ("at ten past nine",)
    answer = await ask(bus)
    assert answer.demonstration and not answer.refused and not answer.supported
    assert "gave no answer" in answer.answer and "“The library closes at 18:30.” [1]" in answer.answer


async def test_a_follow_up_is_rewritten_by_the_model_and_shown(bus: Bus, scripted: Scripted) -> None:
    scripted.says = (
        "When does the library close?",
        "At 18:30 [1].",
    )
    earlier = [Message("user", "Is there a library?"), Message("assistant", "Yes [1].")]
    answer = await ask(bus, "And when does it close?", messages=earlier)
    assert scripted.searched.query == answer.receipt.query == "When does the library close?"
    assert [message.content for message in scripted.asked[1].messages[1:]] == [
        "Is there a library?",
        "Yes [1].",
        "And when does it close?",
    ]


async def test_sampling_and_model_are_passed_on(bus: Bus, scripted: Scripted) -> None:
    await ask(bus, model="scripted/big", temperature=0.3, seed=7, max_tokens=9, state="mine", conversation="c1")
    (asked,) = scripted.asked
    assert (asked.model, asked.temperature, asked.seed, asked.max_tokens) == ("big", 0.3, 7, 9)
    assert (asked.state, asked.conversation) == ("mine", "c1")


async def test_leaving_the_stream_stops_the_model(bus: Bus, scripted: Scripted) -> None:
    scripted.endless = True
    async with bus.stream(Chat("When does the library close?", mode="free")) as pieces:
        async for piece in pieces:
            if piece.text:
                break
    written = scripted.written
    with anyio.fail_after(2):
        while not getattr(scripted, "ended", False):
            await anyio.sleep(0.01)
    assert scripted.written - written < 40
