# mypy: disable-error-code="import-not-found, import-untyped"
"""What the GPU's runtime uses, chosen at load on the model itself: the fastest of what says the same as plain torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.triton import wkv
from .runtime import Piece

if TYPE_CHECKING:
    from .cuda import CudaRuntime
    from .ragged import Ragged, Scan

__all__ = ["choose"]

NEAR = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""How far it may be from plain torch, root mean square by standard deviation: rounding stays below, no error does."""
LENGTHS = (37, 1, 16, 50)
"""Tokens of the texts that are compared; the second has a single one."""
PROMPT = 256
"""Tokens of the text whose reading is timed."""
LONG = 30.0
"""Seconds after which nothing more is tried."""

SINGLE: dict[str, dict[str, bool]] = {
    "batched products": {"batched": True, "sparse": False},
    "batched products, skipping what meets a zero": {"batched": True, "sparse": True},
    "single products": {"batched": False, "sparse": False},
    "single products, skipping what meets a zero": {"batched": False, "sparse": True},
}
"""How the linears of a single token may be multiplied."""

Said = tuple[Tensor, Tensor]
Options = Callable[[], dict[str, Any]]


def choose(runtime: CudaRuntime, ragged: Ragged) -> None:
    """Set what both use, and the runtime's choices. Raises LookupError when nothing says the same as plain torch."""
    until, choices = time.perf_counter() + LONG, runtime.choices
    expected = _say(runtime, None)
    scans = dict(_scans(ragged.model.version, runtime.dtype, runtime.device))
    choices["prefill"] = _fastest(runtime, ragged, scans, PROMPT, expected, until)
    choices["runtime"] = f"Triton kernels, which agree with plain torch on this {runtime.device.type}"
    choices["graphs"] = _graphs(runtime, ragged, expected)
    single = {name: options.copy for name, options in SINGLE.items()}
    choices["decode"] = _fastest(runtime, ragged, single, 1, expected, until)


def _graphs(runtime: CudaRuntime, ragged: Ragged, expected: Said) -> str:
    """Whether texts of one token each are run by CUDA graphs."""
    if runtime.device.type != "cuda":
        return f"off: a {runtime.device.type} has none"
    runtime.graphs = True
    apart = _apart(_say(runtime, ragged), expected)
    if not runtime.graphs:  # it has said why
        return runtime.choices["graphs"]
    runtime.graphs = apart <= NEAR[runtime.dtype]
    return "on, where every text has one token" if runtime.graphs else f"off: what they say is off by {apart:.2g}"


def _fastest(
    runtime: CudaRuntime, ragged: Ragged, candidates: dict[str, Options], length: int, expected: Said, until: float
) -> str:
    """Use the fastest candidate that says what is expected → its name, and what came of the others."""
    best, chosen, use, tried = float("inf"), "", {}, []
    for name, options in candidates.items():
        if chosen and time.perf_counter() > until:
            tried.append(f"{name} not tried for lack of time")
            continue
        try:
            given = options()
            ragged.use(**given)
            if not (apart := _apart(_say(runtime, ragged), expected)) <= NEAR[runtime.dtype]:
                raise ArithmeticError(f"off by {apart:.2g}")
            seconds = _seconds(runtime, ragged, length)
        except Exception as error:  # one candidate less
            reason = str(error).partition("\n")[0][:160]
            tried.append(f"{name} failed with {type(error).__name__}: {reason}")
            continue
        tried.append(f"{name} {1e3 * seconds:.2f} ms")
        if seconds < best:
            best, chosen, use = seconds, name, given
    if not chosen:
        raise LookupError("; ".join(tried))
    ragged.use(**use)
    return f"{chosen}, the fastest for {length} {'token' if length == 1 else 'tokens'}: {'; '.join(tried)}"


def _say(runtime: CudaRuntime, ragged: Ragged | None) -> Said:
    """Some texts of different lengths, a token each, and one alone → all logits, and the states."""
    texts = [_words(runtime, n, slot) for slot, n in enumerate(LENGTHS)]
    steps = [texts, [words[:1] for words in texts], texts[1:2]]
    with runtime.on_trial(len(texts), ragged):
        logits = [runtime.forward([Piece(slot, words) for slot, words in enumerate(step)]) for step in steps]
        return torch.cat(logits), runtime.pool[: len(texts)].clone()


def _apart(mine: Said, theirs: Said) -> float:
    """The worst difference, root mean square by standard deviation."""
    return max(float((a - b).square().mean().sqrt() / b.std()) for a, b in zip(mine, theirs, strict=True))


def _seconds(runtime: CudaRuntime, ragged: Ragged, length: int) -> float:
    """What a text takes: the best of a few, after one that compiles."""
    cuda, best = runtime.device.type == "cuda", float("inf")
    pieces = [Piece(0, _words(runtime, length, 0))]
    with runtime.on_trial(1, ragged):
        for i in range(6 if cuda else 2):
            begin = time.perf_counter()
            runtime.logits(pieces)
            if cuda:
                torch.cuda.synchronize(runtime.device)
            best = min(best, time.perf_counter() - begin) if i else best
    return best


def _words(runtime: CudaRuntime, count: int, seed: int) -> list[int]:
    return torch.randint(0, runtime.vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _scans(version: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Options]]:
    """The ways to read many tokens."""
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    precision = "tf32x3" if tensor_cores and dtype != torch.float32 else "ieee"
    for block in (32, 16):
        chunked = partial(wkv, block=block, precision=precision)
        yield f"chunks, {block} values at a time", partial(dict, scan=chunked)
    yield "token by token", partial(dict, scan=partial(wkv, chunked=False, block=16))
    if dtype != torch.float32:  # whose kernels round to less
        yield "flash-linear-attention", lambda: {"scan": _flash_linear_attention(dtype)}


def _flash_linear_attention(dtype: torch.dtype) -> Scan:
    """The kernels of the package of that name. Raises ImportError."""
    from fla.ops.rwkv6 import chunk_rwkv6
    from fla.ops.rwkv7 import chunk_rwkv7

    def scan(
        r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, ab: tuple[Tensor, Tensor] | None, u: Tensor | None, y: Tensor,
        texts: Any, offset: int, heads: int,
    ) -> None:  # fmt: skip
        head = r.shape[1] // heads

        def split(x: Tensor) -> Tensor:
            return x.view(1, -1, heads, head).to(dtype)

        slots = texts.slots.long()
        states = texts.pool[:, offset : offset + heads * head * head].unflatten(1, (heads, head, head))
        ends = torch.cat([texts.begin, texts.begin[-1:] + texts.length[-1:]]).long()
        options = {"scale": 1.0, "initial_state": states[slots], "output_final_state": True, "cu_seqlens": ends}
        decay = log_w.view(1, -1, heads, head)
        if ab:
            a, b = map(split, ab)
            result, state = chunk_rwkv7(split(r), decay, split(k), split(v), a, b, safe_gate=True, **options)
        else:
            assert u is not None
            result, state = chunk_rwkv6(split(r), split(k), split(v), decay, u.view(heads, head), **options)
        y.copy_(result.view_as(y))
        states[slots] = state.to(states.dtype)

    return scan
