"""A request to the engine, and the texts it asks for: what they are, and how far they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aiirwkv.errors import ServiceError
from aiirwkv.types import Chunk, Finish, Usage
from torch import Tensor

from ..runtimes.runtime import Adapter, Piece
from .output import Output
from .sampling import Sampler

__all__ = ["SPACING", "Row", "Run"]

SPACING = 16
"""No state is kept fewer tokens after another one: to read them again costs less than to keep it."""


@dataclass(eq=False)
class Run:
    """One request. Each text it asks for has a sampler and an output of its own."""

    prompt: Sequence[int]
    samplers: Sequence[Sampler]
    outputs: Sequence[Output]
    emit: Callable[[Chunk | ServiceError], None]
    max_tokens: int
    stop: frozenset[int] = frozenset({0})
    logprobs: bool = False
    owner: str = ""
    deadline: float = math.inf
    """On the engine's clock."""
    state: Tensor | None = None
    """What the text begins with, flat; None: the model's own beginning."""
    adapter: Adapter | None = None
    cache: bool = False
    root: bytes = b""
    """Where the cache has the states of such texts."""
    cuts: Sequence[int] = ()
    """Lengths of beginnings of the prompt that other prompts may share, ascending."""
    answered: Callable[[str], Sequence[int]] | None = None
    """The tokens after the prompt in the next prompt of the conversation, given the answer."""
    read_only: bool = False
    """Read the prompt and keep the state after it; write nothing."""
    label: str = ""
    pin: bool = False
    over: bool = False
    kept: str = ""
    """The id of the state after the whole prompt, once it is kept."""
    usage: Usage = field(default_factory=Usage)
    unfinished: int = 1

    def __post_init__(self) -> None:
        self.usage.prompt = len(self.prompt)
        self.unfinished = len(self.outputs)

    def cancel(self) -> None:
        """Stop as soon as the engine looks; it says nothing more."""
        self.over = True

    def marks(self) -> list[int]:
        """Where states are kept: at the cuts, as far as they are not dense, and at the end."""
        marks, last, whole = [], 0, len(self.prompt)
        for cut in self.cuts:
            if last + SPACING <= cut < whole:
                marks.append(cut)
                last = cut
        return [*marks, whole]


@dataclass(eq=False)
class Row:
    """One text of a request. While it is worked on, it has a slot of the state pool."""

    run: Run
    order: int
    """The how many-th request it belongs to."""
    index: int = 0
    slot: int = -1
    at: int = 0
    """Tokens that its state has read."""
    state: Tensor | None = None
    """What its slot is given when it gets one."""
    logits: Tensor | None = None
    """[V], while the next token is to be chosen."""
    fresh: bool = True
    """It has not had a slot yet, nor a state of its own."""
    keys: dict[int, bytes] = field(default_factory=dict)
    """The keys of beginnings of its prompt, by length. While it `holds` them, others who share them wait."""
    holds: bool = False
    marks: list[int] = field(default_factory=list)
    """Where its state is still to be kept, ascending."""
    ids: list[int] = field(default_factory=list)
    text: str = ""
    last: float = 0.0
    """When its last token was chosen."""
    over: bool = False
    _logprobs: list[float] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens to read before the next one can be chosen."""
        return len(self.run.prompt) + len(self.ids) - self.at

    @property
    def reading(self) -> bool:
        """Some of its prompt is still to be read."""
        return self.at < len(self.run.prompt)

    def piece(self, most: int) -> Piece:
        """Its next tokens: the one that was chosen, or some of the prompt, up to the next mark."""
        prompt = self.run.prompt
        if not self.reading:
            return Piece(self.slot, self.ids[self.at - len(prompt) :], self.run.adapter)
        until = min(self.at + most, self.marks[0] if self.marks else len(prompt))
        return Piece(self.slot, prompt[self.at : until], self.run.adapter)

    def add(self, token: int, word: bytes, logprob: float | None = None) -> Chunk | None:
        """Write a token, whose bytes are `word`; what can be shown now."""
        run, output = self.run, self.run.outputs[self.index]
        if token in run.stop:
            return self.end("", "stop")
        self.ids.append(token)
        run.usage.completion += 1
        if logprob is not None:
            self._logprobs.append(logprob)
        text = output.add(word)
        if output.stopped or run.samplers[self.index].finished:
            return self.end(text, "stop")
        if len(self.ids) >= run.max_tokens:
            return self.end(text, "length")
        return self._chunk(text) if text else None

    def end(self, text: str, finish: Finish) -> Chunk:
        """The last piece of the text; that of the request's last text says what it cost."""
        run = self.run
        text += run.outputs[self.index].end()
        run.unfinished -= 1
        self.over = True
        return self._chunk(text, finish)

    def _chunk(self, text: str, finish: Finish | None = None) -> Chunk:
        self.text += text
        logprobs, self._logprobs = self._logprobs, []
        usage = None if self.run.unfinished else self.run.usage
        return Chunk(text, index=self.index, logprobs=logprobs, finish=finish, usage=usage)
