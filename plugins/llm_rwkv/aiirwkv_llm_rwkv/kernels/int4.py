"""Matrix products as in `matmul`, with weights of 4 bits in groups that share a scale."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils

from .jit import compiled, emitted, parallel
from .matmul import FLOATS, I8, I64, INTS, LANES, VECTORS, WIDTH, fused, pack, size, spread

__all__ = ["GROUP", "matmul4", "matmul4_parallel", "pack4"]

Array = npt.NDArray[Any]

GROUP = 32
"""Inputs that share a scale, in int4."""


@emitted
def _block4(typingctx: Any, rows: Any, w: Any, scales: Any, x: Any, stride: Any, y: Any, out: Any, groups: Any) -> Any:
    """As `matmul._block`, of 4 bits: a byte holds the weights of the inputs k and k + GROUP/2 of a group, each + 8."""
    M = rows.literal_value
    signature = types.void(rows, *[types.intp] * 7)

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        _, w, scales, x, stride, y, out, groups = arguments
        zero = ir.Constant(FLOATS, [0.0] * LANES)

        def variables() -> list[list[Any]]:
            return [[cgutils.alloca_once_value(b, zero) for _ in range(VECTORS)] for _ in range(M)]

        sums, parts, inputs = variables(), variables(), [cgutils.alloca_once_value(b, zero) for _ in range(M)]
        fma = fused(b)
        starts = [b.add(x, b.mul(stride, size(m))) for m in range(M)]
        with cgutils.for_range_slice(b, size(0), groups, size(1), I64) as (group, _):
            for variable in [*itertools.chain(*parts), *inputs]:
                b.store(zero, variable)
            with cgutils.for_range_slice(b, size(0), size(GROUP // 2), size(1), I64) as (i, _):
                line = b.add(w, b.mul(b.add(b.mul(group, size(GROUP // 2)), i), size(WIDTH)))
                halves: list[list[Any]] = [[], []]
                for v in range(VECTORS):
                    address = b.inttoptr(b.add(line, size(v * LANES)), ir.VectorType(I8, LANES).as_pointer())
                    both = b.zext(b.load(address, align=1), INTS)
                    halves[0].append(b.sitofp(b.and_(both, ir.Constant(INTS, [15] * LANES)), FLOATS))
                    halves[1].append(b.sitofp(b.lshr(both, ir.Constant(INTS, [4] * LANES)), FLOATS))
                for half in range(2):
                    k = b.add(b.add(b.mul(group, size(GROUP)), i), size(half * GROUP // 2))
                    for m in range(M):
                        value = spread(b, b.add(starts[m], b.mul(k, size(4))))
                        b.store(b.fadd(value, b.load(inputs[m])), inputs[m])
                        for v in range(VECTORS):
                            b.store(b.call(fma, [halves[half][v], value, b.load(parts[m][v])]), parts[m][v])
            factors = b.add(scales, b.mul(group, size(WIDTH * 4)))
            for v in range(VECTORS):
                factor = b.load(b.inttoptr(b.add(factors, size(v * LANES * 4)), FLOATS.as_pointer()), align=4)
                for m in range(M):  # the weights are 8 too large
                    part = b.call(fma, [ir.Constant(FLOATS, [-8.0] * LANES), b.load(inputs[m]), b.load(parts[m][v])])
                    b.store(b.call(fma, [factor, part, b.load(sums[m][v])]), sums[m][v])
        for m in range(M):
            for v in range(VECTORS):
                address = b.add(b.add(y, b.mul(out, size(m))), size(v * LANES * 4))
                b.store(b.load(sums[m][v]), b.inttoptr(address, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, generate


@compiled
def _panel4(weights: Array, scales: Array, p: int, x: Array, y: Array) -> None:
    rows, groups = x.shape[0], x.shape[1] // GROUP
    w = weights.ctypes.data + p * weights.strides[0]
    factors = scales.ctypes.data + p * scales.strides[0]
    data, stride = x.ctypes.data, x.strides[0]
    target, out = y.ctypes.data + 4 * WIDTH * p, y.strides[0]
    m = 0
    while m + 4 <= rows:
        _block4(4, w, factors, data + m * stride, stride, target + m * out, out, groups)
        m += 4
    while m < rows:
        _block4(1, w, factors, data + m * stride, stride, target + m * out, out, groups)
        m += 1


@compiled
def matmul4(weights: Array, scales: Array, x: Array, y: Array) -> None:
    """As `matmul`, with weights and scales from `pack4`."""
    for p in range(weights.shape[0]):
        _panel4(weights, scales, p, x, y)


@parallel
def matmul4_parallel(weights: Array, scales: Array, x: Array, y: Array) -> None:
    """As `matmul4`, on the threads of Numba."""
    for p in prange(weights.shape[0]):
        _panel4(weights, scales, p, x, y)


def pack4(weights: Array) -> tuple[Array, Array]:
    """
    float32 [outputs, inputs], inputs a multiple of GROUP → panels of two weights a byte, and their scales.

    Each group is scaled so that its largest weight becomes -8, rounded to the nearest.
    """
    panels = pack(weights).reshape(-1, weights.shape[1] // GROUP, GROUP, WIDTH)
    largest = np.take_along_axis(panels, np.abs(panels).argmax(2)[:, :, None], 2)
    scales = np.where(largest == 0, 1, largest / -8).astype(np.float32)
    integers = (np.clip(np.rint(panels / scales), -8, 7) + 8).astype(np.uint8)
    low, high = integers[:, :, : GROUP // 2], integers[:, :, GROUP // 2 :]
    packed = low | (high << 4)
    return packed.reshape(len(panels), -1), np.ascontiguousarray(scales.reshape(len(panels), -1))
