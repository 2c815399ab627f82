"""Who may change the models on the disk, and what each action does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from aiirwkv import BadRequest, Conflict, Forbidden, Models, NotFound, User
from aiirwkv.hooks import may
from aiirwkv_llm_rwkv.shelf.actions import change
from aiirwkv_llm_rwkv.shelf.library import Files, known
from aiirwkv_llm_rwkv.shelf.shelf import CARD
from aiirwkv_llm_rwkv.shelf.tuned import STATE, StateCard, TunedStates, states_folder
from safetensors.torch import save_file

from .conftest import NANO
from .site import serving


def someone(name: str, *roles: str) -> Any:
    user = User(name, roles)
    told: list[tuple[float, float, str]] = []
    judge = lambda action, thing: may(user, action, thing)  # noqa: E731
    return SimpleNamespace(user=user, may=judge, told=told, progress=lambda *step: told.append(step))


OWNER, ADA, EVE = someone("root", "owner"), someone("ada"), someone("eve", "team")


def states() -> dict[str, torch.Tensor]:
    return {f"blocks.{layer}.att.time_state": torch.zeros(3, 64, 64) for layer in range(4)}


def put(data: Path, name: str, owner: str) -> None:
    folder = states_folder(data) / name
    folder.mkdir(parents=True)
    save_file(states(), folder / STATE)
    digest = hashlib.sha256((folder / STATE).read_bytes()).hexdigest()
    card = StateCard(name=name, base="rwkv7-nano", base_sha256="0", owner=owner, sha256={STATE: digest})
    (folder / CARD).write_bytes(msgspec.json.encode(card))


async def test_the_owner_adds_and_deletes(tmp_path: Path) -> None:
    assert await change(Models("add", path=str(NANO), name="mine"), OWNER, tmp_path) == "mine"
    save_file(states(), tmp_path / "poet.safetensors")
    request = Models("add", path=str(tmp_path / "poet.safetensors"), base="big")
    assert await change(request, OWNER, tmp_path, models={"big": Files.at(NANO)}) == "poet"
    assert TunedStates(states_folder(tmp_path)).find("poet", OWNER).owner == "root"
    with pytest.raises(Conflict, match="'mine' is loaded"):
        await change(Models("delete", "mine"), OWNER, tmp_path, loaded=["mine"])
    for name in ("mine", "poet"):
        assert await change(Models("delete", name), OWNER, tmp_path) == name
    assert known([tmp_path / "models"]) == {} and not TunedStates(states_folder(tmp_path)).known(OWNER)
    for name, error in {"../mine": BadRequest, "rwkv7-nano": Conflict, "mine": NotFound, "": BadRequest}.items():
        with pytest.raises(error):
            await change(Models("delete", name), OWNER, tmp_path)
    for request in (Models("add"), Models("pull"), Models("pull", hub="o/n")):
        with pytest.raises(BadRequest):
            await change(request, OWNER, tmp_path)


async def test_a_mirror_is_asked_and_progress_told(tmp_path: Path) -> None:
    with serving() as site:
        site.put("/o/n/resolve/main/a.safetensors", b"no model", headers={"X-Linked-Size": "8"})
        with pytest.raises(BadRequest, match="not a safetensors file"):
            await change(Models("pull", hub="o/n", file="a.safetensors"), OWNER, tmp_path, mirror=site.url)
    assert OWNER.told[-1] == (0.0, 0.0, "looks at it") and len(site.asked) == 1


@pytest.mark.parametrize(
    "request_",
    [Models("add", path="/etc/passwd"), Models("pull", url="http://127.0.0.1:9/a.pth"), Models("delete", "mine")],
)
async def test_nobody_else_changes_base_models(request_: Models, tmp_path: Path) -> None:
    await change(Models("add", path=str(NANO), name="mine"), OWNER, tmp_path)
    with pytest.raises(Forbidden, match=f"only one with the role owner may {request_.action} models, not eve"):
        await change(request_, EVE, tmp_path)
    assert "mine" in known([tmp_path / "models"])


async def test_states_are_deleted_by_their_owners(tmp_path: Path) -> None:
    put(tmp_path, "hers", "ada")
    with pytest.raises(NotFound, match="no model, state or adapter 'hers'; there are: rwkv7-nano"):
        await change(Models("delete", "hers"), EVE, tmp_path)
    await change(Models("delete", "hers"), ADA, tmp_path)
    assert not list(states_folder(tmp_path).iterdir())
