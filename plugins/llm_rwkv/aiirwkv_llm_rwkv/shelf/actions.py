"""The actions of the hook `models` that change what is on the disk: who may, and what is done."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Collection, Mapping
from pathlib import Path

from aiirwkv import Context
from aiirwkv.errors import Forbidden, NotFound
from aiirwkv.types import Models

from .adapters import Adapters, adapters_folder
from .changes import Added, add, delete, pull
from .download import stoppable
from .library import BUILT_IN, Files, known, unknown
from .source import source
from .tuned import TunedStates, states_folder

__all__ = ["change", "owner_only"]

log = logging.getLogger(__name__)


def owner_only(request: Models, ctx: Context) -> None:
    """Base models are everybody's, and adding or pulling makes this machine read any file or address."""
    if "owner" not in ctx.user.roles:
        raise Forbidden(f"models: only one with the role owner may {request.action} models, not {ctx.user.name}")


async def change(
    request: Models,
    ctx: Context,
    data: Path,
    *,
    loaded: Collection[str] = (),
    models: Mapping[str, Files] | None = None,
    mirror: str = "",
) -> str:
    """
    Do what `add`, `pull` and `delete` ask, and return the name of what it was done to.

    `loaded` base models are not deleted; `models` are such besides those in the data directory, by name, to which a
    state or adapter may belong; `mirror` is the model hub. States and adapters are deleted by their owners.
    """
    if request.action == "delete":
        request.need("name")
        await asyncio.to_thread(_delete, request, ctx, data, loaded)
        return request.name
    owner_only(request, ctx)
    folder = data / "models"
    if request.action == "add":
        request.need("path")

        def work(stop: threading.Event) -> Added:
            path, owner = Path(request.path), ctx.user.name
            return add(path, folder, name=request.name, base=request.base, owner=owner, models=models)
    else:
        place = source(request.url, request.hub, request.file, mirror)

        def work(stop: threading.Event) -> Added:
            return pull(
                place,
                folder,
                name=request.name,
                base=request.base,
                sha256=request.sha256,
                owner=ctx.user.name,
                models=models,
                progress=ctx.progress,
                stop=stop,
            )

    added = await stoppable(work)
    log.info("the %s %r was added by %s: its file was %s", added.kind, added.name, ctx.user.name, added.how)
    return added.name


def _delete(request: Models, ctx: Context, data: Path, loaded: Collection[str]) -> None:
    states, adapters = TunedStates(states_folder(data)), Adapters(adapters_folder(data))
    if request.name in (mine := states.known(ctx)):
        states.delete(request.name, ctx)
    elif request.name in (others := adapters.known(ctx)):
        adapters.delete(request.name, ctx)
    else:
        there = known([BUILT_IN, data / "models"])
        if "owner" not in ctx.user.roles and request.name not in there:
            raise NotFound(unknown("model, state or adapter", request.name, [*there, *mine, *others]))
        owner_only(request, ctx)
        delete(request.name, data / "models", loaded)
