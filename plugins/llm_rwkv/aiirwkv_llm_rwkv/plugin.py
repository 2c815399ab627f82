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
from aiirwkv.errors import BadRequest, NotFound, PluginError, ServiceError
from aiirwkv.types import Chunk, Generate, Model, Models, ModelsReply

from .card import Sampling
from .library import BUILT_IN, Files, find, known, unknown
from .tuned import TunedStates, states_folder

if TYPE_CHECKING:
    import torch

    from .engine import Run

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

    LONGEST: ClassVar[int] = 8192
    """Tokens that one answer may have, whatever is asked."""

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._load)
        self._engine.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self._engine.close)

    def _load(self) -> None:
        import torch

        from .checkpoint import load
        from .engine import Engine
        from .tokenizer import Tokenizer

        self._states = TunedStates(states_folder(self.data))
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
        self._engine = Engine(model, tokenizer, threads)

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
            "device": str(self._engine.device),
            "precision": str(self._dtype).removeprefix("torch."),
            "demonstration": card.demonstration,
            "languages": card.languages,
            "limits": msgspec.to_builtins(card.limits),
            "refusal": card.refusal,
        }

    def stats(self) -> dict[str, Any]:
        engine = self._engine
        return {
            "running": len(engine.runs),
            "waiting": engine.waiting,
            "tokens_read": engine.tokens_read,
            "tokens_written": engine.tokens_written,
            "threads": engine.threads,
        }

    @hookimpl
    async def generate(self, request: Generate, ctx: Context) -> AsyncIterator[Chunk]:
        pieces: asyncio.Queue[Chunk | ServiceError] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(piece: Chunk | ServiceError) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        run = await asyncio.to_thread(self._prepare, request, ctx, emit)
        self._engine.submit(run)
        try:
            finish = None
            while finish is None:
                piece = await pieces.get()
                if isinstance(piece, ServiceError):
                    raise piece
                finish = piece.finish
                if finish:
                    piece.model = self._files.card.name
                yield piece
        finally:
            run.cancel()

    def _prepare(self, request: Generate, ctx: Context, emit: Callable[[Chunk | ServiceError], None]) -> Run:
        """The request in tokens, with everything it left out taken from the model's card."""
        from .engine import Run
        from .output import Output
        from .sampling import Sampler

        card = self._files.card
        self._check_names(request)
        sampling = _sampling(request, card.sampling)
        if request.messages:
            if request.prompt:
                raise BadRequest("generate takes either `prompt` or `messages`, not both")
            prompt, stop = card.prompt.write(request.messages, request.documents), [*card.stop.strings, *request.stop]
        else:
            if request.documents:
                raise BadRequest("generate takes `documents` only with `messages`; put them in `prompt` yourself")
            prompt, stop = request.prompt, request.stop
        if not prompt:
            raise BadRequest("generate needs `prompt` or `messages`; both are empty")
        try:
            tokens = self._engine.tokenizer.encode(prompt)
        except UnicodeEncodeError as error:
            raise BadRequest(f"generate: the prompt holds half a character (a lone surrogate): {error}") from None
        state = None
        if request.state:
            state = self._states.load(request.state, ctx, self._engine.model, self._base_sha256)
        return Run(
            prompt=tokens,
            sampler=Sampler(sampling, request.seed, self._countless),
            output=Output(stop, strip=bool(request.messages)),
            emit=emit,
            max_tokens=min(sampling.max_tokens, self.LONGEST),
            stop=frozenset(card.stop.tokens),
            logprobs=request.logprobs,
            state=state,
        )

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
        if request.adapter:
            raise NotFound(unknown("adapter", request.adapter, []))

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


def _sampling(request: Generate, default: Sampling) -> Sampling:
    asked = {name: getattr(request, name) for name in (*RANGES, "max_tokens") if getattr(request, name) is not None}
    for name, (low, high) in RANGES.items():
        if name in asked and not low <= asked[name] <= high:
            raise BadRequest(f"generate: `{name}` is {asked[name]}; it must be from {low} to {high}")
    if asked.get("max_tokens", 1) < 1:
        raise BadRequest(f"generate: `max_tokens` is {asked['max_tokens']}; it must be at least 1")
    if request.seed is not None and not -(2**63) <= request.seed < 2**63:
        raise BadRequest("generate: `seed` must fit 64 bits")
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
