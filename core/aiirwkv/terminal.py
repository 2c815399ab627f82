"""What a person sees in a terminal: one progress line per running job, on a pipe plain lines."""

from __future__ import annotations

import sys
from typing import Self

from .types import Job

WIDTH = 48
"""Characters of a job's title."""
LIVE = 36
"""Characters of it beside a progress bar."""


def clock(seconds: float) -> str:
    """Seconds, or minutes once they are many."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def count(number: int, noun: str) -> str:
    """1 chunk, 2 chunks."""
    return f"{number} {noun}{'s' * (number != 1)}"


def amount(size: int) -> str:
    """Bytes, in the unit that suits them."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= one:
            return f"{size / one:.1f} {unit}"
    return f"{size} bytes"


def plain(text: str) -> str:
    """Text on one line without what a terminal would obey; names come from files that others made."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def short(text: str, width: int) -> str:
    """At most `width` characters; what is left out in the middle is an ellipsis, so that a file's suffix stays."""
    return text if len(text) <= width else f"{text[: width // 2]}…{text[len(text) - (width - 1) // 2 :]}"


def title(job: Job, width: int = WIDTH) -> str:
    """What a job is about, in a few words."""
    return short(_subject(job), width)


def _subject(job: Job) -> str:
    request = job.request if isinstance(job.request, dict) else {}
    sources = request.get("sources") or []
    name = next((source.get("name") or "pasted text" for source in sources), "") or request.get("name", "")
    if job.hook == "models":  # `models` alone would not say what is done
        place = request.get("file") or request.get("url") or request.get("path") or ""
        name = f"{request.get('action', '')} {name or place.partition('?')[0].rpartition('/')[2]}"
    return plain(f"{job.hook} {name}".strip())


class JobLines:
    """Shows jobs as they change. Use as a context manager; call `show` for every change."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._live = None
        self._tasks: dict[str, int] = {}
        self._said: dict[str, str] = {}
        self._quiet = quiet
        if sys.stderr.isatty() and not quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._live = Progress(
                TextColumn(f"  {{task.description:<{LIVE}}}", markup=False),
                BarColumn(24),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line above the progress lines."""
        if self._quiet:
            return
        if self._live:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def show(self, job: Job) -> None:
        if job.over or job.state == "paused":
            if self._live and job.id in self._tasks:
                self._live.remove_task(self._tasks.pop(job.id))  # type: ignore[arg-type]
            self._once(job, f"  {title(job)}: {outcome(job)}")
        elif self._live and job.state == "running":
            if job.id not in self._tasks:
                self._tasks[job.id] = self._live.add_task(title(job, LIVE), note="", total=None)
            self._live.update(
                self._tasks[job.id],  # type: ignore[arg-type]
                completed=job.done,
                total=job.total or None,
                note=how_far(job),
            )
        elif not self._live:
            share = f"{int(10 * job.done / job.total) * 10} %" if job.total else ""
            note = plain(job.note) if job.state == "queued" else ""
            self._once(job, f"  {title(job)}: {job.state} {share} {note}".rstrip())

    def _once(self, job: Job, line: str) -> None:
        if self._said.get(job.id) != line:
            self._said[job.id] = line
            self.say(line)


def how_far(job: Job) -> str:
    """Done of total, and the note if it says more than the title."""
    share = f"{job.done:g} of {job.total:g}" if job.total else ""
    note = plain(job.note)
    return " · ".join(part for part in (share, note if note not in _subject(job) else "") if part)


def outcome(job: Job) -> str:
    """What came of a job."""
    if job.error:
        return plain(f"{job.state}: {job.error}")
    documents = job.result.get("documents", []) if isinstance(job.result, dict) else []
    if not documents:
        return job.state
    parts = []
    for document in documents:
        chunks = f", {count(document['chunks'], 'chunk')}" if document.get("chunks") else ""
        chunks += ", read" if document.get("read") else ""
        reason = f" ({document['reason']})" if document.get("reason") else ""
        name = f"{short(document['name'], WIDTH)}: " if len(documents) > 1 else ""
        parts.append(f"{name}{document['state']}{chunks}{reason}")
    return plain("; ".join(parts))


def table(rows: list[list[str]], head: list[str]) -> str:
    """Columns aligned by their widest cell; the last one may be of any width."""
    lines = [[name.upper() for name in head], *([plain(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell if i == len(head) - 1 else cell.ljust(widths[i]) for i, cell in enumerate(line)).rstrip()
        for line in lines
    )


__all__ = ["JobLines", "amount", "clock", "count", "outcome", "plain", "short", "table", "title"]
