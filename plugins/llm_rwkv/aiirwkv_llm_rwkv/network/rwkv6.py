"""
RWKV-6 as one torch module, the same for serving and for training.

Every size comes from the checkpoint; the parameters have the official names. A state is a value: `forward` never
changes the one it is given, so a state can be kept, shared and continued from many times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.plain import wkv6
from .model import RWKV, Block, Linear, Sizes, TimeMix, count_layers, parameter, reading, shift

__all__ = ["RWKV6", "Sizes6"]


@dataclass(frozen=True)
class Sizes6(Sizes):
    """The sizes and ranks of an RWKV-6."""

    rank_maa: int
    rank_decay: int

    @classmethod
    def read(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        with reading():
            return cls(
                vocabulary=shapes["emb.weight"][0],
                layers=count_layers(shapes),
                width=shapes["emb.weight"][1],
                heads=shapes["blocks.0.att.time_faaaa"][0],
                hidden=shapes["blocks.0.ffn.key.weight"][0],
                rank_maa=shapes["blocks.0.att.time_maa_w2"][1],
                rank_decay=shapes["blocks.0.att.time_decay_w1"][1],
            )


class TimeMix6(TimeMix):
    """What a token learns from the tokens before it, through the state."""

    def __init__(self, sizes: Sizes6) -> None:
        super().__init__()
        D, H, N, M = sizes.width, sizes.heads, sizes.head, sizes.rank_maa
        self.heads, self.head = H, N
        self.time_maa_x, self.time_maa_w, self.time_maa_k = parameter(1, 1, D), parameter(1, 1, D), parameter(1, 1, D)
        self.time_maa_v, self.time_maa_r, self.time_maa_g = parameter(1, 1, D), parameter(1, 1, D), parameter(1, 1, D)
        self.time_maa_w1, self.time_maa_w2 = parameter(D, 5 * M), parameter(5, M, D)
        self.time_decay = parameter(1, 1, D)
        self.time_decay_w1, self.time_decay_w2 = parameter(D, sizes.rank_decay), parameter(sizes.rank_decay, D)
        self.time_faaaa = parameter(H, N)
        self.receptance = Linear(D, D)
        self.key = Linear(D, D)
        self.value = Linear(D, D)
        self.gate = Linear(D, D)
        self.output = Linear(D, D)
        self.ln_x = nn.GroupNorm(H, D, eps=64e-5)

    def forward(
        self, x: Tensor, last: Tensor, wkv: Tensor, first_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [B, T, D] → output [B, T, D], the new wkv state, and nothing for the layers above."""
        B, T, D = x.shape
        change = shift(x, last) - x
        mixed = torch.tanh(torch.addcmul(x, change, self.time_maa_x) @ self.time_maa_w1)
        mixed = mixed.view(B * T, 5, -1).transpose(0, 1) @ self.time_maa_w2  # in the order w, k, v, r, g
        w, k, v, r, g = mixed.view(5, B, T, D)
        w = torch.addcmul(x, change, self.time_maa_w + w)
        k = self.key(torch.addcmul(x, change, self.time_maa_k + k))
        v = self.value(torch.addcmul(x, change, self.time_maa_v + v))
        r = self.receptance(torch.addcmul(x, change, self.time_maa_r + r))
        g = F.silu(self.gate(torch.addcmul(x, change, self.time_maa_g + g)))
        w = self.time_decay.float() + (torch.tanh(w @ self.time_decay_w1) @ self.time_decay_w2).float()
        log_w = -torch.exp(w.clamp(max=FORGOTTEN))

        def heads(z: Tensor) -> Tensor:
            return z.view(B, T, self.heads, self.head).float()

        y, wkv = wkv6(heads(r), heads(log_w), heads(k), heads(v), self.time_faaaa.float(), wkv)
        y = self.ln_x(y.to(x.dtype).reshape(B * T, D)).view(B, T, D)
        return self.output(y * g), wkv, None


FORGOTTEN = 5.0
"""exp(-exp(5)) is zero in fp32 already; beyond, the inner exponential would become infinite, its gradient no number."""


class ChannelMix6(nn.Module):
    """What a token makes of what it has learnt."""

    def __init__(self, sizes: Sizes6) -> None:
        super().__init__()
        self.time_maa_k, self.time_maa_r = parameter(1, 1, sizes.width), parameter(1, 1, sizes.width)
        self.key = Linear(sizes.width, sizes.hidden)
        self.receptance = Linear(sizes.width, sizes.width)
        self.value = Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        change = shift(x, last) - x
        hidden: Tensor = torch.relu(self.key(torch.addcmul(x, change, self.time_maa_k))).square()
        gate = torch.sigmoid(self.receptance(torch.addcmul(x, change, self.time_maa_r)))
        return gate * self.value(hidden)  # type: ignore[no-any-return]


class RWKV6(RWKV):
    """RWKV-6 (x060), after the equations of BlinkDL's RWKV-LM."""

    version = "rwkv6"
    transposed = False
    sizes: Sizes6

    def block(self, layer: int) -> Block:
        return Block(self.sizes.width, layer, TimeMix6(self.sizes), ChannelMix6(self.sizes))
