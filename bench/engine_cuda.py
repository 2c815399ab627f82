"""
The RWKV worker on a GPU: random weights of the shapes of official models, made where they are used.

    python bench/engine_cuda.py [--models 1.5B 2.9B 7.2B] [--versions rwkv7] [--precision bfloat16] [--output FILE]
    python bench/engine_cuda.py --device cpu --tiny

Prints tokens per second with what memory bandwidth or arithmetic of this machine, measured, allow at best; and those of
the `rwkv` package in fp16, which knows no batch. `on the device` is the model alone; `to the CPU` is with the copy of
all logits, as the engine samples from them. Half of the inner activations of random weights are zeros, of trained ones
77 to 90 %: one stream gains from that.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from aiirwkv_llm_rwkv.network.model import RWKV, Sizes
from aiirwkv_llm_rwkv.runtimes.cuda import CudaRuntime
from aiirwkv_llm_rwkv.runtimes.memory import estimate, parameters, state_bytes
from aiirwkv_llm_rwkv.runtimes.quantise import quantise
from aiirwkv_llm_rwkv.runtimes.runtime import Piece, Runtime

from bench.memory import sizes_of

SHAPES = {"1.5B": (24, 2048), "2.9B": (32, 2560), "7.2B": (32, 4096)}
TINY = {"tiny": (2, 64)}
BATCHES = (1, 64, 256, 512)
PROMPT = 2048

AIM = {  # tok/s on an H200: of the texts at once, and of a prompt
    "1.5B": {1: 350, 64: 12_000, 256: 30_000, 512: 40_000, "prefill": 50_000},
    "2.9B": {1: 230, 64: 8_000, 256: 20_000, 512: 27_000, "prefill": 30_000},
    "7.2B": {1: 180, 64: 7_000, 256: 16_000, 512: 20_000, "prefill": 18_000},
}


def random_model(kind: type[RWKV], sizes: Sizes, dtype: torch.dtype, device: torch.device) -> RWKV:
    """Sound, but senseless: norms of one, linears that keep the size of what they are given."""
    with torch.device("meta"):
        model = kind(sizes)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or ".ln" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("weight") and name != "emb.weight":
            parameter.normal_(0, 0.7 / math.sqrt(parameter.shape[1]))
        elif parameter.dim() > 1 and max(parameter.shape) > 1 and parameter.shape[-2] > 1:
            parameter.normal_(0, 1 / math.sqrt(parameter.shape[-2]) if "1" in name else 0.1)
        else:
            parameter.uniform_(-1, 1)
    return model


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Of one call, on average over so many seconds, after two that warm up."""
    work(), work()
    wait(device)
    begin, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < at_least:
        for _ in range(max(1, calls)):
            work()
        calls += max(1, calls)
        wait(device)
    return passed / calls


