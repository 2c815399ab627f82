# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped, import-not-found"
"""
Triton kernels of the WKV of RWKV-7 and RWKV-6 over ragged batches, in place on the pool of states.

`step7` and `step6` are for texts of one token and do all that lies between a layer's linears at once; `wkv` is for
texts of any length, between `prepare7` and `finish`. The equations are those of rwkv7.py, rwkv6.py and plain.py; a
state's wkv is key × value, `offset` is where that of the layer begins; all arithmetic is float32. Tensors of
tokens are [N, D], contiguous; parameters [D], float32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .fused import Texts, sigmoid

__all__ = ["finish", "prepare7", "step6", "step7", "wkv"]

CHUNK = 16
"""Tokens of a text that are one matrix product: the least that Triton multiplies, and exact in float32 (plain.py)."""
TOKENS = 16
"""Tokens per program where tokens do not depend on each other."""


@triton.jit
def _load(x, at, mask):
    return tl.load(x + at, mask, 0.0).to(tl.float32)


@triton.jit
def _inputs7(k, v, first, w, a, mixed, w0, a0, v0, k_k, k_a):
    """Of heads [T, C]: from what the linears say to what a state takes."""
    a = sigmoid(a0 + a)
    kappa = k * k_k
    kappa /= tl.maximum(tl.sqrt(tl.sum(kappa * kappa, 1, keep_dims=True)), 1e-12)
    v += (first - v) * sigmoid(v0 + mixed)
    return -0.606531 * sigmoid(w0 + w), k * (1 + (a - 1) * k_a), v, -kappa, kappa * a


@triton.jit
def _normal(y, weight, bias, HEAD: tl.constexpr):
    """GroupNorm of heads [T, C], with RWKV's epsilon."""
    y -= tl.sum(y, 1, keep_dims=True) / HEAD
    return y * tl.rsqrt(tl.sum(y * y, 1, keep_dims=True) / HEAD + 64e-5) * weight + bias


@triton.jit
def _state(pool, size, offset, slot, head, HEAD: tl.constexpr):
    return pool + slot.to(tl.int64) * size + offset + head * HEAD * HEAD


# ------------------------------------------------------------------------------------------------ texts of one token


@triton.jit
def _step7(r, k, v, w, a, g, mixed, first, w0, a0, v0, k_k, k_a, r_k, norm, bias, out, pool, size, offset, slots, heads,
           HEAD: tl.constexpr, FIRST: tl.constexpr):  # fmt: skip
    """One program per text and head."""
    text, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, HEAD)
    row, column = c[None, :], c[:, None]
    at, p = (text * heads + head) * HEAD + row, head * HEAD + row
    value = tl.load(v + at).to(tl.float32)
    if FIRST:
        tl.store(first + at, value)
    log_w, key, value, remove, add = _inputs7(
        tl.load(k + at).to(tl.float32), value, tl.load(first + at).to(tl.float32) if not FIRST else value,
        tl.load(w + at).to(tl.float32), tl.load(a + at).to(tl.float32), tl.load(mixed + at).to(tl.float32),
        tl.load(w0 + p), tl.load(a0 + p), tl.load(v0 + p), tl.load(k_k + p), tl.load(k_a + p),
    )  # fmt: skip
    read = tl.load(r + at).to(tl.float32)
    where = _state(pool, size, offset, tl.load(slots + text), head, HEAD) + column * HEAD + row
    S = tl.load(where)
    removed = tl.sum(S * tl.trans(remove), 0, keep_dims=True)
    S = S * tl.exp(tl.trans(log_w)) + tl.trans(add) * removed + tl.trans(key) * value
    tl.store(where, S)
    y = _normal(tl.sum(S * tl.trans(read), 0, keep_dims=True), tl.load(norm + p), tl.load(bias + p), HEAD)
    y += tl.sum(read * key * tl.load(r_k + p), 1, keep_dims=True) * value
    tl.store(out + at, y * tl.load(g + at).to(tl.float32))


def step7(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, g: Tensor, mixed: Tensor | None, first: Tensor,
    parameters: dict[str, Tensor], out: Tensor, texts: Texts, offset: int, heads: int,
) -> None:  # fmt: skip
    """
    r … mixed are what the linears say, w, a and mixed (what blends v with layer 0's) before their sigmoid. Layer 0 has
    no mixed and sets `first`. parameters: w0 a0 v0 k_k k_a r_k, and of ln_x `norm` and `bias`. out is gated by g.
    """
    _step7[(len(r), heads)](
        r, k, v, w, a, g, w if mixed is None else mixed, first, **parameters, out=out, pool=texts.pool,
        size=texts.pool.stride(0), offset=offset, slots=texts.slots, heads=heads, HEAD=r.shape[1] // heads,
        FIRST=mixed is None, num_warps=2,
    )  # fmt: skip


