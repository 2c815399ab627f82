"""
RWKV-4 and RWKV-5 through the `rwkv` package, behind the same interface as our own models.

One text after the other, without adapters and tuned states: for checkpoints that were never trained again.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from aiirwkv.errors import PluginError
from safetensors import safe_open
from torch import Tensor

from ..network.checkpoint import finite, loading
from ..network.model import Layout, State, count_layers, version
from .runtime import Piece, check, scarce

__all__ = ["ListLayout", "PackageRuntime"]


class ListLayout(Layout):
    """A state of the package, a list of 5 (RWKV-4) or 3 tensors a layer, laid end to end in one flat vector."""

    def __init__(self, example: Sequence[Tensor]) -> None:
        self._tensors = [(tensor.shape, tensor.dtype, tensor.device) for tensor in example]
        self._lengths = [math.prod(shape) for shape, _, _ in self._tensors]
        self.size = sum(self._lengths)

    def parts(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("a state of the `rwkv` package is a list of tensors")

    def flat(self, state: State) -> Tensor:
        raise NotImplementedError("a state of the `rwkv` package is a list of tensors")

    def state(self, flat: Tensor) -> State:
        raise NotImplementedError("a state of the `rwkv` package is a list of tensors")

    def laid(self, state: Sequence[Tensor]) -> Tensor:
        """The list as a flat vector [size], a copy on the CPU."""
        return torch.cat([tensor.detach().float().cpu().flatten() for tensor in state])

    def unlaid(self, flat: Tensor) -> list[Tensor]:
        """The list in a flat vector: copies, since the package changes some states in place."""
        parts: Sequence[Tensor] = torch.split_with_sizes(flat, self._lengths)
        return [
            part.view(shape).to(device, dtype, copy=True)
            for part, (shape, dtype, device) in zip(parts, self._tensors, strict=True)
        ]


class PackageRuntime:
    """A safetensors file of RWKV-4 or 5, served by the package. Raises PluginError when it cannot be."""

    AT_ONCE = 256
    """Tokens of one call: RWKV-5 before 5.2 needs memory for their square."""

    def __init__(self, path: Path, device: str = "cpu", precision: str = "fp32", slots: int = 0) -> None:
        """`precision` is fp32, fp16 or bf16."""
        self.device = torch.device(device)
        weights = _weights(path, self.device)
        self.vocabulary = len(weights["emb.weight"])
        self._model, example = _model(path, weights, f"{device} {precision}")
        self.layout: Layout = ListLayout(example)
        self.version = f"RWKV-{self._model.version:g}"
        self.choices = {"runtime": f"the `rwkv` package: {self.version} is served by nothing else here"}
        self._initial = self._list.laid(example)
        self.pool = torch.zeros(0, self.layout.size)
        self.grow(slots)

    @property
    def _list(self) -> ListLayout:
        assert isinstance(self.layout, ListLayout)
        return self.layout

    def grow(self, slots: int) -> None:
        if slots > len(self.pool):
            with scarce(f"{slots} states of {4 * self.layout.size / 1e6:.1f} MB"):
                self.pool = torch.cat([self.pool, torch.zeros(slots - len(self.pool), self.layout.size)])

    def put(self, slot: int, state: Tensor | None) -> None:
        self.pool[slot] = self._initial if state is None else state.view(self.layout.size)

    def get(self, slot: int) -> Tensor:
        return self.pool[slot].clone()

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        check(pieces, self.vocabulary)
        if any(piece.adapter for piece in pieces):
            raise ValueError(f"an adapter cannot be used with an {self.version}")
        logits, states = torch.empty(len(pieces), self.vocabulary), []
        with torch.inference_mode(), scarce(f"a batch of {sum(len(piece.tokens) for piece in pieces)} tokens"):
            for row, piece in zip(logits, pieces, strict=True):
                state, tokens = self._list.unlaid(self.pool[piece.slot]), list(piece.tokens)
                for begin in range(0, len(tokens), self.AT_ONCE):
                    last, state = self._model.forward(tokens[begin : begin + self.AT_ONCE], state)
                row.copy_(last)
                states.append(self._list.laid(state))
        for piece, flat in zip(pieces, states, strict=True):  # only now, so that a failure above changes nothing
            self.pool[piece.slot] = flat
        return logits


def _weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file, mapped, in the order in which the package recognises the version."""
    with loading(path, device), safe_open(path, framework="pt") as file:
        names = sorted(file.keys())
        found = version({name: file.get_slice(name).get_shape() for name in names})
        if found not in ("rwkv4", "rwkv5"):
            raise ValueError(f"it holds an {found}, not an RWKV-4 or 5")
        for name in ("emb.weight", *(f"blocks.{layer}.ln1.weight" for layer in range(count_layers(names)))):
            if name not in names:
                raise ValueError(f"the tensor {name} is missing")
        if any(name.endswith(".time_state") for name in names):
            raise ValueError(f"it holds a tuned state, which is not supported for an {found}")
        tensors = {name: file.get_tensor(name) for name in names}
        return {name: finite(name, tensor, tensor.dtype) for name, tensor in tensors.items()}


def _model(path: Path, weights: dict[str, Tensor], strategy: str) -> tuple[Any, list[Tensor]]:
    """The package's model, and the state that it begins with. It is tried, since the package checks nothing itself."""
    package = _package()
    try:
        with _instead_of_a_pickle(package, weights):
            model = package.RWKV(model=str(path), strategy=strategy, verbose=False)
        model.forward([0, 0], None)
        _, state = model.forward([0], None)
    except (MemoryError, torch.OutOfMemoryError):
        raise PluginError(
            f"the model {path} cannot be loaded: it does not fit into memory; choose a smaller one"
        ) from None
    except Exception as error:  # of the package, which was given something that it was not written for
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise PluginError(f"the model {path} cannot be loaded: the `rwkv` package fails with {what}") from None
    initial = [torch.zeros_like(tensor) for tensor in state]
    if model.version == 4:  # five tensors a layer; the fourth is the greatest exponent so far
        for tensor in initial[3::5]:
            tensor.fill_(-1e30)
    return model, initial


def _package() -> Any:
    """
    The package's module, imported for RWKV-4 to 6, which it decides at its import.

    What it then does to torch for the whole process is undone: our own products would become less exact on a GPU.
    """
    kept = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    asked = os.environ.pop("RWKV_V7_ON", None)
    try:
        package = importlib.import_module("rwkv.model")
    finally:
        if asked is not None:
            os.environ["RWKV_V7_ON"] = asked
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept
    if hasattr(package, "RWKV_x070"):
        raise PluginError(
            "the `rwkv` package was imported for RWKV-7 in this process, which cannot serve RWKV-4 or 5 then"
        )
    return package


class _Torch:
    """torch, as the package sees it until it has loaded its weights: what it is given in place of reading a pickle."""

    def __init__(self, package: Any, weights: dict[str, Tensor]) -> None:
        self._package, self._weights = package, weights

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def load(self, *_: object, **__: object) -> dict[str, Tensor]:
        self._package.torch = torch
        return self._weights


@contextmanager
def _instead_of_a_pickle(package: Any, weights: dict[str, Tensor]) -> Iterator[None]:
    """The package reads its checkpoint with `torch.load`, which would run what a pickle says; it is given tensors."""
    package.torch = _Torch(package, weights)
    try:
        yield
    finally:
        package.torch = torch
