"""
Low-rank adapters on this machine: folders with a card.json and an adapter.safetensors. Used by name, per request.

An adapter changes the linears of a model from W to W + scale · B A. A PiSSA adapter was trained from factors B₀ A₀ that
had been taken out of W; with these beside it, it is the adapter [B B₀] [A; −A₀] of twice the rank for the model as it
was.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from aiirwkv import Context
from aiirwkv.errors import BadRequest, Conflict

from .describe import Shapes, linears
from .shelf import Shelf, TunedCard, seal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ADAPTER",
    "Adapter",
    "AdapterCard",
    "Adapters",
    "adapters_folder",
    "apply",
    "check",
    "facts",
    "fold",
    "make",
]

ADAPTER = "adapter.safetensors"
PART = re.compile(r"(?:base_model\.|model\.)*(?P<linear>.+)\.(?P<part>(?:init_)?lora_[AB])(?:\.default)?(?:\.weight)?")
"""The names that the `peft` library and RWKV-PEFT give to the factors; `init_` are those of PiSSA's beginning."""


class AdapterCard(TunedCard, kw_only=True, frozen=True):
    """Of an adapter. What B A gives is multiplied by `alpha` / `rank`."""

    kind: str = "adapter"
    method: str = "lora"
    rank: int = 0
    alpha: float = 0.0
    targets: list[str] = []


