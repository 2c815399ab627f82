"""From a request of the bus to a run of the engine: checked, in tokens, with what it left out from the model's card."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
from aiirwkv import Context
from aiirwkv.errors import BadRequest, ServiceError, TooLarge
from aiirwkv.types import Chunk, Generate, Message, States
from torch import Tensor

from .card import Sampling, clean
from .engine.output import Output
from .engine.requests import Run
from .engine.sampling import Sampler
from .runtimes.runtime import Adapter
from .service import Service
from .shelf.adapters import Adapters
from .shelf.tuned import STATE, TunedStates

__all__ = ["LONGEST", "Asking", "Post"]

LONGEST = 8192
"""Tokens that one answer may have, whatever is asked."""
MANY = 64
"""Texts that one request may ask for."""
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 1_000_000),
    "min_p": (0, 1),
    "presence": (-100, 100),
    "frequency": (-100, 100),
    "decay": (0, 1),
}


class Post:
    """What the engine tells one request, for the event loop's thread. What is not fetched in time is put together."""

    def __init__(self) -> None:
        self._pieces: list[Chunk | ServiceError] = []
        self._arrived = asyncio.Event()

    def put(self, piece: Chunk | ServiceError) -> None:
        last = self._pieces[-1] if self._pieces else None
        if isinstance(piece, Chunk) and isinstance(last, Chunk) and last.index == piece.index and not last.finish:
            piece.text, piece.logprobs = last.text + piece.text, last.logprobs + piece.logprobs
            self._pieces[-1] = piece
        else:
            self._pieces.append(piece)
        self._arrived.set()

    async def pieces(self) -> AsyncIterator[Chunk]:
        """Until the one that tells what the request cost. Raises what the engine says instead."""
        complete = False
        while not complete:
            await self._arrived.wait()
            self._arrived.clear()
            pieces, self._pieces = self._pieces, []
            for piece in pieces:
                if isinstance(piece, ServiceError):
                    raise piece
                complete = piece.usage is not None
                yield piece