@triton.jit
def _step6(r, k, v, w, g, decay, u, norm, bias, out, pool, size, offset, slots, heads, HEAD: tl.constexpr):
    """One program per text and head."""
    text, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, HEAD)
    row, column = c[None, :], c[:, None]
    at, p = (text * heads + head) * HEAD + row, head * HEAD + row
    log_w = -tl.exp(tl.minimum(tl.load(decay + p) + tl.load(w + at).to(tl.float32), 5.0))
    key, value = tl.load(k + at).to(tl.float32), tl.load(v + at).to(tl.float32)
    read = tl.load(r + at).to(tl.float32)
    where = _state(pool, size, offset, tl.load(slots + text), head, HEAD) + column * HEAD + row
    S = tl.load(where)
    y = tl.sum(S * tl.trans(read), 0, keep_dims=True)
    y += tl.sum(read * tl.load(u + p) * key, 1, keep_dims=True) * value
    tl.store(where, S * tl.exp(tl.trans(log_w)) + tl.trans(key) * value)
    gate = tl.load(g + at).to(tl.float32)
    y = _normal(y, tl.load(norm + p), tl.load(bias + p), HEAD)
    tl.store(out + at, y * gate * sigmoid(gate))


def step6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, g: Tensor,
    parameters: dict[str, Tensor], out: Tensor, texts: Texts, offset: int, heads: int,
) -> None:  # fmt: skip
    """r … g are what the linears say; parameters: decay and u, and of ln_x `norm` and `bias`. out is gated by g."""
    _step6[(len(r), heads)](
        r, k, v, w, g, **parameters, out=out, pool=texts.pool, size=texts.pool.stride(0), offset=offset,
        slots=texts.slots, heads=heads, HEAD=r.shape[1] // heads, num_warps=2,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ texts of any length


@triton.jit(do_not_specialize=["N"])
def _prepare7(k, v, w, a, mixed, first, w0, a0, v0, k_k, k_a, log_w_, k_, v_, a_, b_, N, heads,
              HEAD: tl.constexpr, TOKENS: tl.constexpr, FIRST: tl.constexpr):  # fmt: skip
    """One program per some tokens and head."""
    token, head, c = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1), tl.arange(0, HEAD)
    inside = (token < N)[:, None]
    at, p = (token.to(tl.int64)[:, None] * heads + head) * HEAD + c[None, :], head * HEAD + c[None, :]
    value = _load(v, at, inside)
    if FIRST:
        tl.store(first + at, value, inside)
    log_w, key, value, remove, add = _inputs7(
        _load(k, at, inside), value, _load(first, at, inside) if not FIRST else value, _load(w, at, inside),
        _load(a, at, inside), _load(mixed, at, inside),
        tl.load(w0 + p), tl.load(a0 + p), tl.load(v0 + p), tl.load(k_k + p), tl.load(k_a + p),
    )  # fmt: skip
    tl.store(log_w_ + at, log_w, inside)
    tl.store(k_ + at, key, inside)
    tl.store(v_ + at, value, inside)
    tl.store(a_ + at, remove, inside)
    tl.store(b_ + at, add, inside)


def prepare7(
    k: Tensor, v: Tensor, w: Tensor, a: Tensor, mixed: Tensor | None, first: Tensor,
    parameters: dict[str, Tensor], out: Tensor, heads: int,
) -> None:  # fmt: skip
    """As the first part of `step7`, for any number of tokens; out [5, N, D] gets log_w, k, v, a, b."""
    N, D = k.shape
    p = {name: parameters[name] for name in ("w0", "a0", "v0", "k_k", "k_a")}
    _prepare7[(triton.cdiv(N, TOKENS), heads)](
        k, v, w, a, w if mixed is None else mixed, first, **p, log_w_=out[0], k_=out[1], v_=out[2], a_=out[3],
        b_=out[4], N=N, heads=heads, HEAD=D // heads, TOKENS=TOKENS, FIRST=mixed is None,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _finish(y, r, k, v, g, r_k, norm, bias, out, N, heads, HEAD: tl.constexpr, TOKENS: tl.constexpr, V7: tl.constexpr):
    """One program per some tokens and head."""
    token, head, c = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1), tl.arange(0, HEAD)
    inside = (token < N)[:, None]
    at, p = (token.to(tl.int64)[:, None] * heads + head) * HEAD + c[None, :], head * HEAD + c[None, :]
    result = _normal(_load(y, at, inside), tl.load(norm + p), tl.load(bias + p), HEAD)
    gate = _load(g, at, inside)
    if V7:
        bonus = _load(r, at, inside) * _load(k, at, inside) * tl.load(r_k + p)
        result += tl.sum(bonus, 1, keep_dims=True) * _load(v, at, inside)
    else:
        gate *= sigmoid(gate)
    tl.store(out + at, result * gate, inside)


