"""
RWKV-7 and RWKV-6 over ragged batches, with Triton kernels between the linears and the states in place in a pool.

All texts' next tokens, of any mix of lengths, go through each linear together. What is computed is what the modules
compute; the residual stream and the states are float32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.fused import Texts, activate, mix, sparse
from ..kernels.triton import finish, prepare7, step6, step7, wkv
from ..network.model import RWKV, Block, Layout
from ..network.rwkv6 import TimeMix6
from ..network.rwkv7 import TimeMix7

__all__ = ["Batch", "Ragged", "Scan"]

Scan = Callable[..., None]
"""How texts of more than one token are read: the signature of `wkv`, without its options."""

PARTS = 16
"""In how many parts the sparse product of a single token is cut."""


@dataclass
class Batch:
    """What is to be read; tensors on the device."""

    texts: Texts
    tokens: Tensor
    """[N]"""
    last: Tensor
    """[B]: each text's last token."""
    single: bool
    """Every text has one token."""
    updates: Sequence[tuple[slice, slice, Mapping[str, tuple[Tensor, Tensor]]]] = ()
    """Adapters: rows of tokens, rows of texts, and what is added to the linears in these rows."""

    def adapt(self, name: str, x: Tensor, y: Tensor, *, by_text: bool = False) -> Tensor:
        """Add to y, what the linear `name` made of x, what the adapters say."""
        for tokens, texts, deltas in self.updates:
            if name in deltas:
                a, b = deltas[name]
                rows = texts if by_text else tokens
                y[rows] += (x[rows] @ a.mT @ b.mT).to(y.dtype)
        return y


def _flat(x: Tensor) -> Tensor:
    return x.detach().float().reshape(-1).contiguous()


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


def _plain(module: nn.Module) -> bool:
    """Its weight is a tensor of numbers, not something that a library has quantised."""
    return type(module.weight) is nn.Parameter and module.weight.is_floating_point()


def _share(module: nn.Module, name: str, place: Tensor) -> None:
    """Move a parameter to a place where others can be beside it; the module goes on with a view of that."""
    place.copy_(getattr(module, name))
    setattr(module, name, nn.Parameter(place, requires_grad=False))


def _products(x: Tensor, weights: Tensor, batched: bool) -> Tensor:
    """[M, N, inputs] @ [M, inputs, outputs]; of one row, where it is the faster way, one by one."""
    if batched or x.shape[1] > 1:
        return torch.bmm(x, weights)
    y = x.new_empty(len(x), 1, weights.shape[2])
    for row, weight, result in zip(x, weights, y, strict=True):
        torch.mm(row, weight, out=result)
    return y


class _Linears:
    """Several linears, each with its own input: one batched product when they are plain, else one by one."""

    def __init__(self, parent: nn.Module, path: str, names: Sequence[str]) -> None:
        self.parent, self.names, self.paths = parent, names, [f"{path}.{name}" for name in names]
        self.batched = True
        self.weights: Tensor | None = None
        modules = [getattr(parent, name) for name in names]
        if all(map(_plain, modules)):
            self.weights = modules[0].weight.new_empty(len(modules), *modules[0].weight.shape)
            for module, weight in zip(modules, self.weights, strict=True):
                _share(module, "weight", weight)

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """[M, N, inputs] → [M, N, outputs]"""
        if self.weights is not None:
            y = _products(x, self.weights.mT, self.batched)
        else:
            y = torch.stack([getattr(self.parent, name)(row) for name, row in zip(self.names, x, strict=True)])
        for path, before, after in zip(self.paths, x, y, strict=True):
            batch.adapt(path, before, after)
        return y


