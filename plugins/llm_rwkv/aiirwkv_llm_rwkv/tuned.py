"""Tuned states on this machine: folders with a card.json and a state.safetensors. Made by tuning, used by name."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from aiirwkv import Context
from aiirwkv.errors import Conflict, Forbidden, NotFound, ServiceError
from aiirwkv.types import Model

from .library import unknown

if TYPE_CHECKING:
    from .model import RWKV, State

__all__ = ["CARD", "STATE", "StateCard", "TunedStates", "states_folder"]

CARD, STATE = "card.json", "state.safetensors"


class StateCard(msgspec.Struct, kw_only=True, frozen=True):
    """
    Where a tuned state comes from, and what it is worth: mean loss per answer token, on examples it was not tuned on.

    It belongs to exactly one base model, which `base_sha256`, the hash of the base's weights, tells. `resumed` are the
    steps at which training was taken up again.
    """

    name: str
    kind: str = "state"
    version: str = "rwkv7"
    method: str = "state"
    base: str
    base_sha256: str
    precision: str = "float32"
    owner: str
    shares: dict[str, Literal["read", "write"]] = {}
    created: float = 0.0
    run: str = ""
    data_sha256: str = ""
    examples: int = 0
    held_out: int = 0
    seed: int = 0
    steps: int = 0
    learning_rate: float = 0.0
    batch_tokens: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0
    seconds: float = 0.0
    resumed: list[int] = []
    parameters: int = 0
    sha256: dict[str, str] = {}


def states_folder(data: Path) -> Path:
    """Where the tuned states of a data directory lie, each in a folder of its name."""
    return data / "models" / "states"


class TunedStates:
    """The tuned states in a folder, for those who may use them; the last few stay in memory."""

    KEPT = 8

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[str, State] = {}

    def known(self, ctx: Context) -> dict[str, StateCard]:
        """What the caller may read, by name. A broken card is logged, and its state left out."""
        found: dict[str, StateCard] = {}
        for path in sorted(self.folder.glob(f"*/{CARD}")):
            try:
                card = msgspec.json.decode(path.read_bytes(), type=StateCard)
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                logging.getLogger(__name__).warning("the card of a tuned state, %s, cannot be used: %s", path, error)
                continue
            if ctx.may("read", card):
                found[path.parent.name] = card
        return found

    def find(self, name: str, ctx: Context) -> StateCard:
        """Raises NotFound, also for one that the caller may not read."""
        cards = self.known(ctx)
        if name not in cards:
            raise NotFound(unknown("tuned state", name, cards))
        return cards[name]

    def load(self, name: str, ctx: Context, model: RWKV, base: Callable[[], str]) -> State:
        """
        What a text begins with. `base` gives the sha256 of the model's weights.

        Raises NotFound, and Conflict when the state was made for another model or is damaged.
        """
        card = self.find(name, ctx)
        if card.base_sha256 != base():
            raise Conflict(
                f"the tuned state {name!r} was made for the model {card.base!r} with the sha256 "
                f"{card.base_sha256[:12]}…, and this worker's has {base()[:12]}…; tune one for this model"
            )
        key = card.sha256.get(STATE, "")
        state = self._loaded.get(key)
        if state is None:
            state = _read(self.folder / name / STATE, card, model)
            while len(self._loaded) >= self.KEPT:
                self._loaded.pop(next(iter(self._loaded)), None)
            self._loaded[key] = state
        return state

    def delete(self, name: str, ctx: Context) -> None:
        card = self.find(name, ctx)
        if not ctx.may("own", card):
            raise Forbidden(f"the tuned state {name!r} belongs to {card.owner}, who alone may delete it")
        try:
            shutil.rmtree(self.folder / name)
        except OSError as error:
            raise ServiceError(f"the tuned state {name!r} cannot be deleted: {error.strerror}") from None

    def models(self, ctx: Context) -> list[Model]:
        """As the hook `models` lists them."""
        return [
            Model(
                name=name,
                kind="state",
                plugin="llm_rwkv",
                version=card.version,
                parameters=card.parameters,
                size=(self.folder / name / STATE).stat().st_size,
                sha256=card.sha256.get(STATE, ""),
                base=card.base,
                card=msgspec.to_builtins(card),
            )
            for name, card in self.known(ctx).items()
            if (self.folder / name / STATE).is_file()
        ]


def _read(path: Path, card: StateCard, model: RWKV) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != card.sha256.get(STATE):
            raise ValueError("its sha256 is not its card's")
        tensors = load(data)
        layers = []
        for number, layer in enumerate(model.initial_state()):
            wkv = tensors.pop(f"blocks.{number}.att.time_state")
            if wkv.shape != layer.wkv.shape[1:]:
                raise ValueError(f"layer {number} has shape {tuple(wkv.shape)}, not {tuple(layer.wkv.shape[1:])}")
            layers.append(wkv)
        if tensors:
            raise ValueError(f"the tensor {min(tensors)} does not belong to it")
    except KeyError as error:
        raise Conflict(f"the tuned state {card.name!r} cannot be used: it lacks the tensor {error.args[0]}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise Conflict(f"the tuned state {card.name!r} cannot be used: {error}; tune it again") from None
    return model.state_of(layers)