class Asking:
    """Makes runs for a service, out of what a caller asks. Raises BadRequest and NotFound."""

    def __init__(self, service: Service, states: TunedStates, adapters: Adapters, longest_prompt: int) -> None:
        self.service, self.states, self.adapters, self.longest_prompt = service, states, adapters, longest_prompt

    def run(self, request: Generate, ctx: Context, emit: Callable[[Chunk | ServiceError], None]) -> Run:
        card, engine = self.service.card, self.service.engine
        sampling = _sampling(request, card.sampling)
        parts = self._parts(request)
        tokens, cuts = self._encode(parts)
        grammar = self.service.grammars.of(request.regex, request.json_schema, lead=bool(request.messages))
        samplers = [
            Sampler(
                sampling,
                None if request.seed is None else request.seed + index,
                self.service.countless,
                bias=request.logit_bias,
                ban=request.ban,
                grammar=grammar and grammar.copy(),
                rows=engine.runtime.vocabulary,
            )
            for index in range(request.n)
        ]
        strip = bool(request.messages) and (grammar is None or grammar.lead)
        stop = [*card.stop.strings, *request.stop] if request.messages and not grammar else request.stop
        state, adapter, root = self._tuned(request.state, request.adapter, ctx)
        return Run(
            prompt=tokens,
            samplers=samplers,
            outputs=[Output(stop, strip) for _ in range(request.n)],
            emit=emit,
            max_tokens=min(sampling.max_tokens, LONGEST),
            stop=frozenset(card.stop.tokens),
            logprobs=request.logprobs,
            owner=ctx.user.name,
            deadline=engine.clock() + ctx.remaining,
            state=state,
            adapter=adapter,
            cache=request.cache,
            root=root,
            cuts=cuts,
            answered=self._answered(request, "".join(parts)),
        )

    def reading(self, request: States, ctx: Context, emit: Callable[[Chunk | ServiceError], None]) -> Run:
        """To read what prompts will begin with, and to keep the state after it."""
        if request.prompt:
            if request.messages or request.documents:
                raise BadRequest("states: read takes either `prompt`, or `messages` and `documents`")
            tokens, cuts = self._encode([request.prompt])
        else:
            tokens, cuts = self._encode(self.service.card.prompt.beginning(request.messages, request.documents))
            tokens, cuts = tokens[: cuts[-2]], cuts[:-1]
        state, adapter, root = self._tuned(request.state, request.adapter, ctx)
        engine = self.service.engine
        return Run(
            prompt=tokens,
            samplers=[Sampler(self.service.card.sampling, rows=engine.runtime.vocabulary)],
            outputs=[Output()],
            emit=emit,
            max_tokens=1,
            owner=ctx.user.name,
            deadline=engine.clock() + ctx.remaining,
            state=state,
            adapter=adapter,
            cache=True,
            root=root,
            cuts=cuts,
            read_only=True,
            label=request.label,
            pin=request.pin,
        )

    def _encode(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        try:
            tokens, cuts = self.service.engine.tokenizer.encode_parts(parts)
        except UnicodeEncodeError as error:
            raise BadRequest(f"generate: the prompt holds half a character (a lone surrogate): {error}") from None
        if len(tokens) > self.longest_prompt:
            raise TooLarge(
                f"generate: the prompt has {len(tokens)} tokens; plugins.llm_rwkv.longest_prompt allows "
                f"{self.longest_prompt}"
            )
        return tokens, cuts

    def _parts(self, request: Generate) -> list[str]:
        """The prompt, in parts after which other prompts may go on otherwise."""
        if request.messages:
            if request.prompt:
                raise BadRequest("generate takes either `prompt` or `messages`, not both")
            return self.service.card.prompt.parts(request.messages, request.documents)
        if request.documents:
            raise BadRequest("generate takes `documents` only with `messages`; put them in `prompt` yourself")
        if not request.prompt:
            raise BadRequest("generate needs `prompt` or `messages`; both are empty")
        return [request.prompt]

    def _answered(self, request: Generate, prompt: str) -> Callable[[str], list[int]] | None:
        """The tokens after the prompt when a conversation goes on with an answer; None when they are not foreseen."""
        encode = self.service.engine.tokenizer.encode
        if not request.messages:
            return encode
        mark = "\0"
        talk = [*request.messages, Message("assistant", mark), Message("user", mark)]
        following = self.service.card.prompt.write(talk)
        if not following.startswith(prompt) or following.count(mark) != 2 + prompt.count(mark):
            return None
        before, between, _ = following.removeprefix(prompt).split(mark)
        return lambda answer: encode(before + clean(answer) + between)

    def _tuned(
        self, state: str | None, adapter: str | None, ctx: Context
    ) -> tuple[Tensor | None, Adapter | None, bytes]:
        """The state and adapter of these names, and where states of texts read with them are kept."""
        service = self.service
        beginning = change = None
        marks = {"state": "", "adapter": ""}
        if state:
            layout = service.engine.runtime.layout
            beginning = self.states.flat(state, ctx, layout, service.sha256, service.name)
            marks["state"] = self.states.find(state, ctx).sha256[STATE]
        if adapter:
            change = self.adapters.load(adapter, ctx, service.shapes, service.sha256, service.name)
            marks["adapter"] = change.sha256
        return beginning, change, service.cache.root(ctx.user.name, **marks) if service.cache else b""


def _sampling(request: Generate, default: Sampling) -> Sampling:
    asked = {name: getattr(request, name) for name in (*RANGES, "max_tokens") if getattr(request, name) is not None}
    for name, (low, high) in RANGES.items():
        if name in asked and not low <= asked[name] <= high:
            raise BadRequest(f"generate: `{name}` is {asked[name]}; it must be from {low} to {high}")
    if asked.get("max_tokens", 1) < 1:
        raise BadRequest(f"generate: `max_tokens` is {asked['max_tokens']}; it must be at least 1")
    if request.seed is not None and not -(2**63) <= request.seed < 2**63:
        raise BadRequest("generate: `seed` must fit 64 bits")
    if not 1 <= request.n <= MANY:
        raise BadRequest(f"generate: `n` is {request.n}; it must be from 1 to {MANY}")
    return msgspec.structs.replace(default, **asked)
