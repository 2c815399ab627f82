"""The command line: one function per command. Exit codes: 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from . import __version__
from .errors import AiirwkvError, ConfigError
from .types import REQUESTS, Answer, Hits, Index, Indexed, Jobs, Source, StreamRequest

if TYPE_CHECKING:
    from .bus import Bus
    from .config import Config


class State:
    """The options that stand before the command."""

    def __init__(self, config: Path | None, data: Path | None) -> None:
        self._config, self._data = config, data

    @property
    def config(self) -> Config:
        from .config import load

        return load(self._config)

    @property
    def data(self) -> Path:
        from .config import data_directory

        return data_directory(self._data)


def say(line: str) -> None:
    """A line for the person, beside the result."""
    click.echo(line, err=True)


def show(reply: Any) -> None:
    """A reply as JSON on one line."""
    click.echo(msgspec.json.encode(reply))


def runs(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A command that is a coroutine; its errors become one line and exit code 1."""

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        import logging

        import anyio

        logging.getLogger("nats").setLevel(logging.CRITICAL)
        try:
            anyio.run(lambda: function(*args, **kwargs))
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except (AiirwkvError, ExceptionGroup) as exc:
            fail(exc)

    return command


def fail(exc: BaseException) -> None:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    if not isinstance(exc, AiirwkvError | OSError):
        raise exc
    text = str(exc) if isinstance(exc, AiirwkvError) else f"{exc.filename or 'a file'}: {exc.strerror}"
    click.echo(f"aiirwkv: {text}", err=True)
    raise SystemExit(1)


@contextlib.asynccontextmanager
async def connected(state: State, claim: str | None = None) -> Any:
    import os

    from .supervisor import session

    async with session(state.config, state.data, claim=claim or os.environ.get("AIIRWKV_CLAIM", ""), say=say) as bus:
        yield bus


as_json = click.option("--json", "as_json", is_flag=True, help="Print the bus's reply as JSON, as the last line.")
claim = click.option("--claim", help="A signed claim to ask with (or AIIRWKV_CLAIM); without one: as the owner.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--config", type=click.Path(path_type=Path), help="The configuration [./config.toml].")
@click.option("--data", type=click.Path(path_type=Path), help="The data directory [AIIRWKV_DATA, or the user's].")
@click.version_option(__version__, prog_name="aiirwkv")
@click.pass_context
def cli(context: click.Context, config: Path | None, data: Path | None) -> None:
    """AIIRWKV: a private system that reads your documents and answers with citations."""
    context.obj = State(config, data)


# Running


@cli.command()
@click.option("--host", help="Where the web page listens [127.0.0.1].")
@click.option("--port", type=int, help="The web page's port [8080].")
@click.option("--no-web", is_flag=True, help="Without the web page.")
@click.pass_obj
@runs
async def up(state: State, host: str | None, port: int | None, no_web: bool) -> None:
    """Start everything: the bus, the workers, the web page."""
    import time

    import anyio

    from .supervisor import system
    from .terminal import JobLines

    began = time.monotonic()
    config = state.config
    config.web.host, config.web.port = host or config.web.host, config.web.port if port is None else port
    with JobLines() as lines:
        lines.say(f"AIIRWKV {__version__} · data in {state.data}")
        async with anyio.create_task_group() as tasks:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:

                async def end_on_signal() -> None:
                    async for _ in signals:
                        lines.say("ending: finishing what runs …")
                        tasks.cancel_scope.cancel()
                        return

                tasks.start_soon(end_on_signal)
                async with system(config, state.data, web=not no_web, say=lines.say) as found:
                    for cause in found.broken.values():
                        lines.say(f"! {cause}")
                    from .bus import address

                    lines.say(f"bus    {address(found.bus)} (credentials in {found.data / 'bus.url'})")
                    where = f" · open {found.web}" if found.web else ""
                    lines.say(f"ready in {time.monotonic() - began:.1f} s{where} · Ctrl-C ends it")
                    await _watch(found.bus, lines)
        lines.say("ended")


