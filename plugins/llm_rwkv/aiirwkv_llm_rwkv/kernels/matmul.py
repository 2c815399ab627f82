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
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["WIDTH", "matmul", "matmul_parallel", "pack", "unpack"]

Array = npt.NDArray[Any]

LANES = 16
_WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
VECTORS = 4 if _WIDE else 1
"""Vectors of a panel: with 6 rows they fill the registers, 32 of AVX-512, 16 of AVX2."""
WIDTH = VECTORS * LANES
ROWS = 6

_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VF, _VI = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


def _size(integer: int) -> ir.Constant:
    return ir.Constant(_I64, integer)


def _widen(builder: Any, kind: Any, address: Any) -> Any:
    """LANES weights at an address, as float32."""
    bits = kind.dtype.bitwidth
    raw = builder.load(
        builder.inttoptr(address, ir.VectorType(ir.IntType(bits), LANES).as_pointer()), align=1
    )
    if bits == 32:
        return builder.bitcast(raw, _VF)
    if bits == 16:  # bfloat16: the upper half of a float32
        return builder.bitcast(builder.shl(builder.zext(raw, _VI), ir.Constant(_VI, [16] * LANES)), _VF)
    return builder.sitofp(builder.sext(raw, _VI), _VF)


@intrinsic(prefer_literal=True)
def _block(typingctx: Any, weights: Any, rows: Any, sparse: Any, w: Any, x: Any, stride: Any, y: Any, out: Any,
           count: Any, chosen: Any, ahead: Any) -> Any:  # fmt: skip
    """
    y[m, :WIDTH] = Σₖ x[m, k] · w[k, :WIDTH] for `rows` rows m; addresses and strides in bytes.

    With `sparse`, k runs over `chosen` (int64) instead of 0 … count-1, and x holds the values of these only. `ahead` is
    an address that the next block will read.
    """
    M = rows.literal_value
    gather = sparse.literal_value
    signature = types.void(weights, rows, sparse, *[types.intp] * 8)

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        _, _, _, w, x, stride, y, out, count, chosen, ahead = arguments
        item = weights.dtype.bitwidth // 8
        line = WIDTH * item
        sums = [[cgutils.alloca_once_value(b, ir.Constant(_VF, [0.0] * LANES)) for _ in range(VECTORS)] for _ in range(M)]
        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(_VF, [_VF] * 3), f"llvm.fma.v{LANES}f32")
        prefetch = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]), "llvm.prefetch.p0"
        )
        starts = [b.add(x, b.mul(stride, _size(m))) for m in range(M)]
        with cgutils.for_range_slice(b, _size(0), count, _size(1), _I64) as (i, _):
            if gather:
                k = b.load(b.inttoptr(b.add(chosen, b.mul(i, _size(8))), _I64.as_pointer()))
            else:
                k = i
            here = b.mul(k, _size(line))
            if M == ROWS:
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


@njit(boundscheck=False, error_model="numpy", nogil=True, cache=True)
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
        _block(weights, 4, 0, w, data + m * stride, stride, target + m * out, out, count, 0, w)
        m += 4
    if m + 2 <= rows:
        _block(weights, 2, 0, w, data + m * stride, stride, target + m * out, out, count, 0, w)
        m += 2
    if m < rows:
        _block(weights, 1, 0, w, data + m * stride, stride, target + m * out, out, count, 0, w)


@njit(boundscheck=False, error_model="numpy", nogil=True, cache=True)
def matmul(weights: Array, x: Array, y: Array, chosen: Array, sparse: bool) -> None:
    """
    y [rows, outputs] = x [rows, inputs] · Wᵀ, all float32, `weights` from `pack`. y's width is that of the panels.

    `sparse` takes one row of which x holds only the values at the inputs `chosen`; all others are zero.
    """
    for p in range(weights.shape[0]):
        _panel(weights, p, x, y, chosen, sparse)


@njit(boundscheck=False, error_model="numpy", nogil=True, parallel=True, cache=True)
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


def unpack(panels: Array, outputs: int) -> Array:
    """The inverse of `pack`."""
    return panels.reshape(len(panels), -1, WIDTH).transpose(0, 2, 1).reshape(-1, panels.shape[1] // WIDTH)[:outputs]
