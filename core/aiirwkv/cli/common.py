"""What every command shares: the options before it, the connection, how errors and replies are printed."""

from __future__ import annotations

import logging
import os
import tempfile
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import msgspec

from .. import __version__
from ..errors import BY_CODE, AiirwkvError, ServiceError

if TYPE_CHECKING:
    from ..bus import Bus
    from ..config import Config
    from ..types import Request


class State:
    """The options that stand before the command."""

    def __init__(self, config: Path | None, data: Path | None) -> None:
        self._config, self._data = config, data
        self.claim = ""
        """What was given as --claim to a group of commands, which holds for the command below it too."""

    @property
    def config(self) -> Config:
        from ..config import load

        return load(self._config)

    @property
    def data(self) -> Path:
        from ..config import data_directory

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
        import anyio

        logging.getLogger("nats").setLevel(logging.CRITICAL)
        try:
            # Twice the requests per second where uvloop is there; the supervisor needs no speed.
            fast = bool(find_spec("uvloop")) and function.__name__ == "worker"
            anyio.run(lambda: function(*args, **kwargs), backend_options={"use_uvloop": fast})
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except Exception as exc:
            fail(exc)

    return command


def _report(exc: BaseException) -> str:
    """Write a traceback to a file of its own and return the file's name."""
    with tempfile.NamedTemporaryFile("w", prefix="aiirwkv-", suffix=".log", delete=False) as file:
        traceback.print_exception(exc, file=file)
    return file.name


def fail(exc: BaseException) -> NoReturn:
    """Say in one line what went wrong, and exit with 1."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    if isinstance(exc, click.ClickException | click.exceptions.Exit | click.Abort):
        raise exc
    text = str(exc)
    if isinstance(exc, OSError):
        text = f"{exc.filename or 'the system'}: {exc.strerror or exc}"
    elif not isinstance(exc, AiirwkvError):
        text = f"this is a fault of ours: {type(exc).__name__}: {exc}; what led to it is in {_report(exc)}"
    click.echo(f"aiirwkv: {text}", err=True)
    raise SystemExit(1)


@asynccontextmanager
async def connected(state: State, claim: str | None = None) -> AsyncIterator[Bus]:
    """The bus, on behalf of the bearer of `claim`; starts the system for the call if none runs."""
    from ..supervisor import session

    async with session(state.config, state.data, claim=claim_of(state, claim), say=say) as bus:
        yield bus


async def done(bus: Bus, request: Request[Any]) -> Any:
    """
    Have it done as a job, shown as it goes on; its result.

    Raises the error that it failed with; exits with 1 when somebody has cancelled it.
    """
    from ..terminal import JobLines

    job = await bus.submit(request)
    with JobLines() as lines:
        async with bus.follow(job.id) as changes:
            async for job in changes:
                lines.show(job)
    if job.state == "done":
        return job.result
    if not job.error:
        raise SystemExit(1)  # cancelled; the job's line has said so
    raise BY_CODE.get(job.code, ServiceError)(job.error)


def claim_of(state: State, claim: str | None) -> str:
    """The claim to ask with: the command's, its group's, or the environment's."""
    return claim or state.claim or os.environ.get("AIIRWKV_CLAIM", "")


as_json = click.option("--json", "as_json", is_flag=True, help="Print the bus's reply as JSON, as the last line.")
claim = click.option("--claim", help="A signed claim to ask with (or AIIRWKV_CLAIM); without one: as the owner.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--config", type=click.Path(path_type=Path), help="The configuration [./config.toml].")
@click.option("--data", type=click.Path(path_type=Path), help="The data directory [AIIRWKV_DATA, or the user's].")
@click.version_option(__version__, prog_name="aiirwkv")
@click.pass_context
def cli(context: click.Context, config: Path | None, data: Path | None) -> None:
    """AIIRWKV: a private system that reads your documents and answers with citations."""
    if config:  # child processes read it too
        os.environ["AIIRWKV_CONFIG"] = str(config.absolute())
    context.obj = State(config, data)
