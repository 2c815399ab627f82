"""
What lies between the matrix products of a layer, compiled at run time for a CPU: norms, token shift, and WKV.

Rows are tokens, of one or several texts one after the other: text p has the rows starts[p] … starts[p+1]-1, and its
state is states[slots[p]], changed in place. In a state, WKV lies key × value, so that everything runs along values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import float32, int32, prange, types
from numba.core import cgutils

from .jit import compiled, emitted, finite, parallel
from .matmul import LANES, VECTORS

__all__ = [
    "activate6",
    "activate7",
    "add",
    "blend",
    "embed",
    "finish",
    "keys7",
    "lerp",
    "lerp_each",
    "nonzero",
    "norm",
    "relu_squared",
    "shift",
    "sigmoid",
    "silu",
    "tanh",
    "wkv6",
    "wkv6_parallel",
    "wkv7",
    "wkv7_parallel",
]

Array = npt.NDArray[Any]

_I64, _F32 = ir.IntType(64), ir.FloatType()
_VF = ir.VectorType(_F32, LANES)


@emitted
def _float_of_bits(typingctx: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), generate


@finite
def _exp(x: Any) -> Any:
    """e^x of a float32 to 1e-7, as Cephes' expf does it; unlike the library's, it runs in vectors."""
    x = min(max(x, float32(-87.3)), float32(88.3))
    n = math.floor(x * float32(1.4426950408889634) + float32(0.5))
    x = x - n * float32(0.693359375) + n * float32(2.12194440e-4)
    y = float32(1.9875691500e-4)
    y = y * x + float32(1.3981999507e-3)
    y = y * x + float32(8.3334519073e-3)
    y = y * x + float32(4.1665795894e-2)
    y = y * x + float32(1.6666665459e-1)
    y = y * x + float32(5.0000001201e-1)
    y = y * x * x + x + float32(1)
    return y * _float_of_bits((int32(n) + int32(127)) << int32(23))


@finite
def _sigmoid(x: Any) -> Any:
    return float32(1) / (float32(1) + _exp(-x))


@compiled
def sigmoid(x: Array) -> None:
    """In place."""
    flat = x.reshape(-1)
    for i in range(flat.size):
        flat[i] = _sigmoid(flat[i])


@compiled
def silu(x: Array) -> None:
    """In place."""
    flat = x.reshape(-1)
    for i in range(flat.size):
        flat[i] *= _sigmoid(flat[i])


@compiled
def tanh(x: Array) -> None:
    """In place."""
    flat = x.reshape(-1)
    for i in range(flat.size):
        flat[i] = float32(2) * _sigmoid(float32(2) * flat[i]) - float32(1)


@compiled
def relu_squared(x: Array) -> None:
    """In place."""
    flat = x.reshape(-1)
    for i in range(flat.size):
        value = max(flat[i], float32(0))
        flat[i] = value * value


@compiled
def add(x: Array, y: Array) -> None:
    """x += y; y may be wider."""
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[row, i] += y[row, i]


@compiled
def nonzero(x: Array, chosen: Array, values: Array) -> int:
    """Where the row x is not zero, and what it is there; returns how many."""
    count = 0
    for i in range(x.size):
        if x[i] != 0:
            chosen[count] = i
            values[count] = x[i]
            count += 1
    return count


@compiled
def _norm(x: Array, weight: Array, bias: Array, epsilon: Any, out: Array) -> None:
    """Layer norm of one row."""
    mean = float32(0)
    for i in range(x.size):
        mean += x[i]
    mean /= float32(x.size)
    square = float32(0)
    for i in range(x.size):
        square += (x[i] - mean) * (x[i] - mean)
    scale = float32(1) / math.sqrt(square / float32(x.size) + epsilon)
    for i in range(x.size):
        out[i] = (x[i] - mean) * scale * weight[i] + bias[i]


@compiled
def norm(x: Array, weight: Array, bias: Array, out: Array) -> None:
    """Layer norm of each row."""
    for row in range(x.shape[0]):
        _norm(x[row], weight, bias, float32(1e-5), out[row])


@compiled
def _shift(x: Array, weight: Array, bias: Array, first: int, last: int, before: Array, h: Array, s: Array) -> None:
    """The rows first … last-1 of one text: h = norm(x), s = the previous h - h; `before` is the h before the first."""
    for row in range(first, last):
        _norm(x[row], weight, bias, float32(1e-5), h[row])
        previous = before if row == first else h[row - 1]
        for i in range(h.shape[1]):
            s[row, i] = previous[i] - h[row, i]
    for i in range(h.shape[1]):
        before[i] = h[last - 1, i]


@compiled
def shift(
    x: Array, weight: Array, bias: Array, starts: Array, slots: Array, states: Array, at: int, h: Array, s: Array
) -> None:
    """
    x [rows, D] → h, its layer norm, and s, the change to the token before, whose h of the end of the last pass lies in
    the states from `at` on, and is replaced.
    """
    for p in range(slots.size):
        _shift(x, weight, bias, starts[p], starts[p + 1], states[slots[p], at : at + x.shape[1]], h, s)


@compiled
def lerp(h: Array, s: Array, mixes: Array, out: Array) -> None:
    """out[j] = h + s · mixes[j], j rows of D."""
    for row in range(h.shape[0]):
        for j in range(mixes.shape[0]):
            for i in range(h.shape[1]):
                out[j, row, i] = h[row, i] + s[row, i] * mixes[j, i]


@compiled
def lerp_each(h: Array, s: Array, mixes: Array, change: Array, out: Array) -> None:
    """out[j] = h + s · (mixes[j] + change[j]), with a change [j, rows, D] for each token: RWKV-6."""
    for row in range(h.shape[0]):
        for j in range(mixes.shape[0]):
            for i in range(h.shape[1]):
                out[j, row, i] = h[row, i] + s[row, i] * (mixes[j, i] + change[j, row, i])


@compiled
def embed(tokens: Array, table: Array, weight: Array, bias: Array, out: Array) -> None:
    """Rows of the table (float32, or bfloat16 as uint16), layer normed."""
    row = np.empty(out.shape[1], np.float32)
    for t in range(tokens.size):
        for i in range(row.size):
            row[i] = _value(table, tokens[t], i)
        _norm(row, weight, bias, float32(1e-5), out[t])


@emitted
def _value(typingctx: Any, table: Any, row: Any, column: Any) -> Any:
    """An entry of a table as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(table)(context, builder, arguments[0])
        address = cgutils.get_item_pointer(context, builder, table, array, arguments[1:], wraparound=False)
        value = builder.load(address)
        if table.dtype == types.uint16:
            value = builder.bitcast(
                builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16)), _F32
            )
        return value

    return types.float32(table, types.intp, types.intp), generate