def finish(
    y: Tensor, g: Tensor, parameters: dict[str, Tensor], out: Tensor, heads: int,
    rkv: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """As the last part of `step7`, with r, k, v as the state took them, or of `step6`, without them."""
    N, D = y.shape
    r, k, v = rkv or (y, y, y)
    _finish[(triton.cdiv(N, TOKENS), heads)](
        y, r, k, v, g, parameters["r_k"] if rkv else parameters["norm"], parameters["norm"], parameters["bias"], out,
        N, heads, HEAD=D // heads, TOKENS=TOKENS, V7=rkv is not None,
    )  # fmt: skip


@triton.jit
def _scan(r, log_w, k, v, a, b, u, y, pool, size, offset, slots, begin, length, heads,
          HEAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
          V7: tl.constexpr):  # fmt: skip
    """One program per text, head and block of values; token by token."""
    text, head = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, HEAD)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = (tl.load(begin + text).to(tl.int64) * heads + head) * HEAD
    where = _state(pool, size, offset, tl.load(slots + text), head, HEAD) + c[:, None] * HEAD + d[None, :]
    S = tl.load(where)
    for _ in range(tl.load(length + text)):
        read = tl.load(r + at + c).to(tl.float32)[:, None]
        decay = tl.exp(tl.load(log_w + at + c))[:, None]
        new = tl.load(k + at + c).to(tl.float32)[:, None] * tl.load(v + at + d).to(tl.float32)[None, :]
        if V7:
            removed = tl.sum(S * tl.load(a + at + c)[:, None], 0)
            S = S * decay + tl.load(b + at + c)[:, None] * removed[None, :] + new
            result = tl.sum(S * read, 0)
        else:
            result = tl.sum((S + tl.load(u + head * HEAD + c)[:, None] * new) * read, 0)
            S = S * decay + new
        tl.store(y + at + d, result)
        at += heads * HEAD
    tl.store(where, S)


@triton.jit
def _chunk7(r, log_w, k, v, a, b, u, y, pool, size, offset, slots, begin, length, heads,
            HEAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
            V7: tl.constexpr):  # fmt: skip
    """One program per text, head and block of values; chunk by chunk, as `wkv7` in plain.py."""
    text, head = tl.program_id(0), tl.program_id(1)
    c, i = tl.arange(0, HEAD), tl.arange(0, CHUNK)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first, count = tl.load(begin + text).to(tl.int64), tl.load(length + text)
    where = _state(pool, size, offset, tl.load(slots + text), head, HEAD) + c[:, None] * HEAD + d[None, :]
    S = tl.load(where)
    earlier, not_later = i[:, None] > i[None, :], i[:, None] >= i[None, :]
    for start in range(0, count, CHUNK):
        inside = (start + i < count)[:, None]
        at = ((first + start + i)[:, None] * heads + head) * HEAD
        value = _load(v, at + d[None, :], inside)
        decay = _load(log_w, at + c[None, :], inside)
        until = tl.cumsum(decay, 0)
        inverse = tl.exp(-until)
        removes = _load(a, at + c[None, :], inside) * tl.exp(until - decay)
        reads = _load(r, at + c[None, :], inside) * tl.exp(until)
        adds = tl.trans(_load(b, at + c[None, :], inside) * inverse)
        keys = tl.trans(_load(k, at + c[None, :], inside) * inverse)
        power = tl.where(earlier, tl.dot(removes, adds, input_precision=PRECISION), 0.0)
        a_k = tl.where(earlier, tl.dot(removes, keys, input_precision=PRECISION), 0.0)
        r_b = tl.where(not_later, tl.dot(reads, adds, input_precision=PRECISION), 0.0)
        r_k = tl.where(not_later, tl.dot(reads, keys, input_precision=PRECISION), 0.0)
        # what the removals find, U, solves (I − A)·U = removes·S + a_k·V; (I − A)⁻¹ = (I + A)(I + A²)(I + A⁴)(I + A⁸)
        found = tl.dot(removes, S, input_precision=PRECISION) + tl.dot(a_k, value, input_precision=PRECISION)
        found += tl.dot(power, found, input_precision=PRECISION)
        for _ in tl.static_range(3):
            power = tl.dot(power, power, input_precision=PRECISION)
            found += tl.dot(power, found, input_precision=PRECISION)
        result = tl.dot(reads, S, input_precision=PRECISION) + tl.dot(r_b, found, input_precision=PRECISION)
        result += tl.dot(r_k, value, input_precision=PRECISION)
        tl.store(y + at + d[None, :], result, inside)
        S += tl.dot(adds, found, input_precision=PRECISION) + tl.dot(keys, value, input_precision=PRECISION)
        S *= tl.exp(tl.sum(decay, 0))[:, None]
    tl.store(where, S)


