"""The plugin: the hooks `generate`, `models` and `states` of RWKV models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import msgspec
from aiirwkv import Context, Plugin, hookimpl
from aiirwkv.errors import NotFound, ServiceError
from aiirwkv.types import CacheStats, Chunk, Generate, KeptState, Model, Models, ModelsReply, States, StatesReply

from .shelf.library import Files

if TYPE_CHECKING:
    from .asking import Asking
    from .engine.loop import Told
    from .service import Service

MIB = 2**20
FOLLOW = 2.0
"""Seconds between looks at what other workers with the same data directory serve."""


class LlmRwkv(Plugin):
    """Writes text with RWKV models."""

    model: str = "rwkv7-nano"
    """A model's name, or the path of its folder or .safetensors file."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    precision: str = "auto"
    """auto, float32, bfloat16, int8; on a CPU also int4, on a GPU float16 and nf4."""
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Threads of the CPU; 0 chooses by the size of the model."""
    rows: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Texts that are worked on at once; 0 chooses by the size of the model's state, 64 at most."""
    longest_prompt: Annotated[int, msgspec.Meta(ge=1)] = 262_144
    """Tokens that a prompt may have."""
    states_memory: Annotated[int, msgspec.Meta(ge=0)] = 512
    """MiB of memory for kept states, of each loaded model; 0, with `states_disk` 0, keeps none."""
    states_disk: Annotated[int, msgspec.Meta(ge=0)] = 4096
    """MiB on disk for kept states, of each loaded model."""
    mirror: str = ""
    """Where to pull models from instead of https://huggingface.co."""

    concurrent_requests: ClassVar[int] = 256

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._load)
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._following.cancel()
        await asyncio.to_thread(self._serving.close)

    def _load(self) -> None:
        from .service import Wishes
        from .serving import Serving
        from .shelf.adapters import Adapters, adapters_folder
        from .shelf.changes import tidy
        from .shelf.tuned import TunedStates, states_folder

        tidy(self.data / "models")
        self._states = TunedStates(states_folder(self.data))
        self._adapters = Adapters(adapters_folder(self.data))
        wishes = Wishes(
            data=self.data,
            device=self.device,
            precision=self.precision,
            threads=self.threads,
            rows=self.rows,
            states_memory=self.states_memory * MIB,
            states_disk=self.states_disk * MIB,
        )
        self._serving = Serving(self.model, wishes, self._deliver)
        self._serving.start()

    def _deliver(self, told: list[Told]) -> None:
        from .engine.loop import hand_out

        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(hand_out, told)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW)
            await asyncio.to_thread(self._serving.follow)

    def about(self) -> dict[str, Any]:
        return {**self._service().about(), "loaded": list(self._serving.services)}

    def stats(self) -> dict[str, Any]:
        services = self._serving.services
        stats = self._service().engine.stats()
        return stats if len(services) == 1 else {**stats, "models": {n: s.engine.stats() for n, s in services.items()}}

    def _service(self, model: str | None = None) -> Service:
        """By "[plugin/]name"; None is the default one. Raises NotFound."""
        return self._serving.find((model or "").rpartition("/")[2])

    def _asking(self, service: Service) -> Asking:
        from .asking import Asking

        return Asking(service, self._states, self._adapters, self.longest_prompt)

    @hookimpl
    async def generate(self, request: Generate, ctx: Context) -> AsyncIterator[Chunk]:
        from .asking import Post

        post, service = Post(), self._service(request.model)
        run = await asyncio.to_thread(self._asking(service).run, request, ctx, post.put)
        service.engine.submit(run)
        try:
            async for piece in post.pieces():
                if piece.usage:
                    piece.model = service.name
                yield piece
        finally:
            run.cancel()

    @hookimpl
    async def models(self, request: Models, ctx: Context) -> ModelsReply:
        from .shelf.actions import change, owner_only

        serving = self._serving
        if request.action == "list":
            return await asyncio.to_thread(self._list, ctx)
        if request.action in ("add", "pull", "delete"):
            name = await change(
                request, ctx, self.data, loaded=list(serving.services), models=serving.here(), mirror=self.mirror
            )
        else:
            owner_only(request, ctx)
            request.need("name")
            name = request.name
            await asyncio.to_thread(getattr(serving, request.action), name)
        reply = await asyncio.to_thread(self._list, ctx)
        if request.action == "delete":
            return reply
        return ModelsReply([model for model in reply.models if model.name == name])

    def _list(self, ctx: Context) -> ModelsReply:
        models = [self._model(files) for files in self._serving.here().values()]
        return ModelsReply([*models, *self._states.models(ctx), *self._adapters.models(ctx)])

    def _model(self, files: Files) -> Model:
        card, service = files.card, self._serving.services.get(files.card.name)
        return Model(
            name=card.name,
            plugin="llm_rwkv",
            version=card.version,
            parameters=service.parameters if service else card.parameters,
            size=files.weights.stat().st_size,
            sha256=card.sha256.get(files.weights.name, ""),
            loaded=service is not None,
            default=card.name == self._serving.default,
            demonstration=card.demonstration,
            card=msgspec.to_builtins(card),
        )

    @hookimpl
    async def states(self, request: States, ctx: Context) -> StatesReply:
        if request.action == "read":
            return await self._read(request, ctx)
        services = self._serving.services
        caches = [(service.name, service.cache) for service in services.values() if service.cache]
        if request.model:
            service = self._service(request.model)
            caches = [(name, cache) for name, cache in caches if name == service.name]
        owner = None if "owner" in ctx.user.roles else ctx.user.name
        kept: list[KeptState] = []
        object = None
        if request.action == "import":
            request.need("object")
            service, data = self._service(request.model), await ctx.bus.read(request.object)
            kept = [await asyncio.to_thread(self._import, service, data, request, ctx.user.name)]
        elif request.id or request.action == "export":
            request.need("id")
            state, cache = self._kept(caches, owner, request.id)
            kept = [state]
            if request.action == "export":
                file = await asyncio.to_thread(cache.export, owner, request.id)
                object = await ctx.bus.put(file, f"{request.id}.state")
            elif request.action == "drop":
                await asyncio.to_thread(cache.drop, owner, request.id)
        else:
            for _, cache in caches:
                kept += await asyncio.to_thread(cache.drop_all if request.action == "drop" else cache.list, owner)
        return StatesReply(kept, _total([cache.stats() for _, cache in caches]), None, object)

    async def _read(self, request: States, ctx: Context) -> StatesReply:
        from .asking import Post

        post, service = Post(), self._service(request.model)
        if not service.cache:
            raise ServiceError("states: this worker keeps none; set plugins.llm_rwkv.states_memory or states_disk")
        run = await asyncio.to_thread(self._asking(service).reading, request, ctx, post.put)
        service.engine.submit(run)
        try:
            async for _ in post.pieces():
                pass
        finally:
            run.cancel()
        kept = [state for state in await asyncio.to_thread(service.cache.list, None) if state.id == run.kept]
        if not kept:
            raise ServiceError("states: what was read could not be kept; see the worker's log, and aiirwkv states")
        return StatesReply(kept, service.cache.stats(), run.usage)

    @staticmethod
    def _import(service: Service, data: bytes, request: States, owner: str) -> KeptState:
        if not service.cache:
            raise ServiceError("states: this worker keeps none; set plugins.llm_rwkv.states_memory or states_disk")
        return service.cache.import_(owner, data, model=service.name, label=request.label, pin=request.pin)

    @staticmethod
    def _kept(caches: Any, owner: str | None, id: str) -> Any:
        """The state of this id, and its cache."""
        for _, cache in caches:
            for state in cache.list(owner):
                if state.id == id:
                    return state, cache
        raise NotFound(f"there is no kept state {id!r}; aiirwkv states lists them")


def _total(stats: list[CacheStats]) -> CacheStats:
    """Of all caches together."""
    return CacheStats(**{name: sum(getattr(s, name) for s in stats) for name in CacheStats.__struct_fields__})