async def _watch(config: Any, lines: Any) -> None:
    """Show every job until cancelled."""
    from .bus import Bus
    from .jobs import records

    async with Bus.connect(config, "terminal") as bus:
        await records(bus)
        async with bus.follow() as changes:
            began = True
            async for job in changes:
                if began and job.over:
                    continue  # what ended before we started
                began = False if not job.over else began
                lines.show(job)


@cli.command()
@click.argument("plugins", nargs=-1)
@click.option("--bus", "url", help="The NATS server's URL [bus.url, or the one that runs on the data directory].")
@click.option("--credentials", help="A .creds file.")
@click.option("--process", default="worker", help="This process's name in discovery and logs.")
@click.option("--supervised", is_flag=True, hidden=True)
@click.pass_obj
@runs
async def worker(
    state: State, plugins: tuple[str, ...], url: str | None, credentials: str | None, process: str, supervised: bool
) -> None:
    """Serve plugins in this process, until a signal ends it."""
    import logging

    from . import logs
    from .bus import Bus
    from .worker import build, serving

    logs.to_stderr()
    config, data = state.config, state.data
    async with _lifetime():
        async with Bus.connect(_where(config, data, url, credentials), process) as bus:
            await logs.to_bus(bus, process)
            broken: dict[str, str] = {}
            registry = build(list(plugins), config, data, bus, broken if supervised else None)
            async with serving(bus, registry, config, process, broken if supervised else None) as served:
                for cause in broken.values():
                    logging.getLogger("aiirwkv").error("%s", cause)
                names = ", ".join(name for name in registry.plugins if name != "core") or "nothing"
                logging.getLogger("aiirwkv").info("worker %s serves %s", served.id, names)
                await _until_ended()


@cli.command()
@click.pass_obj
@runs
async def web(state: State) -> None:
    """Serve only the web page, for a system that runs."""
    from importlib.metadata import entry_points

    from . import logs
    from .bus import Bus

    logs.to_stderr()
    config, data = state.config, state.data
    pages = list(entry_points(group="aiirwkv.web"))
    if not pages:
        raise ConfigError("no web page is installed; pip install aiirwkv-webui")
    async with _lifetime():
        async with Bus.connect(_where(config, data), "web") as bus:
            await logs.to_bus(bus, "web")
            await pages[0].load()(bus, config.web, data)


def _where(config: Config, data: Path, url: str | None = None, credentials: str | None = None) -> Any:
    from .supervisor import running

    if url:
        config.bus.url = url
    if credentials:
        config.bus.credentials = credentials
    if config.bus.url:
        return config.bus
    if found := running(data):
        return found.bus
    raise ConfigError(f"no bus to connect to: nothing runs on {data}; start aiirwkv up, or name one with [bus] url")


@contextlib.asynccontextmanager
async def _lifetime() -> Any:
    """Ends the block at SIGINT or SIGTERM, or when the supervisor is gone; leaves time to finish what runs."""
    import os
    import threading

    import anyio

    async with anyio.create_task_group() as tasks:

        def end() -> None:
            timer = threading.Timer(45, os._exit, (1,))
            timer.daemon = True
            timer.start()
            tasks.cancel_scope.cancel()

        async def on_signal() -> None:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    end()
                    return

        async def on_orphaned(parent: int) -> None:
            while os.getppid() == parent:
                await anyio.sleep(1)
            end()

        tasks.start_soon(on_signal)
        if parent := os.environ.get("AIIRWKV_SUPERVISOR"):
            tasks.start_soon(on_orphaned, int(parent))
        yield
        tasks.cancel_scope.cancel()


async def _until_ended() -> None:
    import anyio

    await anyio.sleep_forever()


