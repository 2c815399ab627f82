"""The offline default, whole: a text file of ten facts is indexed, asked about, and cited."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiirwkv import Answer, Bus, Chat, ChatChunk, Index, NotFound, Source
from aiirwkv.testing import running
from aiirwkv_convert_files import ConvertFiles
from aiirwkv_embed_minilm import EmbedMiniLM
from aiirwkv_index_chroma import IndexChroma
from aiirwkv_llm_rwkv import LlmRwkv
from aiirwkv_rag import Rag

FACTS = Path(__file__).with_name("facts.txt")

ANSWERABLE = [  # question, what the answer must hold, words of the sentence that must be cited
    ("When does the bakery close on Sundays?", "12:00", "On Sundays"),
    ("How much is a loaf of rye bread?", "4.20 euros", "rye bread"),
    ("When was the bakery founded?", "1953", "founded"),
    ("Who is the master baker?", "Tomas Lindgren", "master baker"),
    ("How early must I order a cake?", "two days", "cakes"),
    ("What number do I call to reach the shop?", "555-0182", "telephone"),
    ("Where can customers park?", "behind the mill", "park"),
    ("How many seats does the cafe have?", "24", "24 seats"),
    ("Where does the flour come from?", "Aldersby", "flour"),
    ("What time does the bakery open on Tuesday?", "6:30", "6:30"),
]
UNANSWERABLE = [
    "What is Tomas Lindgren's telephone number?",
    "How old is the master baker?",
    "How much does a cup of coffee cost in the cafe?",
    "When was the mill built?",
    "Who won the world cup in 1998?",
]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def bus(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bus]:
    plugins = {
        "llm_rwkv": LlmRwkv(),
        "embed_minilm": EmbedMiniLM(),
        "index_chroma": IndexChroma(),
        "convert_files": ConvertFiles(),
        "rag": Rag(),
    }
    async with running(plugins, tmp_path_factory.mktemp("data")) as bus:
        file = await bus.put(FACTS, FACTS.name, "text/plain")
        await bus.call(Index("bakery", [Source(object=file.id, name=FACTS.name)]), timeout=60)
        yield bus


async def ask(bus: Bus, question: str, **more: object) -> Answer:
    return await bus.call(Chat(question, collections=["bakery"], **more), timeout=60)  # type: ignore[arg-type]


async def test_simple_facts_are_answered_with_the_right_sentence_cited(bus: Bus) -> None:
    text = FACTS.read_text()
    right = []
    for question, expected, sentence in ANSWERABLE:
        answer = await ask(bus, question)
        assert answer.demonstration
        for citation in answer.citations:
            assert citation.document == FACTS.name
            assert text[citation.start : citation.end] == citation.text
            assert f"[{citation.number}]" in answer.answer
        if not answer.refused and expected in answer.answer and sentence in answer.citations[0].text:
            right.append(question)
        else:
            print(question, "->", answer.answer)
    assert len(right) >= 8


async def test_what_the_file_does_not_say_is_refused(bus: Bus) -> None:
    for question in UNANSWERABLE:
        answer = await ask(bus, question)
        assert answer.refused, f"{question} -> {answer.answer}"
        assert not answer.supported
        assert answer.citations[0].text in answer.answer  # what was found instead


async def test_a_stream_tells_its_stages_then_the_receipt_the_text_and_the_answer(bus: Bus) -> None:
    async with bus.stream(Chat("Who is the master baker?", collections=["bakery"])) as pieces:
        chunks: list[ChatChunk] = [piece async for piece in pieces]
    stages = [chunk.stage for chunk in chunks if chunk.stage]
    assert [stage.split()[0] for stage in stages] == ["searching", "reading", "writing"]
    kinds = "".join("s" if c.stage else "r" if c.receipt else "t" if c.text else "a" for c in chunks)
    assert re.fullmatch("ssrst+a", kinds)
    whole = chunks[-1].answer
    assert whole and whole.answer == "".join(chunk.text for chunk in chunks)
    assert whole.receipt.query == "Who is the master baker?"
    assert {"weigh", "write"} <= {stage.name for stage in whole.receipt.stages}
    assert whole.receipt.considered and whole.receipt.prompt and whole.usage.completion


async def test_errors_of_the_search_reach_the_caller(bus: Bus) -> None:
    with pytest.raises(NotFound, match="bakerie"):
        await bus.call(Chat("Who is the master baker?", collections=["bakerie"]))
