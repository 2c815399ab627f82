"""The plugin on the bus: answers, streams, leaving, fairness, refusals, and models that cannot be used."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from aiirwkv import (
    BadRequest,
    Bus,
    Completion,
    DeadlineExceeded,
    Generate,
    Message,
    Models,
    NotFound,
    PluginError,
    ServiceError,
    TooLarge,
)
from aiirwkv.testing import running
from aiirwkv_llm_rwkv import LlmRwkv
from aiirwkv_llm_rwkv.tokenizer import Tokenizer
from safetensors.torch import save_file

from .conftest import NANO, random_tensors
from .questions import READING


@pytest.fixture
async def llm() -> LlmRwkv:
    return LlmRwkv(longest_prompt=250_000)


@pytest.fixture
async def bus(llm: LlmRwkv, tmp_path: Path) -> AsyncIterator[Bus]:
    async with running({"llm_rwkv": llm}, tmp_path) as bus:
        yield bus


def question(passage: str, words: str, **more: Any) -> Generate:
    return Generate(messages=[Message("user", words)], documents=[passage], **more)


def endless(**more: Any) -> Generate:
    """A request that does not end by itself soon."""
    return Generate("User:", max_tokens=5000, temperature=1, top_p=1, seed=1, **more)


async def idle(llm: LlmRwkv) -> None:
    with anyio.fail_after(2):
        while llm.stats()["running"] or llm.stats()["waiting"]:
            await anyio.sleep(0.005)


async def test_reading(bus: Bus) -> None:
    right, asked = 0, 0
    for passage, questions in READING:
        for words, answers in questions:
            reply = await bus.call(question(passage, words))
            assert reply.finish == "stop" and reply.model == "rwkv7-nano"
            assert reply.text == reply.text.lstrip()
            right += reply.text.strip().rstrip(".").lower() in {answer.lower() for answer in answers}
            asked += 1
    assert asked == 26 and right >= 21, f"{right} of {asked} answers are right"
    refused = await bus.call(question(READING[0][0], "Who founded the library?"))
    about = await bus.about("generate")
    assert refused.text == about["refusal"] == "The text does not say."


async def test_about(bus: Bus) -> None:
    about = await bus.about("generate")
    assert about["model"] == "rwkv7-nano" and about["version"] == "rwkv7" and about["demonstration"] is True
    assert about["languages"] == ["en"] and about["limits"] == {"passages": 3, "tokens": 160}
    assert about["device"].startswith(("cpu", "cuda")) and about["parameters"] == 2_411_328


async def test_stream(bus: Bus) -> None:
    request = question(*_first(), logprobs=True, cache=False)
    async with bus.stream(request) as chunks:
        pieces = [chunk async for chunk in chunks]
    assert len(pieces) > 2
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    whole = await bus.call(request)
    assert Completion.fold(pieces) == whole and whole.text == "half past six"
    assert whole.usage.prompt > 20 and whole.usage.completion == len(whole.logprobs) > 2
    assert all(value <= 0 for value in whole.logprobs)


async def test_length_stop_and_seed(bus: Bus) -> None:
    short = await bus.call(Generate("User:", max_tokens=5))
    assert short.finish == "length" and short.usage.completion == 5
    stopped = await bus.call(question(*_first(), stop=["past"]))
    assert stopped.text == "half " and stopped.finish == "stop"
    drawn = [(await bus.call(endless(stop=["\n"]), timeout=60)).text for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0]


async def test_several_texts(bus: Bus) -> None:
    request = Generate("The", n=3, seed=4, temperature=3, top_p=1, max_tokens=12)
    reply = await bus.call(request)
    assert len({choice.text for choice in reply.choices}) == 3 and reply.text == reply.choices[0].text
    assert reply.usage.completion == 36 and [choice.finish for choice in reply.choices] == ["length"] * 3
    second = await bus.call(Generate("The", seed=5, temperature=3, top_p=1, max_tokens=12))
    assert second.text == reply.choices[1].text
    async with bus.stream(request) as chunks:
        pieces = [chunk async for chunk in chunks]
    assert [choice.text for choice in Completion.fold(pieces).choices] == [choice.text for choice in reply.choices]
    assert [piece.usage for piece in pieces if piece.usage] == [pieces[-1].usage]


async def test_forms_and_bias(bus: Bus) -> None:
    digits = await bus.call(question(*_first(), regex="[0-9]{3}", temperature=1))
    assert len(digits.text) == 3 and digits.text.isdigit() and digits.finish == "stop"
    answer = await bus.call(question(*_first(), json_schema={"enum": ["nine", "ten"]}, temperature=1))
    assert answer.text in ('"nine"', '"ten"')
    plain = await bus.call(Generate("The", max_tokens=1))
    (id,) = [
        id
        for id, word in Tokenizer.load(NANO / "vocab.txt").tokens.items()
        if word.decode("utf-8", "ignore") == plain.text
    ]
    assert (await bus.call(Generate("The", max_tokens=1, ban=[id]))).text != plain.text
    assert (await bus.call(Generate("The", max_tokens=1, logit_bias={id: -100}))).text != plain.text
    assert (await bus.call(Generate("The", max_tokens=1, logit_bias={id: 1}))).text == plain.text


async def test_what_was_read_is_not_read_again(bus: Bus, llm: LlmRwkv) -> None:
    passage, asked = READING[2]
    replies = [await bus.call(question(passage, words)) for words, _ in asked]
    again = await bus.call(question(passage, asked[0][0]))
    assert replies[0].usage.cached == 0 and again.usage.cached == again.usage.prompt and again.usage.bytes > 200_000
    assert all(20 < reply.usage.cached < reply.usage.prompt for reply in replies[1:]), "as far as the passage goes"
    assert again.text == replies[0].text
    fresh = [await bus.call(question(passage, words, cache=False)) for words, _ in asked]
    assert [reply.text for reply in fresh] == [reply.text for reply in replies]
    assert [reply.usage.cached for reply in fresh] == [0] * len(asked)
    assert llm.stats()["states"]["hits"] == len(asked)


async def test_leaving_a_stream_stops_the_work(bus: Bus, llm: LlmRwkv) -> None:
    async with bus.stream(endless()) as chunks:
        async for _ in chunks:
            break
    before, since = llm.stats()["tokens_written"], time.perf_counter()
    while llm.stats()["running"]:
        await anyio.sleep(0)
    written, seconds = llm.stats()["tokens_written"] - before, time.perf_counter() - since
    assert written <= 3 or seconds <= 0.05
    await anyio.sleep(0.1)
    assert llm.stats()["tokens_written"] == before + written


async def test_a_deadline_stops_a_long_prompt_while_it_is_read(bus: Bus, llm: LlmRwkv) -> None:
    with pytest.raises(DeadlineExceeded):
        await bus.call(Generate("the library opens at nine. " * 20_000), timeout=1)
    await idle(llm)
    assert 0 < llm.stats()["tokens_read"] < 100_000 and llm.stats()["tokens_written"] == 0


async def test_requests_take_turns(bus: Bus, llm: LlmRwkv) -> None:
    alone = await bus.call(question(*_first()))
    replies: list[Completion] = []

    async def ask() -> None:
        replies.append(await bus.call(question(*_first()), timeout=30))

    async with bus.stream(endless()) as long, bus.stream(Generate("a word " * 5000)) as reading:
        await anext(aiter(long))
        async with anyio.create_task_group() as tasks:
            for _ in range(20):  # more than are worked on at once
                tasks.start_soon(ask)
        assert llm.stats()["running"] >= 1, "the long one still runs"
        del reading
    assert [reply.text for reply in replies] == [alone.text] * 20
    assert all(reply.usage.cached == reply.usage.prompt == alone.usage.prompt for reply in replies)
    await idle(llm)


async def test_a_failing_model_fails_one_request_only(bus: Bus, llm: LlmRwkv, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("something broke")

    with monkeypatch.context() as patch:
        patch.setattr(llm._serving.find(None).engine.runtime, "forward", broken)
        with pytest.raises(ServiceError, match="the model failed with RuntimeError: something broke"):
            await bus.call(question(*_first()))
    assert (await bus.call(question(*_first()))).text == "half past six"


@pytest.mark.parametrize(
    ("request_", "error", "complaint"),
    [
        (Generate(), BadRequest, "needs `prompt` or `messages`"),
        (Generate("a", messages=[Message("user", "b")]), BadRequest, "either `prompt` or `messages`"),
        (Generate("a", documents=["b"]), BadRequest, "`documents` only with `messages`"),
        (Generate(messages=[Message("assistant", "b")]), BadRequest, "must have the role user"),
        (Generate("a", max_tokens=0), BadRequest, "`max_tokens` is 0; it must be at least 1"),
        (Generate("a", max_tokens=-5), BadRequest, "`max_tokens` is -5"),
        (Generate("a", temperature=-1), BadRequest, "`temperature` is -1.0; it must be from 0 to 100"),
        (Generate("a", top_p=1.5), BadRequest, "`top_p` is 1.5"),
        (Generate("a", n=0), BadRequest, "`n` is 0; it must be from 1 to 64"),
        (Generate("a", n=65), BadRequest, "`n` is 65"),
        (Generate("a", ban=[1024]), BadRequest, "`ban` names the token 1024; the model's go from 0 to 1023"),
        (Generate("a", logit_bias={-1: 2.0}), BadRequest, "`logit_bias` names the token -1"),
        (Generate("a", regex="a+", json_schema={}), BadRequest, "either `regex` or `json_schema`"),
        (Generate("a", regex="(a"), BadRequest, "`regex` cannot be used"),
        (Generate("a b " * 130_000), TooLarge, "longest_prompt allows 250000"),
        (Generate("a", model="rwkv7-nan"), NotFound, r"did you mean 'rwkv7-nano'\?\); there are: rwkv7-nano"),
        (Generate("a", state="poet"), NotFound, "no tuned state 'poet'; there are none"),
        (Generate("a", adapter="poet"), NotFound, "no adapter 'poet'; there are none"),
    ],
)
async def test_wrong_requests(request_: Generate, error: type[Exception], complaint: str, bus: Bus) -> None:
    with pytest.raises(error, match=complaint):
        await bus.call(request_)
    with pytest.raises(error, match=complaint):
        async with bus.stream(request_) as chunks:
            async for _ in chunks:
                pass


async def test_models(bus: Bus) -> None:
    (nano,) = (await bus.call(Models())).models
    assert nano.name == "rwkv7-nano" and nano.loaded and nano.default and nano.demonstration
    assert nano.parameters == 2_411_328 and nano.size == (NANO / "model.safetensors").stat().st_size
    assert nano.sha256 == nano.card["sha256"]["model.safetensors"] and len(nano.sha256) == 64
    assert nano.card["prompt"]["reading"].startswith("User: {documents}")
    with pytest.raises(BadRequest, match=r"neither a \.safetensors nor a \.pth file"):
        await bus.call(Models("pull", url="http://example.org/x"))


async def entered(data: Path, **settings: Any) -> dict[str, Any]:
    async with LlmRwkv(**settings).attach(data) as plugin:
        assert plugin.stats()["threads"] >= 1
        listed = await plugin.models(Models(), SimpleNamespace(may=lambda *_: True))
        return {**plugin.about(), "listed": [model.name for model in listed.models]}


async def test_a_model_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "data" / "models" / "own"
    shutil.copytree(NANO, own)
    card = {**json.loads((NANO / "card.json").read_text()), "name": "my-model", "demonstration": False}
    (own / "card.json").write_text(json.dumps(card))
    by_name = await entered(tmp_path / "data", model="my-model")
    assert by_name["model"] == "my-model" and by_name["listed"] == ["rwkv7-nano", "my-model"]
    assert await entered(tmp_path, model=str(own)) == by_name
    (own / "card.json").unlink()
    (own / "model.safetensors").rename(own / "bare.safetensors")
    bare = await entered(tmp_path, model=str(own / "bare.safetensors"), threads=1, device="cpu")
    assert bare["model"] == "bare" and bare["demonstration"] is False


async def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(NANO, folder)

    async def complains(about: str, **settings: Any) -> None:
        with pytest.raises(PluginError, match=about):
            await entered(tmp_path, **settings)

    await complains("no model 'rwkv7-nno' .did you mean 'rwkv7-nano'", model="rwkv7-nno")
    await complains("device is 'gpu', which cannot be used here", device="gpu")
    await complains("card.json is not a .safetensors file", model=str(NANO / "card.json"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + b"x")
    await complains("model.safetensors is damaged", model=str(folder))
    (folder / "model.safetensors").unlink()
    await complains("model.safetensors does not exist", model=str(folder))
    (folder / "card.json").unlink()
    save_file(random_tensors(vocabulary=600), folder / "model.safetensors")
    await complains("vocab.txt does not belong to .*ids go up to 1023, the model's up to 599", model=str(folder))
    (folder / "vocab.txt").write_text("what")
    await complains("vocab.txt cannot be used: line 1", model=str(folder))
    (folder / "vocab.txt").unlink()
    await complains("vocab.txt cannot be used", model=str(folder))


def test_heavy_imports_wait_for_entry_and_the_heaviest_never_come(tmp_path: Path) -> None:
    program = """
