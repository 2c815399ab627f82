"""Commands that manage: jobs, plugins, plugin new, users, call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import AiirwkvError
from ..types import REQUESTS, Jobs, StreamRequest, Users
from .common import State, as_json, claim, claim_of, cli, connected, fail, runs, say, show


@cli.group(invoke_without_command=True)
@click.option("--watch", is_flag=True, help="Show them as they change.")
@click.option("--group", default="", help="Only this group.")
@claim
@as_json
@click.pass_context
@runs
async def jobs(context: click.Context, watch: bool, group: str, claim: str | None, as_json: bool) -> None:
    """See and steer jobs; without a command: list them."""
    from ..identity import bearer
    from ..terminal import JobLines, outcome, table, title

    context.obj.claim = claim or ""
    if context.invoked_subcommand is not None:
        return
    async with connected(context.obj) as bus:
        if watch:
            await bus.call(Jobs("list", limit=1))  # refuses a claim that is forged or has expired
            user = bearer(bus.claim)
            with JobLines() as lines:
                async with bus.follow(group=group) as changes:
                    async for job in changes:
                        if "owner" not in user.roles and job.user != user.name:
                            continue
                        show(job) if as_json else lines.show(job)
            return
        reply = await bus.call(Jobs("list", group=group))
    if as_json:
        show(reply)
        return
    rows = [[j.id, title(j), f"{j.done:g}/{j.total:g}" if j.total else "", outcome(j)] for j in reply.jobs]
    click.echo(table(rows, ["id", "job", "done", "state"]))


def _steering(action: Any) -> None:
    @jobs.command(action, help=f"{action.capitalize()} a job.")
    @click.argument("id")
    @claim
    @as_json
    @click.pass_obj
    @runs
    async def steer(state: State, id: str, claim: str | None, as_json: bool) -> None:
        async with connected(state, claim) as bus:
            reply = await bus.call(Jobs(action, id))
        show(reply) if as_json else say(f"{action}: job {id}")


for _action in ("cancel", "pause", "resume", "retry"):
    _steering(_action)


@cli.command()
@claim
@as_json
@click.pass_obj
@runs
async def plugins(state: State, claim: str | None, as_json: bool) -> None:
    """List the installed plugins with their hooks, settings, version and state."""
    from ..bus import Bus
    from ..plugins import hooks, installed, load_class, origin, settings
    from ..supervisor import running

    served: dict[str, set[str]] = {}
    broken: dict[str, str] = {}
    config, found = state.config, running(state.data)
    if config.bus.url or found:
        where = config.bus if config.bus.url else found.bus  # type: ignore[union-attr]
        async with Bus.connect(where, "cli", claim=claim_of(state, claim)) as bus:
            for identity in await bus.workers():
                broken |= json.loads(identity["metadata"]["broken"])
                for name in identity["metadata"]["plugins"].split(","):
                    served.setdefault(name, set()).add(identity["id"])
    rows: list[dict[str, Any]] = []
    for name, ep in sorted(installed().items()):
        row: dict[str, Any] = {"name": name, "distribution": origin(ep), "hooks": [], "settings": {}, "state": ""}
        try:
            cls = load_class(name)
            row["hooks"], row["settings"] = hooks(cls), settings(cls) | config.plugins.get(name, {})
            workers = len(served.get(name, ()))
            row["state"] = f"served by {workers} worker{'s' * (workers != 1)}" if workers else "not running"
            if name in broken:
                row["state"] = f"broken: {broken[name].removeprefix(f'plugin {name!r} ')}"
        except AiirwkvError as exc:
            row["state"] = f"broken: {str(exc).removeprefix(f'plugin {name!r} ')}"
        rows.append(row)
    if as_json:
        show(rows)
        return
    for row in rows:
        mark = "✗" if row["state"].startswith("broken") else "●" if row["state"].startswith("served") else "○"
        click.secho(f"{mark} {row['name']}", bold=True, nl=False)
        click.echo(f"  {row['distribution']} · {', '.join(row['hooks']) or 'no hooks'}")
        click.echo(f"    {row['state']}")
        for key, value in row["settings"].items():
            click.echo(f"    {key} = {json.dumps(value, default=str)}")


@cli.group()
def plugin() -> None:
    """Write a plugin."""


@plugin.command()
@click.argument("name")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(), help="Where to put it [here].")
def new(name: str, folder: Path) -> None:
    """Write a working plugin NAME with a test."""
    from ..scaffold import write

    try:
        files = write(name, folder)
    except (AiirwkvError, OSError) as exc:
        fail(exc)
        return
    for path in files:
        click.echo(path)
    say(f"next: pip install -e {files[0].parent} && pytest {files[0].parent}")


@cli.command()
@click.argument("action", type=click.Choice(["me", "list", "add", "remove", "claim"]), default="list")
@click.argument("name", default="")
@click.option("--role", "roles", multiple=True, help="A role of a new user; `owner` may do everything.")
@click.option("--seconds", default=3600.0, show_default=True, help="How long a claim is valid.")
@claim
@as_json
@click.pass_obj
@runs
async def users(
    state: State, action: Any, name: str, roles: tuple[str, ...], seconds: float, claim: str | None, as_json: bool
) -> None:
    """List, add and remove users; `claim NAME` prints a signed claim."""
    from ..terminal import table

    async with connected(state, claim) as bus:
        reply = await bus.call(Users(action, name, list(roles), seconds))
    if as_json:
        show(reply)
    elif reply.token:
        click.echo(reply.token)
    else:
        click.echo(table([[user.name, ", ".join(user.roles)] for user in reply.users], ["user", "roles"]))


@cli.command()
@click.argument("hook", type=click.Choice(list(REQUESTS)))
@click.argument("body", default="{}")
@click.option("--to", help="A plugin, or plugin.worker.")
@click.option("--stream", is_flag=True, help="Print the pieces as they come.")
@click.option("--job", is_flag=True, help="Have it done durably; prints the job.")
@click.option("--timeout", default=600.0, show_default=True)
@claim
@click.pass_obj
@runs
async def call(
    state: State, hook: str, body: str, to: str | None, stream: bool, job: bool, timeout: float, claim: str | None
) -> None:
    """Send a request, as JSON, to a hook, and print the reply: aiirwkv call search '{"query": "…"}'."""
    from ..worker import decode

    request = decode(hook, body.encode())
    async with connected(state, claim) as bus:
        if job:
            show(await bus.submit(request, to=to))
        elif stream and isinstance(request, StreamRequest):
            async with bus.stream(request, to=to, timeout=timeout) as pieces:
                async for piece in pieces:
                    show(piece)
        else:
            show(await bus.call(request, to=to, timeout=timeout))
