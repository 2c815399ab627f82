"""
The RWKV worker against the `rwkv` package, in one run, on one core, with random weights that it makes.

    python bench/engine.py [--sizes 0.1B 0.4B] [--versions rwkv7 rwkv6] [--rounds 5] [--output FILE]
    python bench/engine.py --device cuda

Prints ratios to the package in fp32 on the same core, what is measured by turns in the same process, and beside each
row what memory bandwidth or arithmetic of this machine allow at best. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

SIZES = {"0.1B": (12, 768), "0.4B": (24, 1024)}
PRECISIONS = ("float32", "bfloat16", "int8")
PROMPTS = (256, 512, 1024)
STREAMS = 16
VOCABULARY = 65536

MUST = {  # ratio to the package: at least, and aimed at
    ("prefill", "float32"): (2.2, 3.5),
    ("prefill", "bfloat16"): (3.0, 5.0),
    ("prefill", "int8"): (3.5, 6.0),
    ("decode 1", "float32"): (1.15, 1.6),
    ("decode 1", "bfloat16"): (1.8, 2.8),
    ("decode 1", "int8"): (2.5, 4.0),
    ("decode 16", "float32"): (8.0, 12.0),
    ("decode 16", "bfloat16"): (11.0, 18.0),
}


# -- what runs in a process of its own ---------------------------------------------------------------------------------


def best(work: Callable[[], object], tries: int = 3) -> float:
    """Seconds of the fastest try."""
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def pin(core: int) -> None:
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def package(path: Path) -> Any:
    """The package's model, in fp32. It takes the path without the ending."""
    from rwkv.model import RWKV

    with quiet():
        return RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")


class quiet:
    """Nothing on the standard output for a while: the package prints what it loads."""

    def __enter__(self) -> None:
        self._out, sys.stdout = sys.stdout, open(os.devnull, "w")

    def __exit__(self, *exc: object) -> None:
        sys.stdout.close()
        sys.stdout = self._out


def runtime(path: Path, precision: str, slots: int = STREAMS) -> Any:
    import torch
    from aiirwkv_llm_rwkv.network.checkpoint import load
    from aiirwkv_llm_rwkv.runtimes.cpu import CpuRuntime

    model = load(path.with_suffix(".safetensors"), torch.device("cpu"), torch.bfloat16)
    return CpuRuntime(model, precision, 1, slots)  # type: ignore[arg-type]


