"""
Checkpoints of random weights with the names, shapes and types of official files: for tests and for speed, not for text.

    python bench/random_checkpoint.py rwkv7 12 768 model.safetensors
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["VERSIONS", "make", "ranks", "tensors"]

HEAD = 64
VERSIONS = ("rwkv7", "rwkv6", "rwkv5.2", "rwkv5.1", "rwkv5", "rwkv4")


def ranks(version: str, layers: int, width: int) -> dict[str, int]:
    """The low ranks of official models of this size."""
    if version == "rwkv6":
        return {"maa": 32, "decay": 64} if width < 4096 else {"maa": 64, "decay": 128}
    if layers == 61:
        return {"w": 192, "a": 192, "v": 128, "g": 384}

    def near(x: float) -> int:
        return max(32, 32 * round(x / 32))

    gate = 128 if width == 1024 else near(0.6 * width**0.8)
    return {"w": near(1.8 * width**0.5), "a": near(1.8 * width**0.5), "v": near(1.3 * width**0.5), "g": gate}


class _Random:
    """Draws the tensors of one checkpoint, in its type."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self._generator = dtype, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0, mean: float | Tensor = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=self._generator) * std + mean).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator).to(self.dtype)

    def linear(self, outputs: int, inputs: int, gain: float = 0.7) -> Tensor:
        return self.normal(outputs, inputs, std=gain / math.sqrt(inputs))

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self.normal(width, std=0.05, mean=1), f"{name}.bias": self.normal(width, std=0.05)}


def tensors(
    version: str,
    layers: int,
    width: int,
    *,
    vocabulary: int = 65536,
    low: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Tensor]:
    """All tensors of a model, by name. `low` replaces the official low ranks."""
    draw = _Random(dtype, seed)
    low = low or ranks(version, layers, width)
    result = {"emb.weight": draw.normal(vocabulary, width, std=0.02), **draw.norm("blocks.0.ln0", width)}
    for layer in range(layers):
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        result |= {**draw.norm(f"blocks.{layer}.ln1", width), **draw.norm(f"blocks.{layer}.ln2", width)}
        if version != "rwkv4":
            result |= draw.norm(f"{att}ln_x", width)
        for name in ("receptance", "key", "value", "output"):
            result[f"{att}{name}.weight"] = draw.linear(width, width)
        if version == "rwkv7":
            result |= _rwkv7(draw, att, ffn, width, low)
        else:
            result |= _rwkv4_to_6(draw, version, att, ffn, width, low)
    return result | draw.norm("ln_out", width) | {"head.weight": draw.linear(vocabulary, width, 1.0)}


def _rwkv7(draw: _Random, att: str, ffn: str, width: int, low: Mapping[str, int]) -> dict[str, Tensor]:
    result = {f"{att}x_{name}": draw.uniform(1, 1, width) for name in "rwkvag"}
    decay = -5.5 + 5 * (torch.arange(width) / (width - 1)) ** 1.2
    for name, bias in (("w", decay), ("a", 0.0), ("v", 0.7)):
        result[f"{att}{name}0"] = draw.normal(1, 1, width, std=0.3, mean=bias)
    for name, rank in low.items():
        result[f"{att}{name}1"] = draw.normal(width, rank, std=1 / math.sqrt(width))
        result[f"{att}{name}2"] = draw.normal(rank, width, std=1 / math.sqrt(rank))
    result[f"{att}k_k"] = draw.normal(1, 1, width, std=0.05, mean=0.85)
    result[f"{att}k_a"] = draw.normal(1, 1, width, std=0.05, mean=1)
    result[f"{att}r_k"] = draw.normal(width // HEAD, HEAD, std=0.1)
    result[f"{ffn}x_k"] = draw.uniform(1, 1, width)
    result[f"{ffn}key.weight"] = draw.linear(4 * width, width)
    result[f"{ffn}value.weight"] = draw.linear(width, 4 * width, 0.5)
    return result


def _rwkv4_to_6(
    draw: _Random, version: str, att: str, ffn: str, width: int, low: Mapping[str, int]
) -> dict[str, Tensor]:
    heads = width // HEAD
    mix = "time_maa" if version == "rwkv6" else "time_mix"
    gated = version in ("rwkv6", "rwkv5.2", "rwkv5.1")
    result = {f"{att}{mix}_{name}": draw.uniform(1, 1, width) for name in ("kvrg" if gated else "kvr")}
    if gated:
        result[f"{att}gate.weight"] = draw.linear(width, width)
    first = "time_faaaa" if version in ("rwkv6", "rwkv5.2") else "time_first"
    # the decay is exp(-exp(·)): from nearly one, over what is usual, to one that forgets all within a token
    decay = -6 + 8 * (torch.arange(width) / (width - 1)) ** 1.3
    match version:
        case "rwkv6":
            result |= {f"{att}{mix}_{name}": draw.uniform(1, 1, width) for name in "xw"}
            result[f"{att}{mix}_w1"] = draw.normal(width, 5 * low["maa"], std=0.5 / math.sqrt(width))
            result[f"{att}{mix}_w2"] = draw.normal(5, low["maa"], width, std=0.5 / math.sqrt(low["maa"]))
            result[f"{att}time_decay_w1"] = draw.normal(width, low["decay"], std=1 / math.sqrt(width))
            result[f"{att}time_decay_w2"] = draw.normal(low["decay"], width, std=1 / math.sqrt(low["decay"]))
            result[f"{att}time_decay"] = draw.normal(1, 1, width, std=0.3, mean=decay)
            result[f"{att}{first}"] = draw.normal(heads, HEAD, std=0.3)
        case "rwkv5.2":
            result[f"{att}time_decay"] = draw.normal(heads, HEAD, std=0.3, mean=decay.view(heads, HEAD))
            result[f"{att}{first}"] = draw.normal(heads, HEAD, std=0.3)
        case "rwkv5.1" | "rwkv5":
            result[f"{att}time_decay"] = draw.normal(heads, std=1.0, mean=-4)
            result[f"{att}{first}"] = draw.normal(heads, std=0.3)
        case _:
            result[f"{att}time_decay"] = draw.normal(width, std=0.3, mean=decay)
            result[f"{att}{first}"] = draw.normal(width, std=0.3)
    hidden = 4 * width if version in ("rwkv5", "rwkv4") else int(3.5 * width // 32) * 32
    result |= {f"{ffn}{mix}_{name}": draw.uniform(1, 1, width) for name in "kr"}
    result[f"{ffn}key.weight"] = draw.linear(hidden, width)
    result[f"{ffn}receptance.weight"] = draw.linear(width, width)
    result[f"{ffn}value.weight"] = draw.linear(width, hidden, 0.5)
    return result


def make(path: Path, version: str, layers: int, width: int, **options: Any) -> Path:
    """Write a checkpoint, as official .pth or as .safetensors; the options are those of `tensors`."""
    content = tensors(version, layers, width, **options)
    if path.suffix == ".pth":
        torch.save(content, path)
    else:
        from safetensors.torch import save_file

        save_file(content, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint of random weights.")
    parser.add_argument("version", choices=VERSIONS)
    parser.add_argument("layers", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("path", type=Path)
    parser.add_argument("--vocabulary", type=int, default=65536)
    given = parser.parse_args()
    made = make(given.path, given.version, given.layers, given.width, vocabulary=given.vocabulary)
    print(f"{made}: {made.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
