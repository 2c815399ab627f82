"""Reciprocal rank fusion: one ranking from several."""

from __future__ import annotations

from collections.abc import Sequence

K = 60
"""Damps the lead of the first ranks; Cormack, Clarke and Büttcher, SIGIR 2009."""


def fuse(rankings: Sequence[Sequence[str]], weights: Sequence[float] = ()) -> dict[str, float]:
    """
    Score ids by the sum of weight / (K + rank) over the rankings that hold them, best first.

    Scaled so that the first of every ranking scores 1. A ranking without ids takes no part.
    """
    weighed = [(ids, weight) for ids, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True) if ids]
    scale = (K + 1) / (sum(weight for _, weight in weighed) or 1)
    scores: dict[str, float] = {}
    for ids, weight in weighed:
        for rank, id in enumerate(ids, 1):
            scores[id] = scores.get(id, 0.0) + scale * weight / (K + rank)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))
