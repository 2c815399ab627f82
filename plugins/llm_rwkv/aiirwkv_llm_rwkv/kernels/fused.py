# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped, import-not-found"
"""
Triton kernels of what lies between the linears of RWKV, over ragged batches: B texts, each with its own tokens.

The tokens of all texts lie one after the other, N of them. All arithmetic is float32, whatever the tensors' type; every
function writes where it is told to, so that it can be part of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Texts", "activate", "mix", "sigmoid", "sparse"]


@dataclass
class Texts:
    """Which tokens belong to which text, and where its state is. All int32, on the device."""

    pool: Tensor
    """[rows, size] float32: states, as a Layout lays them."""
    slots: Tensor
    """[B]: the row of each text; it is changed in place, nothing is gathered or scattered."""
    begin: Tensor
    """[B]: its first token."""
    length: Tensor
    """[B]: how many it has, at least one."""
    text: Tensor
    """[N]: whose each token is."""


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _normal(x, weight, bias, inside, D: tl.constexpr):
    """LayerNorm of one row, with RWKV's epsilon."""
    x = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / D + 1e-5) * weight + bias


@triton.jit
def _row(x, add, at, plane, inside, ADD: tl.constexpr):
    row = tl.load(x + at, inside, 0.0).to(tl.float32)
    for i in tl.static_range(ADD):
        row += tl.load(add + i * plane + at, inside, 0.0).to(tl.float32)
    return row


@triton.jit(do_not_specialize=["N"])  # it changes with every batch, and each kind of number would be compiled for
def _mix(x, add, total, out, now, change, weight, bias, mixes, pool, size, offset, slots, begin, length, text, N,
         D: tl.constexpr, BLOCK: tl.constexpr, MIXES: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)
    plane = N.to(tl.int64) * D
    owner = tl.load(text + token)
    first = tl.load(begin + owner)
    c = tl.arange(0, BLOCK)
    inside = c < D
    w = tl.load(weight + c, inside, 0.0).to(tl.float32)
    b = tl.load(bias + c, inside, 0.0).to(tl.float32)
    row = _row(x, add, token * D + c, plane, inside, ADD)
    if ADD > 0:
        tl.store(total + token * D + c, row, inside)
    row = _normal(row, w, b, inside, D)
    state = pool + tl.load(slots + owner).to(tl.int64) * size + offset + c
    if token == first:  # no other program touches the text's state: it is read, then set for the tokens to come
        before = tl.load(state, inside, 0.0)
        last = (first + tl.load(length + owner) - 1).to(tl.int64)
        tl.store(state, _normal(_row(x, add, last * D + c, plane, inside, ADD), w, b, inside, D), inside)
    else:
        before = _normal(_row(x, add, (token - 1) * D + c, plane, inside, ADD), w, b, inside, D)
    before -= row
    if KEEP:
        tl.store(now + token * D + c, row, inside)
        tl.store(change + token * D + c, before, inside)
    for i in tl.static_range(MIXES):
        m = tl.load(mixes + i * D + c, inside, 0.0).to(tl.float32)
        tl.store(out + i * plane + token * D + c, row + before * m, inside)


def mix(
    x: Tensor, add: Tensor | None, norm: tuple[Tensor, Tensor], mixes: Tensor, texts: Texts, offset: int,
    out: Tensor, total: Tensor | None = None, keep: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """
    h = LayerNorm(total = x + Σ add), and each token's h and its predecessor's, mixed in several ways.

    x, total [N, D] float32; add [A, N, D] or None; norm its weight and bias [D]; mixes [M, D]; offset of the layer's
    last h in a state, which is set. out [M, N, D] gets h + (predecessor − h)·mix; keep gets h and predecessor − h.
    """
    N, D = x.shape
    now, change = keep or (out, out)
    _mix[(N,)](
        x, x if add is None else add, x if total is None else total, out, now, change, *norm, mixes,
        texts.pool, texts.pool.stride(0), offset, texts.slots, texts.begin, texts.length, texts.text, N,
        D=D, BLOCK=triton.next_power_of_2(D), MIXES=len(mixes), ADD=0 if add is None else len(add),
        KEEP=keep is not None, num_warps=4 if D <= 2048 else 8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "plane"])
def _activate(x, count, plane, TANH: tl.constexpr, SIGMOID: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + i, i < count, 0.0).to(tl.float32)
    if TANH < 0:
        z = tl.maximum(z, 0.0)
        z = z * z
    else:
        z = tl.where(i // plane == TANH, 2 * sigmoid(2 * z) - 1, tl.where(i // plane == SIGMOID, sigmoid(z), z))
    tl.store(x + i, z, i < count)


def activate(x: Tensor, tanh: int = -1, sigmoid: int = -1) -> None:
    """In place, of contiguous x [P, …]: the tanh of one plane and the sigmoid of another; without tanh relu(x)²."""
    _activate[(triton.cdiv(x.numel(), 1024),)](
        x, x.numel(), x.numel() // len(x), TANH=tanh, SIGMOID=sigmoid, BLOCK=1024
    )  # fmt: skip


@triton.jit
def _sparse(hidden, rows, out, D, per_part, count, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """One program per block of channels and part of the rows."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.program_id(1) * per_part
    result = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, begin + per_part, ROWS):
        i = start + tl.arange(0, ROWS)
        h = tl.maximum(tl.load(hidden + i, i < count, 0.0).to(tl.float32), 0.0)
        h = h * h
        wanted = (h > 0)[:, None] & (c < D)[None, :]
        w = tl.load(rows + i.to(tl.int64)[:, None] * D + c[None, :], wanted, 0.0)
        result += tl.sum(h[:, None] * w.to(tl.float32), 0)
    tl.store(out + tl.program_id(1) * D + c, result, c < D)


def sparse(hidden: Tensor, rows: Tensor, out: Tensor) -> None:
    """
    relu(hidden)² @ rows for one token, where the rows that meet a zero are never read: exact, and a trained model has
    77 to 90 % zeros. hidden [F], rows [F, D] contiguous, out [P, D] float32: P partial sums.
    """
    count, D = rows.shape
    block, many = 128, 32
    per_part = triton.cdiv(triton.cdiv(count, many), len(out)) * many
    _sparse[(triton.cdiv(D, block), len(out))](hidden, rows, out, D, per_part, count, BLOCK=block, ROWS=many)
