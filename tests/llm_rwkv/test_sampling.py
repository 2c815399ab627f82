"""Sampling follows the rules of RWKV and is the same for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from aiirwkv_llm_rwkv.card import Sampling
from aiirwkv_llm_rwkv.sampling import Sampler


def logits(seed: int, size: int = 500) -> torch.Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.85, 0.999])
@pytest.mark.parametrize("top_k", [0, 1, 7, 10_000])
def test_same_distribution_as_the_rwkv_package(
    temperature: float, top_p: float, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv.utils import PIPELINE

    drawn_from: list[Any] = []

    def choice(a: int, p: Any) -> int:
        drawn_from.append(p)
        return int(p.argmax())

    monkeypatch.setattr(np.random, "choice", choice)
    sampler = Sampler(Sampling(temperature=temperature, top_p=top_p, top_k=top_k))
    for seed in range(5):
        PIPELINE.sample_logits(None, logits(seed), temperature, top_p, top_k)
        mine = sampler.distribution(logits(seed)).numpy()
        assert np.abs(mine - drawn_from[-1]).max() < 1e-5
        assert ((mine > 0) == (drawn_from[-1] > 0)).all()


def test_everything_may_be_drawn_with_top_p_1() -> None:
    sampler = Sampler(Sampling(temperature=1, top_p=1, presence=0, frequency=0))
    assert int((sampler.distribution(logits(1, 50)) > 0).sum()) == 50


def test_min_p() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    kept = Sampler(Sampling(temperature=1, top_p=1, min_p=0.4)).distribution(probabilities.log())
    assert torch.allclose(kept, torch.tensor([0.625, 0.375, 0, 0]))


def test_penalties() -> None:
    """Against the rule written out: presence + frequency × count, counts shrink, digits do not count."""
    presence, frequency, decay, digits = 0.7, 0.4, 0.9, frozenset({3, 4})
    sampler = Sampler(Sampling(temperature=0, presence=presence, frequency=frequency, decay=decay), countless=digits)
    counts: dict[int, float] = {}
    close = logits(2, 12) / 3
    for _ in range(60):
        expected = close.clone()
        for token, count in counts.items():
            expected[token] -= presence + count * frequency
        token = sampler.choose(close)
        assert token == int(expected.argmax())
        counts = {known: count * decay for known, count in counts.items()}
        counts[token] = counts.get(token, 0) + (0 if token in digits else 1)
    assert len(counts) > 3


def test_a_seed_makes_it_repeatable() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, top_p=1, presence=0, frequency=0), seed)
        torch.rand(3)  # the random numbers of others do not matter
        return [sampler.choose(logits(i)) for i in range(40)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_temperature_0_takes_the_likeliest() -> None:
    sampler = Sampler(Sampling(temperature=0, presence=0, frequency=0))
    assert all(sampler.choose(logits(i)) == int(logits(i).argmax()) for i in range(20))
