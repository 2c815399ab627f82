"""Sampling follows the rules of RWKV, is the same for the same seed, and says when there is nothing to choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from aiirwkv.errors import BadRequest, ServiceError
from aiirwkv_llm_rwkv.card import Sampling
from aiirwkv_llm_rwkv.engine.sampling import Sampler, choose_all, logprob
from torch import Tensor

QUIET = {"presence": 0.0, "frequency": 0.0}


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


def by_the_rule(logits: Tensor, sampling: Sampling) -> Tensor:
    """The rule written out: sort, cut, keep equals, temperature last."""
    probabilities = torch.softmax(logits.float(), -1).double()
    ordered = probabilities.sort(descending=True).values
    limits = [float(ordered[0]) * sampling.min_p]
    if sampling.top_p < 1:
        before = int((ordered.cumsum(-1) < sampling.top_p).sum())
        limits.append(float(ordered[before]) if before < len(ordered) else 0.0)
    if sampling.top_k:
        limits.append(float(ordered[min(sampling.top_k, len(ordered)) - 1]))
    kept = torch.where(probabilities < max(limits), 0.0, probabilities)
    tempered = (kept / kept.max()) ** (1 / sampling.temperature)
    return (tempered / tempered.sum()).float()


KINDS: dict[str, Callable[[int], Tensor]] = {
    "peaked": lambda seed: 6 * logits(seed, 700),
    "flat": lambda seed: logits(seed, 700) / 30,
    "ties": lambda seed: logits(seed, 700).round(),
    "equal": lambda seed: torch.full((300,), float(seed)),
    "one": lambda seed: torch.where(torch.arange(300) == seed, 80.0, -80.0),
    "forbidden": lambda seed: torch.where(torch.arange(700) % 7 == seed, logits(seed, 700), -math.inf),
    "few": lambda seed: logits(seed, 2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1e-9, 0.4, 1.0, 50.0])
def test_same_distribution_as_the_rule_written_out(kind: str, temperature: float) -> None:
    for top_p in (0.0, 1e-9, 0.3, 0.9, 0.9999, 1.0):
        for top_k in (0, 1, 2, 40, 10**6):
            for min_p in (0.0, 0.05, 1.0):
                sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, **QUIET)
                sampler = Sampler(sampling, 1)
                for seed in range(2):  # the second time with what the first one taught it
                    row = KINDS[kind](seed)
                    mine, expected = sampler.distribution(row), by_the_rule(row, sampling)
                    assert ((mine > 0) == (expected > 0)).all(), sampling
                    assert (mine - expected).abs().max() < 2e-5, sampling
                    assert expected[sampler.choose(row)] > 0


def test_a_large_vocabulary() -> None:
    for width in (0.1, 1, 3):
        for top_p in (0.3, 0.95, 0.9999):
            sampling = Sampling(temperature=0.8, top_p=top_p, **QUIET)
            row = width * torch.randn(65536, generator=torch.Generator().manual_seed(5))
            mine, expected = Sampler(sampling).distribution(row), by_the_rule(row, sampling)
            assert int(((mine > 0) != (expected > 0)).sum()) <= 1  # sums of so many floats differ in their last digit
            assert (mine - expected).abs().max() < 1e-5


def test_tokens_are_drawn_as_often_as_the_distribution_says() -> None:
    row, count = logits(3, 12), 4000
    for sampling in (Sampling(temperature=1, top_p=1, **QUIET), Sampling(temperature=1.5, top_p=0.9, **QUIET)):
        sampler = Sampler(sampling, 3)
        expected = sampler.distribution(row) * count
        drawn = torch.bincount(torch.tensor([sampler.choose(row) for _ in range(count)]), minlength=12)
        assert ((drawn - expected).abs() <= 5 * expected.sqrt()).all()
        assert (drawn[expected == 0] == 0).all()


def test_min_p() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    kept = Sampler(Sampling(temperature=1, top_p=1, min_p=0.4)).distribution(probabilities.log())
    assert torch.allclose(kept, torch.tensor([0.625, 0.375, 0, 0]))


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.4), (0, 0.4), (0.7, 0), (-0.2, 0.1)])
def test_penalties(presence: float, frequency: float) -> None:
    """Against the rule written out: presence + frequency × count, counts shrink, digits do not count."""
    decay, digits = 0.9, frozenset({3, 4})
    sampler = Sampler(Sampling(temperature=0, presence=presence, frequency=frequency, decay=decay), countless=digits)
    counts: dict[int, float] = {}
    close = logits(2, 400) / 300
    for _ in range(250):
        expected = close.clone()
        for token, count in counts.items():
            expected[token] -= presence + count * frequency
        token = sampler.choose(close)
        assert token == int(expected.argmax())
        counts = {known: count * decay for known, count in counts.items()}
        counts[token] = counts.get(token, 0) + (0 if token in digits else 1)
    assert presence <= 0 or len(counts) > 100


def test_bias_and_ban() -> None:
    row = logits(4, 50)
    best, second = row.topk(2).indices.tolist()
    for sampling in (Sampling(temperature=0, **QUIET), Sampling(temperature=1, top_p=0, **QUIET)):
        assert Sampler(sampling, ban=[best], rows=50).choose(row) == second
        assert Sampler(sampling, bias={7: 100.0}, rows=50).choose(row) == 7
        assert Sampler(sampling, bias={7: 100.0, best: 5.0}, ban=[7], rows=50).choose(row) == best
    everything = Sampling(temperature=1, top_p=1, **QUIET)
    bias = {3: 1.5, 9: -2.0, 49: 0.5}
    expected = row.clone()
    expected[list(bias)] += torch.tensor(list(bias.values()))
    expected[[0, 5]] = -math.inf
    mine = Sampler(everything, bias=bias, ban=[0, 5]).distribution(row)
    assert torch.allclose(mine, expected.softmax(-1), atol=1e-6)
    assert torch.equal(row, logits(4, 50)), "the model's logits are left as they are"


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"ban": [3, 50]}, "`ban` names the token 50; the model's go from 0 to 49"),
        ({"ban": [-1]}, "`ban` names the token -1"),
        ({"bias": {1000: 1.0}}, "`logit_bias` names the token 1000"),
        ({"bias": {1: math.inf}}, "`logit_bias` must be finite"),
        ({"bias": {1: math.nan}}, "`logit_bias` must be finite"),
    ],
)
def test_tokens_that_the_model_does_not_have(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadRequest, match=f"^generate: {complaint}"):
        Sampler(Sampling(), rows=50, **wrong)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature: float) -> None:
    """The row of damaged logits fails, the others go on."""
    rows = torch.stack([logits(i, 50) for i in range(5)])
    rows[1, 7] = math.nan
    rows[2, 7] = math.inf
    rows[3] = -math.inf
    sampling = Sampling(temperature=temperature)
    chosen = choose_all([Sampler(sampling, i) for i in range(5)], rows)
    assert [type(token) for token in chosen] == [int, ServiceError, ServiceError, ServiceError, int]
    assert "logits are not finite" in str(chosen[1])
    with pytest.raises(ServiceError, match="logits are not finite"):
        Sampler(Sampling(temperature=temperature), bias={3: 1.0}).choose(rows[1])
    with pytest.raises(BadRequest, match="leave no token that could be chosen"):
        Sampler(Sampling(temperature=temperature), ban=range(50), rows=50).choose(rows[0])


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    """The same seed gives the same tokens, alone and among others that are asked for in other ways."""
    asked = [
        Sampling(temperature=0, **QUIET),
        Sampling(temperature=0),
        Sampling(),
        Sampling(temperature=1.4, top_p=0.95, presence=0, frequency=0.2),
        Sampling(temperature=0.7, top_p=1, top_k=20, min_p=0.02),
    ]

    def rows(step: int) -> Tensor:
        return torch.stack([logits(100 * step + i) for i in range(len(asked))])

    alone = []
    for i, sampling in enumerate(asked):
        sampler = Sampler(sampling, 11)
        alone.append([sampler.choose(rows(step)[i]) for step in range(30)])
    samplers = [Sampler(sampling, 11) for sampling in asked]
    together = [choose_all(samplers, rows(step)) for step in range(30)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone
    backwards = [Sampler(sampling, 11) for sampling in reversed(asked)]
    together = [choose_all(backwards, rows(step).flip(0))[::-1] for step in range(30)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone
    assert choose_all([], torch.empty(0, 50)) == []


def test_logprob() -> None:
    row = logits(5)
    for token in (0, 17, int(row.argmax())):
        assert math.isclose(logprob(row, token), float(row.log_softmax(-1)[token]), abs_tol=1e-5)
    assert math.isclose(logprob(row.bfloat16(), 3), float(row.bfloat16().float().log_softmax(-1)[3]), abs_tol=1e-5)


def test_a_seed_makes_it_repeatable() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, top_p=1, **QUIET), seed)
        torch.rand(3)  # the random numbers of others do not matter
        return [sampler.choose(logits(i)) for i in range(40)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(-1) != draw(1)
    assert draw(None) != draw(None)


def test_temperature_0_takes_the_likeliest() -> None:
    sampler = Sampler(Sampling(temperature=0, **QUIET))
    assert all(sampler.choose(logits(i)) == int(logits(i).argmax()) for i in range(20))
