"""
Weight matrices in the forms in which a CPU serves them, and the choice among the ways to multiply.

float32: exact; what the checkpoint stores in bfloat16 stays so and is widened on the way. bfloat16: the same weights,
many rows at once in bfloat16 where the processor has instructions for it. int8: one scale per output. int4: one scale
per output and 32 inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels import tiles
from ..kernels.int4 import GROUP, matmul4, matmul4_parallel, pack4
from ..kernels.matmul import WIDTH, matmul, matmul_parallel, pack, scale

__all__ = ["NEVER", "PRECISIONS", "Arena", "Matrix", "Plan", "Precision", "make_plan"]

Array = npt.NDArray[Any]
Precision = Literal["float32", "bfloat16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8", "int4")

NEVER = 1 << 30
SMALL = 1 << 18
"""Weights below which a product is not worth sharing out among threads."""
SPARSE = 0.4
NONE = np.zeros(1, np.int64)


Way = Literal["tiles", "torch"]


@dataclass(frozen=True)
class Plan:
    """How to multiply in a precision: from `many` rows on in a `way` of the processor's, otherwise by our kernel."""

    precision: Precision
    threads: int
    many: int = NEVER
    way: Way = "torch"
    reason: str = ""


class Arena:
    """Room for weights in few large blocks, which the system can back with huge pages: a sixth faster to read."""

    BLOCK = 1 << 26

    def __init__(self) -> None:
        self._room = np.empty(0, np.uint8)

    def place(self, array: Array) -> Array:
        """A copy of the array, aligned to a line of the cache."""
        start = -self._room.ctypes.data % 64
        if start + array.nbytes > self._room.size:
            self._room = np.empty(max(self.BLOCK, array.nbytes + 64), np.uint8)
            start = -self._room.ctypes.data % 64
        copy = self._room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        self._room = self._room[start + array.nbytes :]
        copy[:] = array
        return copy


