"""
The runtime for an NVIDIA GPU: ragged batches with Triton kernels, CUDA graphs where every text has one token.

What runs is chosen at load by a trial against plain torch, which remains for whatever the trial does not pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..network.model import RWKV
from .memory import workspace
from .runtime import Lost, Piece, TorchRuntime, check, scarce

if TYPE_CHECKING:
    from .ragged import Batch, Ragged

__all__ = ["CudaRuntime"]

logger = logging.getLogger(__name__)

Graph = Callable[[list[int], list[int]], Tensor]
"""The next token of each text, and their slots → logits [texts, V], to be used before the next call."""


class CudaRuntime(TorchRuntime):
    """As `TorchRuntime`, and faster. After a MemoryError every state is as it was."""

    SPARE = 1
    """The last row of the pool belongs to nobody: the rows that fill up a graph's batch write there."""
    SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    """Batches of one token per text for which there is a graph, once one is needed."""

    def __init__(self, model: RWKV, slots: int = 0) -> None:
        super().__init__(model, slots)
        self.dtype = model.ln_out.weight.dtype
        self.ragged: Ragged | None = None
        self.graphs = False
        self._graphs: dict[int, Graph | None] = {}
        self._out = torch.empty(0)
        self._memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        with self._here():
            self._choose()
        for what, choice in self.choices.items():
            logger.info("%s: %s", what, choice)

    def grow(self, slots: int) -> None:
        if slots + self.SPARE > len(self.pool):
            self._graphs = {}  # they write to the old pool
        super().grow(slots)

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        if self.ragged is None:
            return super().forward(pieces)
        check(pieces, self.vocabulary)
        order = sorted(range(len(pieces)), key=lambda i: id(pieces[i].adapter))
        logits = torch.empty(len(pieces), self.vocabulary, pin_memory=self.device.type == "cuda")
        with torch.inference_mode(), self._here():
            logits.copy_(self.logits([pieces[i] for i in order]).float())
        if order != list(range(len(pieces))):
            logits[order] = logits.clone()
        return logits

    def logits(self, pieces: Sequence[Piece]) -> Tensor:
        """As `forward`, but left on the device, and in the type of the weights; of one adapter side by side."""
        assert self.ragged is not None
        lengths = [len(piece.tokens) for piece in pieces]
        if max(lengths) == 1 and not any(piece.adapter for piece in pieces):
            size = next((size for size in self.SIZES if size >= len(pieces)), 0)
            if size and (graph := self._graph(size)):
                return graph([piece.tokens[0] for piece in pieces], [piece.slot for piece in pieces])
        tokens = sum(lengths)
        with scarce(f"a batch of {tokens} tokens"):
            batch = self._batch(pieces)
            need = workspace(self.model.version, self.model.sizes, tokens, len(pieces), self.dtype.itemsize)
            torch.empty(need, dtype=torch.uint8, device=self.device)  # fails now, or not at all: states are still whole
        try:
            return self.ragged(batch)
        except Exception as error:
            raise Lost(f"a batch of {tokens} tokens failed half-way: {str(error).partition(chr(10))[0]}") from error

    def _here(self) -> Any:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _batch(self, pieces: Sequence[Piece]) -> Batch:
        from ..kernels.fused import Texts
        from .ragged import Batch

        lengths = [len(piece.tokens) for piece in pieces]
        ends = list(accumulate(lengths))
        begins = [0, *ends[:-1]]
        parts = [
            [piece.slot for piece in pieces],
            begins,
            lengths,
            [end - 1 for end in ends],
            [i for i, length in enumerate(lengths) for _ in range(length)],
            [token for piece in pieces for token in piece.tokens],
        ]
        sizes = [_round(len(part)) for part in parts]  # an address of its own alignment would mean a kernel of its own
        filled = [number for part, size in zip(parts, sizes, strict=True) for number in part + [0] * (size - len(part))]
        numbers = torch.tensor(filled, dtype=torch.int32).to(self.device)  # in one copy
        slots, begin, length, last, text, tokens = (
            column[: len(part)] for part, column in zip(parts, torch.split(numbers, sizes), strict=True)
        )
        updates = [
            (slice(begins[rows.start], ends[rows.stop - 1]), rows, deltas) for rows, deltas in self._updates(pieces)
        ]
        single = len(tokens) == len(pieces)
        return Batch(Texts(self.pool, slots, begin, length, text), tokens, last, single, updates)

    def _graph(self, size: int) -> Graph | None:
        """What runs a batch of up to that many texts."""
        if not self.graphs:
            return None
        if size not in self._graphs:
            try:
                self._graphs[size] = self._capture(size)
            except Exception as error:  # whatever capturing cannot do, running can
                self._graphs[size] = None
                reason = str(error).partition("\n")[0]
                if not isinstance(error, torch.OutOfMemoryError):
                    self.graphs = False
                    self.choices["graphs"] = f"off: of {size} texts it failed with {type(error).__name__}: {reason}"
                logger.warning("a CUDA graph of %d texts cannot be had: %s", size, reason)
        return self._graphs[size]

    def _capture(self, size: int) -> Graph:
        from ..kernels.fused import Texts
        from .ragged import Batch

        assert self.ragged is not None
        ragged, spare, width = self.ragged, len(self.pool) - 1, _round(size)
        numbers = torch.tensor([[0] * width, [spare] * width], dtype=torch.int32, device=self.device)
        tokens, slots = numbers[:, :size]
        each = torch.arange(size, dtype=torch.int32, device=self.device)
        batch = Batch(Texts(self.pool, slots, each, torch.ones_like(each), each), tokens, each, single=True)
        if size > len(self._out):  # where all graphs of up to this size put their logits, which are used at once
            self._out = torch.empty(size, self.vocabulary, dtype=self.dtype, device=self.device)
        out = self._out[:size]
        replay = record(lambda: out.copy_(ragged(batch)), self._memory)

        def run(tokens: list[int], slots: list[int]) -> Tensor:
            idle = width - len(tokens)
            numbers.copy_(torch.tensor([tokens + [0] * idle, slots + [spare] * idle], dtype=torch.int32))
            replay()
            return out[: len(tokens)]

        return run

    # ------------------------------------------------------------------------------------------- the trial at load

    def _choose(self) -> None:
        try:
            from .ragged import Ragged
            from .trial import choose

            with scarce("the kernels' form of the weights"), torch.inference_mode():
                ragged = Ragged(self.model)
                choose(self, ragged)
        except (ImportError, LookupError, MemoryError, ValueError) as error:
            self.graphs, self.choices = False, {"runtime": f"plain torch: {error}"}
        else:
            self.ragged = ragged

    @contextmanager
    def on_trial(self, slots: int, ragged: Ragged | None) -> Iterator[None]:
        """As long as it lasts, the pool is another one of initial states, and `ragged`, or plain torch, runs."""
        before = self.pool, self.ragged, self._graphs
        self.pool = torch.zeros(slots + self.SPARE, self.layout.size, device=self.device)
        self.pool[:] = self._initial
        self.ragged, self._graphs = ragged, {}
        try:
            yield
        finally:
            self.pool, self.ragged, self._graphs = before


def _round(count: int) -> int:
    """Up to what keeps int32 numbers aligned to 16 bytes."""
    return -(-count // 4) * 4


def record(run: Callable[[], object], memory: Any) -> Callable[[], None]:
    """As a CUDA graph: a function that does the same again, with what then stands in the same tensors."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # outside of the graph: what is compiled and set up at first use
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):  # others may use the GPU meanwhile
        run()
    return graph.replay
