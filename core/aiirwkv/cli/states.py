"""The commands about kept states: list, read, export, import, drop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..types import CacheStats, Convert, KeptState, States, StatesReply
from .common import State, as_json, claim, cli, connected, runs, say, show

if TYPE_CHECKING:
    from ..bus import Bus

LONG = 3600.0
"""Seconds that reading a text may take."""


@cli.group(invoke_without_command=True)
@claim
@as_json
@click.pass_context
def states(context: click.Context, claim: str | None, as_json: bool) -> None:
    """See and change what the model remembers of texts it has read; without a command: list it."""
    context.obj.claim = claim or ""
    if context.invoked_subcommand is None:
        context.invoke(list_states, claim=claim, as_json=as_json)


@states.command("list")
@claim
@as_json
@click.pass_obj
@runs
async def list_states(state: State, claim: str | None, as_json: bool) -> None:
    """List kept states, the last used first, the budgets, and what has been saved."""
    from ..terminal import table

    async with connected(state, claim) as bus:
        reply = await bus.call(States("list"))
    if as_json:
        show(reply)
        return
    rows = [_row(kept) for kept in reply.states]
    head = ["id", "tokens", "size", "where", "", "hits", "last used", "model", "label"]
    click.echo(table(rows, head) if rows else "nothing is kept")
    click.echo(f"\n{_budgets(reply.cache)}\n{_savings(reply.cache)}")


@states.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--label", default="", help="What to call it [like the file].")
@click.option("--model", help="[plugin/]name of a base model.")
@claim
@as_json
@click.pass_obj
@runs
async def read(state: State, file: Path, label: str, model: str | None, claim: str | None, as_json: bool) -> None:
    """Have the model read FILE, so that questions about it cost only their own tokens."""
    from ..terminal import amount

    async with connected(state, claim) as bus:
        asked = States("read", documents=[await _text(bus, file)], label=label or file.name, model=model)
        reply = await bus.call(asked, to=(model or "").rpartition("/")[0] or None, timeout=LONG)
    if as_json:
        show(reply)
        return
    for kept in reply.states:
        again = f", {reply.usage.cached} of them before" if reply.usage and reply.usage.cached else ""
        say(f"{kept.model} has read {kept.tokens} tokens{again}; its state has {amount(kept.bytes)}")
        click.echo(kept.id)


async def _text(bus: Bus, file: Path) -> str:
    """What a converter reads out of the file."""
    uploaded = await bus.put(file, file.name)
    converted = await bus.call(Convert(uploaded.id, file.name, uploaded.media_type), timeout=300)
    text = (await bus.read(converted.object)).decode() if converted.object else converted.text
    for object in filter(None, (uploaded.id, converted.object)):
        await bus.discard(object)
    if not text.strip():
        raise click.ClickException(f"there is no text in {file}; {'; '.join(converted.warnings) or 'name another one'}")
    return text


@states.command()
@click.argument("id")
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), help="Where to [ID.state, here].")
@claim
@as_json
@click.pass_obj
@runs
async def export(state: State, id: str, file: Path | None, claim: str | None, as_json: bool) -> None:
    """Write a kept state to a file."""
    from ..terminal import amount

    async with connected(state, claim) as bus:
        reply = await bus.call(States("export", id=id), timeout=600)
        if reply.object is None:
            raise click.ClickException(f"the model gave no file for {id}; see its worker's log")
        into = file or Path(re.sub(r"[^\w.-]", "_", id) + ".state")
        await bus.get(reply.object.id, into)
        await bus.discard(reply.object.id)
    show(reply) if as_json else say(f"wrote {into}, {amount(into.stat().st_size)}")


@states.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--label", default="", help="What to call it [as it was].")
@claim
@as_json
@click.pass_obj
@runs
async def import_(state: State, file: Path, label: str, claim: str | None, as_json: bool) -> None:
    """Take up a kept state from FILE, which `states export` wrote; it fits only the same model."""
    async with connected(state, claim) as bus:
        uploaded = await bus.put(file, file.name)
        try:
            reply = await bus.call(States("import", object=uploaded.id, label=label), timeout=600)
        finally:
            await bus.discard(uploaded.id)
    _told(reply, as_json, "took up")


@states.command()
@click.argument("id", default="")
@click.option("--yes", is_flag=True, help="Drop all of them without asking.")
@claim
@as_json
@click.pass_obj
@runs
async def drop(state: State, id: str, yes: bool, claim: str | None, as_json: bool) -> None:
    """Drop the kept state ID, or all of yours."""
    if not id and not yes:
        click.confirm("Drop all kept states? Texts are then read again when they are asked about.", abort=True)
    async with connected(state, claim) as bus:
        reply = await bus.call(States("drop", id=id))
    _told(reply, as_json, "dropped")


def _told(reply: StatesReply, as_json: bool, what: str) -> None:
    if as_json:
        show(reply)
        return
    for kept in reply.states:
        say(f"{what} {kept.id} {kept.label}".rstrip())
    if not reply.states:
        say("there was none")


def _row(kept: KeptState) -> list[str]:
    from ..terminal import amount

    where = " and ".join(place for place, there in (("memory", kept.memory), ("disk", kept.disk)) if there)
    return [
        kept.id,
        str(kept.tokens),
        amount(kept.bytes),
        where,
        "pinned" if kept.pinned else "",
        str(kept.hits),
        _ago(kept.used or kept.created),
        kept.model,
        kept.label,
    ]


def _ago(moment: float) -> str:
    import time

    from ..terminal import clock

    seconds = max(time.time() - moment, 0)
    if seconds < 5400:
        return f"{clock(seconds)} ago"
    return f"{seconds / 3600:.0f} h ago" if seconds < 172_800 else time.strftime("%Y-%m-%d", time.localtime(moment))


def _budgets(cache: CacheStats) -> str:
    """How full the cache is, and what went to make room."""
    from ..terminal import amount, count

    places = [
        f"{amount(used)} of {amount(budget)} {where} ({100 * used / budget:.0f} %)"
        for used, budget, where in (
            (cache.memory, cache.memory_budget, "in memory"),
            (cache.disk, cache.disk_budget, "on disk"),
        )
        if budget
    ]
    places = places or ["nothing may be kept"]
    return f"{count(cache.states, 'state')}: {', '.join(places)}; {cache.dropped} dropped to make room"


def _savings(cache: CacheStats) -> str:
    """What the cache has been good for."""
    asked = cache.hits + cache.misses
    share = f" ({100 * cache.hits / asked:.0f} %)" if asked else ""
    saved = f"{cache.tokens_saved} tokens were not read again"
    return f"since the start {cache.hits} of {asked} requests went on from one{share}; {saved}"
