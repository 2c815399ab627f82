"""What changes the models on this machine: add, pull, delete. What fails leaves nothing half made behind."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from aiirwkv.errors import BadRequest, Conflict, NotFound, PluginError, ServiceError

from . import adapters, describe, tuned
from .describe import kind, shapes
from .disk import disk_errors, file_sha256, forget, need_room, staging
from .download import download
from .library import BUILT_IN, Files, known, unknown
from .source import Source

__all__ = ["Added", "add", "checked_name", "delete", "name_for", "pull", "tidy"]

OTHERS = ("states", "adapters")
"""Folders beside those of the base models."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
IN_FOLDERS = [
    f"{name}.{suffix}" for suffix in ("safetensors", "pth") for name in ("model", "state", "adapter", "adapter_model")
]

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Added:
    """What there is now, and how the file came to us: linked (it is on the disk once), copied, converted or moved."""

    name: str
    kind: Literal["base", "state", "adapter"]
    how: Literal["linked", "copied", "converted", "moved", "there already"]


@dataclass(frozen=True)
class Wish:
    """What was asked for."""

    folder: Path
    name: str
    owner: str
    base: str
    origin: str
    models: Mapping[str, Files]


def add(
    source: Path,
    folder: Path,
    *,
    name: str = "",
    base: str = "",
    owner: str = "owner",
    models: Mapping[str, Files] | None = None,
) -> Added:
    """
    Make a model, state or adapter in `folder` of one on this machine.

    It may be any file that this machine can read, so only the owner may: the plugin sees to that. `source` is a
    .safetensors or .pth file, or a folder with model, state or adapter .safetensors and a card.json (or an adapter of
    the `peft` library). `base` names the model a state or adapter was made for, unless its card does; `models` are such
    besides those in `folder`. Raises BadRequest, NotFound, Conflict and ServiceError.
    """
    source = Path(os.path.abspath(source.expanduser()))
    if not source.exists():
        raise NotFound(f"models: there is no {source} on the worker's machine")
    wish = _wish(folder, name or name_for(source.name), owner, base, source.name, models)
    _refuse_taken(wish)
    with staging(folder, wish.name) as place, disk_errors(folder):
        weights = _weights(source)
        how = _bring(weights, _made(place))
        return Added(wish.name, _publish(wish, place, weights, source if source.is_dir() else None), how)


def pull(
    source: Source,
    folder: Path,
    *,
    name: str = "",
    base: str = "",
    sha256: str = "",
    owner: str = "owner",
    models: Mapping[str, Files] | None = None,
    progress: Progress = lambda done, total, note: None,
    stop: threading.Event | None = None,
) -> Added:
    """
    Fetch one .safetensors or .pth file and add it, as `download` and `add` do, with their errors.

    It makes this machine ask any address, so only the owner may: the plugin sees to that. `progress` is `ctx.progress`,
    in megabytes. What has come before it breaks is kept for a later call, until `delete`. Pulled before from the same
    address under the same name, it is there already.
    """
    if not source.file.endswith((".safetensors", ".pth")):
        raise BadRequest(f"models: {source.public} is neither a .safetensors nor a .pth file, so it cannot be served")
    wish = _wish(folder, name or name_for(source.file), owner, base, source.public, models)
    if before := _pulled_before(wish):
        return before
    _refuse_taken(wish)
    converted = source.file.endswith(".pth")

    def tell(done: int, total: int) -> None:
        progress(round(done / 1e6, 1), round(total / 1e6, 1), "MB")

    with staging(folder, wish.name) as place, disk_errors(folder):
        file = place / f"{wish.name}{Path(source.file).suffix}"
        download(source, file, sha256=sha256, copies=int(converted), progress=tell, stop=stop)
        size = round(file.stat().st_size / 1e6, 1)
        progress(size, size, "converts it" if converted else "looks at it")
        try:
            how = _bring(file, _made(place), ours=True)
            found = _publish(wish, place, file, None)
        except ServiceError as error:
            if error.code < 500:  # it is of no use, whoever tries again
                forget(place)
            raise
        forget(place)
        return Added(wish.name, found, how)


def delete(name: str, folder: Path, loaded: Collection[str] = ()) -> None:
    """
    Delete a base model, or what is left of a pull that broke off, from the folder of models.

    Only the owner may: the plugin sees to that. Raises Conflict for a built-in or `loaded` one, and NotFound.
    """
    built_in, here = known([BUILT_IN]), known([folder])
    if name in loaded:
        raise Conflict(f"the model {name!r} is loaded; first: aiirwkv models unload {name}")
    path = here[name].weights.parent if name in here else folder / checked_name(name)
    if path.exists() or (folder / f".{path.name}").exists():
        with staging(folder, path.name) as place, disk_errors(folder):
            forget(place)
            if path.exists():
                os.rename(path, place / "deleted")  # gone at once, however long its files take
    elif name in built_in:
        raise Conflict(f"the model {name!r} is built in and cannot be deleted")
    else:
        raise NotFound(unknown("model", name, {**built_in, **here}))


def tidy(folder: Path) -> None:
    """Remove what a process that died has left in the folder of models, but for pulls that can go on."""
    for path in folder.glob(".*"):
        if path.is_dir():
            try:
                with staging(folder, path.name[1:]):
                    pass
            except Conflict:  # somebody is at it
                continue


