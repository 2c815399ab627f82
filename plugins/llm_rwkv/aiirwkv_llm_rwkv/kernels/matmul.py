"""
Matrix products on a CPU, compiled at run time: weights of 16 or 8 bits, arithmetic in float32.

Weights lie in panels of WIDTH outputs, so that every product reads them once and in order. Each output is summed in
the same order however many rows there are: a row's result does not depend on its neighbours. Weights stored in
bfloat16 are widened on the way, which changes nothing: the product is that of float32 with half the memory traffic.

The micro-kernel (a block of rows × a panel kept in registers) follows Goto & van de Geijn, "Anatomy of
High-Performance Matrix Multiplication", 2008.
"""

from __future__ import annotations

import itertools
from typing import Any

import llvmlite.binding
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils

from .jit import compiled, emitted, parallel

__all__ = ["GROUP", "WIDTH", "matmul", "matmul4", "matmul4_parallel", "matmul_parallel", "pack", "pack4", "scale"]

Array = npt.NDArray[Any]

LANES = 16
_WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
VECTORS = 4 if _WIDE else 1
"""Vectors of a panel: with 6 rows they fill the registers, 32 of AVX-512, 16 of AVX2."""
WIDTH = VECTORS * LANES
AHEAD = 4096
"""Bytes that are fetched before they are used: processors do not look beyond a page of their own accord."""

_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VF, _VI = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


def _size(integer: int) -> ir.Constant:
    return ir.Constant(_I64, integer)


def _widen(builder: Any, kind: Any, address: Any) -> Any:
    """LANES weights at an address, as float32."""
    bits = kind.dtype.bitwidth
    raw = builder.load(builder.inttoptr(address, ir.VectorType(ir.IntType(bits), LANES).as_pointer()), align=1)
    if bits == 32:
        return builder.bitcast(raw, _VF)
    if bits == 16:  # bfloat16: the upper half of a float32
        return builder.bitcast(builder.shl(builder.zext(raw, _VI), ir.Constant(_VI, [16] * LANES)), _VF)
    return builder.sitofp(builder.sext(raw, _VI), _VF)