# Documents and answers


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--collection", "-c", required=True, help="Where to put them; made if need be.")
@claim
@as_json
@click.pass_obj
@runs
async def index(state: State, paths: tuple[Path, ...], collection: str, claim: str | None, as_json: bool) -> None:
    """Read files and folders into a collection."""
    import time

    from .store import ulid
    from .terminal import JobLines

    began = time.monotonic()
    async with connected(state, claim) as bus:
        files = await _files(bus, paths)
        group = ulid()
        total = Indexed(collection)
        failed: list[str] = []
        with JobLines() as lines:
            for path, name in files:
                uploaded = await bus.put(path, name)
                source = Source(uploaded.id, name=name, media_type=uploaded.media_type)
                await bus.submit(Index(collection, [source]), group=group)
            async with bus.follow(group=group) as changes:
                async for job in changes:
                    lines.show(job)
                    if job.state == "done":
                        part = msgspec.convert(job.result, Indexed)
                        total.documents += part.documents
                        total.chunks += part.chunks
                    elif job.over:
                        failed.append(job.error or job.state)
    total.seconds = time.monotonic() - began
    bad = [document for document in total.documents if document.state in ("failed", "needs_ocr")]
    if not as_json:
        ready = len(total.documents) - len(bad)
        say(f"{ready} of {len(files)} documents ready in {collection}, {total.chunks} chunks, {total.seconds:.1f} s")
    else:
        show(total)
    if bad or failed:
        raise SystemExit(1)


async def _files(bus: Bus, paths: tuple[Path, ...]) -> list[tuple[Path, str]]:
    """The files to index with their names; of folders those that a converter takes."""
    services = await bus.services("convert")
    taken = {suffix.lower() for service in services for suffix in service.about.get("suffixes", [])}
    found: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_file():
            found.append((path, path.name))
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
        inside = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        for file in inside:
            if file.suffix.lower() in taken:
                found.append((file, str(Path(path.resolve().name) / file.relative_to(path))))
            else:
                say(f"  left out {file}: no converter takes {file.suffix or 'files without a suffix'}")
    if not found:
        raise ConfigError(f"nothing to index in {', '.join(map(str, paths))}")
    return found


@cli.command()
@click.argument("query")
@click.option("--collection", "-c", "collections", multiple=True, help="Where to look; several are fine [all].")
@click.option("--top", default=5, show_default=True, help="How many passages.")
@click.option("--mode", type=click.Choice(["hybrid", "dense", "keyword"]), default="hybrid", show_default=True)
@claim
@as_json
@click.pass_obj
@runs
async def search(
    state: State, query: str, collections: tuple[str, ...], top: int, mode: Any, claim: str | None, as_json: bool
) -> None:
    """Find passages."""
    from .types import Search

    async with connected(state, claim) as bus:
        hits: Hits = await bus.call(Search(query, list(collections), top, mode))
    if as_json:
        show(hits)
        return
    for number, hit in enumerate(hits.hits, 1):
        page = f" · page {hit.page}" if hit.page else ""
        click.secho(f"{number}. {hit.document}{page} · {hit.start}–{hit.end} · {hit.score:.3f}", bold=True)
        click.echo(f"   {' '.join(hit.text.split())[:300]}")
    if not hits.hits:
        say("nothing found; see what there is with: aiirwkv collections")


@cli.command()
@click.argument("question")
@click.option("--collection", "-c", "collections", multiple=True, help="Where to look; several are fine [all].")
@click.option("--mode", type=click.Choice(["sources", "first", "free"]), default="sources", show_default=True,
              help="sources: refuse what they do not say; first: then the model's own words; free: no check.")  # fmt: skip
@click.option("--model", help="[plugin/]name of a base model.")
@click.option("--state", "tuned", help="A tuned state.")
@click.option("--top", default=5, show_default=True, help="How many passages to look at.")
@claim
@as_json
@click.pass_obj
@runs
async def ask(
    state: State,
    question: str,
    collections: tuple[str, ...],
    mode: Any,
    model: str | None,
    tuned: str | None,
    top: int,
    claim: str | None,
    as_json: bool,
) -> None:
    """Ask a question about your documents."""
    from .types import Chat

    request = Chat(question, [], list(collections), mode, top, model=model, state=tuned)
    answer: Answer | None = None
    async with connected(state, claim) as bus, bus.stream(request) as chunks:
        async for chunk in chunks:
            if chunk.stage and sys.stderr.isatty() and not as_json:
                click.echo(f"\r\x1b[2K  {chunk.stage} …", nl=False, err=True)
            if chunk.text and not as_json:
                if sys.stderr.isatty():
                    click.echo("\r\x1b[2K", nl=False, err=True)
                click.echo(chunk.text, nl=False)
            answer = chunk.answer or answer
    if as_json:
        show(answer)
        return
    click.echo()
    if answer:
        for citation in answer.citations:
            page = f", page {citation.page}" if citation.page else ""
            place = click.style(f"[{citation.number}] {citation.document}{page}", bold=True)
            click.echo(f"  {place} · {' '.join(citation.text.split())}")
        if answer.demonstration:
            say(f"  ({answer.model} is a small demonstration model; see the README for a real one)")


