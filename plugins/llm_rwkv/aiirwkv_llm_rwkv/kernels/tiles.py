"""
Matrix products with the tile instructions of a processor (AMX): bfloat16 in, float32 sums out.

A float32 is the sum of three bfloat16, so that three products of weights stored in bfloat16 are as exact as one in
float32, and still twice as fast where these instructions exist. The weights lie as for `matmul`.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import llvmlite.binding
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils

from .int4 import GROUP
from .jit import compiled, emitted, parallel
from .matmul import FLOATS, I8, INTS, LANES, VECTORS, WIDTH, prefetch, size

__all__ = [
    "available",
    "split",
    "tiles4",
    "tiles4_parallel",
    "tiles8",
    "tiles8_parallel",
    "tiles16",
    "tiles16_parallel",
]

Array = npt.NDArray[Any]

STEP = 32
"""Inputs of one tile; it has 16 rows."""
LINE = 4 * WIDTH  # bytes of a pair of inputs in a panel
AHEAD = 8192

CONFIG = np.zeros(64, np.uint8)
"""Eight tiles of 16 rows of 64 bytes."""
CONFIG[0] = 1
CONFIG[16:32].view(np.uint16)[:] = 64
CONFIG[48:56] = 16


def available() -> bool:
    """Whether the processor has the instructions, and the system lets this process use them."""
    features = llvmlite.binding.get_host_cpu_features()
    if platform.system() != "Linux" or not (features.get("amx-tile") and features.get("amx-bf16")) or WIDTH != 64:
        return False
    arch_prctl, request, tile_data = (
        158,
        0x1023,
        18,
    )  # x86-64; the state of the tiles is large, so Linux wants to be asked
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _tile(number: int) -> ir.Constant:
    return ir.Constant(I8, number)


@emitted
def _configure(typingctx: Any, config: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "ldtilecfg", builder.inttoptr(arguments[0], I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp), generate


@emitted
def _release(typingctx: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@emitted
def _block(typingctx: Any, terms: Any, tall: Any, w: Any, a: Any, term: Any, block: Any, y: Any, out: Any,
           steps: Any) -> Any:  # fmt: skip
    """
    16 rows × 64 outputs, or with `tall` 32 rows × 32 outputs, of `steps` tiles of inputs; addresses and bytes.

    `a` holds `terms` summands of the rows, `term` bytes apart, blocks of 16 rows `block` bytes apart.
    """
    T, high = terms.literal_value, tall.literal_value
    rows, columns = (2, 2) if high else (1, 4)

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        _, _, w, a, term, block, y, out, steps = arguments

        def load(tile: int, address: Any, stride: int) -> None:
            _call(b, "tileloadd64", _tile(tile), b.inttoptr(address, I8.as_pointer()), size(stride))

        for tile in range(rows * columns):
            _call(b, "tilezero", _tile(tile))
        with cgutils.for_range(b, steps) as loop:
            weights = b.add(w, b.mul(loop.index, size(STEP // 2 * LINE)))
            inputs = b.add(a, b.mul(loop.index, size(16 * STEP * 2)))
            if high:
                for n in range(2):
                    load(6 + n, b.add(weights, size(64 * n)), LINE)
                for t in range(T):
                    for m in range(2):
                        load(4 + m, b.add(inputs, b.add(b.mul(term, size(t)), b.mul(block, size(m)))), 2 * STEP)
                        for n in range(2):
                            _call(b, "tdpbf16ps", _tile(2 * m + n), _tile(4 + m), _tile(6 + n))
            else:
                prefetch(b, b.add(weights, size(AHEAD)), STEP // 2 * LINE)
                for t in range(T):
                    load(4 + t, b.add(inputs, b.mul(term, size(t))), 2 * STEP)
                for n in range(4):
                    load(7, b.add(weights, size(64 * n)), LINE)
                    for t in range(T):
                        _call(b, "tdpbf16ps", _tile(n), _tile(4 + t), _tile(7))
        for m in range(rows):
            for n in range(columns):
                target = b.add(b.add(y, b.mul(out, size(16 * m))), size(64 * n))
                _call(b, "tilestored64", _tile(m * columns + n), b.inttoptr(target, I8.as_pointer()), out)
        return context.get_dummy_value()

    return types.void(terms, tall, *[types.intp] * 7), generate


@compiled
def _panel(w: int, p: int, a: Array, y: Array, last: Array) -> None:
    """One panel at the address w; rows beyond whole blocks go through `last` [16, WIDTH]."""
    terms, blocks, steps = a.shape[0], a.shape[1], a.shape[2]
    term, block = a.strides[0], a.strides[1]
    rows, out = y.shape[0], y.strides[0]
    inputs, target = a.ctypes.data, y.ctypes.data + 4 * WIDTH * p
    m = 0
    while (m + 2) * 16 <= rows:
        here, there = inputs + m * block, target + 16 * m * out
        for half in range(2):
            if terms == 3:
                _block(3, 1, w + 128 * half, here, term, block, there + 128 * half, out, steps)
            else:
                _block(1, 1, w + 128 * half, here, term, block, there + 128 * half, out, steps)
        m += 2
    while m < blocks:
        whole = (m + 1) * 16 <= rows
        there = target + 16 * m * out if whole else last.ctypes.data
        stride = out if whole else 4 * WIDTH
        if terms == 3:
            _block(3, 0, w, inputs + m * block, term, block, there, stride, steps)
        else:
            _block(1, 0, w, inputs + m * block, term, block, there, stride, steps)
        if not whole:
            for row in range(16 * m, rows):
                for i in range(WIDTH):
                    y[row, p * WIDTH + i] = last[row - 16 * m, i]
        m += 1


@compiled
def _tiles16(panels: Array, p: int, a: Array, y: Array, config: Array) -> None:
    _configure(config.ctypes.data)
    _panel(panels.ctypes.data + p * panels.strides[0], p, a, y, np.empty((16, WIDTH), np.float32))
    _release()


@compiled
def tiles16(panels: Array, a: Array, y: Array, config: Array) -> None:
    """y [rows, outputs] from panels of bfloat16 and the rows `a` from `split`."""
    for p in range(panels.shape[0]):
        _tiles16(panels, p, a, y, config)


@parallel
def tiles16_parallel(panels: Array, a: Array, y: Array, config: Array) -> None:
    """As `tiles16`, on the threads of Numba."""
    for p in prange(panels.shape[0]):
        _tiles16(panels, p, a, y, config)


@compiled
def _tiles8(panels: Array, p: int, a: Array, y: Array, config: Array) -> None:
    wide = np.empty(panels.shape[1], np.uint16)
    _widen8(panels.ctypes.data + p * panels.strides[0], wide.ctypes.data, panels.shape[1] // WIDTH // 2)
    _configure(config.ctypes.data)
    _panel(wide.ctypes.data, p, a, y, np.empty((16, WIDTH), np.float32))
    _release()


@compiled
def tiles8(panels: Array, a: Array, y: Array, config: Array) -> None:
    """As `tiles16`, from panels of int8, which bfloat16 holds exactly; without their scales."""
    for p in range(panels.shape[0]):
        _tiles8(panels, p, a, y, config)


@parallel
def tiles8_parallel(panels: Array, a: Array, y: Array, config: Array) -> None:
    """As `tiles8`, on the threads of Numba."""
    for p in prange(panels.shape[0]):
        _tiles8(panels, p, a, y, config)


@compiled
def _tiles4(panels: Array, scales: Array, p: int, a: Array, y: Array, config: Array) -> None:
    groups = panels.shape[1] // WIDTH * 2 // GROUP
    wide = np.empty(panels.shape[1] * 2, np.uint16)
    _widen4(
        panels.ctypes.data + p * panels.strides[0], scales.ctypes.data + p * scales.strides[0], wide.ctypes.data, groups
    )
    _configure(config.ctypes.data)
    _panel(wide.ctypes.data, p, a, y, np.empty((16, WIDTH), np.float32))
    _release()


@compiled
def tiles4(panels: Array, scales: Array, a: Array, y: Array, config: Array) -> None:
    """As `tiles16`, from panels of `int4.pack4`, their products with the scales rounded to bfloat16."""
    for p in range(panels.shape[0]):
        _tiles4(panels, scales, p, a, y, config)


@parallel
def tiles4_parallel(panels: Array, scales: Array, a: Array, y: Array, config: Array) -> None:
    """As `tiles4`, on the threads of Numba."""
    for p in prange(panels.shape[0]):
        _tiles4(panels, scales, p, a, y, config)


def _pair(builder: Any, even: Any, odd: Any) -> Any:
    """Two vectors of float32 → pairs of bfloat16, rounded half up."""
    half, upper = ir.Constant(INTS, [0x8000] * LANES), ir.Constant(INTS, [0xFFFF0000] * LANES)
    even, odd = (builder.add(builder.bitcast(x, INTS), half) for x in (even, odd))
    return builder.or_(builder.and_(odd, upper), builder.lshr(even, ir.Constant(INTS, [16] * LANES)))


@emitted
def _widen8(typingctx: Any, source: Any, target: Any, pairs: Any) -> Any:
    """A panel of int8 → one of pairs of bfloat16."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        source, target, pairs = arguments
        with cgutils.for_range(b, pairs) as loop:
            here = b.add(source, b.mul(loop.index, size(2 * WIDTH)))
            there = b.add(target, b.mul(loop.index, size(LINE)))
            for v in range(VECTORS):
                values = []
                for n in range(2):
                    address = b.add(here, size(n * WIDTH + v * LANES))
                    raw = b.load(b.inttoptr(address, ir.VectorType(I8, LANES).as_pointer()), align=1)
                    values.append(b.sitofp(b.sext(raw, INTS), FLOATS))
                pointer = b.inttoptr(b.add(there, size(64 * v)), INTS.as_pointer())
                b.store(_pair(b, *values), pointer, align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@emitted
def _widen4(typingctx: Any, source: Any, scales: Any, target: Any, groups: Any) -> Any:
    """A panel of `pack4` → one of pairs of bfloat16."""
    half = GROUP // 2

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        source, scales, target, groups = arguments
        with cgutils.for_range(b, groups) as group:
            factors = b.add(scales, b.mul(group.index, size(4 * WIDTH)))
            begin = b.add(target, b.mul(group.index, size(half * LINE)))
            with cgutils.for_range(b, size(half // 2)) as loop:
                line = b.add(b.mul(group.index, size(half)), b.mul(loop.index, size(2)))
                for v in range(VECTORS):
                    factor = b.load(b.inttoptr(b.add(factors, size(v * LANES * 4)), FLOATS.as_pointer()), align=4)
                    values: list[list[Any]] = [[], []]
                    for n in range(2):
                        address = b.add(source, b.add(b.mul(b.add(line, size(n)), size(WIDTH)), size(v * LANES)))
                        raw = b.load(b.inttoptr(address, ir.VectorType(I8, LANES).as_pointer()), align=1)
                        both = b.zext(raw, INTS)
                        low, high = (
                            b.and_(both, ir.Constant(INTS, [15] * LANES)),
                            b.lshr(both, ir.Constant(INTS, [4] * LANES)),
                        )
                        for part, integers in enumerate((low, high)):
                            centred = b.sitofp(b.sub(integers, ir.Constant(INTS, [8] * LANES)), FLOATS)
                            values[part].append(b.fmul(centred, factor))
                    for part in range(2):
                        there = b.add(begin, b.mul(b.add(loop.index, size(part * half // 2)), size(LINE)))
                        pointer = b.inttoptr(b.add(there, size(64 * v)), INTS.as_pointer())
                        b.store(_pair(b, *values[part]), pointer, align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@emitted
def _split(typingctx: Any, x: Any, out: Any, term: Any, terms: Any) -> Any:
    """STEP float32 → their summands in bfloat16, `term` bytes apart, each the rounded rest of the ones before."""

    def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        x, out, term, _ = arguments
        shorts = ir.VectorType(ir.IntType(16), LANES)
        sixteen = ir.Constant(INTS, [16] * LANES)
        for v in range(STEP // LANES):
            rest = b.load(b.inttoptr(b.add(x, size(v * LANES * 4)), FLOATS.as_pointer()), align=4)
            for t in range(terms.literal_value):
                bits = b.bitcast(rest, INTS)
                even = b.and_(b.lshr(bits, sixteen), ir.Constant(INTS, [1] * LANES))
                upper = b.lshr(b.add(b.add(bits, ir.Constant(INTS, [0x7FFF] * LANES)), even), sixteen)
                address = b.add(b.add(out, b.mul(term, size(t))), size(v * LANES * 2))
                b.store(b.trunc(upper, shorts), b.inttoptr(address, shorts.as_pointer()), align=2)
                rest = b.fsub(rest, b.bitcast(b.shl(upper, sixteen), FLOATS))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, terms), generate


@compiled
def split(x: Array, a: Array) -> None:
    """x [rows, inputs] → a [1 or 3, ⌈rows / 16⌉, inputs / STEP, 16, STEP] of bfloat16, tiles of the rows' summands."""
    for row in range(x.shape[0]):
        for step in range(a.shape[2]):
            source = x.ctypes.data + row * x.strides[0] + step * STEP * 4
            target = a.ctypes.data + (row // 16) * a.strides[1] + step * a.strides[2] + (row % 16) * a.strides[3]
            if a.shape[0] == 3:
                _split(source, target, a.strides[0], 3)
            else:
                _split(source, target, a.strides[0], 1)
