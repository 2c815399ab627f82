"""Tuned states on this machine: folders with a card.json and a state.safetensors. Made by tuning, used by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiirwkv import Context
from aiirwkv.errors import BadRequest, Conflict

from .describe import Shapes
from .shelf import CARD, Shelf, TunedCard, seal

if TYPE_CHECKING:
    from torch import Tensor

    from ..network.model import RWKV, Layout, State

__all__ = ["CARD", "STATE", "StateCard", "TunedStates", "make", "sizes", "states_folder", "time_states"]

STATE = "state.safetensors"


class StateCard(TunedCard, kw_only=True, frozen=True):
    """Of a tuned state."""

    kind: str = "state"
    method: str = "state"


def states_folder(data: Path) -> Path:
    """Where the tuned states of a data directory lie, each in a folder of its name."""
    return data / "models" / "states"


class TunedStates(Shelf[StateCard, "list[Tensor]"]):
    """The tuned states in a folder."""

    noun, kind, file = "tuned state", "state", STATE
    card = StateCard

    def load(self, name: str, ctx: Context, model: RWKV, base: Callable[[], str], base_name: str = "") -> State:
        """
        What a text begins with. `base` gives the sha256 of the model's weights, `base_name` is the model's name.

        Raises NotFound, and Conflict when the state was made for another model or is damaged.
        """
        return model.state_of(self.tensors(name, ctx, model.layout, base, base_name))

    def flat(self, name: str, ctx: Context, layout: Layout, base: Callable[[], str], base_name: str = "") -> Tensor:
        """The same in the flat form of a layout: float32 [size], on the CPU."""
        import torch

        flat = torch.zeros(1, layout.size)
        layout.parts(flat)[2][0] = torch.stack(self.tensors(name, ctx, layout, base, base_name)).mT
        return flat[0]

    def tensors(
        self, name: str, ctx: Context, layout: Layout, base: Callable[[], str], base_name: str = ""
    ) -> list[Tensor]:
        """The same as it lies in the file: float32 [H, N, N] per layer, value × key for every version of RWKV."""
        card = self._for(name, ctx, base, base_name)
        states = self._kept(
            card, name, card.sha256.get(STATE, ""), time_states, lambda states: sum(state.nbytes for state in states)
        )
        wanted, found = (layout.layers, layout.heads, layout.head), sizes(states)
        if wanted != found:
            raise Conflict(
                f"the tuned state {name!r} does not fit {card.base!r}, for which it is said to be: it has {found[0]} "
                f"layers of {found[1]} heads of width {found[2]}, the model {wanted[0]} of {wanted[1]} of {wanted[2]}"
            )
        return states


TIME_STATE = re.compile(r"blocks\.(\d+)\.att\.time_state")


def time_states(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The states of all layers, as float32. Raises ValueError, and KeyError for a layer that is missing."""
    import torch

    for name, tensor in tensors.items():
        if not TIME_STATE.fullmatch(name):
            raise ValueError(f"the tensor {name} does not belong to it")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the tensor {name} holds values that are not finite numbers")
    states = [tensors[f"blocks.{layer}.att.time_state"].float() for layer in range(len(tensors))]
    sizes(states)
    return states


def sizes(states: Sequence[Tensor]) -> tuple[int, int, int]:
    """Layers, heads, and the width of a head. Raises ValueError unless all layers have the same."""
    shapes = {tuple(state.shape) for state in states}
    if len(shapes) != 1:
        raise ValueError("its layers do not all have the same shape" if shapes else "it holds nothing")
    [shape] = shapes
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"its layers have the shape {shape}, not [heads, width of a head, width of a head]")
    return len(states), shape[0], shape[1]


def make(made: Path, given: Mapping[str, Any], base: Shapes) -> None:
    """Of made/model.safetensors make a tuned state with its card. `given`: fields of it. Raises BadRequest."""
    from safetensors.torch import load_file

    try:
        states = time_states(load_file(made / "model.safetensors"))
        layers, heads, head = sizes(states)
        there = len({name.split(".")[1] for name in base if name.startswith("blocks.")})
        own = base.get("blocks.0.att.r_k") or base.get("blocks.0.att.time_faaaa") or (heads, head)
        if layers != there or (heads, head) != tuple(own) or heads * head != base["ln_out.weight"][0]:
            raise ValueError(f"it is for {layers} layers of {heads} heads of width {head}, unlike {given['base']!r}")
    except KeyError as error:
        raise BadRequest(f"models: the state cannot be used: it lacks the tensor {error.args[0]}") from None
    except ValueError as error:
        raise BadRequest(f"models: the state cannot be used: {error}") from None
    (made / "model.safetensors").rename(made / STATE)
    seal(made, StateCard, {**given, "parameters": sum(state.numel() for state in states)}, STATE)
