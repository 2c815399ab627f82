"""Tuned states: what they change, whose they are, which base they belong to, and how they come from elsewhere."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from aiirwkv import BadRequest, Bus, Completion, Conflict, Forbidden, Generate, Models, NotFound, ServiceError, User
from aiirwkv.hooks import may
from aiirwkv.identity import mint, publish_key
from aiirwkv.testing import running
from aiirwkv_llm_rwkv import LlmRwkv
from aiirwkv_llm_rwkv.card import Card
from aiirwkv_llm_rwkv.network.checkpoint import load
from aiirwkv_llm_rwkv.network.model import Layout
from aiirwkv_llm_rwkv.shelf.changes import add
from aiirwkv_llm_rwkv.shelf.library import Files
from aiirwkv_llm_rwkv.shelf.tuned import CARD, STATE, StateCard, TunedStates, states_folder
from aiirwkv_llm_rwkv.tokenizer import Tokenizer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file
from torch import Tensor

from .conftest import NANO, ask_package, random_tensors

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
    return await bus.call(Generate(PROMPT, state=state, max_tokens=12, temperature=0, logprobs=True, cache=False))


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
    put(tmp_path, "wild", tensors() | {"blocks.0.att.time_state": torch.full((3, 64, 64), torch.nan)})
    put(tmp_path, "cardless", tensors())
    (tmp_path / "models" / "states" / "cardless" / CARD).write_text("{")
    for name, complaint in {
        "other": "'other' was made for the model 'big' with the sha256 ffffffffffff…",
        "changed": "its sha256 is not its card's",
        "small": "it has 4 layers of 1 heads of width 64, the model 4 of 3 of 64",
        "wild": "values that are not finite numbers",
        "short": "it has 3 layers of 3 heads of width 64, the model 4 of 3 of 64",
        "long": "it lacks the tensor blocks.4.att.time_state",
    }.items():
        with pytest.raises(Conflict, match=complaint.replace("…", ".*")):
            await write(bus, name)
    with pytest.raises(
        NotFound, match="no tuned state 'cardless'; there are: changed, long, other, short, small, wild"
    ):
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
    with pytest.raises(NotFound, match=r"no .*state.* 'hers'"):
        await eve.call(Models("delete", "hers"))
    with pytest.raises(Forbidden, match="belongs to ada, who alone may delete it"):
        await tom.call(Models("delete", "hers"))
    await ada.call(Models("delete", "hers"))
    assert await states(bus) == ["ours"]
    for name in ("../ours", "rwkv7-nano"):
        with pytest.raises(ServiceError, match=f"{re.escape(name)}'"):
            await bus.call(Models("delete", name))


# Of any version, and from elsewhere


def someone(name: str = "owner") -> Any:
    user = User(name, ("owner",) if name == "owner" else ())
    return SimpleNamespace(user=user, may=lambda action, thing: may(user, action, thing))


@pytest.fixture(params=["rwkv7", "rwkv6"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """A small model in the data directory."""
    folder = tmp_path / "data" / "models" / "base"
    folder.mkdir(parents=True)
    save_file(random_tensors(layers=2, width=128, version=request.param), folder / "model.safetensors")
    shutil.copy(NANO / "vocab.txt", folder)
    (folder / "card.json").write_bytes(msgspec.json.encode(Card(name="base", version=request.param)))
    return Files.at(folder)


def official(seed: int = 0) -> dict[str, Tensor]:
    """As states are published: of half the precision, value × key."""
    generator = torch.Generator().manual_seed(seed)
    return {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64, generator=generator).bfloat16() for i in range(2)}


def test_a_published_state_turns_as_the_package_turns_it(base: Files, tmp_path: Path) -> None:
    states = official()
    torch.save(states, tmp_path / "rwkv-chn_single_round_qa.pth")
    models = base.weights.parents[1]
    assert add(tmp_path / "rwkv-chn_single_round_qa.pth", models, name="qa", base="base", owner="ada").kind == "state"
    assert {path.name for path in (models / "states" / "qa").iterdir()} == {CARD, STATE}
    shelf = TunedStates(models / "states")
    card = shelf.find("qa", someone())
    assert (card.owner, card.base, card.base_sha256, card.version) == ("ada", "base", "", base.card.version)
    assert card.origin == "rwkv-chn_single_round_qa.pth" and card.parameters == 2 * 2 * 64 * 64

    model = load(base.weights, torch.device("cpu"), torch.float32)
    state = shelf.load("qa", someone(), model, base.sha256, "base")
    flat = shelf.flat("qa", someone(), model.layout, base.sha256, "base")
    assert torch.equal(flat, model.layout.flat(state)[0])
    tokens = list(range(30, 70))
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), state)[0][0]
        plain = model(torch.tensor([tokens]))[0][0]
    # The package wants the state key × value for RWKV-6, for which published code transposes it, and as it is for 7.
    turned = [
        value.float().mT.contiguous() if base.card.version == "rwkv6" else value.float() for value in states.values()
    ]
    given = [part for value in turned for part in (torch.zeros(128), value, torch.zeros(128))]
    weights = {name: tensor.float() for name, tensor in load_file(base.weights).items()}
    [reference] = ask_package(tmp_path, base.card.version, weights, tokens, [given])
    assert (logits - reference["logits"]).abs().max() < 1e-4 < 0.1 < (logits - plain).abs().max()


def test_a_published_state_belongs_to_the_model_that_was_named(base: Files, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    models = base.weights.parents[1]
    save_file(official(), path)
    with pytest.raises(BadRequest, match="does not say which: name it as `base`"):
        add(path, models)
    with pytest.raises(NotFound, match=r"no model 'bass' .did you mean 'base'"):
        add(path, models, base="bass")
    with pytest.raises(BadRequest, match="for 2 layers of 2 heads of width 64, unlike 'rwkv7-nano'"):
        add(path, models, base="rwkv7-nano")
    assert not (models / "states").exists()
    add(path, models, base="base")
    shelf = TunedStates(models / "states")
    layout = load(base.weights, torch.device("cpu"), torch.float32).layout
    with pytest.raises(Conflict, match="for the model 'base'; this is 'other': ask with `model` 'base'"):
        shelf.flat("state", someone(), layout, base.sha256, "other")
    with pytest.raises(Conflict, match="for the model 'base': ask"):
        shelf.flat("state", someone(), layout, base.sha256)
    elsewhere = Layout(3, 192, 3, transposed=True)
    with pytest.raises(Conflict, match="it has 2 layers of 2 heads of width 64, the model 3 of 3 of 64"):
        shelf.flat("state", someone(), elsewhere, base.sha256, "base")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"blocks.1.att.time_state": torch.full((2, 64, 64), torch.inf)}, "not finite"),
        ({"blocks.1.att.time_state": torch.zeros(2, 64, 32)}, "do not all have the same shape"),
        ({"blocks.3.att.time_state": torch.zeros(2, 64, 64)}, "it lacks the tensor blocks.2.att.time_state"),
        ({"blocks.x.att.time_state": torch.zeros(2, 64, 64)}, "blocks.x.att.time_state does not belong to it"),
    ],
)
def test_what_is_no_state_is_not_added(change: dict[str, Tensor], complaint: str, tmp_path: Path) -> None:
    save_file(official() | change, tmp_path / "a.safetensors")
    with pytest.raises(BadRequest, match=complaint):
        add(tmp_path / "a.safetensors", tmp_path / "models", base="rwkv7-nano")
    assert not list((tmp_path / "models").iterdir())


def test_one_that_was_tuned_elsewhere_keeps_its_proof(tmp_path: Path) -> None:
    put(tmp_path, "poet", tensors(), owner="ada", loss_before=2.0, loss_after=0.5)
    add(tmp_path / "models" / "states" / "poet", tmp_path / "models", name="second", owner="bob")
    card = TunedStates(states_folder(tmp_path)).find("second", someone())
    assert (card.owner, card.loss_before, card.loss_after) == ("bob", 2.0, 0.5)
    assert card.base_sha256 == Files.at(NANO).sha256()