@cli.group(invoke_without_command=True)
@as_json
@click.pass_context
def collections(context: click.Context, as_json: bool) -> None:
    """Manage collections; without a command: list them."""
    if context.invoked_subcommand is None:
        context.invoke(list_collections, as_json=as_json)


def _collections(action: Any, *arguments: Any) -> Any:
    """A command of the `collections` hook."""

    def decorate(function: Callable[..., Any]) -> Any:
        @runs
        async def command(state: State, as_json: bool, claim: str | None = None, **fields: Any) -> None:
            from .types import Collections

            async with connected(state, claim) as bus:
                reply = await bus.call(Collections(action, **fields), timeout=600)
            show(reply) if as_json else function(reply, **fields)

        command.__doc__ = function.__doc__
        decorated: Any = click.pass_obj(command)
        for argument in (*reversed(arguments), claim, as_json):
            decorated = argument(decorated)
        return collections.command(action, help=function.__doc__)(decorated)

    return decorate


@_collections("list")
def list_collections(reply: Any) -> None:
    """List the collections you may read."""
    from .terminal import table

    rows = [[c.name, str(c.documents), str(c.chunks), c.owner, c.embedder, c.description] for c in reply.collections]
    click.echo(table(rows, ["name", "documents", "chunks", "owner", "embedder", "description"]))


@_collections("create", click.argument("name"), click.option("--description", default=None))
def create_collection(reply: Any, name: str, **_: Any) -> None:
    """Make an empty collection."""
    say(f"made {name}")


@_collections("rename", click.argument("name"), click.argument("to"))
def rename_collection(reply: Any, name: str, to: str) -> None:
    """Give a collection another name."""
    say(f"{name} is now {to}")


@_collections("documents", click.argument("name"))
def list_documents(reply: Any, name: str) -> None:
    """List the documents of a collection."""
    from .terminal import table

    rows = [[d.name, d.state, str(d.chunks), str(d.pages), d.reason] for d in reply.documents]
    click.echo(table(rows, ["document", "state", "chunks", "pages", "reason"]))


@_collections("delete", click.argument("name"), click.option("--document", default="", help="Only this document."),
              click.confirmation_option(prompt="Delete it with all that was read into it?"))  # fmt: skip
def delete_collection(reply: Any, name: str, document: str) -> None:
    """Delete a collection, or one document of it."""
    say(f"deleted {document or name}")


@_collections("share", click.argument("name"), click.argument("user"),
              click.option("--access", type=click.Choice(["read", "write"]), default=None, help="None takes it back."))  # fmt: skip
def share_collection(reply: Any, name: str, user: str, access: str | None) -> None:
    """Share a collection with a user, or with role:NAME."""
    say(f"{user} may {access} {name}" if access else f"{user} may no longer use {name}")


@_collections("verify", click.argument("name"))
def verify_collection(reply: Any, name: str) -> None:
    """Check that the vector index holds what the catalogue holds."""
    click.echo("\n".join(reply.problems) or f"{name} is whole")


@_collections("rebuild", click.argument("name"))
def rebuild_collection(reply: Any, name: str) -> None:
    """Make the vector index again from the catalogue."""
    say(f"rebuilt {name}")


# Jobs, plugins, models, users


