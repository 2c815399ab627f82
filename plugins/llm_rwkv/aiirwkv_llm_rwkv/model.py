"""
RWKV-7 as one torch module, the same for serving and for training.

Every size comes from the checkpoint; the parameters have the official names. A state is a value: `forward` never
changes the one it is given, so a state can be kept, shared and continued from many times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.plain import wkv7

__all__ = ["RWKV7", "LayerState", "Sizes", "State"]


class LayerState(NamedTuple):
    """What one layer remembers of a batch of B texts."""

    att: Tensor
    """[B, D]: the last token's input of the time mix."""
    wkv: Tensor
    """[B, H, N, N], float32: value × key, as in the `rwkv` package and in tuned states of RWKV-7."""
    ffn: Tensor
    """[B, D]: the last token's input of the channel mix."""


State = tuple[LayerState, ...]


@dataclass(frozen=True)
class Sizes:
    """The sizes of an RWKV-7 model, all of them visible in the shapes of its tensors."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    hidden: int
    rank_w: int
    rank_a: int
    rank_v: int
    rank_g: int

    @property
    def head(self) -> int:
        return self.width // self.heads

    @classmethod
    def read(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """From names and shapes of a checkpoint. Raises ValueError when they are not those of RWKV-7."""
        if "blocks.0.att.r_k" not in shapes:
            if any("att.time_" in name for name in shapes):
                raise ValueError("it holds an RWKV of version 4 to 6; this worker serves RWKV-7")
            raise ValueError("it holds no RWKV-7: the tensor blocks.0.att.r_k is missing")
        layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        try:
            vocabulary, width = shapes["emb.weight"]
            return cls(
                vocabulary=vocabulary,
                layers=layers,
                width=width,
                heads=shapes["blocks.0.att.r_k"][0],
                hidden=shapes["blocks.0.ffn.key.weight"][0],
                rank_w=shapes["blocks.0.att.w1"][1],
                rank_a=shapes["blocks.0.att.a1"][1],
                rank_v=shapes["blocks.1.att.v1"][1] if layers > 1 else 0,
                rank_g=shapes["blocks.0.att.g1"][1],
            )
        except KeyError as error:
            raise ValueError(f"the tensor {error.args[0]} is missing") from None
        except (ValueError, IndexError):
            raise ValueError("a tensor has a wrong number of dimensions") from None


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class Linear(nn.Linear):
    """Without a bias; zero at first, since random numbers that a checkpoint replaces cost seconds at loading."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class Embedding(nn.Embedding):
    """Zero at first, too."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def _shift(x: Tensor, last: Tensor) -> Tensor:
    """Each token's predecessor; `last` [B, D] precedes the first. x [B, T, D]."""
    return torch.cat([last.unsqueeze(1), x[:, :-1]], 1)


class TimeMix(nn.Module):
    """What a token learns from the tokens before it, through the state."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        D, H, N = sizes.width, sizes.heads, sizes.head
        self.layer, self.heads, self.head = layer, H, N
        self.x_r, self.x_w, self.x_k = _parameter(1, 1, D), _parameter(1, 1, D), _parameter(1, 1, D)
        self.x_v, self.x_a, self.x_g = _parameter(1, 1, D), _parameter(1, 1, D), _parameter(1, 1, D)
        self.w0, self.w1, self.w2 = _parameter(1, 1, D), _parameter(D, sizes.rank_w), _parameter(sizes.rank_w, D)
        self.a0, self.a1, self.a2 = _parameter(1, 1, D), _parameter(D, sizes.rank_a), _parameter(sizes.rank_a, D)
        if layer > 0:
            self.v0, self.v1, self.v2 = _parameter(1, 1, D), _parameter(D, sizes.rank_v), _parameter(sizes.rank_v, D)
        self.g1, self.g2 = _parameter(D, sizes.rank_g), _parameter(sizes.rank_g, D)
        self.k_k, self.k_a, self.r_k = _parameter(1, 1, D), _parameter(1, 1, D), _parameter(H, N)
        self.receptance = Linear(D, D)
        self.key = Linear(D, D)
        self.value = Linear(D, D)
        self.output = Linear(D, D)
        self.ln_x = nn.GroupNorm(H, D, eps=64e-5)
        self.time_state: nn.Parameter | None
        self.register_parameter("time_state", None)

    def forward(
        self, x: Tensor, last: Tensor, wkv: Tensor, first_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] → output [B, T, D], the new wkv state, and the values of layer 0 for the layers above."""
        B, T, D = x.shape
        change = _shift(x, last) - x
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


class ChannelMix(nn.Module):
    """What a token makes of what it has learnt."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.x_k = _parameter(1, 1, sizes.width)
        self.key = Linear(sizes.width, sizes.hidden)
        self.value = Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        hidden: Tensor = self.key(torch.addcmul(x, _shift(x, last) - x, self.x_k))
        return self.value(torch.relu(hidden).square())  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(sizes.width)
        self.ln1 = nn.LayerNorm(sizes.width)
        self.ln2 = nn.LayerNorm(sizes.width)
        self.att = TimeMix(sizes, layer)
        self.ffn = ChannelMix(sizes)

    def forward(self, x: Tensor, state: LayerState, first_value: Tensor | None) -> tuple[Tensor, LayerState, Tensor]:
        att = self.ln1(x)
        values: Tensor
        y, wkv, values = self.att(att, state.att, state.wkv, first_value)
        x = x + y
        ffn = self.ln2(x)
        x = x + self.ffn(ffn, state.ffn)
        return x, LayerState(att[:, -1], wkv, ffn[:, -1]), values


class RWKV7(nn.Module):
    """RWKV-7 (x070), after the equations of BlinkDL's RWKV-LM. A new one holds zeros: load or initialise it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.emb = Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, layer) for layer in range(sizes.layers))
        self.ln_out = nn.LayerNorm(sizes.width)
        self.head = Linear(sizes.width, sizes.vocabulary)

    @property
    def layers(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def add_time_state(self) -> list[nn.Parameter]:
        """Give every layer an initial wkv state of its own [H, N, N], zero at first: what state tuning learns."""
        sizes, states = self.sizes, []
        for block in self.layers:
            state = torch.zeros(sizes.heads, sizes.head, sizes.head, device=self.emb.weight.device)
            block.att.time_state = nn.Parameter(state)
            states.append(block.att.time_state)
        return states

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token: zero, or the `time_state` of the checkpoint."""
        sizes, weight = self.sizes, self.emb.weight
        zero = torch.zeros(batch, sizes.width, dtype=weight.dtype, device=weight.device)
        shape = (batch, sizes.heads, sizes.head, sizes.head)
        nothing = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        tuned = (block.att.time_state for block in self.layers)
        return tuple(
            LayerState(zero, nothing if state is None else state.float().expand(shape), zero) for state in tuned
        )

    def hidden(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens [B, T], T ≥ 1 → the normalised output of the last layer [B, T, D], and the new state."""
        state = state or self.initial_state(tokens.shape[0])
        x: Tensor = self.layers[0].ln0(self.emb(tokens))
        first_value: Tensor | None = None
        after = []
        for block, before in zip(self.layers, state, strict=True):
            x, layer, first_value = block(x, before, first_value)
            after.append(layer)
        return self.ln_out(x), tuple(after)

    def forward(self, tokens: Tensor, state: State | None = None, *, last: bool = False) -> tuple[Tensor, State]:
        """tokens [B, T] → logits [B, T, V] (with `last`, of the last token only: [B, 1, V]), and the new state."""
        x, state = self.hidden(tokens, state)
        return self.head(x[:, -1:] if last else x), state