def _recurrence(version: int) -> Any:
    """
    The recurrence of one head over `count` tokens, along a block of values kept in registers.

    v6: y = Σ r·S, then S ← w·S + k·v.  v7: S ← w·S + k·v + b·(Σ a·S), then y = Σ r·S; the sum for the next token is
    taken in the same pass, so `a` needs one token more. Addresses; a token's vectors are `stride` bytes after those of
    the one before; S [N, N] key × value. The bonus of v6 is added by the caller.
    """

    @emitted
    def run(typingctx: Any, S: Any, w: Any, k: Any, v: Any, a: Any, b: Any, r: Any, y: Any, N: Any, count: Any,
            stride: Any) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            S, w, k, v, a, b, r, y, N, count, stride = arguments
            B = builder

            def size(n: int) -> Any:
                return ir.Constant(_I64, n)

            fma = cgutils.get_or_insert_function(B.module, ir.FunctionType(_VF, [_VF] * 3), f"llvm.fma.v{LANES}f32")
            zero = ir.Constant(_VF, [0.0] * LANES)
            undefined = ir.Constant(_VF, ir.Undefined)
            row_bytes = B.mul(N, size(4))

            def vector(address: Any, n: int) -> Any:
                return B.inttoptr(B.add(address, size(n * LANES * 4)), _VF.as_pointer())

            def spread(base: Any, offset: Any) -> Any:
                value = B.load(B.inttoptr(B.add(base, offset), _F32.as_pointer()), align=4)
                one = B.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
                return B.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))

            def block(column: Any, vectors: int) -> None:
                sums = [cgutils.alloca_once_value(B, zero) for _ in range(vectors)]
                following = [cgutils.alloca_once_value(B, zero) for _ in range(vectors)]
                result = [cgutils.alloca_once_value(B, zero) for _ in range(vectors)]
                start = B.add(S, column)
                for n in range(vectors):
                    B.store(zero, sums[n])
                if version == 7:
                    with cgutils.for_range(B, N) as loop:
                        weight = spread(a, B.mul(loop.index, size(4)))
                        here = B.add(start, B.mul(loop.index, row_bytes))
                        for n in range(vectors):
                            state = B.load(vector(here, n), align=4)
                            B.store(B.call(fma, [weight, state, B.load(sums[n])]), sums[n])
                with cgutils.for_range(B, count) as tokens:
                    token = B.mul(tokens.index, stride)
                    values = [B.load(vector(B.add(B.add(v, token), column), n), align=4) for n in range(vectors)]
                    removed = [B.load(s) for s in sums]
                    for n in range(vectors):
                        B.store(zero, following[n])
                        B.store(zero, result[n])
                    with cgutils.for_range(B, N) as loop:
                        at = B.add(token, B.mul(loop.index, size(4)))
                        here = B.add(start, B.mul(loop.index, row_bytes))
                        decay, key, read = spread(w, at), spread(k, at), spread(r, at)
                        if version == 7:
                            removal, add = spread(a, B.add(at, stride)), spread(b, at)
                        for n in range(vectors):
                            old = B.load(vector(here, n), align=4)
                            new = B.fmul(decay, old)
                            new = B.call(fma, [key, values[n], new])
                            if version == 7:
                                new = B.call(fma, [add, removed[n], new])
                                B.store(B.call(fma, [removal, new, B.load(following[n])]), following[n])
                            B.store(B.call(fma, [read, new if version == 7 else old, B.load(result[n])]), result[n])
                            B.store(new, vector(here, n), align=4)
                    for n in range(vectors):
                        B.store(B.load(following[n]), sums[n])
                        B.store(B.load(result[n]), vector(B.add(B.add(y, token), column), n), align=4)

            line = VECTORS * LANES * 4
            full = B.mul(B.udiv(row_bytes, size(line)), size(line))
            with cgutils.for_range_slice(B, size(0), full, size(line), _I64) as (column, _):
                block(column, VECTORS)
            if VECTORS > 1:
                with cgutils.for_range_slice(B, full, row_bytes, size(LANES * 4), _I64) as (column, _):
                    block(column, 1)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11), generate

    return run