@triton.jit
def _chunk6(r, log_w, k, v, a, b, u, y, pool, size, offset, slots, begin, length, heads,
            HEAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
            V7: tl.constexpr):  # fmt: skip
    """One program per text, head and block of values; chunk by chunk. A decay may be near zero: none is inverted."""
    text, head = tl.program_id(0), tl.program_id(1)
    c, i = tl.arange(0, HEAD), tl.arange(0, CHUNK)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first, count = tl.load(begin + text).to(tl.int64), tl.load(length + text)
    where = _state(pool, size, offset, tl.load(slots + text), head, HEAD) + c[:, None] * HEAD + d[None, :]
    S = tl.load(where)
    bonus = tl.load(u + head * HEAD + c)[None, :]
    earlier, same = i[:, None] > i[None, :], i[:, None] == i[None, :]
    for start in range(0, count, CHUNK):
        inside = (start + i < count)[:, None]
        at = ((first + start + i)[:, None] * heads + head) * HEAD
        value = _load(v, at + d[None, :], inside)
        decay = tl.maximum(_load(log_w, at + c[None, :], inside), -40.0)  # zero beyond; sums of more would be coarse
        until, total = tl.cumsum(decay, 0), tl.sum(decay, 0)
        before = until - decay
        read, key = _load(r, at + c[None, :], inside), _load(k, at + c[None, :], inside)
        between = tl.where(earlier[:, :, None], before[:, None, :] - until[None, :, :], -float("inf"))
        scores = tl.sum(read[:, None, :] * key[None, :, :] * tl.exp(between), 2)
        scores += tl.where(same, tl.sum(read * bonus * key, 1)[:, None], 0.0)
        result = tl.dot(read * tl.exp(before), S, input_precision=PRECISION)
        result += tl.dot(scores, value, input_precision=PRECISION)
        tl.store(y + at + d[None, :], result, inside)
        keys = tl.trans(key * tl.exp(total[None, :] - until))
        S = S * tl.exp(total)[:, None] + tl.dot(keys, value, input_precision=PRECISION)
    tl.store(where, S)


def wkv(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, ab: tuple[Tensor, Tensor] | None, u: Tensor | None, y: Tensor,
    texts: Texts, offset: int, heads: int, *, chunked: bool = True, block: int = 32, precision: str = "ieee",
) -> None:  # fmt: skip
    """
    RWKV-7 with removals a, b, RWKV-6 with a bonus u; y [N, D] float32 gets what is read, the states what is new.

    `chunked`: matrix products over chunks, in the given precision of Triton; else token by token. `block`: values of a
    head that one program works on, at least 16.
    """
    head = r.shape[1] // heads
    a, b = ab or (log_w, log_w)
    kernel: Any = _scan if not chunked else _chunk7 if ab else _chunk6
    kernel[(len(texts.slots), heads, triton.cdiv(head, block))](
        r, log_w, k, v, a, b, log_w if u is None else u, y, texts.pool, texts.pool.stride(0), offset, texts.slots,
        texts.begin, texts.length, heads, HEAD=head, BLOCK=block, CHUNK=CHUNK, PRECISION=precision, V7=ab is not None,
        num_warps=2 if not chunked else 8 if precision == "ieee" else 4,
    )  # fmt: skip