@emitted
def _block(typingctx: Any, weights: Any, rows: Any, sparse: Any, w: Any, x: Any, stride: Any, y: Any, out: Any,
           count: Any, chosen: Any, ahead: Any) -> Any:  # fmt: skip
    """
    y[m, :WIDTH] = Σₖ x[m, k] · w[k, :WIDTH] for `rows` rows m; addresses and strides in bytes.

    With `sparse`, k runs over `chosen` (int64) instead of 0 … count-1, and x holds the values of these only. At
    `ahead` lies what will be read next, for every k one line.
    """
    M = rows.literal_value
    gather = sparse.literal_value
    signature = types.void(weights, rows, sparse, *[types.intp] * 8)

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        _, _, _, w, x, stride, y, out, count, chosen, ahead = arguments
        item = weights.dtype.bitwidth // 8
        line = WIDTH * item
        sums = [
            [cgutils.alloca_once_value(b, ir.Constant(_VF, [0.0] * LANES)) for _ in range(VECTORS)] for _ in range(M)
        ]
        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(_VF, [_VF] * 3), f"llvm.fma.v{LANES}f32")
        prefetch = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]), "llvm.prefetch.p0"
        )
        starts = [b.add(x, b.mul(stride, _size(m))) for m in range(M)]
        with cgutils.for_range_slice(b, _size(0), count, _size(1), _I64) as (i, _):
            k = b.load(b.inttoptr(b.add(chosen, b.mul(i, _size(8))), _I64.as_pointer())) if gather else i
            here = b.mul(k, _size(line))
            if not gather:
                for at in range(0, line, 64):
                    address = b.inttoptr(b.add(b.add(ahead, here), _size(at)), _I8.as_pointer())
                    b.call(prefetch, [address, ir.Constant(_I32, 0), ir.Constant(_I32, 2), ir.Constant(_I32, 1)])
            panel = [_widen(b, weights, b.add(b.add(w, here), _size(v * LANES * item))) for v in range(VECTORS)]
            for m in range(M):
                value = b.load(b.inttoptr(b.add(starts[m], b.mul(i, _size(4))), _F32.as_pointer()), align=4)
                one = b.insert_element(ir.Constant(_VF, ir.Undefined), value, ir.Constant(_I32, 0))
                spread = b.shuffle_vector(one, ir.Constant(_VF, ir.Undefined), ir.Constant(_VI, [0] * LANES))
                for v in range(VECTORS):
                    b.store(b.call(fma, [panel[v], spread, b.load(sums[m][v])]), sums[m][v])
        for m in range(M):
            for v in range(VECTORS):
                address = b.add(b.add(y, b.mul(out, _size(m))), _size(v * LANES * 4))
                b.store(b.load(sums[m][v]), b.inttoptr(address, _VF.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, generate


@compiled
def _panel(weights: Array, p: int, x: Array, y: Array, chosen: Array, sparse: bool) -> None:
    rows, count = x.shape
    w = weights.ctypes.data + p * weights.strides[0]
    ahead = w + weights.strides[0] if p + 1 < weights.shape[0] else w
    data, stride = x.ctypes.data, x.strides[0]
    target, out = y.ctypes.data + 4 * WIDTH * p, y.strides[0]
    if sparse:
        _block(weights, 1, 1, w, data, stride, target, out, count, chosen.ctypes.data, w)
        return
    m = 0
    while m + 6 <= rows:
        _block(weights, 6, 0, w, data + m * stride, stride, target + m * out, out, count, 0, ahead)
        m += 6
    if m + 4 <= rows:
        _block(weights, 4, 0, w, data + m * stride, stride, target + m * out, out, count, 0, w + AHEAD)
        m += 4
    if m + 2 <= rows:
        _block(weights, 2, 0, w, data + m * stride, stride, target + m * out, out, count, 0, w + AHEAD)
        m += 2
    if m < rows:
        _block(weights, 1, 0, w, data + m * stride, stride, target + m * out, out, count, 0, w + AHEAD)


@compiled
def matmul(weights: Array, x: Array, y: Array, chosen: Array, sparse: bool) -> None:
    """
    y [rows, outputs] = x [rows, inputs] · Wᵀ, all float32, `weights` from `pack`. y's width is that of the panels.

    `sparse` takes one row of which x holds only the values at the inputs `chosen`; all others are zero.
    """
    for p in range(weights.shape[0]):
        _panel(weights, p, x, y, chosen, sparse)


@parallel
def matmul_parallel(weights: Array, x: Array, y: Array, chosen: Array, sparse: bool) -> None:
    """As `matmul`, on the threads of Numba."""
    for p in prange(weights.shape[0]):
        _panel(weights, p, x, y, chosen, sparse)


def pack(weights: Array) -> Array:
    """[outputs, inputs] → panels [⌈outputs / WIDTH⌉, inputs · WIDTH], filled up with zeros."""
    outputs, inputs = weights.shape
    if missing := -outputs % WIDTH:
        weights = np.concatenate([weights, np.zeros((missing, inputs), weights.dtype)])
    panels = weights.reshape(-1, WIDTH, inputs).transpose(0, 2, 1)
    return np.ascontiguousarray(panels).reshape(len(panels), -1)


@compiled
def scale(y: Array, factors: Array) -> None:
    """y[row] *= factors."""
    for row in range(y.shape[0]):
        for i in range(y.shape[1]):
            y[row, i] *= factors[i]


GROUP = 32
"""Inputs that share a scale, in int4."""


@emitted
def _block4(typingctx: Any, rows: Any, w: Any, scales: Any, x: Any, stride: Any, y: Any, out: Any, groups: Any) -> Any:
    """As `_block`, of weights of 4 bits: a byte holds those of the inputs k and k + GROUP/2 of its group, each + 8."""
    M = rows.literal_value
    signature = types.void(rows, *[types.intp] * 7)

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        _, w, scales, x, stride, y, out, groups = arguments
        zero = ir.Constant(_VF, [0.0] * LANES)

        def variables() -> list[list[Any]]:
            return [[cgutils.alloca_once_value(b, zero) for _ in range(VECTORS)] for _ in range(M)]

        sums, parts, inputs = variables(), variables(), [cgutils.alloca_once_value(b, zero) for _ in range(M)]
        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(_VF, [_VF] * 3), f"llvm.fma.v{LANES}f32")
        starts = [b.add(x, b.mul(stride, _size(m))) for m in range(M)]
        with cgutils.for_range_slice(b, _size(0), groups, _size(1), _I64) as (group, _):
            for variable in [*itertools.chain(*parts), *inputs]:
                b.store(zero, variable)
            with cgutils.for_range_slice(b, _size(0), _size(GROUP // 2), _size(1), _I64) as (i, _):
                line = b.add(w, b.mul(b.add(b.mul(group, _size(GROUP // 2)), i), _size(WIDTH)))
                halves: list[list[Any]] = [[], []]
                for v in range(VECTORS):
                    address = b.inttoptr(b.add(line, _size(v * LANES)), ir.VectorType(_I8, LANES).as_pointer())
                    both = b.zext(b.load(address, align=1), _VI)
                    halves[0].append(b.sitofp(b.and_(both, ir.Constant(_VI, [15] * LANES)), _VF))
                    halves[1].append(b.sitofp(b.lshr(both, ir.Constant(_VI, [4] * LANES)), _VF))
                for half in range(2):
                    k = b.add(b.add(b.mul(group, _size(GROUP)), i), _size(half * GROUP // 2))
                    for m in range(M):
                        at = b.add(starts[m], b.mul(k, _size(4)))
                        value = b.load(b.inttoptr(at, _F32.as_pointer()), align=4)
                        one = b.insert_element(ir.Constant(_VF, ir.Undefined), value, ir.Constant(_I32, 0))
                        spread = b.shuffle_vector(one, ir.Constant(_VF, ir.Undefined), ir.Constant(_VI, [0] * LANES))
                        b.store(b.fadd(spread, b.load(inputs[m])), inputs[m])
                        for v in range(VECTORS):
                            b.store(b.call(fma, [halves[half][v], spread, b.load(parts[m][v])]), parts[m][v])
            factors = b.add(scales, b.mul(group, _size(WIDTH * 4)))
            for v in range(VECTORS):
                factor = b.load(b.inttoptr(b.add(factors, _size(v * LANES * 4)), _VF.as_pointer()), align=4)
                for m in range(M):  # the weights are 8 too large
                    part = b.call(fma, [ir.Constant(_VF, [-8.0] * LANES), b.load(inputs[m]), b.load(parts[m][v])])
                    b.store(b.call(fma, [factor, part, b.load(sums[m][v])]), sums[m][v])
        for m in range(M):
            for v in range(VECTORS):
                address = b.add(b.add(y, b.mul(out, _size(m))), _size(v * LANES * 4))
                b.store(b.load(sums[m][v]), b.inttoptr(address, _VF.as_pointer()), align=4)
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
