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

from .kernels.matmul import GROUP, WIDTH, matmul, matmul4, matmul4_parallel, matmul_parallel, pack, pack4, scale

__all__ = ["NEVER", "PRECISIONS", "Arena", "Matrix", "Plan", "Precision", "make_plan"]

Array = npt.NDArray[Any]
Precision = Literal["float32", "bfloat16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8", "int4")

NEVER = 1 << 30
SMALL = 1 << 18
"""Weights below which a product is not worth sharing out among threads."""
SPARSE = 0.4
NONE = np.zeros(1, np.int64)


@dataclass(frozen=True)
class Plan:
    """How to multiply in a precision: from `many` rows on by torch, in bfloat16, otherwise by our kernel."""

    precision: Precision
    threads: int
    many: int
    reason: str


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
        if plan.precision == "bfloat16" and plan.many < NEVER:
            rows = torch.nn.functional.pad(weights.to(torch.bfloat16), (0, 0, 0, self.width - self.outputs))
            self._packed = _reordered(rows.contiguous())

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

    def __call__(self, x: Array, y: Array) -> Array:
        """x [rows, inputs] → y [rows, width], both float32 and contiguous."""
        if len(x) >= self.plan.many:
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

    def _many(self, x: Array, y: Array) -> None:
        rows = torch.from_numpy(x).to(torch.bfloat16)
        if self._packed is not None:
            torch.from_numpy(y).copy_(_multiplied(rows, self._packed))
            return
        torch.from_numpy(y).copy_(rows @ self._wide())
        if self._scale is not None:
            scale(y, self._scale)

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
    Find out, on random weights of this shape, from how many rows on torch in bfloat16 is faster than our own kernel.

    Takes about a tenth of a second once the kernels are compiled.
    """
    own = Plan(precision, threads, NEVER, "")
    if precision == "float32":
        return Plan(precision, threads, NEVER, "our kernel: exact, with the weights as they are stored")
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(min(outputs, 4096), min(inputs, 4096), generator=generator)
    try:
        ours, theirs = Matrix(weights, own), Matrix(weights, Plan(precision, threads, 0, ""))
        many, told = NEVER, ""
        for rows in (256, 64, 16, 8, 4):
            x = torch.randn(rows, ours.inputs, generator=generator).numpy()
            y = np.empty((rows, ours.width), np.float32)
            expected = ours(x, y).copy()
            error = float(np.abs(theirs(x, y) - expected).max() / np.abs(expected).max())
            if not error < 0.03:
                return Plan(precision, threads, NEVER, f"our kernel: torch's results are off by {error:.1%}")
            mine, other = _seconds(lambda: ours(x, y)), _seconds(lambda: theirs(x, y))  # noqa: B023
            if other > 0.95 * mine:
                break
            many, told = rows, told or f"{mine / other:.1f} × as fast at {rows} rows"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return Plan(
            precision, threads, NEVER, f"our kernel: torch cannot do it here ({str(error).partition(chr(10))[0]})"
        )
    if many == NEVER:
        return Plan(precision, threads, many, "our kernel: torch in bfloat16 is not faster on this processor")
    return Plan(precision, threads, many, f"torch in bfloat16 from {many} rows on ({told}), our kernel below")


def _seconds(work: Callable[[], object]) -> float:
    """Of the best of a few tries."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