@dataclass(frozen=True, eq=False)
class Adapter:
    """
    What is added to the linears of a model.

    `deltas`: by the linear's name ("blocks.0.att.key") the factors A [r, in] and B [out, r], with the scale in B; as
    float32, on the CPU. `sha256` tells apart all that add anything different.
    """

    name: str
    sha256: str
    deltas: dict[str, tuple[Tensor, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(factor.nbytes for pair in self.deltas.values() for factor in pair)


def apply(adapter: Adapter, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Add to y [..., out], in place, what the adapter makes of x [..., in], the input of the linear `name`."""
    if factors := adapter.deltas.get(name):
        A, B = factors
        y += x.to(A.dtype) @ A.T @ B.T
    return y


def fold(tensors: Mapping[str, Tensor], alpha: float, method: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The `deltas` of a file's factors, as float32. Raises ValueError when they are not whole, or not all there is."""
    import torch

    deltas = {}
    for linear, parts in _parts(tensors).items():
        if missing := {"lora_A", "lora_B"} - parts.keys():
            raise ValueError(f"{linear} lacks its {min(missing)}")
        A, B = parts["lora_A"].float(), parts["lora_B"].float()
        rank = len(A)
        if not rank or B.shape[1] != rank:
            raise ValueError(f"the factors of {linear} have the ranks {rank} and {B.shape[1]}")
        if method == "pissa":
            if not {"init_lora_A", "init_lora_B"} <= parts.keys():
                raise ValueError(
                    f"{linear} lacks the factors that PiSSA began with (init_lora_A, init_lora_B), so it fits only a "
                    "base from which these were taken"
                )
            A0, B0 = parts["init_lora_A"].float(), parts["init_lora_B"].float()
            if A0.shape != A.shape or B0.shape != B.shape:
                raise ValueError(f"{linear} began with factors of another shape than it has")
            A, B = torch.cat([A, -A0]), torch.cat([B, B0], 1)
        elif len(parts) > 2:
            raise ValueError(f"{linear} has factors that PiSSA began with, but its card says {method}")
        deltas[linear] = A, B * (alpha / rank)
    if not deltas:
        raise ValueError("it holds nothing")
    return deltas


def check(deltas: Mapping[str, tuple[Tensor, Tensor]], shapes: Shapes) -> None:
    """Raises ValueError unless they fit a model of these shapes."""
    there = linears(shapes)
    for linear, (A, B) in deltas.items():
        if linear not in there:
            raise ValueError(f"it changes {linear}, which is no linear that an adapter can change here")
        if (B.shape[0], A.shape[1]) != there[linear]:
            raise ValueError(f"{linear} is {(B.shape[0], A.shape[1])} (outputs, inputs), in the model {there[linear]}")


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The factors by linear, under the names lora_A, lora_B, init_lora_A, init_lora_B."""
    import torch

    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = PART.fullmatch(name)
        if not part:
            raise ValueError(
                f"the tensor {name} is no low-rank factor: what was trained besides must be merged into a base model"
            )
        if tensor.ndim != 2 or not torch.isfinite(tensor).all():
            raise ValueError(f"the tensor {name} is no matrix, or holds values that are not finite numbers")
        found.setdefault(part["linear"], {})[part["part"]] = tensor
    return found


def adapters_folder(data: Path) -> Path:
    """Where the adapters of a data directory lie, each in a folder of its name."""
    return data / "models" / "adapters"


class Adapters(Shelf[AdapterCard, Adapter]):
    """The adapters in a folder."""

    noun, kind, file = "adapter", "adapter", ADAPTER
    card = AdapterCard

    def load(self, name: str, ctx: Context, shapes: Shapes, base: Callable[[], str], base_name: str = "") -> Adapter:
        """
        For a model of these shapes (of all its tensors, or of the weights of its linears, by their official names).

        `base` gives the sha256 of the model's weights, `base_name` is the model's name.
        Raises NotFound, and Conflict when the adapter was made for another model or is damaged.
        """
        card = self._for(name, ctx, base, base_name)
        sha256 = hashlib.sha256(f"{card.sha256.get(ADAPTER)} {card.method} {card.alpha}".encode()).hexdigest()

        def read(tensors: Mapping[str, Tensor]) -> Adapter:
            return Adapter(name, sha256, fold(tensors, card.alpha, card.method))

        adapter = self._kept(card, name, sha256, read, lambda adapter: adapter.bytes)
        try:
            check(adapter.deltas, shapes)
        except ValueError as error:
            raise Conflict(
                f"the adapter {name!r} does not fit {card.base!r}, for which it is said to be: {error}"
            ) from None
        return adapter


def facts(folder: Path) -> dict[str, Any]:
    """What the adapter_config.json of the `peft` library says, in the words of our card. Raises BadRequest."""
    try:
        config = msgspec.json.decode((folder / "adapter_config.json").read_bytes(), type=dict[str, Any])
        alpha, rank = float(config["lora_alpha"]), int(config["r"])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise BadRequest(f"models: adapter_config.json of {folder} cannot be used: {error!r}") from None
    if odd := [key for key in ("use_dora", "alpha_pattern", "rank_pattern", "modules_to_save") if config.get(key)]:
        raise BadRequest(f"models: the adapter in {folder} uses {', '.join(odd)}, which is not served")
    if config.get("peft_type", "LORA") != "LORA":
        raise BadRequest(f"models: the adapter in {folder} is of type {config['peft_type']}; LORA alone is served")
    return {
        "alpha": alpha * rank**0.5 if config.get("use_rslora") else alpha,
        "method": "pissa" if str(config.get("init_lora_weights")).startswith("pissa") else "lora",
        "base": Path(str(config.get("base_model_name_or_path") or "")).name,
    }


def make(made: Path, given: Mapping[str, Any], base: Shapes) -> None:
    """
    Of made/model.safetensors, and what PiSSA began with in made/init.safetensors, make an adapter with its card.

    `given`: fields of its card. Raises BadRequest.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(made / "model.safetensors")
    if (init := made / "init.safetensors").exists():
        tensors |= load_file(init)
        init.unlink()
    try:
        parts = _parts(tensors)
        began = any("init_lora_A" in factors for factors in parts.values())
        method = str(given.get("method") or ("pissa" if began else "lora"))
        ranks = {len(factors["lora_A"]) for factors in parts.values() if "lora_A" in factors} or {0}
        alpha = float(given.get("alpha") or (max(ranks) if method == "pissa" else 0))
        if not alpha:
            raise ValueError(
                "it does not say its alpha; put it as adapter.safetensors (or .pth) into a folder with a card.json: "
                '{"alpha": …}, and add that'
            )
        if len(ranks) > 1:
            raise ValueError(f"its linears have different ranks, {min(ranks)} to {max(ranks)}")
        check(fold(tensors, alpha, method), base)
    except ValueError as error:
        raise BadRequest(f"models: the adapter cannot be used: {error}") from None
    flat = {f"{linear}.{part}": tensor.contiguous() for linear, both in parts.items() for part, tensor in both.items()}
    (made / "model.safetensors").unlink()
    save_file(flat, made / ADAPTER)
    own = {
        "method": method,
        "rank": max(ranks),
        "alpha": alpha,
        "targets": sorted({linear.split(".", 2)[2] for linear in parts}),
        "parameters": sum(tensor.numel() for name, tensor in flat.items() if ".init_" not in name),
    }
    seal(made, AdapterCard, {**given, **own}, ADAPTER)
