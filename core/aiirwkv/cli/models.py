"""The commands about models: list, add, pull, load, unload, use, delete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from ..types import Model, Models, ModelsReply
from .common import State, as_json, claim, cli, connected, done, runs, say, show

LONG = 600
"""Seconds that loading a model may take."""


@cli.group(invoke_without_command=True)
@claim
@as_json
@click.pass_context
def models(context: click.Context, claim: str | None, as_json: bool) -> None:
    """See and change base models, states and adapters; without a command: list them."""
    context.obj.claim = claim or ""
    if context.invoked_subcommand is None:
        context.invoke(list_models, claim=claim, as_json=as_json)


@models.command("list")
@claim
@as_json
@click.pass_obj
@runs
async def list_models(state: State, claim: str | None, as_json: bool) -> None:
    """List base models, states and adapters."""
    from ..terminal import table

    async with connected(state, claim) as bus:
        reply = await bus.call(Models("list"))
    if as_json:
        show(reply)
        return
    rows = [
        [m.name, m.kind, m.version, _millions(m.parameters), _megabytes(m.size), _standing(m), m.base]
        for m in reply.models
    ]
    click.echo(table(rows, ["model", "kind", "version", "parameters", "size", "", "made for"]))


@models.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", default="", help="What to call it [like the file].")
@click.option("--base", default="", help="For a state or adapter without a card: the model that it was made for.")
@claim
@as_json
@click.pass_obj
@runs
async def add(state: State, path: Path, name: str, base: str, claim: str | None, as_json: bool) -> None:
    """
    Add a model, state or adapter that lies on the worker's machine.

    PATH is a .safetensors or .pth file, or a folder with one and its card.
    """
    await _bring(state, Models("add", name, path=str(path.absolute()), base=base), claim, as_json)


@models.command()
@click.argument("source")
@click.argument("file", default="")
@click.option("--name", default="", help="What to call it [like the file].")
@click.option("--sha256", default="", help="What the file must hash to [what the hub says].")
@click.option("--base", default="", help="For a state or adapter: the model that it was made for.")
@claim
@as_json
@click.pass_obj
@runs
async def pull(
    state: State, source: str, file: str, name: str, sha256: str, base: str, claim: str | None, as_json: bool
) -> None:
    """
    Fetch a model, state or adapter: one .safetensors or .pth file.

    SOURCE is its address, or a repository of the model hub, owner/name, and FILE its name there. What breaks goes on
    where it broke when it is pulled again.
    """
    place = {"hub": source, "file": file} if file or "://" not in source else {"url": source}
    await _bring(state, Models("pull", name, sha256=sha256, base=base, **place), claim, as_json)


async def _bring(state: State, request: Models, claim: str | None, as_json: bool) -> None:
    async with connected(state, claim) as bus:
        reply = msgspec.convert(await done(bus, request), ModelsReply)
    if as_json:
        show(reply)
        return
    for model in reply.models:
        use = {
            "base": f"aiirwkv models use {model.name}",
            "state": f"aiirwkv ask --state {model.name} QUESTION",
            "adapter": f"""aiirwkv call generate '{{"prompt": "…", "adapter": "{model.name}"}}'""",
        }[model.kind]
        kind = {"base": "a base model"}.get(model.kind, f"for {model.base}, as {model.kind}")
        say(f"{model.name} is here, {kind} of {_millions(model.parameters)} parameters\nuse it: {use}")


def _acting(action: Any, help: str, said: str, *options: Any) -> None:
    """A command that names a model."""

    @runs
    async def act(state: State, name: str, claim: str | None, as_json: bool) -> None:
        async with connected(state, claim) as bus:
            reply = await bus.call(Models(action, name), timeout=LONG)
        show(reply) if as_json else say(said.format(name=name))

    command: Any = click.pass_obj(act)
    for option in (as_json, claim, *options, click.argument("name")):
        command = option(command)
    models.command(action, help=help)(command)


_acting(
    "load", "Load a base model, beside those that are.", "{name} is loaded; ask for it with: aiirwkv ask --model {name}"
)
_acting("unload", "Unload a base model, once nobody waits for it any more.", "{name} is unloaded")
_acting("use", "Answer with this base model from now on; what runs ends first.", "{name} answers from now on")
_acting(
    "delete",
    "Delete a base model, state or adapter, or what a broken pull has left.",
    "deleted {name}",
    click.confirmation_option(prompt="Delete it from the disk?"),
)


def _standing(model: Model) -> str:
    marks = {
        "default": model.default,
        "loaded": model.loaded and not model.default,
        "demonstration": model.demonstration,
    }
    return ", ".join(mark for mark, holds in marks.items() if holds)


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e3:.0f} K"
