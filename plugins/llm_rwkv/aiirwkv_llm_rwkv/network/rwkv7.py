"""
RWKV-7 as one torch module, the same for serving and for training.

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

from ..kernels.plain import wkv7
from .model import RWKV, Block, Linear, Sizes, TimeMix, count_layers, parameter, reading, shift

__all__ = ["RWKV7", "Sizes7"]


@dataclass(frozen=True)
class Sizes7(Sizes):
    """The sizes and ranks of an RWKV-7."""

    rank_w: int
    rank_a: int
    rank_v: int
    rank_g: int

    @classmethod
    def read(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        with reading():
            layers = count_layers(shapes)
            return cls(
                vocabulary=shapes["emb.weight"][0],
                layers=layers,
                width=shapes["emb.weight"][1],
                heads=shapes["blocks.0.att.r_k"][0],
                hidden=shapes["blocks.0.ffn.key.weight"][0],
                rank_w=shapes["blocks.0.att.w1"][1],
                rank_a=shapes["blocks.0.att.a1"][1],
                rank_v=shapes["blocks.1.att.v1"][1] if layers > 1 else 0,
                rank_g=shapes["blocks.0.att.g1"][1],
            )


class TimeMix7(TimeMix):
    """What a token learns from the tokens before it, through the state."""

    def __init__(self, sizes: Sizes7, layer: int) -> None:
        super().__init__()
        D, H, N = sizes.width, sizes.heads, sizes.head
        self.layer, self.heads, self.head = layer, H, N
        self.x_r, self.x_w, self.x_k = parameter(1, 1, D), parameter(1, 1, D), parameter(1, 1, D)
        self.x_v, self.x_a, self.x_g = parameter(1, 1, D), parameter(1, 1, D), parameter(1, 1, D)
        self.w0, self.w1, self.w2 = parameter(1, 1, D), parameter(D, sizes.rank_w), parameter(sizes.rank_w, D)
        self.a0, self.a1, self.a2 = parameter(1, 1, D), parameter(D, sizes.rank_a), parameter(sizes.rank_a, D)
        if layer > 0:
            self.v0, self.v1, self.v2 = parameter(1, 1, D), parameter(D, sizes.rank_v), parameter(sizes.rank_v, D)
        self.g1, self.g2 = parameter(D, sizes.rank_g), parameter(sizes.rank_g, D)
        self.k_k, self.k_a, self.r_k = parameter(1, 1, D), parameter(1, 1, D), parameter(H, N)
        self.receptance = Linear(D, D)
        self.key = Linear(D, D)
        self.value = Linear(D, D)
        self.output = Linear(D, D)
        self.ln_x = nn.GroupNorm(H, D, eps=64e-5)

    def forward(
        self, x: Tensor, last: Tensor, wkv: Tensor, first_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [B, T, D] → output [B, T, D], the new wkv state, and the values of layer 0 for the layers above."""
        B, T, D = x.shape
        change = shift(x, last) - x
        r = self.receptance(torch.addcmul(x, change, self.x_r))
        k = self.key(torch.addcmul(x, change, self.x_k))
        x_v = torch.addcmul(x, change, self.x_v)
        v: Tensor = self.value(x_v)
        log_w = self.w0 + torch.tanh(torch.addcmul(x, change, self.x_w) @ self.w1) @ self.w2
        log_w = -0.606531 * torch.sigmoid(log_w.float())  # e^(-1/2), so that w is between exp(-e^(-1/2)) and 1
        a = torch.sigmoid(self.a0 + torch.addcmul(x, change, self.x_a) @ self.a1 @ self.a2)
        g = torch.sigmoid(torch.addcmul(x, change, self.x_g) @ self.g1) @ self.g2
        if first_value is None:
            first_value = v
        else:
            v = torch.lerp(v, first_value, torch.sigmoid(self.v0 + x_v @ self.v1 @ self.v2))

        def heads(z: Tensor) -> Tensor:
            return z.view(B, T, self.heads, self.head)

        kappa = F.normalize(heads(k * self.k_k).float(), dim=-1)
        k = k * (1 + (a - 1) * self.k_a)
        r, k, v = heads(r), heads(k), heads(v)
        y, wkv = wkv7(r.float(), heads(log_w), k.float(), v.float(), -kappa, kappa * heads(a).float(), wkv)
        y = self.ln_x(y.to(x.dtype).reshape(B * T, D)).view(B, T, D)
        y = y + ((r * k * self.r_k).sum(-1, keepdim=True) * v).view(B, T, D)
        return self.output(y * g), wkv, first_value


class ChannelMix7(nn.Module):
    """What a token makes of what it has learnt."""

    def __init__(self, sizes: Sizes7) -> None:
        super().__init__()
        self.x_k = parameter(1, 1, sizes.width)
        self.key = Linear(sizes.width, sizes.hidden)
        self.value = Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        hidden: Tensor = self.key(torch.addcmul(x, shift(x, last) - x, self.x_k))
        return self.value(torch.relu(hidden).square())  # type: ignore[no-any-return]


class RWKV7(RWKV):
    """RWKV-7 (x070), after the equations of BlinkDL's RWKV-LM."""

    version = "rwkv7"
    transposed = True
    sizes: Sizes7

    def block(self, layer: int) -> Block:
        return Block(self.sizes.width, layer, TimeMix7(self.sizes, layer), ChannelMix7(self.sizes))