def checked_name(name: str) -> str:
    """The name, if it can be one of a new model, state or adapter: it is also the name of a folder."""
    if not NAME.fullmatch(name) or name in OTHERS:
        raise BadRequest(
            f"models: `name` is {name!r}; it has up to 64 letters (a to z), digits, '-', '_' and '.', begins with "
            f"neither '-' nor '.', and is none of {', '.join(OTHERS)}"
        )
    return name


def name_for(file: str) -> str:
    """A name after that of a file, as far as it can be one."""
    stem = re.sub(r"\.(pth|safetensors)$", "", file)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).lstrip(".-")[:64] or "model"


def _made(place: Path) -> Path:
    made = place / "made"
    made.mkdir()
    return made / "model.safetensors"


def _wish(folder: Path, name: str, owner: str, base: str, origin: str, models: Mapping[str, Files] | None) -> Wish:
    return Wish(folder, checked_name(name), owner, base, origin, {**known([BUILT_IN, folder]), **(models or {})})


def _places(wish: Wish) -> dict[str, Path]:
    return {
        "base": wish.folder / wish.name,
        "state": wish.folder / "states" / wish.name,
        "adapter": wish.folder / "adapters" / wish.name,
    }


def _refuse_taken(wish: Wish) -> None:
    if wish.name in wish.models or any(path.exists() for path in _places(wish).values()):
        raise Conflict(f"models: there is a {wish.name!r} already; choose another `name`, or delete that one first")


def _pulled_before(wish: Wish) -> Added | None:
    """A job may be delivered twice."""
    for found, path in _places(wish).items():
        try:
            card = msgspec.json.decode((path / "card.json").read_bytes())
            if card["origin"] == wish.origin:
                return Added(wish.name, found, "there already")  # type: ignore[arg-type]
        except (OSError, msgspec.MsgspecError, KeyError, TypeError):
            continue
    return None


def _weights(source: Path) -> Path:
    """The file that matters."""
    if source.is_file():
        return source
    for name in IN_FOLDERS:
        if (source / name).is_file():
            return source / name
    raise BadRequest(f"models: the folder {source} has no model.safetensors, state.safetensors or adapter.safetensors")


def _bring(weights: Path, target: Path, *, ours: bool = False) -> Literal["linked", "copied", "converted", "moved"]:
    """Have the tensors of a file as a safetensors file. What is `ours` need not stay where it was."""
    if weights.suffix == ".pth":
        from ..network.convert import convert

        need_room(target.parent, weights.stat().st_size)
        try:
            convert(weights, target)
        except PluginError as error:
            raise BadRequest(f"models: {error}") from None
        return "converted"
    if weights.suffix != ".safetensors":
        raise BadRequest(f"models: {weights.name} is neither a .safetensors nor a .pth file, so it cannot be served")
    if ours:
        os.rename(weights, target)
        return "moved"
    try:
        os.link(weights.resolve(), target)
        return "linked"
    except OSError:  # on another disk, or one that cannot
        need_room(target.parent, weights.stat().st_size)
        shutil.copyfile(weights, target)
        return "copied"


def _publish(wish: Wish, place: Path, weights: Path, beside: Path | None) -> Literal["base", "state", "adapter"]:
    """Make made/ whole and give it its name. `beside`: the folder with what belongs to the file."""
    made = place / "made"
    tensors = shapes(made / "model.safetensors")
    found = kind(tensors)
    if found == "base":
        describe.make(made, wish.name, wish.origin, tensors, weights, beside)
    else:
        if found == "adapter" and beside:
            for init in filter(Path.is_file, (beside / "init_pissa.safetensors", beside / "init_pissa.pth")):
                _bring(init, made / "init.safetensors")
        given = _facts(weights, beside)
        base = wish.base or given.get("base", "")
        if not base:
            raise BadRequest(f"models: {weights.name} is for one base model and does not say which: name it as `base`")
        if base not in wish.models:
            raise NotFound(
                f"models: {weights.name} is for a base model that is not here: {unknown('model', base, wish.models)}"
            )
        files = wish.models[base]
        if base != given.get("base"):
            given.pop("base_sha256", None)
        elif given.get("base_sha256", files.sha256()) != files.sha256():
            raise Conflict(f"models: {weights.name} was made for another {base!r} than the one that is here")
        known_now = {"name": wish.name, "owner": wish.owner, "base": base, "version": files.card.version}
        fields = {"base_sha256": "", "origin": wish.origin, **given, **known_now, "shares": {}}
        (adapters if found == "adapter" else tuned).make(made, fields, shapes(files.weights))
    target = _places(wish)[found]
    target.parent.mkdir(exist_ok=True)
    try:
        os.rename(made, target)
    except OSError as error:
        if target.exists():
            _refuse_taken(wish)
        raise ServiceError(f"models: {target} cannot be written: {error.strerror}") from None
    return found


def _facts(weights: Path, beside: Path | None) -> dict[str, Any]:
    """What the folder of a state or adapter says of it."""
    if beside is None:
        return {}
    try:
        given = msgspec.json.decode((beside / "card.json").read_bytes(), type=dict[str, Any])
        hashes = msgspec.convert(given.get("sha256", {}), dict[str, str])
    except FileNotFoundError:
        return adapters.facts(beside)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(f"models: the card of {beside} cannot be used: {error}") from None
    if hashes.get(weights.name, found := file_sha256(weights)) != found:
        raise BadRequest(f"models: {weights} is damaged or another one: its sha256 is not its card's")
    return given
