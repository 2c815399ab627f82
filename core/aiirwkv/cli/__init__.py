"""The command line: one function per command. Exit codes: 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

from . import documents as documents
from . import manage as manage
from . import models as models
from . import running as running
from . import states as states
from . import tuning as tuning
from .common import cli, fail


def main() -> None:
    """Entry point; every error of ours becomes one line."""
    try:
        cli(prog_name="aiirwkv")
    except Exception as exc:
        fail(exc)
