"""A conversation: it streams, stops at once and keeps what is there, and says in words what went wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from aiirwkv import Answer, Chat, ChatChunk, NotFound, Plugin, Receipt, Stage, hookimpl
from aiirwkv.bus import Bus
from aiirwkv.testing import running
from aiirwkv_webui.talk import Talk, Turn


class Slow(Plugin):
    """Answers a word every 20 ms; `ended` tells whether it was left to finish."""

    @hookimpl
    async def chat(self, request: Chat) -> AsyncIterator[ChatChunk]:
        self.asked, self.written = request, 0
        if request.question == "nothing":
            raise NotFound("there is no collection 'Town'; see them with: aiirwkv collections")
        yield ChatChunk(stage="searching")
        yield ChatChunk(receipt=Receipt(request.question, stages=[Stage("search", 0.01)]))
        for number in range(5 if request.question == "short" else 500):
            await anyio.sleep(0.02)
            self.written += 1
            yield ChatChunk(text=f"word{number} ")
        yield ChatChunk(answer=Answer("all the words"))


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
async def bus(slow: Slow, tmp_path: Path) -> AsyncIterator[Bus]:
    async with running({"slow": slow}, tmp_path) as bus:
        yield bus


async def over(turn: Turn) -> Turn:
    with anyio.fail_after(10):
        while not turn.over:
            await anyio.sleep(0.01)
    return turn


async def test_a_whole_answer_and_the_rounds_before(bus: Bus, slow: Slow) -> None:
    talk = Talk()
    talk.join()
    for _ in range(2):
        talk.ask(bus, "short", ["Town"])
        turn = await over(talk.turns[-1])
    assert turn.stages == ["searching"] and turn.text == "word0 word1 word2 word3 word4 "
    assert turn.answer and turn.answer.answer == "all the words" and turn.receipt and not turn.stopped
    assert [message.content for message in slow.asked.messages] == ["short", "all the words"]


@pytest.mark.parametrize("how", ["stop", "leave"])
async def test_stopping_keeps_the_words_and_ends_the_work(bus: Bus, slow: Slow, how: str) -> None:
    talk = Talk()
    talk.join()
    talk.ask(bus, "long", [])
    turn = talk.turns[0]
    while len(turn.text) < 20:
        await anyio.sleep(0.01)
    talk.join()
    talk.leave()  # another tab looked on for a moment
    await anyio.sleep(0.1)
    assert talk.busy
    talk.stop() if how == "stop" else talk.leave()
    await over(turn)
    assert turn.stopped and turn.text.startswith("word0 word1") and not talk.busy
    await anyio.sleep(0.1)
    written = slow.written
    await anyio.sleep(0.2)
    assert slow.written == written < 500


async def test_what_went_wrong_is_said_and_can_be_tried_again(bus: Bus) -> None:
    talk = Talk()
    talk.join()
    talk.ask(bus, "nothing", ["Town"])
    turn = await over(talk.turns[0])
    assert turn.error.startswith("there is no collection 'Town'") and turn.answer is None
    turn.question = "short"
    talk.start(bus, turn)
    await over(turn)
    assert not turn.error and turn.answer
