"""
WKV of RWKV-7 in plain torch: one token at a time, or many at once in chunks. Differentiable, on any device.

With a state S (value × key) and, per token, a decay w, a receptance r, a key k, a value v and a removal a, b:

    S ← S·diag(w) + (S·a)·bᵀ + v·kᵀ        y = S·r
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CHUNK", "wkv7", "wkv7_step"]

CHUNK = 16
"""Tokens per chunk. The decay is at least exp(-0.6065), so its inverse over a chunk stays below 2e4: exact in fp32."""


def wkv7_step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token. Vectors [B, H, N], state [B, H, N, N]; returns y [B, H, N] and the new state."""
    removed = state @ a.unsqueeze(-1)
    state = state * log_w.exp().unsqueeze(-2) + removed * b.unsqueeze(-2) + v.unsqueeze(-1) * k.unsqueeze(-2)
    return (state @ r.unsqueeze(-1)).squeeze(-1), state


def wkv7(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """
    Any number of tokens. Inputs [B, T, H, N], state [B, H, N, N]; returns y [B, T, H, N] and the new state.

    Inside a chunk the recurrence is a triangular system (the WY form of a product of rank-one updates; Yang et al.,
    "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024). Only the states at the borders
    of the chunks are computed one after the other.
    """
    B, T, H, N = r.shape
    if T == 1:
        y, state = wkv7_step(r[:, 0], log_w[:, 0], k[:, 0], v[:, 0], a[:, 0], b[:, 0], state)
        return y.unsqueeze(1), state
    if padding := -T % chunk:  # a token of zeros, with decay one, leaves the state as it is
        r, log_w, k, v, a, b = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (r, log_w, k, v, a, b))
    chunks = (T + padding) // chunk

    def split(x: Tensor) -> Tensor:  # [chunks, B, H, chunk, N]
        return x.view(B, chunks, chunk, H, N).permute(1, 0, 3, 2, 4)

    r, log_w, k, v, a, b = map(split, (r, log_w, k, v, a, b))
    until = log_w.cumsum(-2)  # the decay from the chunk's beginning up to each token
    total = until[..., -1:, :].exp()
    reads = torch.cat([a * (until - log_w).exp(), r * until.exp()], -2)  # what looks into the state: before, after
    inverse = (-until).exp()
    writes = torch.cat([b * inverse, k * inverse], -2)  # what is added to it

    mixed = reads @ writes.mT  # [.., 2·chunk, 2·chunk]: every read of every write
    ones = torch.ones(chunk, chunk, dtype=r.dtype, device=r.device)
    earlier, not_later = ones.tril(-1), ones.tril()
    a_b = mixed[..., :chunk, :chunk] * earlier
    a_k = mixed[..., :chunk, chunk:] * earlier
    r_bk = mixed[..., chunk:, :] * torch.cat([not_later, not_later], -1)

    # u_t = S_{t-1}·a_t solves (I − a_b)·U = a·Sᵀ + a_k·V; here as U = from_state·Sᵀ + from_values.
    solved = _inverse(a_b) @ torch.cat([reads[..., :chunk, :], a_k @ v], -1)
    from_state, from_values = solved[..., :N], solved[..., N:]
    writes_to_end = (writes * total).mT

    border = state.mT  # key × value
    borders, updates = [], []
    for i in range(chunks):
        borders.append(border)
        updates.append(torch.cat([from_state[i] @ border + from_values[i], v[i]], -2))
        border = border * total[i].mT + writes_to_end[i] @ updates[-1]
    y = reads[..., chunk:, :] @ torch.stack(borders) + r_bk @ torch.stack(updates)
    y = y.permute(1, 0, 3, 2, 4).reshape(B, chunks * chunk, H, N)
    return y[:, :T], border.mT


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