@cli.group(invoke_without_command=True)
@click.option("--watch", is_flag=True, help="Show them as they change.")
@click.option("--group", default="", help="Only this group.")
@as_json
@click.pass_context
@runs
async def jobs(context: click.Context, watch: bool, group: str, as_json: bool) -> None:
    """See and steer jobs; without a command: list them."""
    from .terminal import JobLines, outcome, table, title

    if context.invoked_subcommand is not None:
        return
    async with connected(context.obj) as bus:
        if watch:
            with JobLines() as lines:
                async with bus.follow(group=group) as changes:
                    async for job in changes:
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
    @as_json
    @click.pass_obj
    @runs
    async def steer(state: State, id: str, as_json: bool) -> None:
        async with connected(state) as bus:
            reply = await bus.call(Jobs(action, id))
        show(reply) if as_json else say(f"{action}: job {id}")


for _action in ("cancel", "pause", "resume", "retry"):
    _steering(_action)


@cli.command()
@as_json
@click.pass_obj
@runs
async def plugins(state: State, as_json: bool) -> None:
    """List the installed plugins with their hooks, settings, version and state."""
    from .bus import Bus
    from .plugins import hooks, installed, load_class, origin, settings
    from .supervisor import running

    served: dict[str, set[str]] = {}
    broken: dict[str, str] = {}
    config, found = state.config, running(state.data)
    if config.bus.url or found:
        async with Bus.connect(config.bus if config.bus.url else found.bus, "cli") as bus:  # type: ignore[union-attr]
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
                row["state"] = f"broken: {broken[name]}"
        except AiirwkvError as exc:
            row["state"] = f"broken: {exc}"
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
    from .scaffold import write

    try:
        files = write(name, folder)
    except (AiirwkvError, OSError) as exc:
        fail(exc)
        return
    for path in files:
        click.echo(path)
    say(f"next: pip install -e {files[0].parent} && pytest {files[0].parent}")


@cli.command()
@as_json
@click.pass_obj
@runs
async def models(state: State, as_json: bool) -> None:
    """List base models, states and adapters."""
    from .terminal import table
    from .types import Models

    async with connected(state) as bus:
        reply = await bus.call(Models("list"))
    if as_json:
        show(reply)
        return
    rows = [
        [m.name, m.kind, m.version, f"{m.parameters / 1e6:.1f} M", "default" if m.default else "",
         "demonstration" if m.demonstration else ""]
        for m in reply.models
    ]  # fmt: skip
    click.echo(table(rows, ["model", "kind", "version", "parameters", "", ""]))


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
    from .terminal import table
    from .types import Users

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
    from .worker import decode

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


@cli.command()
@click.pass_obj
@runs
async def doctor(state: State) -> None:
    """Check the installation, the configuration and the data directory."""
    import shutil

    from .plugins import check, installed, load_class, origin
    from .server import binary
    from .supervisor import running

    bad = 0

    def report(what: str, test: Callable[[], object]) -> None:
        nonlocal bad
        try:
            click.echo(f"✓ {what}: {test()}")
        except (AiirwkvError, OSError) as exc:
            bad += 1
            click.echo(f"✗ {what}: {exc}")

    def free() -> str:
        left = shutil.disk_usage(state.data).free
        if left < 1 << 30:
            raise ConfigError(f"only {left >> 20} MB are free where {state.data} lies; make room")
        return f"{left >> 30} GB free"

    def configured() -> str:
        config = state.config
        check(config)
        return ", ".join(f"{name}: {' '.join(names)}" for name, names in config.workers.items())

    report("python", lambda: sys.version.split()[0])
    report("nats-server", binary)
    report("data directory", lambda: state.data)
    report("disk", free)
    report("configuration", configured)
    for name, ep in sorted(installed().items()):
        report(f"plugin {name}", lambda name=name, ep=ep: load_class(name) and origin(ep))  # type: ignore[misc]
    report("running", lambda: (found := running(state.data)) and (found.web or f"process {found.pid}") or "nothing")
    report("logs", lambda: state.data / "logs")
    if bad:
        raise SystemExit(1)


def main() -> None:
    """Entry point; every error of ours becomes one line."""
    try:
        cli(prog_name="aiirwkv")
    except (AiirwkvError, OSError) as exc:
        fail(exc)


__all__ = ["cli", "main"]
