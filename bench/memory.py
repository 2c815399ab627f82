"""
The memory that serving takes: reckoned for models of any size, and checked against what is really allocated.

    python bench/memory.py [--slots 8] [--chunk 512] [--check] [--output FILE]

The table says, for generating, embedding and ranking on one GPU together, which precision fits into what the RAG system
that this one follows is said to need: 4, 7.5, 18 and 30 GB for models of 1.6, 3, 7 and 14 billion parameters. It needs
no GPU; `--check` makes small models and compares what is reckoned with what is allocated.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import weakref
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from aiirwkv_llm_rwkv.network.model import RWKV, Sizes
from aiirwkv_llm_rwkv.network.rwkv6 import RWKV6, Sizes6
from aiirwkv_llm_rwkv.network.rwkv7 import RWKV7, Sizes7
from aiirwkv_llm_rwkv.runtimes.memory import BGE_M3, CONTEXT, Memory, estimate
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.random_checkpoint import ranks, tensors

SHAPES = {"1.6B": (24, 2048), "3B": (32, 2560), "7B": (32, 4096), "14B": (61, 4096)}
BUDGET = {"1.6B": 4.0, "3B": 7.5, "7B": 18.0, "14B": 30.0}
"""GB, as the RAG system that this one follows states them."""
READ = 4096
"""Tokens that the embedder, and the ranker, read at once."""


def sizes_of(version: str, layers: int, width: int, vocabulary: int = 65536) -> tuple[type[RWKV], Sizes]:
    """The sizes of an official model of that shape."""
    low = ranks(version, layers, width)
    shared = {"vocabulary": vocabulary, "layers": layers, "width": width, "heads": width // 64}
    if version == "rwkv7":
        low = {f"rank_{name}": rank for name, rank in low.items()}
        return RWKV7, Sizes7(**shared, hidden=4 * width, **low)  # type: ignore[arg-type]
    low = {f"rank_{name}": rank for name, rank in low.items()}
    return RWKV6, Sizes6(**shared, hidden=int(3.5 * width // 32) * 32, **low)


TOGETHER = {"alone": 0, "with the embedder": 1, "with both": 2}


def table(slots: int, chunk: int, say: Any) -> None:
    encoder = BGE_M3.estimate(READ)
    say(
        f"\nIn GB (10⁹ bytes). Generating: {slots} texts at once, prompts in chunks of {chunk} tokens. CUDA itself\n"
        f"takes about {CONTEXT / 1e9:.1f}. An embedder (BGE-M3), and a ranker (BGE-reranker-v2-m3), in float16,\n"
        f"{READ} tokens at once: {encoder.total / 1e9:.2f} each. In bold: within the limit.\n"
    )
    say(f"| model | limit | precision | weights | embedding | states | work, logits | {' | '.join(TOGETHER)} |")
    say("|---" * 10 + "|")
    best: dict[tuple[str, str], str] = {}
    for name, (layers, width) in SHAPES.items():
        for version in ("rwkv6", "rwkv7"):
            kind, sizes = sizes_of(version, layers, width)
            for precision in ("bfloat16", "int8", "nf4"):
                need = estimate(kind, sizes, precision, slots, chunk, slots)
                parts = (need.weights, need.embedding, need.states, need.workspace + need.logits)
                cells = [f"{part / 1e9:.2f}" for part in parts]
                for what, encoders in TOGETHER.items():
                    total = (need.total + CONTEXT + encoders * encoder.total) / 1e9
                    fits = total <= BUDGET[name]
                    cells.append(f"**{total:.2f}**" if fits else f"{total:.2f}")
                    if fits:
                        best.setdefault((f"{name} {version}", what), f"{precision} ({total:.2f})")
                say(f"| {name} {version} | {BUDGET[name]} | {precision} | {' | '.join(cells)} |")
    say("\nThe best precision that keeps within the limit:\n")
    for name in SHAPES:
        for version in ("rwkv6", "rwkv7"):
            found = (f"{what} {best.get((f'{name} {version}', what), 'none')}" for what in TOGETHER)
            say(f"- {name} {version}, {BUDGET[name]} GB: {', '.join(found)}")


# -- the check ---------------------------------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that torch makes as long as it lasts: those that live, and the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage: Any, given: set[int]) -> None:
        key = id(storage)
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        gc.collect()


def made(version: str, layers: int, width: int, vocabulary: int, dtype: torch.dtype) -> RWKV:
    from aiirwkv_llm_rwkv.network.checkpoint import UNUSED

    kind, sizes = sizes_of(version, layers, width, vocabulary)
    with torch.device("meta"):
        model = kind(sizes)
    content = tensors(version, layers, width, vocabulary=vocabulary, dtype=dtype)
    model.load_state_dict({name: tensor for name, tensor in content.items() if name not in UNUSED}, assign=True)
    return model.eval().requires_grad_(False)


def ragged_peak(version: str, layers: int, width: int, tokens: int) -> tuple[int, Memory]:
    """Bytes allocated at the peak of one batch of a bfloat16 model on the GPU's code, and what is reckoned."""
    from aiirwkv_llm_rwkv.runtimes import trial
    from aiirwkv_llm_rwkv.runtimes.cuda import CudaRuntime
    from aiirwkv_llm_rwkv.runtimes.ragged import Ragged
    from aiirwkv_llm_rwkv.runtimes.runtime import Piece

    trial.choose = lambda runtime, ragged: None
    model = made(version, layers, width, 1024, torch.bfloat16)
    runtime = CudaRuntime(model, slots=1)
    assert isinstance(runtime.ragged, Ragged)
    batch = runtime._batch([Piece(0, [1] * tokens)])
    with torch.inference_mode(), Allocated() as allocated:
        runtime.ragged(batch)
    return allocated.peak, estimate(type(model), model.sizes, "bfloat16", 1, tokens)


