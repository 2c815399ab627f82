"""Child processes that end when they are told to, and when their parent is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO

import anyio


async def spawn(
    command: list[str],
    *,
    output: int | IO[bytes] = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
) -> asyncio.subprocess.Process:
    """
    Start a child in a session of its own, so that Ctrl-C reaches only us and we decide who ends when.

    Call it from the main thread: on Linux the child's end is tied to the thread that started it.
    """
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=dict(os.environ) | dict(env or {}),
        start_new_session=True,
        preexec_fn=_die_with_parent(),
    )


def _die_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    import ctypes

    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


async def end(process: asyncio.subprocess.Process, grace: float = 10) -> None:
    """Ask a child to end, wait, and then insist."""
    with anyio.CancelScope(shield=True):
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with anyio.move_on_after(grace):
            await process.wait()
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