class Matrix:
    """
    Weights [outputs, inputs] that were given as float32, bfloat16 or float16.

    `width`: outputs filled up to whole panels; a product has so many columns, the last of them zero.
    """

    def __init__(self, weights: Tensor, plan: Plan, inputs: int = 0, arena: Arena | None = None) -> None:
        """`inputs`: so many columns the rows will have, if more than the weights have."""
        weights = weights.detach()
        if missing := inputs - weights.shape[1]:
            weights = torch.nn.functional.pad(weights, (0, missing)) if missing > 0 else weights
        self.outputs, self.inputs = weights.shape
        self.width = -(-self.outputs // WIDTH) * WIDTH
        self.plan = plan
        self._parallel = plan.threads > 1 and weights.numel() >= SMALL
        self._scale: Array | None = None
        self._packed: Any = None
        panels, self._groups = self._stored(weights)
        self._panels = arena.place(panels) if arena else panels
        self._many = self._ways(weights)

    @property
    def bytes(self) -> int:
        extra = self._panels.size * 2 if self._packed is not None else 0
        return self._panels.nbytes + (0 if self._groups is None else self._groups.nbytes) + extra

    def _stored(self, weights: Tensor) -> tuple[Array, Array | None]:
        precision = self.plan.precision
        if precision == "int4" and self.inputs % GROUP == 0:
            return pack4(weights.float().numpy())
        if precision in ("int8", "int4"):
            values = weights.float()
            largest = values.abs().amax(1).clamp_min(1e-12) / 127
            self._scale = np.ones(self.width, np.float32)
            self._scale[: self.outputs] = largest.numpy()
            return pack((values / largest[:, None]).round().to(torch.int8).numpy()), None
        if weights.dtype == torch.bfloat16 or precision == "bfloat16":
            return pack(weights.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()), None
        return pack(weights.float().contiguous().numpy()), None

    def _ways(self, weights: Tensor) -> Callable[[Array, Array], None] | None:
        """How to multiply many rows, if not as few."""
        precision, way = self.plan.precision, self.plan.way
        if self.plan.many == NEVER or self._panels.dtype == np.float32:
            return None
        if way == "tiles":
            return self._by_tiles if self.inputs % tiles.STEP == 0 else None
        if precision == "bfloat16":
            rows = torch.nn.functional.pad(weights.to(torch.bfloat16), (0, 0, 0, self.width - self.outputs))
            self._packed = _reordered(rows.contiguous())
        return self._by_torch if precision != "float32" else None

    def __call__(self, x: Array, y: Array) -> Array:
        """x [rows, inputs] → y [rows, width], both float32 and contiguous."""
        if self._many and len(x) >= self.plan.many:
            self._many(x, y)
        elif self._groups is not None:
            (matmul4_parallel if self._parallel else matmul4)(self._panels, self._groups, x, y)
        else:
            (matmul_parallel if self._parallel else matmul)(self._panels, x, y, NONE, False)
        if self._scale is not None:
            scale(y, self._scale)
        return y

    def pays(self, count: int) -> bool:
        """Whether to read only the weights of so many inputs: in pieces, memory is slower."""
        return count < SPARSE * self.inputs

    def sparse(self, values: Array, chosen: Array, y: Array) -> Array:
        """As a call for one row that has these values at the inputs `chosen`, and zeros elsewhere. Exact."""
        if self._groups is not None:
            x = np.zeros((1, self.inputs), np.float32)
            x[0, chosen] = values
            return self(x, y)
        (matmul_parallel if self._parallel else matmul)(self._panels, values[None], y, chosen, True)
        if self._scale is not None:
            scale(y, self._scale)
        return y

    def _by_tiles(self, x: Array, y: Array) -> None:
        terms = 3 if self.plan.precision == "float32" else 1
        a = np.empty((terms, -(-len(x) // 16), self.inputs // tiles.STEP, 16, tiles.STEP), np.uint16)
        tiles.split(x, a)
        if self._groups is not None:
            run4 = tiles.tiles4_parallel if self._parallel else tiles.tiles4
            run4(self._panels, self._groups, a, y, tiles.CONFIG)
        elif self._panels.dtype == np.int8:
            (tiles.tiles8_parallel if self._parallel else tiles.tiles8)(self._panels, a, y, tiles.CONFIG)
        else:
            (tiles.tiles16_parallel if self._parallel else tiles.tiles16)(self._panels, a, y, tiles.CONFIG)

    def _by_torch(self, x: Array, y: Array) -> None:
        rows = torch.from_numpy(x).to(torch.bfloat16)
        product = rows @ self._wide() if self._packed is None else _multiplied(rows, self._packed)
        torch.from_numpy(y).copy_(product)

    def _wide(self) -> Tensor:
        """The weights, but for `_scale`, as bfloat16 [inputs, width], for one product only; it holds every int8."""
        wide = torch.empty(self.inputs, self.width, dtype=torch.bfloat16)
        panels = torch.from_numpy(self._panels)
        if self._groups is not None:
            pairs = panels.view(-1, self.inputs // GROUP, GROUP // 2, WIDTH)
            factors = torch.from_numpy(self._groups).view(-1, self.inputs // GROUP, 1, WIDTH)
            panels = (torch.cat([pairs & 15, pairs >> 4], 2).float() - 8) * factors
        wide.view(self.inputs, -1, WIDTH).copy_(panels.view(-1, self.inputs, WIDTH).transpose(0, 1))
        return wide


def _reordered(weights: Tensor) -> Any:
    """Weights in oneDNN's own order; an internal operator of torch, so that it may be missing."""
    return torch.ops.mkldnn._reorder_linear_weight(weights, 16)


def _multiplied(rows: Tensor, packed: Any) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    return result


def make_plan(precision: Precision, threads: int, outputs: int, inputs: int) -> Plan:
    """
    Find out, on random weights of this shape, from how many rows on the processor's own ways beat our kernel.

    Takes about a tenth of a second once the kernels are compiled.
    """
    way: Way = "tiles" if tiles.available() else "torch"
    name = {"tiles": "tiles of the processor (AMX)", "torch": "torch in bfloat16"}[way]
    exact = precision == "float32"
    if exact and way == "torch":
        return Plan(precision, threads, reason="our kernel: exact, with the weights as they are stored")
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(min(outputs, 4096), min(inputs, 4096), generator=generator).to(torch.bfloat16)
    try:
        ours, theirs = Matrix(weights, Plan(precision, threads)), Matrix(weights, Plan(precision, threads, 0, way))
        many, told = NEVER, ""
        for rows in (256, 64, 16, 8, 4, 2):
            x = torch.randn(rows, ours.inputs, generator=generator).numpy()
            y = np.empty((rows, ours.width), np.float32)
            expected = ours(x, y).copy()
            error = float(np.abs(theirs(x, y) - expected).max() / np.abs(expected).max())
            if not error < (1e-5 if exact else 0.03):
                return Plan(precision, threads, reason=f"our kernel: the results of {name} are off by {error:.1e}")
            mine, other = _seconds(lambda: ours(x, y)), _seconds(lambda: theirs(x, y))  # noqa: B023
            if other > 0.95 * mine:
                break
            many, told = rows, told or f"{mine / other:.1f} × as fast at {rows} rows"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        return Plan(precision, threads, reason=f"our kernel: {name} cannot be used here ({reason})")
    if many == NEVER:
        return Plan(precision, threads, reason=f"our kernel: {name} is not faster on this processor")
    return Plan(precision, threads, many, way, f"{name} from {many} rows on ({told}), our kernel below")


def _seconds(work: Callable[[], object]) -> float:
    """Of the best of a few tries."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
