"""
The training process: `python -m aiirwkv_tune_peft.child FOLDER` carries out the order in the folder of a run.

It may be killed at any moment. Standard output is one JSON line per event; what anybody else prints goes to the log.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec
from aiirwkv.errors import AiirwkvError
from aiirwkv_llm_rwkv.shelf.library import Files

from .data import read
from .runs import Event, Order, Run


def main() -> None:
    run = Run(Path(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))  # Lightning would finish its step and report success
    if hasattr(os, "nice"):
        os.nice(10)
    events = os.dup(1)
    log = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def say(event: Event) -> None:
        os.write(events, msgspec.json.encode(event) + b"\n")  # fails when nobody reads it: then it is over

    try:
        work(run, say)
        say(Event(done=True))
    except AiirwkvError as error:
        say(Event(error=str(error), code=getattr(error, "code", 409)))
    except Exception as error:
        traceback.print_exc()
        if "out of memory" in str(error) or isinstance(error, MemoryError):
            text = "there is not enough memory for a step; ask for fewer batch_tokens"
            say(Event(error=f"tune: {text}", code=409))
        else:
            say(Event(error=f"tune: training failed with {type(error).__name__}: {error}", code=500))


def work(run: Run, say: Callable[[Event], None]) -> None:
    order = msgspec.json.decode(run.order.read_bytes(), type=Order)
    files = Files.at(Path(order.weights))
    examples = read(run.data, files.card)  # before the imports that take seconds
    say(Event(0, "loading the model"))
    files.verify()
    from .training import train

    train(order, run, files, examples, say)


if __name__ == "__main__":
    main()
