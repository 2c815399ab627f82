"""Samples as tensors, batch by batch, from wherever training stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .data import Sample, plan

__all__ = ["Batch", "Batches", "collate"]

Batch = tuple[Tensor, Tensor]
"""Tokens [B, T + 1], padded with zeros, and which of the last T are to be learnt [B, T]."""


class Batches:
    """
    The batches of all steps, in their planned order.

    It remembers where it is, and Lightning keeps that in the checkpoint. Without it, Lightning would begin a resumed
    epoch with its first batches again.
    """

    def __init__(self, samples: Sequence[Sample], limit: int, steps: int, seed: int, device: torch.device) -> None:
        self._samples, self._device = samples, device
        self._plan = plan([len(sample.tokens) for sample in samples], limit, steps, seed)
        self._next = 0

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        while self._next < len(self._plan):
            self._next += 1
            yield collate([self._samples[index] for index in self._plan[self._next - 1]], self._device)

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


def collate(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Samples side by side."""
    longest = max(len(sample.tokens) for sample in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.long)
    learnt = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        learnt[row, sample.answer : len(sample.tokens)] = True
    return tokens.to(device), learnt[:, 1:].to(device)
