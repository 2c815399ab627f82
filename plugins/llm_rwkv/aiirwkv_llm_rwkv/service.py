"""One loaded model: its files, its runtime, its engine, and the states it keeps."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from aiirwkv.errors import PluginError

from .cache.states import StateCache
from .engine.grammar import Grammars
from .engine.loop import Engine, Told
from .network.checkpoint import load
from .network.model import RWKV, version
from .runtimes.linear import PRECISIONS
from .runtimes.runtime import Runtime, TorchRuntime
from .shelf.describe import UNCOUNTED, Shapes, shapes
from .shelf.library import Files
from .tokenizer import Tokenizer

__all__ = ["Service", "Wishes"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wishes:
    """How models are to be served: settings of the plugin."""

    data: Path
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    rows: int = 0
    states_memory: int = 0
    """Bytes, as below."""
    states_disk: int = 0


class Service:
    """A model at work. Loading takes seconds, so that it is done in a thread of its own."""

    def __init__(self, files: Files, wishes: Wishes, deliver: Callable[[list[Told]], None]) -> None:
        """Raises PluginError when the model cannot be served."""
        files.verify()
        self.files, self.card, self.name = files, files.card, files.card.name
        self.shapes: Shapes = shapes(files.weights)
        self.device = _device(wishes.device)
        self.precision = _precision(wishes.precision, self.device)
        _room(files, self.precision, self.device)
        self.threads = _threads(wishes.threads, self.shapes)
        runtime = _runtime(files.weights, self.shapes, self.device, self.precision, self.threads)
        for what, choice in runtime.choices.items():
            log.info("%s, %s: %s", self.name, what, choice)
        tokenizer = _tokenizer(files, runtime.vocabulary)
        self.countless = tokenizer.countless()
        self.grammars = Grammars(tokenizer, runtime.vocabulary, self.card.stop.tokens)
        self.parameters = sum(math.prod(shape) for name, shape in self.shapes.items() if not UNCOUNTED.fullmatch(name))
        self._sha256 = ""
        self.engine = Engine(
            runtime,
            tokenizer,
            name=self.name,
            cache=self._cache(wishes, runtime),
            rows=wishes.rows,
            threads=self.threads,
            deliver=deliver,
        )
        self.engine.start()

    @property
    def cache(self) -> StateCache | None:
        return self.engine.cache

    def sha256(self) -> str:
        """Of the weights. Those of a model without a card are hashed when that is first needed."""
        self._sha256 = self._sha256 or self.files.sha256()
        return self._sha256

    def close(self, finish: bool = False) -> None:
        """End; with `finish`, only after the work that there is."""
        self.engine.close(finish)
        if self.cache:
            self.cache.close()

    def about(self) -> dict[str, Any]:
        card = self.card
        return {
            "model": card.name,
            "version": card.version,
            "description": card.description,
            "parameters": self.parameters,
            "device": str(self.device),
            "precision": self.precision,
            "demonstration": card.demonstration,
            "languages": card.languages,
            "limits": msgspec.to_builtins(card.limits),
            "refusal": card.refusal,
        }

    def _cache(self, wishes: Wishes, runtime: Runtime) -> StateCache | None:
        if not (wishes.states_memory or wishes.states_disk):
            return None
        return StateCache(
            wishes.data / "states" / self.name,
            wishes.states_memory,
            wishes.states_disk,
            f"{self.sha256()} {self.precision} {runtime.layout.size}",
            runtime.layout.size,
            vocabulary=runtime.vocabulary,
            precision="float32" if self.precision == "float32" else "float16",  # so that a seed repeats its text
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise PluginError(f"plugins.llm_rwkv.device is {name!r}, which cannot be used here: {reason}") from None
    return device


def _precision(name: str, device: torch.device) -> str:
    if name == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    allowed = ("float32", "float16", "bfloat16", "int8", "nf4") if device.type == "cuda" else PRECISIONS
    if name not in allowed:
        raise PluginError(
            f"plugins.llm_rwkv.precision is {name!r}; on {device} it must be one of auto, {', '.join(allowed)}"
        )
    return name


def _threads(wished: int, shapes: Shapes) -> int:
    """Products of a small model are too short to be worth sharing out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wished or (1 if shapes["emb.weight"][1] < 512 else cores)


def _room(files: Files, precision: str, device: torch.device) -> None:
    """Raises PluginError when the weights alone cannot fit, before the machine begins to swap."""
    bits = {"int8": 8, "int4": 5, "nf4": 5}.get(precision, 16)
    need, free = files.weights.stat().st_size * bits // 16, _available(device)
    if need > free:
        raise PluginError(
            f"the model {files.card.name} needs about {need / 1e9:.1f} GB in {precision}, and {free / 1e9:.1f} GB are "
            f"free on {device}: unload another model, set plugins.llm_rwkv.precision to int8, or choose a smaller one"
        )


def _available(device: torch.device) -> int:
    """Bytes of memory that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # another system than Linux: the attempt will tell
        return 1 << 62


def _runtime(path: Path, shapes: Shapes, device: torch.device, precision: str, threads: int) -> Runtime:
    """What serves this checkpoint fastest here."""
    if version(shapes) in ("rwkv4", "rwkv5"):
        from .runtimes.package import PackageRuntime

        return PackageRuntime(path, str(device), {"float32": "fp32", "float16": "fp16"}.get(precision, "bf16"))
    if device.type == "cuda":
        return _on_cuda(path, device, precision)
    model = load(path, device)
    if model.emb.weight.dtype == torch.float16:  # which few processors can compute with
        model = load(path, device, torch.float32)
    return _on_cpu(model, precision, threads) if device.type == "cpu" else TorchRuntime(model)


def _on_cpu(model: RWKV, precision: Any, threads: int) -> Runtime:
    try:
        from .runtimes.cpu import CpuRuntime, disagreement, suits

        reason = suits(model) or disagreement(model.version)
        if not reason:
            return CpuRuntime(model, precision, threads)
    except (ImportError, RuntimeError) as error:
        reason = f"what compiles it cannot be used here: {str(error).partition(chr(10))[0]}"
    runtime = TorchRuntime(model.float())
    runtime.choices["runtime"] = f"plain torch, in float32; the compiled runtime does not serve: {reason}"
    return runtime


def _on_cuda(path: Path, device: torch.device, precision: str) -> Runtime:
    from .runtimes.cuda import CudaRuntime

    if precision in ("int8", "nf4"):
        from .runtimes.quantise import quantise

        return CudaRuntime(quantise(load(path, torch.device("cpu"), torch.bfloat16), precision, device))  # type: ignore[arg-type]
    return CudaRuntime(load(path, device, getattr(torch, precision)))


def _tokenizer(files: Files, rows: int) -> Tokenizer:
    vocabulary = files.vocabulary(rows)
    try:
        tokenizer = Tokenizer.load(vocabulary)
    except (OSError, ValueError) as error:
        raise PluginError(f"the vocabulary {vocabulary} cannot be used: {error}") from None
    if tokenizer.size > rows:
        raise PluginError(
            f"the vocabulary {vocabulary} does not belong to {files.weights}: its ids go up to {tokenizer.size - 1}, "
            f"the model's up to {rows - 1}"
        )
    return tokenizer
