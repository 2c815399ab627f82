"""WKV in chunks of plain torch is what the single steps say, and its gradients are theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aiirwkv_llm_rwkv.kernels.plain import wkv6, wkv6_step, wkv7, wkv7_step
from torch import Tensor
from torch.nn.functional import normalize

B, H, N = 2, 2, 16


class Random:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


def close(a: Tensor, b: Tensor, bound: float) -> bool:
    return float((a - b).detach().abs().max()) <= bound * max(1.0, float(b.detach().abs().max()))


def inputs7(random: Random, T: int) -> list[Tensor]:
    kappa = normalize(random(B, T, H, N), dim=-1)
    log_w = -0.606531 * torch.sigmoid(3 * random(B, T, H, N))
    removal = kappa * torch.sigmoid(random(B, T, H, N))
    leaves = [random(B, T, H, N), log_w, 0.3 * random(B, T, H, N), random(B, T, H, N), -kappa, removal]
    return [*leaves, random(B, H, N, N)]


def inputs6(random: Random, T: int, strongest: float = 2) -> list[Tensor]:
    """The decay of a head's channels goes from hardly any to exp(-exp(strongest))."""
    log_w = -torch.exp(torch.linspace(-7, strongest, N) + 0.5 * random(B, T, H, N)).clamp(max=1e3)
    leaves = [random(B, T, H, N), log_w, random(B, T, H, N), random(B, T, H, N), random(H, N)]
    return [*leaves, random(B, H, N, N)]


def steps7(*leaves: Tensor) -> tuple[Tensor, Tensor]:
    *inputs, state = leaves
    ys = []
    for t in range(inputs[0].shape[1]):
        y, state = wkv7_step(*(leaf[:, t] for leaf in inputs), state)  # type: ignore[call-arg]
        ys.append(y)
    return torch.stack(ys, 1), state


def steps6(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    ys = []
    for t in range(r.shape[1]):
        y, state = wkv6_step(r[:, t], log_w[:, t], k[:, t], v[:, t], u, state)
        ys.append(y)
    return torch.stack(ys, 1), state


def test_a_step_is_the_definition() -> None:
    random = Random(1)
    r, log_w, k, v, a, b, state = (x.double() for x in inputs7(random, 1))
    r, w, k, v, a, b = (x[:, 0].unsqueeze(-1) for x in (r, log_w.exp(), k, v, a, b))
    after = state * w.mT + (state @ a) @ b.mT + v @ k.mT  # value × key, as RWKV-LM writes it
    y, got = steps7(*(x.double() for x in inputs7(Random(1), 1)))
    assert close(got, after, 1e-12) and close(y[:, 0], (after @ r).squeeze(-1), 1e-12)

    r, log_w, k, v, u, state = (x.double() for x in inputs6(Random(2), 1))
    r, w, k, v = (x[:, 0].unsqueeze(-1) for x in (r, log_w.exp(), k, v))
    y, got = steps6(*(x.double() for x in inputs6(Random(2), 1)))
    assert close(got, w * state + k @ v.mT, 1e-12)
    assert close(y[:, 0], (r.mT @ (u.unsqueeze(-1) * (k @ v.mT) + state)).squeeze(-2), 1e-12)


CASES = [
    (wkv7, steps7, inputs7),
    (wkv6, steps6, inputs6),
]


@pytest.mark.parametrize("length", [2, 16, 53, 300])
@pytest.mark.parametrize("chunk", [8, 16, 32])
@pytest.mark.parametrize(("chunked", "steps", "inputs"), CASES, ids=["wkv7", "wkv6"])
def test_chunks_say_what_the_steps_say(
    chunked: Callable[..., Any], steps: Callable[..., Any], inputs: Callable[..., Any], chunk: int, length: int
) -> None:
    leaves = inputs(Random(chunk), length)
    expected, end = steps(*(leaf.double() for leaf in leaves))
    y, state = chunked(*leaves, chunk=chunk)
    assert y.dtype == torch.float32 and y.shape == expected.shape and state.shape == end.shape
    assert close(y, expected, 1e-5) and close(state, end, 1e-5)


@pytest.mark.parametrize(("chunked", "steps", "inputs"), CASES, ids=["wkv7", "wkv6"])
def test_gradients_of_the_chunks_are_those_of_the_steps(
    chunked: Callable[..., Any], steps: Callable[..., Any], inputs: Callable[..., Any]
) -> None:
    random = Random(7)
    leaves = [leaf.requires_grad_() for leaf in inputs(random, 150)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weight, end_weight = random(B, 150, H, N), random(B, H, N, N)

    def gradients(leaves: list[Tensor], function: Callable[..., Any]) -> tuple[Tensor, ...]:
        y, state = function(*leaves)
        return torch.autograd.grad((y * weight).sum() + (state * end_weight).sum(), leaves)

    for mine, theirs in zip(gradients(leaves, chunked), gradients(exact, steps), strict=True):
        assert close(mine, theirs, 1e-4)


@pytest.mark.parametrize("strongest", [5.0, 20.0])
def test_a_decay_to_nothing_stays_finite_and_exact(strongest: float) -> None:
    """exp(-exp(5)) is zero in float32; then as good as all channels of a head forget at once."""
    leaves = [leaf.requires_grad_() for leaf in inputs6(Random(3), 70, strongest)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, state = wkv6(*leaves)
    expected, end = steps6(*exact)
    assert close(y, expected, 1e-5) and close(state, end, 1e-5)
    mine = torch.autograd.grad(y.square().sum() + state.sum(), leaves)
    theirs = torch.autograd.grad(expected.square().sum() + end.sum(), exact)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.isfinite(a).all() and close(a, b, 1e-4)
