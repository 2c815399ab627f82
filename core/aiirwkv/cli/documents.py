"""Commands about documents: index, search, ask, collections."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ..errors import ConfigError, NoWorker
from ..types import Answer, Chat, Collections, CollectionsReply, Document, Index, Indexed, Search, Source, Usage
from .common import State, as_json, claim, cli, connected, done, runs, say, show

if TYPE_CHECKING:
    from ..bus import Bus
    from ..config import Config

ROOM = 2 << 20
"""Bytes that must be free on the disk beside room for the files."""
PATIENCE = 3.0
"""Seconds to look for the services that indexing needs; a busy worker may answer late."""


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--collection", "-c", required=True, help="Where to put them; made if need be.")
@click.option("--read/--no-read", default=None, help="Have the model read them too, once [as the collection is set].")
@claim
@as_json
@click.pass_obj
@runs
async def index(
    state: State, paths: tuple[Path, ...], collection: str, read: bool | None, claim: str | None, as_json: bool
) -> None:
    """Read files and folders into a collection."""
    import time

    from ..store import ulid
    from ..terminal import JobLines, count

    began = time.monotonic()
    async with connected(state, claim) as bus:
        await _need_services(bus, state.config)
        files = await _files(bus, paths)
        _need_room(state, [path for path, _ in files])
        group = ulid()
        total = Indexed(collection)
        failed = False
        uploads: list[str] = []
        names: dict[str, str] = {}
        with JobLines() as lines:
            for path, name in files:
                uploaded = await bus.put(path, name)
                uploads.append(uploaded.id)
                source = Source(uploaded.id, name=name, media_type=uploaded.media_type)
                names[(await bus.submit(Index(collection, [source], read), group=group)).id] = name
            async with bus.follow(group=group) as changes:
                async for job in changes:
                    lines.show(job)
                    name = names.pop(job.id, "") if job.over else ""
                    if job.over and not name:
                        continue  # told again, since the bus was away for a moment
                    if job.state == "done":
                        part = msgspec.convert(job.result, Indexed)
                        total.documents += part.documents
                        total.chunks += part.chunks
                    elif job.over:
                        failed = True
                        total.documents.append(Document("", name, "failed", reason=job.error or job.state))
        if not failed:  # otherwise they are kept for a day, for `aiirwkv jobs retry`
            for upload in uploads:
                await bus.discard(upload)
    total.seconds = time.monotonic() - began
    bad = [document for document in total.documents if document.state in ("failed", "needs_ocr")]
    if not as_json:
        ready = len(total.documents) - len(bad)
        chunks = count(total.chunks, "chunk")
        say(f"{ready} of {count(len(files), 'document')} ready in {collection}, {chunks}, {total.seconds:.1f} s")
    else:
        show(total)
    if bad:
        raise SystemExit(1)


async def _need_services(bus: Bus, config: Config) -> None:
    """NoWorker if a service that indexing needs is missing for a while: a job would wait for it."""
    import anyio

    missing = ["index", "convert", "embed"]
    with anyio.move_on_after(PATIENCE):
        while missing := [hook for hook in missing if not await bus.services(hook)]:
            await anyio.sleep(0.2)
    if not missing:
        return
    plugins = [(config.use.plugins(hook) or [f"PLUGIN_FOR_{hook.upper()}"])[0] for hook in missing]
    raise NoWorker(
        f"nobody serves {' and '.join(missing)} now, which indexing needs; start it: aiirwkv worker "
        f"{' '.join(plugins)}, or add it to [workers]; if it is there already, aiirwkv plugins says what is wrong"
    )


def _need_room(state: State, files: list[Path]) -> None:
    """Refuse to fill the disk of our own server: what it cannot write down, it cannot tell about either."""
    needed = ROOM + 2 * sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(state.data).free
    if not state.config.bus.url and free < needed:
        raise ConfigError(
            f"the disk of {state.data} is full: {free >> 20} MB are free, {needed >> 20} MB are needed; make room and "
            "try again, nothing stored is lost"
        )


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
    async with connected(state, claim) as bus:
        hits = await bus.call(Search(query, list(collections), top, mode))
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
@click.option(
    "--mode",
    type=click.Choice(["sources", "first", "free"]),
    default="sources",
    help="sources [default]: refuse what they do not say; first: then the model's own words; free.",
)
@click.option("--model", help="[plugin/]name of a base model.")
@click.option("--state", "tuned", help="A tuned state.")
@click.option("--top", default=5, show_default=True, help="How many passages to look at.")
@click.option(
    "--read",
    type=click.Choice(["concat", "parallel"]),
    help="Give the model whole passages: one after another, or each by itself [the sentences that fit best].",
)
@click.option("--receipt", is_flag=True, help="Show how the answer came about.")
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
    read: Any,
    receipt: bool,
    claim: str | None,
    as_json: bool,
) -> None:
    """Ask a question about your documents."""
    request = Chat(question, [], list(collections), mode, top, read=read, model=model, state=tuned)
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
        if receipt:
            _show_receipt(answer)
        if answer.demonstration:
            say(f"  ({answer.model} is a small demonstration model; see the README for a real one)")


def _show_receipt(answer: Answer) -> None:
    """What was searched for, each step with its time, each passage with its scores, and what was read."""
    from ..terminal import count, table

    receipt = answer.receipt
    click.echo(f"\nsearched for: {receipt.query}\n")
    click.echo(table([[s.name, f"{1000 * s.seconds:.0f} ms", s.note] for s in receipt.stages], ["step", "time", ""]))
    rows = [
        [
            "✓" if seen.kept else "",
            f"{seen.document}{f', page {seen.page}' if seen.page else ''} · {seen.start}–{seen.end}",
            " ".join(f"{name} {score:.3g}" for name, score in seen.scores.items()),
            seen.reason,
        ]
        for seen in receipt.considered
    ]
    click.echo(f"\n{table(rows, ['', 'passage', 'scores', 'why'])}")
    wrote = f", wrote {count(answer.usage.completion, 'token')}" if answer.usage.completion else ""
    click.echo(f"\n{answer.model or 'the model'} {_reading(answer.usage)}{wrote}")


def _reading(usage: Usage) -> str:
    """How much of the prompt had to be read."""
    from ..terminal import amount, count

    if not usage.cached:
        return f"read {count(usage.prompt, 'token')}"
    size = f" of {amount(usage.bytes)}" if usage.bytes else ""
    kept = f"{usage.cached} from {count(usage.hits, 'kept state')}{size}" if usage.hits else f"{usage.cached} kept"
    return f"read {usage.prompt - usage.cached} of {usage.prompt} tokens ({kept})"


@cli.group(invoke_without_command=True)
@claim
@as_json
@click.pass_context
def collections(context: click.Context, claim: str | None, as_json: bool) -> None:
    """Manage collections; without a command: list them."""
    context.obj.claim = claim or ""
    if context.invoked_subcommand is None:
        context.invoke(list_collections, claim=claim, as_json=as_json)


Printer = Callable[..., None]


def _collections(action: Any, *arguments: Any) -> Callable[[Printer], click.Command]:
    """A command of the `collections` hook; the decorated function prints the reply."""

    def decorate(function: Printer) -> click.Command:
        @runs
        async def command(state: State, as_json: bool, claim: str | None = None, **fields: Any) -> None:
            async with connected(state, claim) as bus:
                reply = await bus.call(Collections(action, **fields), timeout=600)
            show(reply) if as_json else function(reply, **fields)

        command.__doc__ = function.__doc__
        decorated: Any = click.pass_obj(command)
        for argument in (*reversed(arguments), claim, as_json):
            decorated = argument(decorated)
        command_made: click.Command = collections.command(action, help=function.__doc__)(decorated)
        return command_made

    return decorate


@_collections("list")
def list_collections(reply: CollectionsReply) -> None:
    """List the collections you may read."""
    from ..terminal import table

    rows = [
        [c.name, str(c.documents), str(c.chunks), c.owner, c.embedder, "yes" if c.read else "", c.description]
        for c in reply.collections
    ]
    click.echo(table(rows, ["name", "documents", "chunks", "owner", "embedder", "read", "description"]))


@_collections(
    "create",
    click.argument("name"),
    click.option("--description", default=None),
    click.option("--read", is_flag=True, default=None, help="Have the model read what is indexed into it, once."),
)
def create_collection(reply: CollectionsReply, name: str, **_: Any) -> None:
    """Make an empty collection."""
    say(f"made {name}")


@_collections("rename", click.argument("name"), click.argument("to"))
def rename_collection(reply: CollectionsReply, name: str, to: str) -> None:
    """Give a collection another name."""
    say(f"{name} is now {to}")


@_collections("documents", click.argument("name"))
def list_documents(reply: CollectionsReply, name: str) -> None:
    """List the documents of a collection."""
    from ..terminal import table

    rows = [[d.name, d.state, str(d.chunks), str(d.pages), d.read or "", d.reason] for d in reply.documents]
    click.echo(table(rows, ["document", "state", "chunks", "pages", "read", "reason"]))


@collections.command()
@click.argument("name")
@click.option("--document", default="", help="Only this document.")
@click.option("--off", is_flag=True, help="Have it forget them.")
@claim
@as_json
@click.pass_obj
@runs
async def read(state: State, name: str, document: str, off: bool, claim: str | None, as_json: bool) -> None:
    """Have the model read what is in a collection, and what comes; questions then cost only their own tokens."""
    from ..terminal import count

    async with connected(state, claim) as bus:
        request = Collections("describe", name=name, document=document, read=not off)
        reply = msgspec.convert(await done(bus, request), CollectionsReply)
    if as_json:
        show(reply)
    elif off:
        say(f"forgot {document or name}")
    elif not document:
        say("\n".join([f"read {count(reply.count, 'document')} of {name}", *reply.problems]))
    if reply.problems or any(not off and not document.read for document in reply.documents):
        raise SystemExit(1)


@_collections(
    "delete",
    click.argument("name"),
    click.option("--document", default="", help="Only this document."),
    click.confirmation_option(prompt="Delete it with all that was read into it?"),
)
def delete_collection(reply: CollectionsReply, name: str, document: str) -> None:
    """Delete a collection, or one document of it."""
    say(f"deleted {document or name}")


@_collections(
    "share",
    click.argument("name"),
    click.argument("user"),
    click.option("--access", type=click.Choice(["read", "write"]), help="Without: take it back."),
)
def share_collection(reply: CollectionsReply, name: str, user: str, access: str | None) -> None:
    """Share a collection with a user, or with role:NAME."""
    say(f"{user} may {access} {name}" if access else f"{user} may no longer use {name}")


@_collections("verify", click.argument("name"))
def verify_collection(reply: CollectionsReply, name: str) -> None:
    """Check that the vector index holds what the catalogue holds."""
    click.echo("\n".join(reply.problems) or f"{name} is whole")


@_collections("rebuild", click.argument("name"))
def rebuild_collection(reply: CollectionsReply, name: str) -> None:
    """Make the vector index again from the catalogue."""
    say(f"rebuilt {name}")
