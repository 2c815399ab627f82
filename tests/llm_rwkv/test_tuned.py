"""Tuned states: what they change, whose they are, and which base they belong to."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from aiirwkv import Bus, Completion, Conflict, Forbidden, Generate, Models, NotFound, User
from aiirwkv.identity import mint, publish_key
from aiirwkv.testing import running
from aiirwkv_llm_rwkv import LlmRwkv
from aiirwkv_llm_rwkv.checkpoint import load
from aiirwkv_llm_rwkv.library import Files
from aiirwkv_llm_rwkv.tokenizer import Tokenizer
from aiirwkv_llm_rwkv.tuned import CARD, STATE, StateCard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save_file
from torch import Tensor

from .conftest import NANO

KEY = Ed25519PrivateKey.generate()
PROMPT = "User: Where is the key?\n\nAssistant:"


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"blocks.{layer}.att.time_state": torch.randn(3, 64, 64, generator=generator) for layer in range(4)}


def put(data: Path, name: str, states: dict[str, Tensor], **fields: Any) -> None:
    folder = data / "models" / "states" / name
    folder.mkdir(parents=True)
    save_file(states, folder / STATE)
    digest = hashlib.sha256((folder / STATE).read_bytes()).hexdigest()
    known: dict[str, Any] = {
        "name": name,
        "base": "rwkv7-nano",
        "base_sha256": Files.at(NANO).sha256(),
        "owner": "owner",
        "sha256": {STATE: digest},
    }
    (folder / CARD).write_bytes(msgspec.json.encode(StateCard(**(known | fields))))


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    async with running({"llm_rwkv": LlmRwkv()}, tmp_path) as bus:
        await publish_key(bus, KEY.public_key().public_bytes_raw())
        yield bus


async def write(bus: Bus, state: str | None) -> Completion:
    return await bus.call(Generate(PROMPT, state=state, max_tokens=12, temperature=0, logprobs=True))


async def test_a_row_begins_with_its_state_and_with_no_other(bus: Bus, tmp_path: Path) -> None:
    states = tensors()
    put(tmp_path, "poet", states)
    plain = await write(bus, None)
    tuned = await write(bus, "poet")
    assert await write(bus, None) == plain and await write(bus, "poet") == tuned != plain

    model = load(NANO / "model.safetensors", torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        for parameter, value in zip(model.add_time_state(), states.values(), strict=True):
            parameter.copy_(value)
        tokens = Tokenizer.load(NANO / "vocab.txt").encode(PROMPT)
        logits, _ = model(torch.tensor([tokens]), last=True)
    assert tuned.logprobs[0] == pytest.approx(float(torch.log_softmax(logits[0, -1], -1).max()), abs=1e-4)


async def test_states_of_another_base_and_damaged_ones_are_refused(bus: Bus, tmp_path: Path) -> None:
    put(tmp_path, "other", tensors(), base="big", base_sha256="f" * 64)
    put(tmp_path, "changed", tensors(), sha256={STATE: "0" * 64})
    put(tmp_path, "small", {name: tensor[:1].clone() for name, tensor in tensors().items()})
    put(tmp_path, "short", dict(list(tensors().items())[:3]))
    put(tmp_path, "long", tensors() | {"blocks.9.att.time_state": torch.zeros(1)})
    put(tmp_path, "cardless", tensors())
    (tmp_path / "models" / "states" / "cardless" / CARD).write_text("{")
    for name, complaint in {
        "other": "'other' was made for the model 'big' with the sha256 ffffffffffff…",
        "changed": "its sha256 is not its card's",
        "small": r"layer 0 has shape \(1, 64, 64\), not \(3, 64, 64\)",
        "short": "it lacks the tensor blocks.3.att.time_state",
        "long": "the tensor blocks.9.att.time_state does not belong to it",
    }.items():
        with pytest.raises(Conflict, match=complaint.replace("…", ".*")):
            await write(bus, name)
    with pytest.raises(NotFound, match="no tuned state 'cardless'; there are: changed, long, other, short, small"):
        await write(bus, "cardless")
    assert (await write(bus, None)).text


async def test_a_state_is_its_owners_and_theirs_with_whom_it_is_shared(bus: Bus, tmp_path: Path) -> None:
    put(tmp_path, "hers", tensors(), owner="ada", shares={"role:team": "read"})
    put(tmp_path, "ours", tensors(1))

    def caller(name: str, *roles: str) -> Bus:
        return bus.bound(claim=mint(KEY, User(name, roles), time.time() + 60))

    async def states(bus: Bus) -> list[str]:
        return [model.name for model in (await bus.call(Models())).models if model.kind == "state"]

    ada, eve, tom = caller("ada"), caller("eve"), caller("tom", "team")
    assert (await states(bus), await states(ada), await states(eve)) == (["hers", "ours"], ["hers"], [])
    assert (await write(ada, "hers")).text == (await write(tom, "hers")).text
    with pytest.raises(NotFound, match="no tuned state 'hers'; there are none"):
        await write(eve, "hers")
    with pytest.raises(NotFound, match="no tuned state 'hers'"):
        await eve.call(Models("delete", "hers"))
    with pytest.raises(Forbidden, match="belongs to ada, who alone may delete it"):
        await tom.call(Models("delete", "hers"))
    await ada.call(Models("delete", "hers"))
    assert await states(bus) == ["ours"]
    with pytest.raises(NotFound, match=r"no tuned state '\.\./ours'"):
        await bus.call(Models("delete", "../ours"))
    with pytest.raises(NotFound, match="no tuned state 'rwkv7-nano'"):
        await bus.call(Models("delete", "rwkv7-nano"))