def limits(device: torch.device, tiny: bool) -> tuple[float, float]:
    """Bytes per second read and written, and floating-point operations per second in bfloat16, that are possible."""
    a = torch.zeros((16 if tiny else 2048) << 20, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    bandwidth = 2 * a.nbytes / seconds(lambda: b.copy_(a), device, 0.2)
    n = 256 if tiny else 8192
    x = torch.ones(n, n, dtype=torch.bfloat16, device=device).normal_()
    return bandwidth, 2 * n**3 / seconds(lambda: x @ x, device, 0.2)


def on_device(runtime: Runtime, pieces: list[Piece]) -> Callable[[], object]:
    """The model alone, where the runtime can leave its logits on the device."""
    if isinstance(runtime, CudaRuntime) and runtime.ragged:

        def run() -> None:
            with torch.inference_mode():
                runtime.logits(pieces)

        return run
    return lambda: runtime.forward(pieces)


def measure(given: argparse.Namespace, name: str, version: str, bounds: tuple[float, float], say: Any) -> None:
    device, dtype = torch.device(given.device), torch.float16 if given.precision == "float16" else torch.bfloat16
    kind, sizes = sizes_of(version, *given.shapes[name], vocabulary=256 if given.tiny else 65536)
    small = given.precision in ("int8", "nf4")
    model = random_model(kind, sizes, dtype, torch.device("cpu") if small else device)
    model = quantise(model, given.precision, device) if small else model
    batches = [size for size in BATCHES if not given.tiny or size <= 64]
    began = time.perf_counter()
    runtime = CudaRuntime(model, slots=max(batches))
    loaded = time.perf_counter() - began
    for slot in range(max(batches)):
        runtime.put(slot, None)
    table, linears, rest = parameters(kind, sizes)
    work = 2 * (linears + rest)
    read = sum(p.nbytes for p in model.parameters()) - model.emb.weight.nbytes
    bandwidth, peak = bounds
    aims = AIM.get(name, {}) if version == "rwkv7" and not small else {}

    say(f"\n## {version} {name} {given.precision}, {(table + linears + rest) / 1e9:.2f} billion parameters\n")
    for what, choice in runtime.choices.items():
        say(f"- {what}: {choice}")
    say(f"- ready after {loaded:.1f} s\n")
    say("| tok/s | on the device | to the CPU | at best | of that | aim (H200) |")
    say("|---|---|---|---|---|---|")

    def row(what: str, tokens: int, pieces: list[Piece], best: float, aim: Any) -> None:
        alone = tokens / seconds(on_device(runtime, pieces), device, given.seconds)
        copied = tokens / seconds(lambda: runtime.forward(pieces), device, given.seconds)
        say(f"| {what} | **{alone:.0f}** | {copied:.0f} | {best:.0f} | {alone / best:.0%} | {aim} |")

    for size in batches:
        moved = read + 2 * size * state_bytes(runtime.layout)
        best = size / max(moved / bandwidth, size * work / peak)
        row(f"{size} texts", size, [Piece(slot, [slot % 200]) for slot in range(size)], best, aims.get(size, ""))
    prompt = 64 if given.tiny else PROMPT
    body = work - 2 * sizes.vocabulary * sizes.width
    best = prompt / max(read / bandwidth, prompt * body / peak)
    tokens = torch.randint(0, sizes.vocabulary, (prompt,)).tolist()
    row(f"a prompt of {prompt}", prompt, [Piece(0, tokens)], best, aims.get("prefill", ""))
    if device.type == "cuda":
        reckoned = estimate(kind, sizes, given.precision, max(batches), prompt, max(batches)).total / 1e9
        most = torch.cuda.max_memory_allocated(device) / 1e9
        say(
            f"\nMost memory allocated: {most:.2f} GB, reckoned {reckoned:.2f} (with {max(batches)} states, and graphs)."
        )


def package(device: str, version: str, layers: int, width: int, vocabulary: int, at_least: float) -> dict[str, float]:
    """Tokens per second of the `rwkv` package in fp16; it is given tensors where it would read a file."""
    precision = "fp16" if device.startswith("cuda") else "fp32"
    dtype = torch.float16 if precision == "fp16" else torch.float32
    kind, sizes = sizes_of(version, layers, width, vocabulary)
    weights = dict(random_model(kind, sizes, dtype, torch.device(device)).state_dict())
    torch.load = lambda *args, **kwargs: weights
    from rwkv.model import RWKV as Package

    theirs = Package(model="random", strategy=f"{device} {precision}")
    tokens = torch.randint(0, vocabulary, (PROMPT if vocabulary > 1024 else 64,)).tolist()
    _, state = theirs.forward(tokens[:4], None)
    where = torch.device(device)
    prefill = seconds(lambda: theirs.forward(tokens, None), where, at_least)
    return {
        "decode": 1 / seconds(lambda: theirs.forward([7], state), where, at_least),
        "prefill": len(tokens) / prefill,
    }


def ask_package(given: argparse.Namespace, name: str, version: str, say: Any) -> None:
    """With its own CUDA kernels if they can be compiled, else without."""
    vocabulary = 256 if given.tiny else 65536
    shape = (version, *given.shapes[name], vocabulary, given.seconds)
    reason = ""
    for kernels in ("1", "0") if given.device.startswith("cuda") else ("0",):
        environment = {
            **os.environ,
            "RWKV_V7_ON": "1" if version == "rwkv7" else "0",
            "RWKV_JIT_ON": "1",
            "RWKV_CUDA_ON": kernels,
        }
        command = [sys.executable, "-W", "ignore", __file__, "--child", given.device, *map(str, shape)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            reason = "it takes more than 300 s"
            continue
        if done.returncode == 0:
            found = json.loads(done.stdout.splitlines()[-1])
            own = "with its own kernels" if kernels == "1" else "without its own kernels"
            decode, prefill = f"1 text {found['decode']:.0f} tok/s", f"a prompt {found['prefill']:.0f} tok/s"
            say(f"\nThe `rwkv` package, {own}: {decode}, {prefill}.")
            return
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    say(f"\nThe `rwkv` package cannot run here: {reason}")


def run(given: argparse.Namespace) -> None:
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    device = torch.device(given.device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU: a rehearsal, not a measurement"
    say(f"# The engine on {hardware}, {date.today()}, torch {torch.__version__}\n")
    bandwidth, peak = bounds = limits(device, given.tiny)
    say(f"Measured: {bandwidth / 1e9:.0f} GB/s copied, {peak / 1e12:.2f} TFLOP/s in bfloat16.")
    for version in given.versions:
        for name in given.models:
            try:
                measure(given, name, version, bounds, say)
            except MemoryError as error:
                say(f"\n{version} {name}: {error}")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            if not given.no_package:
                ask_package(given, name, version, say)
    if given.output:
        given.output.write_text("\n".join(lines) + "\n", "utf-8")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--versions", nargs="+", choices=("rwkv7", "rwkv6"), default=["rwkv7"])
    parser.add_argument("--precision", choices=("bfloat16", "float16", "int8", "nf4"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each figure is measured")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that all of this runs")
    parser.add_argument("--no-package", action="store_true")
    parser.add_argument("--output", type=Path)
    result = parser.parse_args(given)
    result.shapes = TINY if result.tiny else SHAPES
    if result.tiny:
        result.models, result.seconds = list(TINY), min(result.seconds, 0.02)
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        where, which, *numbers = sys.argv[2:]
        print(json.dumps(package(where, which, *map(int, numbers[:3]), float(numbers[3]))))
    else:
        run(arguments())
