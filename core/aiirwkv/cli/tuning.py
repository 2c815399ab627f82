"""The command that tunes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from ..types import Tune, Tuned
from .common import State, as_json, claim, cli, connected, done, runs, say, show


@cli.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", required=True, help="What to call the tuned state.")
@click.option("--method", type=click.Choice(["state", "lora", "pissa"]), default="state", show_default=True)
@click.option("--model", help="A base model [the one that is served].")
@click.option("--steps", default=200, show_default=True)
@click.option("--learning-rate", type=float, help="At its highest [the method's own].")
@click.option("--batch-tokens", default=1024, show_default=True, help="Tokens in a step; fewer need less memory.")
@click.option("--seed", default=0, show_default=True, help="Decides what is held out, and the order.")
@claim
@as_json
@click.pass_obj
@runs
async def tune(state: State, file: Path, name: str, claim: str | None, as_json: bool, **options: Any) -> None:
    """
    Tune the model on the examples in FILE.

    FILE has one JSON object per line: {"prompt": …, "response": …}, {"messages": […]} or {"text": …}.
    """
    from ..terminal import clock

    async with connected(state, claim) as bus:
        uploaded = await bus.put(file, file.name)
        tuned = msgspec.convert(await done(bus, Tune(name, uploaded.id, **options)), Tuned)
    if as_json:
        show(tuned)
        return
    say(
        f"tuned {tuned.name} for {tuned.model} in {clock(tuned.seconds)}: on examples held out, the loss went from "
        f"{tuned.loss_before:.2f} to {tuned.loss_after:.2f}\nuse it: aiirwkv ask --state {tuned.name} QUESTION"
    )
