"""The plugin: what is asked of it, checked and put in the model's own form, given to the engine, and streamed back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import msgspec
from aiirwkv import Context, Plugin, hookimpl
from aiirwkv.errors import BadRequest, NotFound, PluginError, ServiceError, TooLarge
from aiirwkv.types import Chunk, Generate, Message, Model, Models, ModelsReply

from .card import Sampling, clean
from .library import BUILT_IN, Files, find, known, unknown
from .tuned import STATE, TunedStates, states_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .adapters import Adapter
    from .engine import Told
    from .requests import Run
    from .runtime import Runtime
    from .states import StateCache

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


class LlmRwkv(Plugin):
    """Writes text with an RWKV model."""

    model: str = "rwkv7-nano"
    """A model's name, or the path of its folder or .safetensors file."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    threads: int = 0
    """Threads of the CPU; 0 chooses by the size of the model."""
    rows: int = 0
    """Texts that are worked on at once; 0 chooses by the size of the model's state, 64 at most."""
    longest_prompt: int = 262_144
    """Tokens that a prompt may have."""
    states_memory: int = 512
    """MiB of memory for kept states; 0, with `states_disk` 0, keeps none."""
    states_disk: int = 4096
    """MiB on disk for kept states."""

    concurrent_requests: ClassVar[int] = 256
    LONGEST: ClassVar[int] = 8192
    """Tokens that one answer may have, whatever is asked."""

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._load)
        self._engine.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self._engine.close)
        if self._engine.cache:
            await asyncio.to_thread(self._engine.cache.close)

    def _load(self) -> None:
        import torch

        from .adapters import Adapters, adapters_folder
        from .checkpoint import load
        from .describe import shapes
        from .engine import Engine
        from .grammar import Grammars
        from .runtime import TorchRuntime
        from .tokenizer import Tokenizer

        self._states = TunedStates(states_folder(self.data))
        self._adapters = Adapters(adapters_folder(self.data))
        self._files = find(self.model, self._folders)
        self._files.verify()
        self._sha256 = ""
        device = _device(self.device)
        self._dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = load(self._files.weights, device, self._dtype)
        vocabulary = self._files.vocabulary(model.sizes.vocabulary)
        try:
            tokenizer = Tokenizer.load(vocabulary)
        except (OSError, ValueError) as error:
            raise PluginError(f"the vocabulary {vocabulary} cannot be used: {error}") from None
        if tokenizer.size > model.sizes.vocabulary:
            raise PluginError(
                f"the vocabulary {vocabulary} does not belong to {self._files.weights}: "
                f"its ids go up to {tokenizer.size - 1}, the model's up to {model.sizes.vocabulary - 1}"
            )
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._countless = tokenizer.countless()
        # Operations of a small model are too short to be worth sharing out.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = self.threads or (1 if model.sizes.width < 512 else cores)
        runtime = TorchRuntime(model)
        self._grammars = Grammars(tokenizer, runtime.vocabulary, self._files.card.stop.tokens)
        self._shapes = shapes(self._files.weights)
        self._engine = Engine(
            runtime,
            tokenizer,
            name=self._files.card.name,
            cache=self._cache(runtime),
            rows=self.rows,
            threads=threads,
            deliver=self._deliver,
        )

    def _cache(self, runtime: Runtime) -> StateCache | None:
        from .states import StateCache

        if not (self.states_memory or self.states_disk):
            return None
        numerics = str(self._dtype).removeprefix("torch.")
        return StateCache(
            self.data / "states",
            self.states_memory * 2**20,
            self.states_disk * 2**20,
            f"{self._base_sha256()} {numerics}",
            runtime.layout.size,
            vocabulary=runtime.vocabulary,
            precision="float32" if numerics == "float32" else "float16",
        )

    def _deliver(self, told: list[Told]) -> None:
        from .engine import hand_out

        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(hand_out, told)

    @property
    def _folders(self) -> list[Path]:
        return [BUILT_IN, self.data / "models"]

    def about(self) -> dict[str, Any]:
        card = self._files.card
        return {
            "model": card.name,
            "version": card.version,
            "description": card.description,
            "parameters": self._parameters,
            "device": str(self._engine.runtime.device),
            "precision": str(self._dtype).removeprefix("torch."),
            "demonstration": card.demonstration,
            "languages": card.languages,
            "limits": msgspec.to_builtins(card.limits),
            "refusal": card.refusal,
        }

    def stats(self) -> dict[str, Any]:
        return self._engine.stats()

    @hookimpl
    async def generate(self, request: Generate, ctx: Context) -> AsyncIterator[Chunk]:
        post = Post()
        run = await asyncio.to_thread(self._prepare, request, ctx, post.put)
        self._engine.submit(run)
        try:
            complete = False
            while not complete:
                for piece in await post.take():
                    if isinstance(piece, ServiceError):
                        raise piece
                    if complete := piece.usage is not None:
                        piece.model = self._files.card.name
                    yield piece
        finally:
            run.cancel()

    def _prepare(self, request: Generate, ctx: Context, emit: Callable[[Chunk | ServiceError], None]) -> Run:
        """The request in tokens, with everything it left out taken from the model's card."""
        from .output import Output
        from .requests import Run
        from .sampling import Sampler

        card, engine = self._files.card, self._engine
        self._check_names(request)
        sampling = _sampling(request, card.sampling)
        parts = self._parts(request)
        try:
            tokens, cuts = engine.tokenizer.encode_parts(parts)
        except UnicodeEncodeError as error:
            raise BadRequest(f"generate: the prompt holds half a character (a lone surrogate): {error}") from None
        if len(tokens) > self.longest_prompt:
            raise TooLarge(
                f"generate: the prompt has {len(tokens)} tokens; plugins.llm_rwkv.longest_prompt allows "
                f"{self.longest_prompt}"
            )
        grammar = self._grammars.of(request.regex, request.json_schema, lead=bool(request.messages))
        samplers = [
            Sampler(
                sampling,
                None if request.seed is None else request.seed + index,
                self._countless,
                bias=request.logit_bias,
                ban=request.ban,
                grammar=grammar and grammar.copy(),
                rows=engine.runtime.vocabulary,
            )
            for index in range(request.n)
        ]
        strip = bool(request.messages) and (grammar is None or grammar.lead)
        stop = [*card.stop.strings, *request.stop] if request.messages and not grammar else request.stop
        state, adapter, root = self._tuned(request, ctx)
        return Run(
            prompt=tokens,
            samplers=samplers,
            outputs=[Output(stop, strip) for _ in range(request.n)],
            emit=emit,
            max_tokens=min(sampling.max_tokens, self.LONGEST),
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

    def _parts(self, request: Generate) -> list[str]:
        """The prompt, in parts after which other prompts may go on otherwise."""
        if request.messages:
            if request.prompt:
                raise BadRequest("generate takes either `prompt` or `messages`, not both")
            return self._files.card.prompt.parts(request.messages, request.documents)
        if request.documents:
            raise BadRequest("generate takes `documents` only with `messages`; put them in `prompt` yourself")
        if not request.prompt:
            raise BadRequest("generate needs `prompt` or `messages`; both are empty")
        return [request.prompt]

    def _answered(self, request: Generate, prompt: str) -> Callable[[str], list[int]] | None:
        """The tokens after the prompt when a conversation goes on with an answer; None when they are not foreseen."""
        encode = self._engine.tokenizer.encode
        if not request.messages:
            return encode
        mark = "\0"
        talk = [*request.messages, Message("assistant", mark), Message("user", mark)]
        following = self._files.card.prompt.write(talk)
        if not following.startswith(prompt) or following.count(mark) != 2 + prompt.count(mark):
            return None
        before, between, _ = following.removeprefix(prompt).split(mark)
        return lambda answer: encode(before + clean(answer) + between)

    def _tuned(self, request: Generate, ctx: Context) -> tuple[Tensor | None, Adapter | None, bytes]:
        """The state and adapter that the request names, and where states of texts read with them are kept."""
        layout, name = self._engine.runtime.layout, self._files.card.name
        state = adapter = None
        marks = {"state": "", "adapter": ""}
        if request.state:
            state = self._states.flat(request.state, ctx, layout, self._base_sha256, name)
            marks["state"] = self._states.find(request.state, ctx).sha256[STATE]
        if request.adapter:
            adapter = self._adapters.load(request.adapter, ctx, self._shapes, self._base_sha256, name)
            marks["adapter"] = adapter.sha256
        cache = self._engine.cache
        return state, adapter, cache.root(ctx.user.name, **marks) if cache else b""

    def _check_names(self, request: Generate) -> None:
        asked = (request.model or "").rpartition("/")[2]
        if asked and asked != self._files.card.name:
            models = known(self._folders)
            if asked in models:
                raise NotFound(
                    f"the model {asked!r} is not loaded; this worker serves {self._files.card.name!r} "
                    f"(set plugins.llm_rwkv.model)"
                )
            raise NotFound(unknown("model", asked, {**models, self._files.card.name: self._files}))

    def _base_sha256(self) -> str:
        self._sha256 = self._sha256 or self._files.sha256()  # a model without a card is hashed when it is first needed
        return self._sha256

    @hookimpl
    async def models(self, request: Models, ctx: Context) -> ModelsReply:
        if request.action == "delete":
            request.need("name")
            await asyncio.to_thread(self._states.delete, request.name, ctx)
        elif request.action != "list":
            raise BadRequest(
                f"models: llm_rwkv serves only the actions `list` and `delete` (of tuned states) yet, "
                f"not {request.action!r}; to use another model, set plugins.llm_rwkv.model"
            )
        here = {**known(self._folders), self._files.card.name: self._files}
        states = await asyncio.to_thread(self._states.models, ctx)
        return ModelsReply([*map(self._model, here.values()), *states])

    def _model(self, files: Files) -> Model:
        card = files.card
        loaded = files == self._files
        return Model(
            name=card.name,
            plugin="llm_rwkv",
            version=card.version,
            parameters=self._parameters if loaded else card.parameters,
            size=files.weights.stat().st_size,
            sha256=card.sha256.get(files.weights.name, ""),
            loaded=loaded,
            default=loaded,
            demonstration=card.demonstration,
            card=msgspec.to_builtins(card),
        )


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

    async def take(self) -> list[Chunk | ServiceError]:
        await self._arrived.wait()
        self._arrived.clear()
        pieces, self._pieces = self._pieces, []
        return pieces


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


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise PluginError(f"plugins.llm_rwkv.device is {name!r}, which cannot be used here: {reason}") from None
    return device