_recur6, _recur7 = _recurrence(6), _recurrence(7)


@compiled
def activate7(w: Array, a: Array, w0: Array, a0: Array) -> None:
    """In place: w → the decay exp(-e^(-1/2) · sigmoid(w0 + w)), a → sigmoid(a0 + a)."""
    for row in range(w.shape[0]):
        for i in range(w.shape[1]):
            w[row, i] = _exp(float32(-0.606531) * _sigmoid(w0[i] + w[row, i]))
        for i in range(w.shape[1]):
            a[row, i] = _sigmoid(a0[i] + a[row, i])


@compiled
def blend(v: Array, first: Array, u: Array, v0: Array) -> None:
    """In place: v += (first - v) · sigmoid(v0 + u)."""
    for row in range(v.shape[0]):
        for i in range(v.shape[1]):
            u[row, i] = _sigmoid(v0[i] + u[row, i])
        for i in range(v.shape[1]):
            v[row, i] += (first[row, i] - v[row, i]) * u[row, i]


@compiled
def keys7(k: Array, rate: Array, k_k: Array, k_a: Array, N: int, removal: Array, add: Array) -> None:
    """removal = -normalised(k · k_k) by head, add = -removal · rate; in place k *= 1 + (rate - 1) · k_a."""
    for row in range(k.shape[0]):
        for head in range(0, k.shape[1], N):
            square = float32(0)
            for i in range(head, head + N):
                removal[row, i] = k[row, i] * k_k[i]
                square += removal[row, i] * removal[row, i]
            length: Any = max(math.sqrt(square), float32(1e-12))
            scale = float32(-1) / length
            for i in range(head, head + N):
                removal[row, i] *= scale
        for i in range(k.shape[1]):
            add[row, i] = -removal[row, i] * rate[row, i]
        for i in range(k.shape[1]):
            k[row, i] *= float32(1) + (rate[row, i] - float32(1)) * k_a[i]


@compiled
def activate6(w: Array, time_decay: Array) -> None:
    """In place: w → the decay exp(-exp(time_decay + w))."""
    for row in range(w.shape[0]):
        for i in range(w.shape[1]):
            w[row, i] = _exp(-_exp(time_decay[i] + w[row, i]))


