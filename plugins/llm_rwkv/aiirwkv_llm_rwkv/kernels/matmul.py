"""
Matrix products on a CPU, compiled at run time: weights of 16 or 8 bits, arithmetic in float32.

Weights lie in panels of WIDTH outputs, so that every product reads them once and in order. Each output is summed in
the same order however many rows there are: a row's result does not depend on its neighbours. Weights stored in
bfloat16 are widened on the way, which changes nothing: the product is that of float32 with half the memory traffic.

The micro-kernel (a block of rows × a panel kept in registers) follows Goto & van de Geijn, "Anatomy of
High-Performance Matrix Multiplication", 2008.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils

from .jit import compiled, emitted, parallel

__all__ = ["LANES", "VECTORS", "WIDTH", "matmul", "matmul_parallel", "pack", "scale"]

Array = npt.NDArray[Any]

LANES = 16
_WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
VECTORS = 4 if _WIDE else 1
"""Vectors of a panel: with 6 rows they fill the registers, 32 of AVX-512, 16 of AVX2."""
WIDTH = VECTORS * LANES
AHEAD = 4096
"""Bytes that are fetched before they are used: processors do not look beyond a page of their own accord."""

I8, I32, I64, F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


def spread(builder: Any, address: Any) -> Any:
    """The float32 at an address, in all lanes."""
    value = builder.load(builder.inttoptr(address, F32.as_pointer()), align=4)
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(FLOATS, ir.Undefined), ir.Constant(INTS, [0] * LANES))


def fused(builder: Any) -> Any:
    """The function a · b + c of vectors."""
    return cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fma.v{LANES}f32"
    )


def prefetch(builder: Any, address: Any, length: int) -> None:
    """Fetch the lines of so many bytes into the cache."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for at in range(0, length, 64):
        pointer = builder.inttoptr(builder.add(address, size(at)), I8.as_pointer())
        builder.call(function, [pointer, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])


def size(integer: int) -> ir.Constant:
    return ir.Constant(I64, integer)


def _load(builder: Any, bits: int, address: Any) -> Any:
    """LANES integers of so many bits, widened to 32."""
    kind = ir.VectorType(ir.IntType(bits), LANES)
    raw = builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)
    return raw if bits == 32 else builder.sext(raw, INTS)


def _upper(builder: Any, pairs: Any, shift: Any) -> Any:
    """The bfloat16 of each pair that a shift moves up, as float32, whose upper half it is."""
    moved = builder.shl(pairs, shift)
    return builder.bitcast(builder.and_(moved, ir.Constant(INTS, [0xFFFF0000] * LANES)), FLOATS)


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
        bits = weights.dtype.bitwidth
        paired = bits == 16
        together = 2 if paired and not gather else 1
        line = WIDTH * (4 if paired else bits // 8)
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(b, zero) for _ in range(VECTORS)] for _ in range(M)]
        fma = fused(b)
        starts = [b.add(x, b.mul(stride, size(m))) for m in range(M)]
        with cgutils.for_range_slice(b, size(0), count, size(together), I64) as (i, _):
            k = b.load(b.inttoptr(b.add(chosen, b.mul(i, size(8))), I64.as_pointer())) if gather else i
            here = b.mul(b.lshr(k, size(1)) if paired else k, size(line))
            if not gather:
                prefetch(b, b.add(ahead, here), line)
            at = [b.add(b.add(w, here), size(v * line // VECTORS)) for v in range(VECTORS)]
            if paired:
                pairs = [_load(b, 32, address) for address in at]
                odd = ir.Constant(INTS, [0] * LANES)
                if gather:
                    shift = b.shl(b.sub(size(1), b.and_(k, size(1))), size(4))
                    lane = b.insert_element(ir.Constant(INTS, ir.Undefined), b.trunc(shift, I32), ir.Constant(I32, 0))
                    shifts = [b.shuffle_vector(lane, ir.Constant(INTS, ir.Undefined), odd)]
                else:
                    shifts = [ir.Constant(INTS, [16] * LANES), odd]
                panels = [[_upper(b, pair, shift) for pair in pairs] for shift in shifts]
            elif bits == 8:
                panels = [[b.sitofp(_load(b, 8, address), FLOATS) for address in at]]
            else:
                panels = [[b.bitcast(_load(b, 32, address), FLOATS) for address in at]]
            for n, panel in enumerate(panels):
                for m in range(M):
                    value = spread(b, b.add(starts[m], b.mul(b.add(i, size(n)), size(4))))
                    for v in range(VECTORS):
                        b.store(b.call(fma, [panel[v], value, b.load(sums[m][v])]), sums[m][v])
        for m in range(M):
            for v in range(VECTORS):
                address = b.add(b.add(y, b.mul(out, size(m))), size(v * LANES * 4))
                b.store(b.load(sums[m][v]), b.inttoptr(address, FLOATS.as_pointer()), align=4)
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
    """
    [outputs, inputs] → panels [⌈outputs / WIDTH⌉, inputs · WIDTH], filled up with zeros.

    bfloat16, as uint16, lies in pairs: of each output, the weights of two inputs side by side; `inputs` is then even.
    """
    outputs, inputs = weights.shape
    if missing := -outputs % WIDTH:
        weights = np.concatenate([weights, np.zeros((missing, inputs), weights.dtype)])
    together = 2 if weights.dtype == np.uint16 else 1
    panels = weights.reshape(-1, WIDTH, inputs // together, together).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(panels).reshape(len(panels), -1)


@compiled
def scale(y: Array, factors: Array) -> None:
    """y[row] *= factors."""
    for row in range(y.shape[0]):
        for i in range(y.shape[1]):
            y[row, i] *= factors[i]
