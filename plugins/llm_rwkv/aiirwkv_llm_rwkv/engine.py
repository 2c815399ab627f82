"""
The engine: one thread that owns the model and works on all requests in turn.

Requests come in through a queue; their text goes out through a callback. Every pass gives each request one piece of
work: a chunk of its prompt, or one token. It does not batch and keeps no states.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from aiirwkv.errors import ServiceError
from aiirwkv.types import Chunk, Finish, Usage
from torch import Tensor

from .model import RWKV, State
from .output import Output
from .sampling import Sampler
from .tokenizer import Tokenizer

__all__ = ["Engine", "Run"]


@dataclass(eq=False)
class Run:
    """One request: what it asks, and how far it is. `emit` is called from the engine's thread."""

    prompt: list[int]
    sampler: Sampler
    output: Output
    emit: Callable[[Chunk | ServiceError], None]
    max_tokens: int
    stop: frozenset[int] = frozenset({0})
    logprobs: bool = False
    read: int = 0
    written: int = 0
    over: bool = False
    state: State | None = None
    logits: Tensor | None = None
    _logprobs: list[float] = field(default_factory=list)

    def cancel(self) -> None:
        """Stop as soon as the engine looks; it says nothing more."""
        self.over = True

    def tell(self, text: str, finish: Finish | None = None) -> None:
        """Hand out text, when there is some, and the end."""
        if finish:
            text += self.output.end()
        if text or finish:
            usage = Usage(prompt=len(self.prompt), completion=self.written) if finish else None
            self.emit(Chunk(text, logprobs=self._logprobs, finish=finish, usage=usage))
            self._logprobs = []
        self.over = self.over or finish is not None


class Engine:
    """Runs a model. `submit` and `close` may be called from any thread."""

    CHUNK = 128
    """Tokens of a prompt that are read at once; between two chunks the other requests go on."""
    ROWS = 16
    """Requests that are worked on at once; more wait."""

    def __init__(self, model: RWKV, tokenizer: Tokenizer, threads: int = 0) -> None:
        self.model, self.tokenizer, self.threads = model, tokenizer, threads
        self.device = model.emb.weight.device
        self.runs: list[Run] = []
        self.tokens_read = self.tokens_written = 0
        self._inbox: SimpleQueue[Run | None] = SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="rwkv-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, run: Run) -> None:
        self._inbox.put(run)

    @property
    def waiting(self) -> int:
        return self._inbox.qsize()

    def close(self) -> None:
        """End the thread; requests that are still running get an error."""
        self._closing = True
        self._inbox.put(None)
        self._thread.join()

    def _work(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        with torch.inference_mode():
            while not self._closing:
                self._admit()
                self.step()
        while not self._inbox.empty():
            if run := self._inbox.get():
                self.runs.append(run)
        for run in self.runs:
            if not run.over:
                run.emit(ServiceError("generate: the worker was stopped before the answer was complete; ask again"))

    def _admit(self) -> None:
        """Take in what waits, as far as there is room; sleep while there is nothing to do."""
        while len(self.runs) < self.ROWS and (not self.runs or not self._inbox.empty()):
            if run := self._inbox.get():
                self.runs.append(run)
            elif self._closing:
                return

    def step(self) -> None:
        """One piece of work for each request."""
        for run in self.runs:
            if run.over:
                continue
            try:
                if run.read < len(run.prompt):
                    self._prefill(run)
                else:
                    self._decode(run)
            except Exception as error:  # one request fails, the engine lives on
                run.over = True
                run.emit(ServiceError(f"generate: the model failed with {type(error).__name__}: {error}"))
        self.runs = [run for run in self.runs if not run.over]

    def _prefill(self, run: Run) -> None:
        chunk = run.prompt[run.read : run.read + self.CHUNK]
        self._forward(run, chunk)
        run.read += len(chunk)
        self.tokens_read += len(chunk)

    def _decode(self, run: Run) -> None:
        assert run.logits is not None
        token = run.sampler.choose(run.logits)
        if token in run.stop:
            return run.tell("", "stop")
        run.written += 1
        self.tokens_written += 1
        if run.logprobs:  # the model's own opinion, before penalties and temperature
            run._logprobs.append(float(torch.log_softmax(run.logits, -1)[token]))
        text = run.output.add(self.tokenizer.tokens.get(token, b""))
        if run.output.stopped:
            return run.tell(text, "stop")
        if run.written >= run.max_tokens:
            return run.tell(text, "length")
        run.tell(text)
        self._forward(run, [token])

    def _forward(self, run: Run, tokens: list[int]) -> None:
        logits, run.state = self.model(torch.tensor([tokens], device=self.device), run.state, last=True)
        run.logits = logits[0, -1].float().cpu()
