"""
WKV of RWKV-7 and RWKV-6 in plain torch: one token at a time, or many in chunks. Differentiable, on any device.

Per head there is a state S, here written key × value, and per token a receptance r, a decay w, a key k, a value v:

    RWKV-7, with a removal a, b:    S ← diag(w)·S + b·(aᵀ·S) + k·vᵀ     y = rᵀ·S
    RWKV-6, with a bonus u:         y = rᵀ·(S + diag(u)·k·vᵀ)           S ← diag(w)·S + k·vᵀ

In chunks, everything but the states at their borders is computed for all tokens at once. Decays come as logarithms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CHUNK", "wkv6", "wkv6_step", "wkv7", "wkv7_step"]

CHUNK = 16
"""Tokens per chunk. RWKV-7's decay is at least exp(-0.6065): its inverse over a chunk stays below 2e4, exact enough."""

PIECE = 128
"""Tokens whose chunks are worked on together: more do not fit the caches of a CPU."""

NOTHING = -80.0
"""The logarithm of the strongest decay that is told from a stronger one; below begin the slow subnormal numbers."""


def wkv7_step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token. Vectors [B, H, N], state [B, H, N, N], value × key; returns y [B, H, N] and the new state."""
    state = state.mT
    updates = torch.cat([a.unsqueeze(-2) @ state, v.unsqueeze(-2)], -2)
    state = state * log_w.exp().unsqueeze(-1) + torch.stack([b, k], -1) @ updates
    return (r.unsqueeze(-2) @ state).squeeze(-2), state.mT


def wkv7(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """
    Any number of tokens. Inputs [B, T, H, N], state [B, H, N, N], value × key; returns y [B, T, H, N], the new state.

    Inside a chunk the recurrence is a triangular system (the WY form of a product of rank-one updates; Yang et al.,
    "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024).
    """
    if r.shape[1] == 1:
        y, state = wkv7_step(r[:, 0], log_w[:, 0], k[:, 0], v[:, 0], a[:, 0], b[:, 0], state)
        return y.unsqueeze(1), state
    y, state = _in_pieces(_wkv7, (r, log_w, k, v, a, b), state.mT, chunk)
    return y, state.mT


def _wkv7(inputs: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [chunks, heads, chunk, N], state [heads, N, N]."""
    r, log_w, k, v, a, b = inputs
    chunk, N = r.shape[-2:]
    not_later = torch.ones(chunk, chunk, dtype=r.dtype, device=r.device).tril()
    earlier = not_later.tril(-1)
    decay = (torch.cat([earlier, not_later, -not_later]) @ log_w).exp()  # before a token, after it, its inverse
    before, after, inverse = decay.split(chunk, -2)  # type: ignore[no-untyped-call]
    total = after[..., -1:, :]
    a, r = a * before, r * after  # what looks into the state
    writes = torch.cat([b * inverse, k * inverse], -2)  # what is added to it

    a_b, a_k = ((a @ writes.mT) * earlier.repeat(1, 2)).split(chunk, -1)
    r_bk = (r @ writes.mT) * not_later.repeat(1, 2)

    # u_t = a_tᵀ·S_{t-1} solves (I − a_b)·U = a·S + a_k·V; here as U = from_state·S + from_values.
    solved = _inverse(a_b) @ torch.cat([a, a_k @ v], -1)
    from_state, from_values = solved[..., :N].contiguous(), solved[..., N:].contiguous()
    b_to_end, k_to_end = (writes * total).split(chunk, -2)
    b_to_end, added, total = b_to_end.mT.contiguous(), k_to_end.mT @ v, total.mT

    borders, removed = [], []
    for i in range(len(r)):
        borders.append(state)
        removed.append(torch.baddbmm(from_values[i], from_state[i], state))
        state = torch.baddbmm(torch.addcmul(added[i], state, total[i]), b_to_end[i], removed[-1])
    return r @ torch.stack(borders) + r_bk @ torch.cat([torch.stack(removed), v], -2), state


def _inverse(lower: Tensor) -> Tensor:
    """(I − A)⁻¹ of strictly lower triangular A [.., n, n]: (I + A)(I + A²)(I + A⁴)…, since Aⁿ = 0."""
    n = lower.shape[-1]
    result = lower + torch.eye(n, dtype=lower.dtype, device=lower.device)
    power, reach = lower, 2
    while reach < n:
        power = power @ power
        result = result + result @ power
        reach *= 2
    return result


def wkv6_step(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token. Vectors [B, H, N], u [H, N], state [B, H, N, N], key × value; returns y [B, H, N], the new state."""
    new = k.unsqueeze(-1) * v.unsqueeze(-2)
    y = r.unsqueeze(-2) @ torch.addcmul(state, u.unsqueeze(-1), new)
    return y.squeeze(-2), torch.addcmul(new, state, log_w.exp().unsqueeze(-1))


def wkv6(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """
    Any number of tokens. Inputs [B, T, H, N], u [H, N], state [B, H, N, N], key × value; returns y [B, T, H, N], state.

    `log_w` is finite. The decay may be zero, so it is never inverted: every exponent is the sum of the logarithms of
    one stretch of tokens, as in the secondary chunking of gated linear attention (Yang et al., 2023).
    """
    if r.shape[1] == 1:
        y, state = wkv6_step(r[:, 0], log_w[:, 0], k[:, 0], v[:, 0], u, state)
        return y.unsqueeze(1), state

    def work(inputs: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        return _wkv6(inputs, u.repeat(len(state) // len(u), 1).unsqueeze(-2), state)

    return _in_pieces(work, (r, log_w, k, v), state, chunk)


def _wkv6(inputs: list[Tensor], u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [chunks, heads, chunk, N], u [heads, 1, N], state [heads, N, N]."""
    r, log_w, k, v = inputs
    chunk = r.shape[-2]
    half = chunk // 2
    not_later = torch.ones(chunk, chunk, dtype=r.dtype, device=r.device).tril()
    earlier, later = not_later.tril(-1), not_later.mT.triu(1)
    from_middle, to_middle = earlier[half:].clone(), later[:half].clone()
    from_middle[:, :half] = to_middle[:, half:] = 0
    decay = (torch.cat([earlier, later, from_middle, to_middle, not_later[-1:]]) @ log_w).clamp(min=NOTHING).exp()
    from_start, to_end, from_middle, to_middle, total = decay.split(  # type: ignore[no-untyped-call]
        [chunk, chunk, half, half, 1], -2
    )

    def halves(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-2], 2, half, x.shape[-1])

    inside = _near(halves(r), halves(log_w.clamp(min=NOTHING).exp()), halves(k), halves(r * u)) @ halves(v)
    across = (r[..., half:, :] * from_middle) @ (k[..., :half, :] * to_middle).mT @ v[..., :half, :]
    first, second = inside.unbind(-3)
    y = torch.cat([first, second + across], -2)

    added, total = (k * to_end).mT @ v, total.mT
    borders = []
    for i in range(len(r)):
        borders.append(state)
        state = torch.addcmul(added[i], state, total[i])
    return y + (r * from_start) @ torch.stack(borders), state


def _near(r: Tensor, w: Tensor, k: Tensor, now: Tensor) -> Tensor:
    """How much each of a few tokens sees of the earlier ones, and of itself through `now`: [.., n, N] → [.., n, n]."""
    n = r.shape[-2]
    seen = torch.diag_embed((now * k).sum(-1))
    for distance in range(1, n):  # k has decayed over what lies between
        k = k[..., : n - distance, :]
        seen = seen + torch.diag_embed((r[..., distance:, :] * k).sum(-1), -distance)
        k = k * w[..., distance:, :]
    return seen


def _in_pieces(
    work: Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Do the `work` for some chunks after the other. Inputs [B, T, H, N]; the state [B, H, N, N] is handed on."""
    B, T, H, N = inputs[0].shape
    heads, ys = state.reshape(B * H, N, N), []
    for begin in range(0, T, PIECE):
        pieces = [x[:, begin : begin + PIECE] for x in inputs]
        if padding := -pieces[0].shape[1] % chunk:  # a token of zeros, with decay one, leaves the state as it is
            pieces = [F.pad(x, (0, 0, 0, 0, 0, padding)) for x in pieces]
        # [B, T, H, N] → [chunks, B·H, chunk, N]
        chunked = [x.view(B, -1, chunk, H, N).permute(1, 0, 3, 2, 4).reshape(-1, B * H, chunk, N) for x in pieces]
        y, heads = work(chunked, heads)
        ys.append(y.view(-1, B, H, chunk, N).permute(1, 0, 3, 2, 4).reshape(B, -1, H, N)[:, : min(PIECE, T - begin)])
    return torch.cat(ys, 1), heads.view(B, H, N, N)
