"""The plugin: checks what is asked, has a process of low priority do it, watches that, and files the result."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import anyio
import msgspec
from aiirwkv import Context, Plugin, Tune, Tuned, hookimpl
from aiirwkv.errors import BY_CODE, BadRequest, Conflict, NotFound, PluginError, ServiceError
from aiirwkv.processes import end, spawn
from aiirwkv_llm_rwkv.shelf.library import BUILT_IN, Files, find, known, unknown
from aiirwkv_llm_rwkv.shelf.tuned import CARD, STATE, StateCard, states_folder

from .runs import Event, Order, Run

__all__ = ["TunePeft"]

LEARNING_RATE = 1.0
"""For states, falling to a hundredth: what RWKV-LM advises, and the best one measured on the built-in model."""
log = logging.getLogger(__name__)


class TunePeft(Plugin):
    """Tunes states of RWKV models on examples."""

    model: str = ""
    """The model to tune when none is named: a name, or the path of a folder or file. Empty: the one that is served."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Threads of the CPU; 0 chooses by the size of the model, at most half the cores."""
    checkpoint_seconds: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    """How often training is written down, so that it can go on from there."""

    concurrent_requests: ClassVar[int] = 4

    async def __aenter__(self) -> Self:
        self._turn = anyio.Lock()
        await anyio.to_thread.run_sync(Run.tidy, self._runs)
        return self

    @property
    def _runs(self) -> Path:
        return self.data / "runs"

    def about(self) -> dict[str, Any]:
        return {"methods": ["state"], "versions": ["rwkv7"], "device": self.device}

    def stats(self) -> dict[str, Any]:
        turn = self._turn.statistics()
        return {"running": int(turn.locked), "waiting": turn.tasks_waiting}

    @hookimpl
    async def tune(self, request: Tune, ctx: Context) -> Tuned:
        """Tune a state. What was broken off goes on from its last checkpoint when the same is asked again."""
        _check(request)
        target = states_folder(self.data) / request.name
        run = Run(self._runs / (ctx.job.id if ctx.job else request.name))
        if target.exists():
            return _finished(target, ctx)
        files = await self._base(request, ctx)
        order = Order(
            request=request,
            run=ctx.job.id if ctx.job else "",
            owner=ctx.user.name,
            base=files.card.name,
            base_sha256=await anyio.to_thread.run_sync(files.sha256),
            weights=str(files.weights),
            device=self.device,
            threads=self.threads,
            checkpoint_seconds=self.checkpoint_seconds,
        )
        if request.learning_rate is None:
            order.request = msgspec.structs.replace(request, learning_rate=LEARNING_RATE)
        if self._turn.locked():
            ctx.progress(0, request.steps, "waits for another one to end")
        async with self._turn:
            await run.prepare(order, ctx.bus)
            await self._train(run, request.steps, ctx)
            return await anyio.to_thread.run_sync(_publish, run, target)

    async def _base(self, request: Tune, ctx: Context) -> Files:
        """The model to tune. A request may only name one; a path is for the configuration."""
        if not request.model and self.model:
            try:
                return find(self.model, [BUILT_IN, self.data / "models"])
            except PluginError as error:
                raise Conflict(f"plugins.tune_peft.model: {error}") from None
        name = request.model or (await ctx.bus.about("generate", "llm_rwkv"))["model"]
        models = await anyio.to_thread.run_sync(known, [BUILT_IN, self.data / "models"])
        if (short := name.rpartition("/")[2]) not in models:
            raise NotFound(unknown("model", short, models))
        return models[short]

    async def _train(self, run: Run, steps: int, ctx: Context) -> None:
        """Have the training process do it. Leaving, also by cancellation, ends the process at once."""
        threads = str(self.threads or max(1, (os.cpu_count() or 1) // 2))
        command = [sys.executable, "-P", "-m", "aiirwkv_tune_peft.child", str(run.path)]
        last = Event()
        async with AsyncExitStack() as stack:
            process = await spawn(command, output=PIPE, env={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads})
            stack.push_async_callback(end, process, grace=0)
            assert process.stdout is not None
            words = ""
            async for line in process.stdout:
                try:
                    last = msgspec.json.decode(line, type=Event)
                except msgspec.MsgspecError:  # it has not begun yet
                    words = line.decode("utf-8", "replace").strip() or words
                    continue
                if not last.error and not last.done:
                    ctx.progress(last.step, steps, last.note)
            await process.wait()
        if last.done:
            return
        if not last.error:
            raise _ended(process, run, words)
        if 400 <= last.code < 500:
            run.remove()
        raise BY_CODE.get(last.code, ServiceError)(last.error)


def _check(request: Tune) -> None:
    if request.method != "state":
        raise BadRequest(f"tune: only the method `state` is served yet, not {request.method!r}")
    if not re.fullmatch(r"\w[\w.-]{0,63}", request.name):
        raise BadRequest(
            f"tune: `name` is {request.name!r}; it has up to 64 letters, digits, '-', '_' and '.', and begins with one "
            "of the first two"
        )
    if bool(request.object) == bool(request.text):
        raise BadRequest("tune takes the data either as `object` or as `text`, and needs one of them")
    for field, low, high in (("steps", 1, 1_000_000), ("batch_tokens", 16, 1_000_000)):
        if not low <= (value := getattr(request, field)) <= high:
            raise BadRequest(f"tune: `{field}` is {value}; it must be from {low} to {high}")
    rate = request.learning_rate
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise BadRequest(f"tune: `learning_rate` is {rate:g}; it must be above 0")
    if not 0 < request.validation <= 0.9:
        raise BadRequest(f"tune: `validation` is {request.validation:g}; it must be above 0 and at most 0.9")


def _finished(target: Path, ctx: Context) -> Tuned:
    """What this very job has made already, when it is delivered once more; otherwise the name is taken."""
    try:
        card = msgspec.json.decode((target / CARD).read_bytes(), type=StateCard)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        card = None
    if card and ctx.job and card.run == ctx.job.id:
        return _tuned(card)
    raise _taken(target.name)


def _taken(name: str) -> Conflict:
    return Conflict(
        f"there is a tuned state {name!r} already; choose another name, or delete it first: "
        f"""aiirwkv call models '{{"action": "delete", "name": "{name}"}}'"""
    )


def _publish(run: Run, target: Path) -> Tuned:
    """Move the result to the tuned states, whole."""
    card = msgspec.json.decode((run.result / CARD).read_bytes(), type=StateCard)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(run.result, target)
    except OSError as error:
        if target.exists():
            raise _taken(target.name) from None
        raise ServiceError(f"tune: cannot write {target}: {error.strerror}") from None
    run.remove()
    return _tuned(card)


def _tuned(card: StateCard) -> Tuned:
    return Tuned(
        name=card.name,
        method=card.method,
        model=card.base,
        sha256=card.sha256[STATE],
        steps=card.steps,
        loss_before=card.loss_before,
        loss_after=card.loss_after,
        seconds=card.seconds,
        parameters=card.parameters,
    )


def _ended(process: Process, run: Run, words: str) -> ServiceError:
    """The process is gone without a word."""
    code = process.returncode or 0
    words = run.last_words() or words
    log.error("the training process ended with %s; its log is %s", code, run.log)
    how = f"was killed by signal {-code}, perhaps for want of memory" if code < 0 else f"ended with exit code {code}"
    return ServiceError(
        f"tune: the training process {how}{f' ({words})' if words else ''}; asked again, it goes on from its last "
        "checkpoint"
    )
