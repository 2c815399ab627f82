"""Reading for many texts at once so that what is wrong with one of them does not become the others' affair."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..runtimes.runtime import Lost, Piece, Runtime
from .requests import SPACING

__all__ = ["Reader"]

CALM = 256
"""Passes after which more is tried again."""

log = logging.getLogger(__name__)


class Reader:
    """Forward calls of a runtime that is allowed to fail."""

    MOST = 512

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.most = self.MOST
        """Tokens of prompts to read at once; fewer after memory was out."""
        self._calm = 0

    def forward(self, pieces: Sequence[Piece]) -> tuple[Tensor, list[Exception | None]]:
        """
        The logits [pieces, V], and for each piece what went wrong, if anything did; its logits mean nothing then.

        What fails in one go is tried in halves; a single piece for which memory is out, in two parts.
        """
        try:
            logits = self.runtime.forward(pieces)
        except Lost as error:
            return torch.zeros(len(pieces), self.runtime.vocabulary), [error] * len(pieces)
        except Exception as error:
            return self._again(pieces, error)
        self._calm += 1
        if self._calm > CALM and self.most < self.MOST:
            self.most, self._calm = self.most * 2, 0
        finite = np.isfinite(logits.sum(-1).numpy())
        return logits, [None if sound else ArithmeticError("its numbers are not finite") for sound in finite]

    def _again(self, pieces: Sequence[Piece], error: Exception) -> tuple[Tensor, list[Exception | None]]:
        scarce, piece = isinstance(error, MemoryError), pieces[0]
        if scarce:
            tokens = sum(len(piece.tokens) for piece in pieces)
            self.most, self._calm = max(SPACING, min(self.most, tokens) // 2), 0
            log.warning("%d tokens are too many at once, %d are tried: %s", tokens, (tokens + 1) // 2, error)
        if half := len(pieces) // 2:
            (some, these), (others, those) = self.forward(pieces[:half]), self.forward(pieces[half:])
            return torch.cat([some, others]), these + those
        if scarce and (half := len(piece.tokens) // 2):
            logits, errors = self.forward([replace(piece, tokens=piece.tokens[:half])])
            return (logits, errors) if errors[0] else self.forward([replace(piece, tokens=piece.tokens[half:])])
        return torch.zeros(1, self.runtime.vocabulary), [error]
