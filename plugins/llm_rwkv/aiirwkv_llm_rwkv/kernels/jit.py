"""Compilation at run time by Numba, kept between runs: as decorators that leave a function its type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit
from numba.extending import intrinsic

__all__ = ["compiled", "emitted", "finite", "parallel"]

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS: dict[str, Any] = {"boundscheck": False, "error_model": "numpy", "nogil": True, "cache": True}
EXACT = {"contract", "reassoc"}  # sums in vectors; still infinite and no numbers where float32 has them


def compiled(function: F) -> F:
    """Arrays and numbers in, one thread, without the interpreter's lock."""
    return cast(F, njit(fastmath=EXACT, **OPTIONS)(function))


def finite(function: F) -> F:
    """As `compiled`, for arguments that are never infinite: its conditions become operations of vectors."""
    return cast(F, njit(fastmath=True, **OPTIONS)(function))


def parallel(function: F) -> F:
    """As `compiled`; its `prange` runs on the threads of Numba."""
    return cast(F, njit(fastmath=EXACT, parallel=True, **OPTIONS)(function))


def emitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that emits the compiler's intermediate language itself; see Numba's `intrinsic`."""
    return cast("Callable[..., Any]", intrinsic(prefer_literal=True)(function))
