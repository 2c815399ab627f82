"""
A model on a CPU: all the rows of a batch, of any mix of texts, go through each layer together.

The matrix products are those of `linear`, everything between them is compiled (`kernels.compiled`). It computes what
the torch module defines, from the module's weights, and is held to it when a model is loaded.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import groupby
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels import compiled as k
from ..kernels.matmul import WIDTH
from ..network.model import RWKV, Block
from ..network.rwkv6 import RWKV6, Sizes6
from ..network.rwkv7 import RWKV7, Sizes7
from .linear import Arena, Matrix, Plan, Precision, make_plan
from .runtime import Adapter, Lost, Piece, TorchRuntime, check, scarce

__all__ = ["CpuRuntime", "disagreement", "suits"]

Array = npt.NDArray[Any]


def suits(model: RWKV) -> str:
    """Why this runtime cannot run the model, or nothing."""
    sizes = model.sizes
    if model.version not in LAYERS:
        return f"it knows RWKV-6 and 7, not {model.version}"
    if sizes.width % WIDTH or sizes.head % 16:
        return f"the model's width {sizes.width} is no multiple of {WIDTH}, or its heads' {sizes.head} none of 16"
    return ""


@cache
def disagreement(version: str) -> str:
    """How compiled code differs here from the torch module, tried on a small random model; or nothing."""
    kind, sizes = SMALL[version]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        model = kind(sizes).eval()
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.to(torch.bfloat16).float()  # weights that bfloat16 holds, as those of real models
        plain, mine = TorchRuntime(model, 2), CpuRuntime(model.to(torch.bfloat16), "float32", 1, 2)
        plain.model = model.float()
        worst = 0.0
        for lengths in ((40, 3), (1, 1)):
            pieces = [Piece(slot, list(range(length))) for slot, length in enumerate(lengths)]
            expected, found = plain.forward(pieces), mine.forward(pieces)
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return "" if worst < 1e-3 else f"its results are off by {worst:.1e} on this processor"


SPARE = 1 << 24
"""Bytes that a product may need for a moment."""


class Pass:
    """The rows of one forward pass, and room for what the layers compute."""

    def __init__(self, runtime: CpuRuntime, pieces: Sequence[Piece]) -> None:
        lengths = [len(piece.tokens) for piece in pieces]
        self.rows = sum(lengths)
        self.tokens = np.fromiter((token for piece in pieces for token in piece.tokens), np.int64, self.rows)
        self.starts = np.zeros(len(pieces) + 1, np.int64)
        self.starts[1:] = np.cumsum(lengths)
        self.slots = np.array([piece.slot for piece in pieces], np.int64)
        self.states = runtime.states
        self.layout = runtime.layout
        self.adapters: list[tuple[slice, Adapter]] = []
        for _, same in groupby(range(len(pieces)), key=lambda i: id(pieces[i].adapter)):
            group = list(same)
            if adapter := pieces[group[0]].adapter:
                self.adapters.append((slice(self.starts[group[0]], self.starts[group[-1] + 1]), adapter))
        self._room, self._widths = runtime.room, runtime.widths

    def array(self, name: str, width: int, more: int = 0) -> Array:
        """Room [rows + more, width] that stays between passes: fresh memory costs a page fault every 4 KiB."""
        rows = self.rows + more
        room = self._room.get(name)
        if room is None or len(room) < rows * width:
            room = self._room[name] = np.zeros(rows * width, np.float32)
            self._widths[name] = max(width, self._widths.get(name, 0))
        return room[: rows * width].reshape(rows, width)

    def reserve(self) -> None:
        """Make all the room that passes before this one needed: memory is out now, or not at all."""
        for name, width in self._widths.items():
            self.array(name, width, 1)
        np.empty(SPARE, np.uint8)


class Layer:
    """One layer. `number` is where it stands, `prefix` its name in the checkpoint."""

    def __init__(self, block: Block, number: int, plan: Plan, arena: Arena) -> None:
        self.number, self.prefix = number, f"blocks.{number}."
        self.ln1, self.ln2 = _norm(block.ln1), _norm(block.ln2)
        att: Any = block.att
        self.ln_x = _norm(att.ln_x)
        self.width = self.ln1[0].size
        self.head: int = att.head
        self._matrices: dict[str, Matrix] = {}
        self._plan, self._arena = plan, arena
        self._wide = plan.threads > 1

    def matrix(self, name: str, weights: Tensor, inputs: int = 0) -> None:
        self._matrices[name] = Matrix(weights, self._plan, inputs, self._arena)

    def linear(self, p: Pass, name: str, x: Array, room: str) -> Array:
        """A product with one of the layer's matrices, with what adapters add to it."""
        matrix = self._matrices[name]
        y = matrix(x, p.array(room, matrix.width))
        for rows, adapter in p.adapters:
            if delta := adapter.deltas.get(self.prefix + name):
                a, b = delta
                change = torch.from_numpy(x[rows, : a.shape[1]]) @ a.float().mT @ b.float().mT
                y[rows, : b.shape[0]] += change.numpy()
        return y

    def shifted(self, p: Pass, x: Array, norm: tuple[Array, Array], at: int) -> tuple[Array, Array]:
        """The normed rows, and their change to the token before; `at` is where the states keep the last."""
        h, s = p.array("h", self.width), p.array("s", self.width)
        k.shift(x, *norm, p.starts, p.slots, p.states, at, h, s)
        return h, s

    def mixed(self, p: Pass, h: Array, s: Array, mixes: Array) -> Array:
        out = p.array("mixed", len(mixes) * self.width).reshape(len(mixes), p.rows, self.width)
        k.lerp(h, s, mixes, out)
        return out

    def squared(self, p: Pass, name: str, x: Array, key: Array) -> Array:
        """The channel mix's product with relu(key)², which for one row reads only the weights that it needs."""
        k.relu_squared(key)
        matrix = self._matrices[name]
        if p.rows > 1 or p.adapters:
            return self.linear(p, name, key, "y")
        chosen, values = np.empty(key.size, np.int64), np.empty(key.size, np.float32)
        count = k.nonzero(key[0], chosen, values)
        if not matrix.pays(count):
            return self.linear(p, name, key, "y")
        return matrix.sparse(values[:count], chosen[:count], p.array("y", matrix.width))

    def time_mix(self, p: Pass, h: Array, s: Array) -> Array:
        raise NotImplementedError

    def channel_mix(self, p: Pass, h: Array, s: Array) -> Array:
        raise NotImplementedError

    def __call__(self, p: Pass, x: Array) -> None:
        """x [rows, D], changed in place."""
        at = self.number * self.width
        k.add(x, self.time_mix(p, *self.shifted(p, x, self.ln1, at)))
        k.add(x, self.channel_mix(p, *self.shifted(p, x, self.ln2, at + p.layout.shifts // 2)))

    def wkv_at(self, p: Pass) -> int:
        return p.layout.shifts + self.number * self.width * self.head


class Layer7(Layer):
    """RWKV-7."""

    def __init__(self, block: Block, number: int, plan: Plan, arena: Arena) -> None:
        super().__init__(block, number, plan, arena)
        att: Any = block.att
        ffn: Any = block.ffn
        self.mixes = _rows(att.x_r, att.x_w, att.x_k, att.x_v, att.x_a, att.x_g)
        self.w0, self.a0, self.k_k, self.k_a, self.r_k = _rows(att.w0, att.a0, att.k_k, att.k_a, att.r_k)
        for name in ("receptance", "key", "value", "output"):
            self.matrix(f"att.{name}", getattr(att, name).weight)
        for name in "wag" if number == 0 else "wagv":
            self._low_rank(name, getattr(att, f"{name}1"), getattr(att, f"{name}2"))
        if number > 0:
            (self.v0,) = _rows(att.v0)
        self.mixes_ffn = _rows(ffn.x_k)
        self.matrix("ffn.key", ffn.key.weight)
        self.matrix("ffn.value", ffn.value.weight, self._matrices["ffn.key"].width)

    def _low_rank(self, name: str, first: Tensor, second: Tensor) -> None:
        self.matrix(name + "1", first.T)
        self.matrix(name + "2", second.T, self._matrices[name + "1"].width)

    def _through(self, p: Pass, name: str, x: Array, activation: Callable[[Array], None] | None = None) -> Array:
        low = self.linear(p, name + "1", x, "low")
        if activation:
            activation(low)
        return self.linear(p, name + "2", low, name + "2")

    def time_mix(self, p: Pass, h: Array, s: Array) -> Array:
        D, N = self.width, self.head
        x_r, x_w, x_k, x_v, x_a, x_g = self.mixed(p, h, s, self.mixes)
        r = self.linear(p, "att.receptance", x_r, "r")
        key = self.linear(p, "att.key", x_k, "k")
        v = self.linear(p, "att.value", x_v, "v")
        w = self._through(p, "w", x_w, k.tanh)
        a = self._through(p, "a", x_a)
        g = self._through(p, "g", x_g, k.sigmoid)
        k.activate7(w, a, self.w0, self.a0)
        first = p.array("first", D)
        if self.number == 0:
            first[:] = v
        else:
            k.blend(v, first, self._through(p, "v", x_v), self.v0)
        removal, added, y = p.array("h", D, 1), p.array("added", D), p.array("s", D)
        k.keys7(key, a, self.k_k, self.k_a, N, removal, added)
        run = k.wkv7_parallel if self._wide else k.wkv7
        run(w, key, v, removal, added, r, p.starts, p.slots, p.states, self.wkv_at(p), N, y)
        k.finish(y, r, key, self.r_k, v, g, *self.ln_x, N, False)
        return self.linear(p, "att.output", y, "y")

    def channel_mix(self, p: Pass, h: Array, s: Array) -> Array:
        (x,) = self.mixed(p, h, s, self.mixes_ffn)
        return self.squared(p, "ffn.value", x, self.linear(p, "ffn.key", x, "hidden"))


class Layer6(Layer):
    """RWKV-6."""

    def __init__(self, block: Block, number: int, plan: Plan, arena: Arena) -> None:
        super().__init__(block, number, plan, arena)
        att: Any = block.att
        ffn: Any = block.ffn
        self.mix = _rows(att.time_maa_x)
        self.mixes = _rows(att.time_maa_w, att.time_maa_k, att.time_maa_v, att.time_maa_r, att.time_maa_g)
        self.time_decay, self.bonus = _rows(att.time_decay, att.time_faaaa)
        for name in ("receptance", "key", "value", "gate", "output"):
            self.matrix(f"att.{name}", getattr(att, name).weight)
        rank = att.time_maa_w2.shape[1]
        self.ranks = -(-rank // WIDTH) * WIDTH
        for j, (down, up) in enumerate(zip(att.time_maa_w1.T.split(rank), att.time_maa_w2, strict=True)):
            self.matrix(f"maa{j}1", down)
            self.matrix(f"maa{j}2", up.T, self._matrices[f"maa{j}1"].width)
        self.matrix("decay1", att.time_decay_w1.T)
        self.matrix("decay2", att.time_decay_w2.T, self._matrices["decay1"].width)
        self.mixes_ffn = _rows(ffn.time_maa_k, ffn.time_maa_r)
        self.matrix("ffn.key", ffn.key.weight)
        self.matrix("ffn.receptance", ffn.receptance.weight)
        self.matrix("ffn.value", ffn.value.weight, self._matrices["ffn.key"].width)

    def time_mix(self, p: Pass, h: Array, s: Array) -> Array:
        D, N = self.width, self.head
        z = p.array("z", D)
        k.lerp(h, s, self.mix, z[None])
        changes = p.array("changes", 5 * D).reshape(5, p.rows, D)
        for j in range(5):
            low = self.linear(p, f"maa{j}1", z, "low")
            k.tanh(low)
            self._matrices[f"maa{j}2"](low, changes[j])
        mixed = p.array("mixed", 5 * D).reshape(5, p.rows, D)
        k.lerp_each(h, s, self.mixes, changes, mixed)
        x_w, x_k, x_v, x_r, x_g = mixed
        r = self.linear(p, "att.receptance", x_r, "r")
        key = self.linear(p, "att.key", x_k, "k")
        v = self.linear(p, "att.value", x_v, "v")
        g = self.linear(p, "att.gate", x_g, "g")
        k.silu(g)
        low = self.linear(p, "decay1", x_w, "low")
        k.tanh(low)
        w = self.linear(p, "decay2", low, "w")
        k.activate6(w, self.time_decay)
        y = p.array("s", D)
        run = k.wkv6_parallel if self._wide else k.wkv6
        run(w, key, v, r, p.starts, p.slots, p.states, self.wkv_at(p), N, y)
        k.finish(y, r, key, self.bonus, v, g, *self.ln_x, N, True)
        return self.linear(p, "att.output", y, "y")

    def channel_mix(self, p: Pass, h: Array, s: Array) -> Array:
        x_k, x_r = self.mixed(p, h, s, self.mixes_ffn)
        gate = self.linear(p, "ffn.receptance", x_r, "r")
        k.sigmoid(gate)
        y = self.squared(p, "ffn.value", x_k, self.linear(p, "ffn.key", x_k, "hidden"))
        y *= gate
        return y


SMALL: dict[str, tuple[type[RWKV], Any]] = {
    "rwkv7": (RWKV7, Sizes7(64, 2, 64, 1, 128, 32, 32, 32, 32)),
    "rwkv6": (RWKV6, Sizes6(64, 2, 64, 1, 128, 32, 32)),
}
LAYERS: dict[str, Callable[[Block, int, Plan, Arena], Layer]] = {"rwkv7": Layer7, "rwkv6": Layer6}


class CpuRuntime:
    """Owned by one thread. The model given can be dropped afterwards."""

    def __init__(self, model: RWKV, precision: Precision = "float32", threads: int = 1, slots: int = 0) -> None:
        """Raises ValueError when it cannot run the model; see `suits`."""
        if reason := suits(model):
            raise ValueError(reason)
        self.layout = model.layout
        self.vocabulary = model.sizes.vocabulary
        self.device = torch.device("cpu")
        self.threads = threads
        plan = make_plan(precision, threads, model.sizes.hidden, model.sizes.width)
        self.choices = {
            "runtime": f"compiled for this processor, {precision}, {threads} thread{'s' * (threads > 1)}",
            "products": plan.reason,
        }
        with torch.inference_mode():
            self._initial = self.layout.flat(model.initial_state())[0]
            self._table = _table(model.emb.weight)
            self._ln0, self._ln_out = _norm(model.layers[0].ln0), _norm(model.ln_out)
            arena = Arena()
            self._layers = [LAYERS[model.version](block, i, plan, arena) for i, block in enumerate(model.layers)]
            # for the few rows that need logits, a second copy of the largest matrix would not pay
            self._head = Matrix(
                model.head.weight, plan if plan.way == "tiles" else Plan(precision, threads), arena=arena
            )
        self.room: dict[str, Array] = {}
        self.widths: dict[str, int] = {}
        self.states = np.zeros((0, self.layout.size), np.float32)
        self.grow(slots)
        _give_back()

    def grow(self, slots: int) -> None:
        if slots > len(self.states):
            with scarce(f"{slots} states of {4 * self.layout.size / 1e6:.1f} MB"):
                states = np.zeros((slots, self.layout.size), np.float32)
            states[: len(self.states)] = self.states
            self.states = states

    def put(self, slot: int, state: Tensor | None) -> None:
        self.states[slot] = (self._initial if state is None else state).numpy()

    def get(self, slot: int) -> Tensor:
        return torch.from_numpy(self.states[slot].copy())

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        check(pieces, self.vocabulary)
        torch.set_flush_denormal(
            True
        )  # of this thread; a state that fades would make everything a hundred times slower
        order = sorted(range(len(pieces)), key=lambda i: id(pieces[i].adapter))
        with _quickly(self.threads), torch.inference_mode():
            with scarce(f"a batch of {sum(len(piece.tokens) for piece in pieces)} tokens"):
                p = Pass(self, [pieces[i] for i in order])
                p.reserve()
            x = p.array("x", self.layout.width)
            k.embed(p.tokens, self._table, *self._ln0, x)
            try:
                for layer in self._layers:
                    layer(p, x)
            except Exception as error:
                raise Lost(f"a batch of {p.rows} tokens failed half-way: {error}") from error
            last = x[p.starts[1:] - 1]
            k.norm(last, *self._ln_out, last)
            logits = self._head(last, np.empty((len(pieces), self._head.width), np.float32))
        result = torch.empty(len(pieces), self.vocabulary)
        result[order] = torch.from_numpy(logits)[:, : self.vocabulary]
        return result


_shared = threading.Lock()


@cache
def _most() -> int:
    """Threads of Numba: before anyone asks for fewer, as many as there are cores. To ask starts them."""
    return int(numba.get_num_threads())


@contextmanager
def _quickly(threads: int) -> Iterator[None]:
    """
    Let Numba use so many threads; not every way in which it shares work out may be used by two at once.

    Numbers too small for a full float32 count as zero meanwhile: a state that fades away would make everything slow.
    """
    with _shared if threads > 1 else nullcontext():
        if threads > 1:
            numba.set_num_threads(min(threads, _most()))
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)


def _give_back() -> None:
    """Let the system have the memory that packing needed and the C library keeps, where there is a way."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _norm(norm: Any) -> tuple[Array, Array]:
    return norm.weight.detach().float().numpy(), norm.bias.detach().float().numpy()


def _rows(*parameters: Tensor) -> Array:
    """Parameters of D values each → [n, D]."""
    return torch.stack([parameter.detach().float().reshape(-1) for parameter in parameters]).numpy()


def _table(weights: Tensor) -> Array:
    """The embedding as it is stored: float32, or bfloat16 as uint16. A copy, so that the file can be closed."""
    if weights.dtype == torch.bfloat16:
        return weights.detach().contiguous().view(torch.uint16).numpy().copy()
    return weights.detach().float().numpy().copy()