def speed(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds per token by who and what; everybody has a turn in every round, and the fastest counts."""
    import torch
    from aiirwkv_llm_rwkv.runtimes.runtime import Piece

    torch.manual_seed(0)
    tokens = torch.randint(1, VOCABULARY - 1, (max(PROMPTS),)).tolist()
    theirs = package(path)
    works: dict[tuple[str, str], tuple[Callable[[], object], int]] = {}
    for length in PROMPTS:
        works["package", f"prefill {length}"] = (lambda n=length: theirs.forward(tokens[:n], None), length)  # type: ignore[misc]
    _, state = theirs.forward(tokens[:8], None)
    works["package", "decode 1"] = (lambda: [theirs.forward([7], [t.clone() for t in state]) for _ in range(4)], 4)
    choices = {}
    for precision in PRECISIONS:
        ours = runtime(path, precision)
        choices[precision] = ours.choices
        for length in PROMPTS:
            works[precision, f"prefill {length}"] = (
                lambda o=ours, n=length: [o.forward([Piece(0, tokens[i : min(i + 256, n)])]) for i in range(0, n, 256)],  # type: ignore[misc]
                length,
            )
        works[precision, "decode 1"] = (lambda o=ours: [o.forward([Piece(0, [7])]) for _ in range(4)], 4)  # type: ignore[misc]
        batch = [Piece(slot, [7 + slot]) for slot in range(STREAMS)]
        works[precision, f"decode {STREAMS}"] = (lambda o=ours, b=batch: [o.forward(b) for _ in range(2)], 2 * STREAMS)  # type: ignore[misc]
    found: dict[str, float] = {}
    for _ in range(rounds):
        for (who, what), (work, count) in works.items():
            seconds = best(work, 1) / count
            found[f"{who} {what}"] = min(seconds, found.get(f"{who} {what}", seconds))
    return {"seconds": found, "choices": choices}


def memory(path: Path, who: str) -> dict[str, Any]:
    """Megabytes that stay in memory after one token: of the import, and in all."""
    import torch
    from aiirwkv_llm_rwkv.runtimes.runtime import Piece

    torch.set_num_threads(1)
    if who == "package":
        import rwkv.model  # noqa: F401

        imported = resident()
        model = package(path)
        model.forward([7], None)
    else:
        import aiirwkv_llm_rwkv.runtimes.cpu  # noqa: F401

        imported = resident()
        model = runtime(path, who, 1)
        model.forward([Piece(0, [7])])
    import gc

    gc.collect()
    found = {"imported": imported, "all": resident()}
    del model
    return found


def resident() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e6


def service(path: Path, precision: str, folder: Path) -> Any:
    """The model as the plugin serves it, with its engine and its state cache."""
    from aiirwkv_llm_rwkv.engine.loop import hand_out
    from aiirwkv_llm_rwkv.service import Service, Wishes
    from aiirwkv_llm_rwkv.shelf.library import Files

    wishes = Wishes(data=folder, precision=precision, threads=1, states_memory=1 << 30, states_disk=1 << 30)
    return Service(Files.at(path.with_suffix(".safetensors")), wishes, hand_out)


class Asked:
    """A run of random tokens, and when those came that it wrote: greedily, and whole characters, each shown at once."""

    def __init__(
        self, served: Any, prompt: Sequence[int], tokens: int, cuts: Sequence[int] = (), cache: bool = False
    ) -> None:
        from aiirwkv_llm_rwkv.card import Sampling
        from aiirwkv_llm_rwkv.engine.output import Output
        from aiirwkv_llm_rwkv.engine.requests import Run
        from aiirwkv_llm_rwkv.engine.sampling import Sampler

        self.times: list[float] = []
        self.error: object = None
        self.done = threading.Event()
        greedy = Sampling(temperature=0.0, presence=0.0, frequency=0.0)
        self.run = Run(
            prompt=prompt,
            samplers=[Sampler(greedy, ban=unshown(served), rows=served.engine.runtime.vocabulary)],
            outputs=[Output()],
            emit=self.told,
            max_tokens=tokens,
            owner="bench",
            cache=cache,
            root=served.cache.root("bench"),
            cuts=cuts,
        )
        self.began = time.perf_counter()
        served.engine.submit(self.run)

    def told(self, piece: Any) -> None:
        self.times.append(time.perf_counter())
        if isinstance(piece, Exception):
            self.error = piece
        if self.error or piece.usage:
            self.done.set()

    def seconds(self) -> float:
        """From the request to its end."""
        self.done.wait()
        if self.error:
            raise RuntimeError(self.error)
        return self.times[-1] - self.began


@cache
def unshown(served: Any) -> list[int]:
    """The tokens that are not text by themselves."""
    tokens = served.engine.tokenizer.tokens
    return [id for id in range(served.engine.runtime.vocabulary) if not tokens.get(id, b"").decode("utf-8", "ignore")]


def random_tokens(count: int, seed: int) -> list[int]:
    import torch

    numbers: list[int] = torch.randint(1, 60_000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return numbers


def states(path: Path, precision: str, rounds: int) -> dict[str, float]:
    """Seconds to the first token, with and without what was read before."""
    with tempfile.TemporaryDirectory() as folder:
        served = service(path, precision, Path(folder))
        prefix, document = random_tokens(512, 1), random_tokens(4000, 2)
        Asked(served, prefix, 1, cache=True).seconds()
        Asked(served, document, 1, cache=True).seconds()
        found: dict[str, float] = {}

        def note(what: str, seconds: float) -> None:
            found[what] = min(seconds, found.get(what, seconds))

        for turn in range(rounds):
            new, question = random_tokens(8, 10 + turn), random_tokens(16, 20 + turn)
            note("520 tokens", Asked(served, [*prefix, *new], 1).seconds())
            note("8 after 512 kept", Asked(served, [*prefix, *new], 1, [512], cache=True).seconds())
            note("16 tokens", Asked(served, question, 1).seconds())
            note("16 after 4000 kept", Asked(served, [*document, *question], 1, [4000], cache=True).seconds())
        served.close()
    return found


def gaps(path: Path, precision: str) -> dict[str, float]:
    """Seconds between the tokens of an answer: usually, and at most while a prompt of 4 000 tokens arrives."""
    with tempfile.TemporaryDirectory() as folder:
        served = service(path, precision, Path(folder))
        words = random_tokens(4000, 2)
        answer = Asked(served, random_tokens(16, 1), 100_000)
        time.sleep(3)
        before = len(answer.times)
        prompt = Asked(served, words, 1)
        prompt.done.wait()
        answer.run.cancel()
        times = answer.times
        usual = sorted(
            b - a for a, b in zip(times[before // 3 : before], times[before // 3 + 1 : before], strict=False)
        )
        during = [b - a for a, b in itertools.pairwise(times[before - 1 :])]
        served.close()
    during.sort()
    return {"usual": usual[len(usual) // 2], "longest": during[-1], "most": during[int(0.99 * len(during))]}


TEXT = 48
"""Tokens that each of the clients asks for."""


def own_rate(served: Any, streams: int) -> float:
    """Tokens per second of so many texts at once, asked of the engine itself."""
    start = time.perf_counter()
    runs = [Asked(served, random_tokens(8, seed), TEXT) for seed in range(streams)]
    for run in runs:
        run.seconds()
    return streams * TEXT / (time.perf_counter() - start)


async def serve(config: Any, path: Path, precision: str, folder: Path, core: int, pipe: Any) -> None:
    from aiirwkv import Bus
    from aiirwkv.config import Config
    from aiirwkv.plugins import Registry
    from aiirwkv.worker import serving
    from aiirwkv_llm_rwkv import LlmRwkv

    pin(core)
    async with Bus.connect(config) as bus:
        plugin = LlmRwkv(model=str(path.with_suffix(".safetensors")), precision=precision, threads=1).attach(
            folder, bus
        )
        registry = Registry()
        registry.add("llm_rwkv", plugin)
        async with serving(bus, registry, Config(), "bench"):
            served = plugin._serving.find(None)
            while await asyncio.to_thread(pipe.recv):
                pipe.send(await asyncio.to_thread(own_rate, served, STREAMS))


def worker(*arguments: Any) -> None:
    import anyio

    anyio.run(serve, *arguments, backend_options={"use_uvloop": True})  # as worker processes do


async def through_the_bus(path: Path, precision: str, core: int, rounds: int) -> dict[str, float]:
    """Tokens per second of 16 clients that stream, and of the engine that they ask, by turns."""
    import anyio
    from aiirwkv import Bus
    from aiirwkv.server import embedded
    from aiirwkv.types import Generate

    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    found = {"bus": 0.0, "engine": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        async with embedded(Path(folder)) as config:
            arguments = (config, path, precision, Path(folder), core, theirs)
            process = multiprocessing.get_context("spawn").Process(target=worker, args=arguments)
            process.start()
            async with Bus.connect(config) as bus:

                async def client(number: int) -> None:
                    request = Generate(
                        f"Number {number}:",
                        max_tokens=TEXT,
                        temperature=0,
                        presence=0,
                        frequency=0,
                        ban=[0],
                        cache=False,
                    )
                    async with bus.stream(request) as chunks:
                        async for _ in chunks:
                            pass

                async def clients() -> float:
                    start = time.perf_counter()
                    async with anyio.create_task_group() as tasks:
                        for number in range(STREAMS):
                            tasks.start_soon(client, number)
                    return STREAMS * TEXT / (time.perf_counter() - start)

                while not await bus.services("generate"):
                    await asyncio.sleep(0.2)
                await clients()
                for _ in range(rounds):
                    ours.send(True)
                    found["engine"] = max(found["engine"], await asyncio.to_thread(ours.recv))
                    found["bus"] = max(found["bus"], await clients())
            ours.send(False)
            process.terminate()
            process.join()
    return found


def limits() -> dict[str, float]:
    """What one core can do at best: GB/s read from memory, GFLOP/s of products, measured with the fastest code here."""
    import numpy as np
    import torch
    from aiirwkv_llm_rwkv.kernels.matmul import matmul, pack

    big = np.ones((1 << 18, 1024), np.float32)
    panels, x = pack(big), np.ones((1, 1024), np.float32)
    del big
    y, none = np.empty((1, 1 << 18), np.float32), np.zeros(1, np.int64)
    matmul(panels, x, y, none, False)
    found = {"bandwidth": panels.nbytes / best(lambda: matmul(panels, x, y, none, False), 5) / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.ones(1024, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
        a @ b
        found[name] = 2 * a.numel() * 2048 / best(lambda: a @ b, 5) / 1e9  # noqa: B023
    quantised = torch.quantize_per_tensor(torch.ones(2048, 2048), 0.1, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantised, None)
    rows = torch.ones(1024, 2048)
    torch.ops.quantized.linear_dynamic(rows, packed, False)
    found["int8"] = 2 * rows.numel() * 2048 / best(lambda: torch.ops.quantized.linear_dynamic(rows, packed), 5) / 1e9
    found["int8"] = max(found["int8"], found["bfloat16"])  # whichever is the faster way to multiply int8 weights
    return found


# -- what starts them and prints ---------------------------------------------------------------------------------------


def child(work: str, *arguments: object, version: str = "rwkv7", core: int = 0) -> Any:
    """The result of one of the functions above, from a process of its own."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "RWKV_V7_ON": "1" if version == "rwkv7" else "0",
        "RWKV_JIT_ON": "1",
        "RWKV_CUDA_ON": "0",
    }
    command = [sys.executable, "-W", "ignore", __file__, "--child", work, *map(str, arguments), "--core", str(core)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def parameters(version: str, layers: int, width: int) -> dict[str, float]:
    """Weights: of all, read for a token, and multiplied for a token of a prompt."""
    import random_checkpoint
    import torch

    with torch.device("meta"):
        shapes = random_checkpoint.tensors(version, layers, width)
    table = shapes["emb.weight"].numel()
    total = sum(tensor.numel() for tensor in shapes.values())
    return {"all": total, "decode": total - table, "prefill": total - 2 * table}


class Table:
    """Rows printed as they come, and kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def head(self, *cells: str) -> None:
        self.row(*cells)
        self.row(*["---"] * len(cells))

    def row(self, *cells: object) -> None:
        self.say("| " + " | ".join(map(str, cells)) + " |")


def report_speed(table: Table, result: dict[str, Any], counts: dict[str, float], bounds: dict[str, float]) -> None:
    seconds = result["seconds"]
    table.head("", "precision", "package tok/s", "ours tok/s", "ratio", "must", "aim", "at best tok/s")
    for what in (*(f"prefill {n}" for n in PROMPTS), "decode 1", f"decode {STREAMS}"):
        base = 1 / seconds[f"package {'decode 1' if what.startswith('decode') else what}"]
        for precision in PRECISIONS:
            ours = 1 / seconds[f"{precision} {what}"]
            kind = "prefill" if what.startswith("prefill") else what
            must, aim = MUST.get((kind, precision), ("", ""))
            peak = max(bounds["float32"], bounds["bfloat16"] / 3) if precision == "float32" else bounds[precision]
            if kind == "prefill":
                limit = peak * 1e9 / (2 * counts["prefill"])
            else:
                streams = int(what.split()[1])
                size = {"float32": 2, "bfloat16": 2, "int8": 1}[precision]  # fp32 arithmetic on weights kept in bf16
                seconds_read = counts["decode"] * size / (bounds["bandwidth"] * 1e9)
                seconds_multiplied = 2 * counts["decode"] * streams / (peak * 1e9)
                limit = streams / max(seconds_read, seconds_multiplied)
            table.row(
                what, precision, f"{base:.1f}", f"{ours:.1f}", f"**{ours / base:.2f}**", must, aim, f"{limit:.0f}"
            )
    for precision, choices in result["choices"].items():
        table.say(f"\n{precision}: {choices['products']}")


def report_states(table: Table, file: Path, given: argparse.Namespace, version: str) -> None:
    table.head("kept states, gaps and the bus", "precision", "without", "with", "ratio", "must", "aim")
    for precision in ("float32", "bfloat16") if file.stem.endswith("0.1B") else ("float32",):
        found = child("states", file, precision, given.rounds, version=version, core=given.core)
        cold, warm = found["520 tokens"], found["8 after 512 kept"]
        table.row(
            "first token, 512 kept + 8 new", precision, ms(cold), ms(warm), f"**{cold / warm:.1f} ×**", "10 ×", "20 ×"
        )
        empty, read = found["16 tokens"], found["16 after 4000 kept"]
        table.row(
            "16 tokens on an empty state, and after 4 000 read ones",
            precision, ms(empty), ms(read), f"**{read / empty:.2f}**", "≤ 1.5", "1.1",
        )  # fmt: skip
        found = child("gaps", file, precision, version=version, core=given.core)
        table.row(
            "gap between tokens: usual, and the longest beside a prompt of 4 000", precision, ms(found["usual"]),
            f"{ms(found['longest'])} (99 %: {ms(found['most'])})", f"**{found['longest'] / found['usual']:.1f}**",
            "≤ 3", "",
        )  # fmt: skip
        found = child("bus", file, precision, given.rounds, version=version, core=given.core)
        table.row(
            "16 streams: engine, and 16 clients through the bus, tok/s",
            precision, f"{found['engine']:.0f}", f"{found['bus']:.0f}", f"**{found['bus'] / found['engine']:.3f}**",
            "≥ 0.9", "0.95",
        )  # fmt: skip
    table.say()


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--versions", nargs="+", choices=("rwkv7", "rwkv6"), default=["rwkv7", "rwkv6"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, help="a folder to keep the made checkpoints in")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run_child(given.child, given.core)
    elif given.device != "cpu":
        import engine_cuda

        output = ["--output", str(given.output)] if given.output else []
        engine_cuda.run(engine_cuda.arguments(["--device", given.device, *output]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(given, given.checkpoints or Path(folder))


def other_core(core: int) -> int:
    """One that is not this one, if there is any: the clients must not take the engine's time."""
    return (core + 1) % (os.cpu_count() or 1)


def run_child(command: Sequence[str], core: int) -> None:
    pin(core)
    work, *arguments = command
    functions: dict[str, Callable[..., Any]] = {
        "speed": lambda path, rounds: speed(Path(path), int(rounds)),
        "memory": lambda path, who: memory(Path(path), who),
        "limits": limits,
        "states": lambda path, precision, rounds: states(Path(path), precision, int(rounds)),
        "gaps": lambda path, precision: gaps(Path(path), precision),
        "bus": lambda path, precision, rounds: asyncio.run(
            through_the_bus(Path(path), precision, other_core(core), int(rounds))
        ),
    }
    print(json.dumps(functions[work](*arguments)))


def measure(given: argparse.Namespace, folder: Path) -> None:
    import random_checkpoint

    table = Table()
    table.say(f"# The engine on {processor()}, {date.today()}\n")
    bounds = child("limits", core=given.core)
    table.say(
        f"One core reads {bounds['bandwidth']:.1f} GB/s and multiplies {bounds['float32']:.0f} GFLOP/s in fp32, "
        f"{bounds['bfloat16']:.0f} in bf16. Ratios are to `rwkv` in fp32, on this core, in the same run.\n"
    )
    for version in given.versions:
        for size in given.sizes:
            path = folder / f"{version}-{size}"
            for file in (path.with_name(path.name + ".pth"), path.with_name(path.name + ".safetensors")):
                if not file.exists():
                    random_checkpoint.make(file, version, *SIZES[size])
            table.say(f"## {version} {size}\n")
            counts = parameters(version, *SIZES[size])
            report_speed(table, child("speed", file, given.rounds, version=version, core=given.core), counts, bounds)
            table.say()
            table.head("memory, MB", "of the import", "in all")
            for who in ("package", *PRECISIONS):
                found = child("memory", file, who, version=version, core=given.core)
                table.row(who, f"{found['imported']:.0f}", f"**{found['all']:.0f}**")
            table.say()
            if version == "rwkv7":
                report_states(table, file, given, version)
    if given.output:
        given.output.write_text("\n".join(table.lines) + "\n", "utf-8")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