def resident() -> dict[str, float]:
    """Bytes that a small model on this CPU takes of the system, and what is reckoned."""
    import psutil
    from aiirwkv_llm_rwkv.runtimes.runtime import Piece, TorchRuntime

    torch.set_num_threads(1)

    def serving() -> TorchRuntime:
        runtime = TorchRuntime(made("rwkv7", 6, 512, 32768, torch.float32), slots=63)
        for slot in range(63):
            runtime.put(slot, None)  # memory is only taken when it is written to
        runtime.forward([Piece(0, [1, 2])])
        gc.collect()
        return runtime

    serving()  # what torch and the system's allocator keep for themselves
    gc.collect()
    before = psutil.Process().memory_info().rss
    runtime = serving()
    taken = psutil.Process().memory_info().rss - before
    need = estimate(type(runtime.model), runtime.model.sizes, "float32", 62, 1)
    return {"taken": taken, "reckoned": need.weights + need.embedding + need.states}


def check(say: Any) -> None:
    say("\n| reckoned and allocated | reckoned MB | allocated MB | allocated / reckoned |\n|---|---|---|---|")
    found = child("resident")
    line = (found["reckoned"], found["taken"])
    say(f"| weights, states: RSS, rwkv7 6×512 float32, 63 states | {_row(*line)} |")
    for version in ("rwkv7", "rwkv6"):
        for layers, width, tokens in ((2, 128, 40), (2, 512, 17)):
            allocated, need = child("ragged", version, layers, width, tokens)
            say(f"| one batch: {version} {layers}×{width} bfloat16, {tokens} tokens | {_row(need, allocated)} |")


def _row(reckoned: float, taken: float) -> str:
    return f"{reckoned / 1e6:.3f} | {taken / 1e6:.3f} | {taken / reckoned:.2f}"


def child(work: str, *arguments: object) -> Any:
    """In a process of its own, where Triton interprets."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", work, *map(str, arguments)]
    # memory that is freed goes back to the system at once, so that what is resident is what is in use
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        work, *arguments = given.child
        if work == "resident":
            print(json.dumps(resident()))
        else:
            peak, need = ragged_peak(arguments[0], *map(int, arguments[1:]))
            print(json.dumps([peak, need.workspace + need.logits]))
        return
    lines = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"# What serving takes of a GPU's memory: reckoned, without one, {date.today()}")
    table(given.slots, given.chunk, say)
    if given.check:
        check(say)
    if given.output:
        given.output.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
