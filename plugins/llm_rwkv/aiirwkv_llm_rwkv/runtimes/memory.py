"""
How much memory serving a model takes: for admission, and for knowing beforehand whether it fits.

No model and no GPU is needed: parameters are counted on a model without storage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..network.model import RWKV, Layout, Linear, Sizes

__all__ = ["BGE_M3", "PRECISIONS", "Encoder", "Memory", "estimate", "parameters", "state_bytes", "workspace"]

PRECISIONS: dict[str, tuple[float, int]] = {
    "float32": (4, 4),
    "bfloat16": (2, 2),
    "float16": (2, 2),
    "int8": (1, 2),
    "nf4": (0.5 + 1 / 64 + 4 / (64 * 256), 2),
}
"""Bytes per weight of the layers' linears, and of everything else. nf4: a scale per 64 weights, itself in a byte."""

CONTEXT = 500 << 20
"""What CUDA itself and the workspaces of cuBLAS take, about."""


@dataclass(frozen=True)
class Memory:
    """Bytes, at the most."""

    weights: int
    embedding: int
    states: int
    workspace: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.embedding + self.states + self.workspace + self.logits


def state_bytes(layout: Layout) -> int:
    """Of one text in the pool."""
    return 4 * layout.size


def parameters(model: type[RWKV], sizes: Sizes) -> tuple[int, int, int]:
    """How many parameters are in the embedding, in the linears of the layers, and elsewhere."""
    with torch.device("meta"):
        empty = model(sizes)
    within = [m for name, m in empty.named_modules() if isinstance(m, Linear) and name != "head"]
    linears: int = sum(linear.weight.numel() for linear in within)
    embedding = empty.emb.weight.numel()
    return embedding, linears, sum(p.numel() for p in empty.parameters()) - embedding - linears


def workspace(version: str, sizes: Sizes, tokens: int, texts: int, itemsize: int) -> int:
    """Bytes that a batch of so many tokens of so many texts takes besides its logits; an upper bound for ragged.py."""
    D, F, i = sizes.width, sizes.hidden, itemsize
    if version == "rwkv7":
        low = 4 * max(getattr(sizes, f"rank_{name}", 0) for name in "wavg")
        time, channel = D * (32 + 16 * i) + low * i, D * (8 + 4 * i) + F * i
    else:
        low = 10 * getattr(sizes, "rank_maa", 0)
        time, channel = D * (20 + 14 * i) + low * i, D * (8 + 9 * i) + F * i
    return tokens * (max(time, channel) + 64) + texts * (D * 12 + 64)


def estimate(model: type[RWKV], sizes: Sizes, precision: str, slots: int, chunk: int, rows: int = 1) -> Memory:
    """Of serving a model with so many slots, in batches of `chunk` tokens of `rows` texts."""
    quantised, other = PRECISIONS[precision]
    embedding, linears, rest = parameters(model, sizes)
    layout = Layout(sizes.layers, sizes.width, sizes.heads, transposed=model.transposed)
    return Memory(
        weights=round(linears * quantised) + rest * other,
        embedding=embedding * other,
        states=(slots + 1) * state_bytes(layout),
        workspace=workspace(model.version, sizes, chunk, rows, other),
        logits=rows * sizes.vocabulary * (other + 4),
    )


@dataclass(frozen=True)
class Encoder:
    """A transformer of the kind of XLM-RoBERTa, which embeds or ranks."""

    vocabulary: int
    positions: int
    layers: int
    width: int
    hidden: int

    @property
    def parameters(self) -> int:
        D, F = self.width, self.hidden
        layer = 4 * (D * D + D) + 2 * D * F + F + D + 4 * D
        return (self.vocabulary + self.positions + 1) * D + 2 * D + self.layers * layer + D * D + D

    def estimate(self, tokens: int, itemsize: int = 2) -> Memory:
        """Of reading batches of so many tokens, attention computed without a matrix of all pairs."""
        activations = tokens * (2 * self.hidden + 6 * self.width) * itemsize
        embedding = (self.vocabulary + self.positions) * self.width * itemsize
        return Memory(self.parameters * itemsize - embedding, embedding, 0, activations, 0)


BGE_M3 = Encoder(vocabulary=250_002, positions=8194, layers=24, width=1024, hidden=4096)
"""BAAI/bge-m3, and BAAI/bge-reranker-v2-m3, which differs by its head of one output."""