import asyncio, pathlib, sys
from aiirwkv_llm_rwkv import LlmRwkv
assert not {"torch", "numpy", "safetensors", "rwkv"} & set(sys.modules)
async def enter():
    async with LlmRwkv().attach(pathlib.Path(sys.argv[1])):
        assert not {"torch._dynamo", "sympy", "rwkv"} & set(sys.modules)
asyncio.run(enter())
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _first() -> tuple[str, str]:
    passage, questions = READING[0]
    return passage, questions[0][0]


@pytest.mark.parametrize("field", ['"prompt": "a \\ud800"', '"messages": [{"role": "user", "content": "\\udfff"}]'])
async def test_half_a_character_is_refused(field: str, bus: Bus) -> None:
    answer = await bus.nc.request("aiirwkv.generate", f'{{"stream": false, {field}}}'.encode(), timeout=10)
    assert answer.headers and answer.headers["Nats-Service-Error-Code"] == "400"
    assert (await bus.call(question(*_first()))).text == "half past six"


async def test_a_conversation_goes_on_from_where_it_was(tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(NANO, own)
    card = json.loads((own / "card.json").read_text())
    card = {**card, "name": "own", "prompt": {}, "stop": {"tokens": [0], "strings": ["\n\nUser:"]}}
    (own / "card.json").write_text(json.dumps(card))
    talk = [Message("user", f"{READING[0][0]} {READING[1][0]} When does the library close?")]
    async with running({"llm_rwkv": LlmRwkv(model=str(own))}, tmp_path / "data") as bus:
        first = await bus.call(Generate(messages=talk, max_tokens=40))
        talk += [Message("assistant", first.text), Message("user", "How long is the warranty?")]
        second = await bus.call(Generate(messages=talk, max_tokens=40))
        branch = [*talk[:-1], Message("user", "How long are batteries covered?")]
        third = await bus.call(Generate(messages=branch, max_tokens=40))
        fresh = [await bus.call(Generate(messages=turns, max_tokens=40, cache=False)) for turns in (talk, branch)]
    assert first.usage.cached == 0 and second.usage.cached >= first.usage.prompt
    assert third.usage.cached >= second.usage.cached, "the conversation goes on in two ways"
    assert [reply.text for reply in fresh] == [second.text, third.text]