@dataclass
class _Layer:
    """What the layers of both versions share."""

    number: int
    block: Block
    layout: Layout
    scan: Scan
    sparse: bool = True
    parameters: dict[str, Tensor] = field(default_factory=dict)
    linears: _Linears = field(init=False)

    def __post_init__(self) -> None:
        layout, i = self.layout, self.number
        self.path = f"blocks.{i}"
        self.att, self.ffn = i * layout.width, (layout.layers + i) * layout.width
        self.wkv = layout.shifts + i * layout.width * layout.head
        self.heads, self.dtype = layout.heads, self.block.ln1.weight.dtype
        norm: Any = self.block.att.ln_x
        self.parameters |= {"norm": _flat(norm.weight), "bias": _flat(norm.bias)}

    def mixed(
        self, x: Tensor, add: Tensor | None, norm: nn.LayerNorm, mixes: Tensor, batch: Batch, offset: int,
        keep: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x + add, and its mixes with the tokens before."""
        out = x.new_empty((len(mixes), *x.shape), dtype=self.dtype)
        total = x if add is None else torch.empty_like(x)
        mix(x, add, _norm(norm), mixes, batch.texts, offset, out, total, keep)
        return total, out

    def linear(self, name: str, x: Tensor, batch: Batch) -> Tensor:
        y: Tensor = self.block.get_submodule(name)(x)
        return batch.adapt(f"{self.path}.{name}", x, y)

    def __call__(self, x: Tensor, add: Tensor | None, first: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x [N, D] and what the layer below adds [A, N, D] → their sum with the time mix, and what this layer adds."""
        x, out = self.time_mix(x, add, first, batch)  # a call of its own, after which nothing else of it is in memory
        return self.channel_mix(x, self.linear("att.output", out, batch)[None], batch)

    def time_mix(self, x: Tensor, add: Tensor | None, first: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x + add, and the input of the time mix's output."""
        raise NotImplementedError

    def channel_mix(self, x: Tensor, add: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x + add, and what the channel mix adds to it."""
        raise NotImplementedError


class _Layer7(_Layer):
    def __post_init__(self) -> None:
        super().__post_init__()
        att: Any = self.block.att
        assert isinstance(att, TimeMix7)
        names = ("w0", "a0", "k_k", "k_a", "r_k")
        self.parameters |= {name: _flat(getattr(att, name)) for name in names}
        self.parameters["v0"] = _flat(att.v0) if self.number else self.parameters["w0"]
        self.mixes = torch.cat([getattr(att, f"x_{name}").detach().view(1, -1) for name in "rkvwag"]).contiguous()
        ffn: Any = self.block.ffn
        self.ffn_mixes = ffn.x_k.detach().view(1, -1)
        self.linears = _Linears(att, f"{self.path}.att", ("receptance", "key", "value"))
        low = "vwag" if self.number else "wag"
        self.tanh, self.gate = low.index("w"), low.index("g")
        rank = max(getattr(att, f"{name}1").shape[1] for name in low)
        self.down = att.g1.new_zeros(len(low), self.layout.width, rank)
        self.up = att.g1.new_zeros(len(low), rank, self.layout.width)
        for i, name in enumerate(low):
            own = getattr(att, f"{name}1").shape[1]
            _share(att, f"{name}1", self.down[i, :, :own])
            _share(att, f"{name}2", self.up[i, :own])
        self.rows: Tensor | None = None
        if _plain(ffn.value):
            self.rows = torch.empty_like(ffn.value.weight.mT, memory_format=torch.contiguous_format)
            _share(ffn.value, "weight", self.rows.mT)

    def time_mix(self, x: Tensor, add: Tensor | None, first: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        x, mixed = self.mixed(x, add, self.block.ln1, self.mixes, batch, self.att)
        r, k, v = self.linears(mixed[:3], batch)
        low = _products(mixed[6 - len(self.down) :], self.down, self.linears.batched)
        activate(low, tanh=self.tanh, sigmoid=self.gate)
        *blend, w, a, g = _products(low, self.up, self.linears.batched)
        blended = blend[0] if blend else None
        out = torch.empty_like(r)
        if batch.single:
            step7(r, k, v, w, a, g, blended, first, self.parameters, out, batch.texts, self.wkv, self.heads)
        else:
            inputs = torch.empty((5, *x.shape), device=x.device)
            prepare7(k, v, w, a, blended, first, self.parameters, inputs, self.heads)
            log_w, k, v, remove, insert = inputs
            y = torch.empty_like(x)
            self.scan(r, log_w, k, v, (remove, insert), None, y, batch.texts, self.wkv, self.heads)
            finish(y, g, self.parameters, out, self.heads, (r, k, v))
        return x, out

    def channel_mix(self, x: Tensor, add: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        x, mixed = self.mixed(x, add, self.block.ln2, self.ffn_mixes, batch, self.ffn)
        hidden = self.linear("ffn.key", mixed[0], batch)
        if len(x) == 1 and self.sparse and self.rows is not None and not batch.updates:
            parts = torch.empty((PARTS, *x.shape), device=x.device)
            sparse(hidden, self.rows, parts)
            return x, parts
        activate(hidden)
        return x, self.linear("ffn.value", hidden, batch)[None]


class _Layer6(_Layer):
    def __post_init__(self) -> None:
        super().__post_init__()
        att: Any = self.block.att
        assert isinstance(att, TimeMix6)
        self.parameters |= {"decay": _flat(att.time_decay), "u": _flat(att.time_faaaa)}
        self.mixes = att.time_maa_x.detach().view(1, -1)
        self.bases = torch.cat([getattr(att, f"time_maa_{name}").detach().view(1, 1, -1) for name in "wkvrg"])
        ffn: Any = self.block.ffn
        self.ffn_mixes = torch.cat([ffn.time_maa_k.detach().view(1, -1), ffn.time_maa_r.detach().view(1, -1)])
        self.time = att
        self.linears = _Linears(att, f"{self.path}.att", ("key", "value", "receptance", "gate"))

    def time_mix(self, x: Tensor, add: Tensor | None, first: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        now, change = (x.new_empty(x.shape, dtype=self.dtype) for _ in range(2))
        x, mixed = self.mixed(x, add, self.block.ln1, self.mixes, batch, self.att, (now, change))
        low = torch.tanh(mixed[0] @ self.time.time_maa_w1).view(len(x), 5, -1).transpose(0, 1)
        mixed = torch.addcmul(now, change, (low @ self.time.time_maa_w2).add_(self.bases))
        w = torch.tanh(mixed[0] @ self.time.time_decay_w1) @ self.time.time_decay_w2
        k, v, r, g = self.linears(mixed[1:], batch)
        out = torch.empty_like(r)
        if batch.single:
            step6(r, k, v, w, g, self.parameters, out, batch.texts, self.wkv, self.heads)
        else:
            log_w = -torch.exp((w + self.parameters["decay"]).clamp_(max=5.0))
            y = torch.empty_like(x)
            self.scan(r, log_w, k, v, None, self.parameters["u"], y, batch.texts, self.wkv, self.heads)
            finish(y, g, self.parameters, out, self.heads)
        return x, out

    def channel_mix(self, x: Tensor, add: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        x, mixed = self.mixed(x, add, self.block.ln2, self.ffn_mixes, batch, self.ffn)
        hidden = self.linear("ffn.key", mixed[0], batch)
        activate(hidden)
        gate = torch.sigmoid(self.linear("ffn.receptance", mixed[1], batch))
        return x, (gate * self.linear("ffn.value", hidden, batch))[None]


class Ragged:
    """A model made ready for it. The module keeps working: its big weights are then views of what is used here."""

    def __init__(self, model: RWKV) -> None:
        """Raises ValueError when it is none that the kernels can take."""
        head = model.layout.head
        if head < 16 or head & (head - 1):
            raise ValueError(f"the kernels take heads of 16, 32, 64 … channels, and this model's have {head}")
        layers: dict[str, type[_Layer]] = {"rwkv7": _Layer7, "rwkv6": _Layer6}
        if model.version not in layers:
            raise ValueError(f"there are kernels for RWKV-7 and RWKV-6, not for {model.version}")
        self.model = model
        self.layers = [layers[model.version](i, block, model.layout, wkv) for i, block in enumerate(model.layers)]

    def use(self, *, scan: Scan | None = None, sparse: bool | None = None, batched: bool | None = None) -> None:
        """
        Choose how texts of more than one token are read, and for a single token, whether the product with what is zero
        for the most part is sparse, and whether products of several inputs are batched.
        """
        for layer in self.layers:
            layer.scan = scan or layer.scan
            layer.sparse = layer.sparse if sparse is None else sparse
            layer.linears.batched = layer.linears.batched if batched is None else batched

    def __call__(self, batch: Batch) -> Tensor:
        """Read the batch: the states change in place → logits of each text's last token [B, V]."""
        model = self.model
        x = model.layers[0].ln0(model.emb(batch.tokens)).float()
        first = x.new_empty(x.shape, dtype=model.ln_out.weight.dtype)
        add: Tensor | None = None
        for layer in self.layers:
            x, add = layer(x, add, first, batch)
        assert add is not None
        x = x.index_select(0, batch.last) + add.index_select(1, batch.last).sum(0)
        norm = model.ln_out
        x = F.layer_norm(x, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        x = x.to(norm.weight.dtype)
        return batch.adapt("head", x, model.head(x), by_text=True)
