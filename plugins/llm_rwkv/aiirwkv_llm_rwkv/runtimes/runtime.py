"""
What the engine asks of whoever computes: states in numbered slots, and some next tokens of many texts at once.

`TorchRuntime` does it with the module itself, on any device; the others are faster where they can run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..network.model import RWKV, Layout

__all__ = ["Adapter", "Lost", "Piece", "Runtime", "TorchRuntime", "check", "scarce"]


class Adapter(Protocol):
    """What is added to some linears, by their names in the module: x ↦ (x·Aᵀ)·Bᵀ, the scale being within."""

    @property
    def deltas(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Name → A [rank, inputs], B [outputs, rank]."""
        ...


@dataclass
class Piece:
    """Some next tokens of one text, at least one."""

    slot: int
    """The row of the state pool, which is changed in place; no two pieces of one call may share it."""
    tokens: Sequence[int]
    adapter: Adapter | None = None


class Lost(RuntimeError):
    """A batch failed when its states had already begun to change: they are worth nothing any more."""


class Runtime(Protocol):
    """Owned by one thread. When a call fails, every state is as it was, unless it raises Lost."""

    layout: Layout
    vocabulary: int
    device: torch.device
    choices: dict[str, str]
    """What was chosen at load, and why: for the log and for statistics."""

    def grow(self, slots: int) -> None:
        """Make the state pool that big; contents are kept. Raises MemoryError."""

    def put(self, slot: int, state: Tensor | None) -> None:
        """Set a state: flat float32 [size]; None is the model's own initial state."""

    def get(self, slot: int) -> Tensor:
        """A copy of a state on the CPU, flat float32 [size]."""
        ...

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """
        Read the pieces, of any mix of lengths → the logits of each one's last token, float32 on the CPU [pieces, V].

        Raises MemoryError, ValueError for what is no token of this model, and Lost.
        """
        ...


class TorchRuntime:
    """Runs the module as it is: pieces of equal length share a batch, in particular all that are one token long."""

    SPARE = 0
    """Rows of the pool beyond the slots."""

    def __init__(self, model: RWKV, slots: int = 0) -> None:
        self.model = model
        self.layout = model.layout
        self.vocabulary = model.sizes.vocabulary
        self.device = model.emb.weight.device
        self.choices = {"runtime": f"plain torch: it runs on every device, here on {self.device}"}
        with torch.inference_mode():
            self.pool = torch.zeros(0, self.layout.size, device=self.device)
            self._initial = self.layout.flat(model.initial_state())[0]
        self._near: dict[int, tuple[Adapter, dict[str, tuple[Tensor, Tensor]]]] = {}
        self.grow(slots)

    def grow(self, slots: int) -> None:
        rows = slots + self.SPARE
        if rows > len(self.pool):
            with torch.inference_mode(), scarce(f"{slots} states of {4 * self.layout.size / 1e6:.1f} MB"):
                pool = torch.zeros(rows, self.layout.size, device=self.device)
                pool[: len(self.pool)] = self.pool
            self.pool = pool

    def put(self, slot: int, state: Tensor | None) -> None:
        with torch.inference_mode():
            self.pool[slot] = self._initial if state is None else state.view(self.layout.size)

    def get(self, slot: int) -> Tensor:
        return self.pool[slot].to("cpu", copy=True)

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        check(pieces, self.vocabulary)
        order = sorted(range(len(pieces)), key=lambda i: (len(pieces[i].tokens), id(pieces[i].adapter)))
        logits = torch.empty(len(pieces), self.vocabulary)
        states: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode(), scarce(f"a batch of {sum(len(piece.tokens) for piece in pieces)} tokens"):
            for _, group in groupby(order, key=lambda i: len(pieces[i].tokens)):
                rows = list(group)
                slots, result, state = self._run([pieces[i] for i in rows])
                logits[rows] = result
                states.append((slots, state))
            for slots, state in states:  # only now, so that a failure above changes nothing
                self.pool.index_copy_(0, slots, state)
        return logits

    def _run(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        """Pieces of one length, those of an adapter side by side → slots, logits [pieces, V], states [pieces, size]."""
        slots = torch.tensor([piece.slot for piece in pieces], device=self.device)
        tokens = torch.tensor([list(piece.tokens) for piece in pieces], device=self.device)
        state = self.layout.state(self.pool.index_select(0, slots))
        with adapted(self.model, self._updates(pieces)):
            logits, state = self.model(tokens, state, last=True)
        return slots, logits[:, -1].float().cpu(), self.layout.flat(state)

    def _updates(self, pieces: Iterable[Piece]) -> list[tuple[slice, dict[str, tuple[Tensor, Tensor]]]]:
        """The rows of each adapter, pieces of one adapter being side by side."""
        updates, begin = [], 0
        for _, same in groupby(pieces, key=lambda piece: id(piece.adapter)):
            group = list(same)
            if adapter := group[0].adapter:
                updates.append((slice(begin, begin + len(group)), self._deltas(adapter)))
            begin += len(group)
        return updates

    def _deltas(self, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
        """An adapter where the model is, in its type; the last few are kept there."""
        if id(adapter) not in self._near:
            while len(self._near) >= 16:
                self._near.pop(next(iter(self._near)))
            dtype = self.model.ln_out.weight.dtype
            self._near[id(adapter)] = (
                adapter,
                {name: (a.to(self.device, dtype), b.to(self.device, dtype)) for name, (a, b) in adapter.deltas.items()},
            )
        return self._near[id(adapter)][1]


@contextmanager
def adapted(model: nn.Module, updates: Sequence[tuple[slice, Mapping[str, tuple[Tensor, Tensor]]]]) -> Iterator[None]:
    """
    As long as it lasts, the model's linears add to these rows of their batch what adapters say.

    A hook of the module, since so it holds for a linear in any form of storage.
    """
    by_name: dict[str, list[tuple[slice, Tensor, Tensor]]] = {}
    for rows, deltas in updates:
        for name, (a, b) in deltas.items():
            by_name.setdefault(name, []).append((rows, a, b))
    with ExitStack() as stack:
        for name, changes in by_name.items():

            def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, changes: Any = changes) -> Tensor:
                for rows, a, b in changes:
                    output[rows] += (inputs[0][rows].to(a.dtype) @ a.mT @ b.mT).to(output.dtype)
                return output

            stack.callback(model.get_submodule(name).register_forward_hook(add).remove)
        yield


def check(pieces: Sequence[Piece], vocabulary: int) -> None:
    """Raises ValueError; a token beyond the vocabulary would end a whole CUDA process, so that it is worth a look."""
    for piece in pieces:
        if not piece.tokens:
            raise ValueError("a piece holds no token")
        if min(piece.tokens) < 0 or max(piece.tokens) >= vocabulary:
            raise ValueError(f"a token is not among the {vocabulary} of the model")
    if len({piece.slot for piece in pieces}) < len(pieces):
        raise ValueError("two pieces of one batch share a slot")


@contextmanager
def scarce(what: str) -> Iterator[None]:
    """Turn what torch raises when memory is out, on any device, into a MemoryError that says for what."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        reason = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason:
            raise MemoryError(f"no memory for {what}: {reason}") from None
        raise