@compiled
def _head7(
    item: int, w: Array, k: Array, v: Array, removal: Array, add: Array, r: Array, starts: Array, slots: Array,
    states: Array, at: int, N: int, y: Array,
) -> None:  # fmt: skip
    heads = r.shape[1] // N
    p, head = item // heads, item % heads
    stride = r.strides[0]
    offset = starts[p] * stride + head * N * 4
    state = states.ctypes.data + slots[p] * states.strides[0] + (at + head * N * N) * 4
    _recur7(
        state, w.ctypes.data + offset, k.ctypes.data + offset, v.ctypes.data + offset, removal.ctypes.data + offset,
        add.ctypes.data + offset, r.ctypes.data + offset, y.ctypes.data + offset, N, starts[p + 1] - starts[p], stride,
    )  # fmt: skip


@compiled
def wkv7(
    w: Array, k: Array, v: Array, removal: Array, add: Array, r: Array, starts: Array, slots: Array, states: Array,
    at: int, N: int, y: Array,
) -> None:  # fmt: skip
    """
    The recurrence of RWKV-7, S ← S·w + k·v + add·(removal·S) and y = r·S: rows of heads of N values, contiguous.

    `removal` has at least one row more. The states' WKV begin at `at`.
    """
    for item in range(slots.size * (r.shape[1] // N)):
        _head7(item, w, k, v, removal, add, r, starts, slots, states, at, N, y)


@parallel
def wkv7_parallel(
    w: Array, k: Array, v: Array, removal: Array, add: Array, r: Array, starts: Array, slots: Array, states: Array,
    at: int, N: int, y: Array,
) -> None:  # fmt: skip
    """As `wkv7`, on the threads of Numba."""
    for item in prange(slots.size * (r.shape[1] // N)):
        _head7(item, w, k, v, removal, add, r, starts, slots, states, at, N, y)


@compiled
def _head6(
    item: int, w: Array, k: Array, v: Array, r: Array, starts: Array, slots: Array, states: Array, at: int, N: int,
    y: Array,
) -> None:  # fmt: skip
    heads = r.shape[1] // N
    p, head = item // heads, item % heads
    stride = r.strides[0]
    offset = starts[p] * stride + head * N * 4
    state = states.ctypes.data + slots[p] * states.strides[0] + (at + head * N * N) * 4
    _recur6(
        state, w.ctypes.data + offset, k.ctypes.data + offset, v.ctypes.data + offset, 0, 0, r.ctypes.data + offset,
        y.ctypes.data + offset, N, starts[p + 1] - starts[p], stride,
    )  # fmt: skip


@compiled
def wkv6(
    w: Array, k: Array, v: Array, r: Array, starts: Array, slots: Array, states: Array, at: int, N: int, y: Array
) -> None:
    """The recurrence of RWKV-6, y = r·S (without the bonus of the token itself), then S ← S·w + k·v; as `wkv7`."""
    for item in range(slots.size * (r.shape[1] // N)):
        _head6(item, w, k, v, r, starts, slots, states, at, N, y)


@parallel
def wkv6_parallel(
    w: Array, k: Array, v: Array, r: Array, starts: Array, slots: Array, states: Array, at: int, N: int, y: Array
) -> None:
    """As `wkv6`, on the threads of Numba."""
    for item in prange(slots.size * (r.shape[1] // N)):
        _head6(item, w, k, v, r, starts, slots, states, at, N, y)


@compiled
def finish(
    y: Array, r: Array, k: Array, weight: Array, v: Array, g: Array, ln: Array, bias: Array, N: int, before: bool
) -> None:
    """
    In place: the group norm (`ln`, `bias`) of each head of y, plus (Σ r·k·weight) · v, times the gate g.

    With `before` the sum is added before the norm, as in RWKV-6.
    """
    for row in range(y.shape[0]):
        for head in range(0, y.shape[1], N):
            bonus = float32(0)
            for i in range(head, head + N):
                bonus += r[row, i] * k[row, i] * weight[i]
            if before:
                for i in range(head, head + N):
                    y[row, i] += bonus * v[row, i]
                bonus = float32(0)
            mean = float32(0)
            for i in range(head, head + N):
                mean += y[row, i]
            mean /= float32(N)
            square = float32(0)
            for i in range(head, head + N):
                square += (y[row, i] - mean) * (y[row, i] - mean)
            scale = float32(1) / math.sqrt(square / float32(N) + float32(64e-5))
            for i in range(head, head + N):
                y[row, i] = (y[row, i] - mean) * scale * ln[i] + bias[i]
            for i in range(head, head + N):
                y[row, i] += bonus * v[row, i]
        for i in range(y.shape[1]):
            y[row, i] *= g[row, i]
