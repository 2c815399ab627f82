"""The compiled runtime against the torch module that defines what it computes, and its products against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiirwkv_llm_rwkv.kernels import tiles
from aiirwkv_llm_rwkv.network.checkpoint import load
from aiirwkv_llm_rwkv.network.model import RWKV
from aiirwkv_llm_rwkv.runtimes.cpu import CpuRuntime, Pass, disagreement, suits
from aiirwkv_llm_rwkv.runtimes.linear import NEVER, PRECISIONS, Matrix, Plan, Precision, make_plan
from aiirwkv_llm_rwkv.runtimes.runtime import Lost, Piece, TorchRuntime

from bench import random_checkpoint

CPU = torch.device("cpu")
LAYERS, WIDTH, VOCABULARY = 3, 128, 512


@pytest.fixture(scope="module", params=["rwkv7", "rwkv6"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / f"{request.param}.safetensors"
    return random_checkpoint.make(path, request.param, LAYERS, WIDTH, vocabulary=VOCABULARY)


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def words(count: int, seed: int) -> list[int]:
    return [int(word) for word in np.random.default_rng(seed).integers(1, VOCABULARY, count)]


def both(checkpoint: Path, stored: torch.dtype, threads: int = 1) -> tuple[TorchRuntime, CpuRuntime]:
    plain = TorchRuntime(load(checkpoint, CPU, torch.float32), 4)
    compiled = CpuRuntime(load(checkpoint, CPU, stored), "float32", threads, 4)
    state = torch.from_numpy(random(plain.layout.size, seed=3)) * 0.1
    for runtime in (plain, compiled):
        runtime.put(0, None)
        runtime.put(1, state)
        runtime.put(2, None)
        runtime.put(3, state)
    return plain, compiled


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_it_says_what_the_module_says(checkpoint: Path, stored: torch.dtype, threads: int) -> None:
    plain, compiled = both(checkpoint, stored, threads)
    for turn, lengths in enumerate([(1, 1, 1, 1), (7, 1, 130, 1), (1, 64, 2, 33), (1, 1, 1, 1)]):
        pieces = [Piece(slot, words(length, 10 * turn + slot)) for slot, length in enumerate(lengths)]
        expected, found = plain.forward(pieces), compiled.forward(pieces)
        assert (expected - found).abs().max() < 1e-4
    for slot in range(4):
        assert (plain.get(slot) - compiled.get(slot)).abs().max() < 1e-4


def test_many_tokens_at_once_are_as_one_by_one(checkpoint: Path) -> None:
    _, runtime = both(checkpoint, torch.bfloat16)
    text = words(100, 1)
    for slot in (0, 2):
        runtime.put(slot, None)
    at_once = runtime.forward([Piece(0, text)])
    for word in text:
        one = runtime.forward([Piece(2, [word])])
    assert (at_once - one).abs().max() < 1e-4 and (runtime.get(0) - runtime.get(2)).abs().max() < 1e-4


def test_a_row_does_not_depend_on_its_neighbours(checkpoint: Path) -> None:
    _, runtime = both(checkpoint, torch.bfloat16)
    runtime.grow(40)
    for slot in range(40):
        runtime.put(slot, None)
    alone = runtime.forward([Piece(0, [5])])
    runtime.put(0, None)
    together = runtime.forward([Piece(slot, [5 + slot]) for slot in range(40)])
    assert (together[0] - alone[0]).abs().max() < 1e-5


def test_adapters_change_their_rows_only(checkpoint: Path) -> None:
    class Some:
        deltas = {
            "blocks.1.ffn.key": (torch.from_numpy(random(4, WIDTH)) * 0.1, torch.ones(4 * WIDTH, 4) * 0.1),
            "blocks.2.att.output": (torch.from_numpy(random(4, WIDTH)) * 0.1, torch.ones(WIDTH, 4) * 0.1),
        }

    plain, compiled = both(checkpoint, torch.float32)
    if plain.model.sizes.hidden != 4 * WIDTH:
        key = (torch.from_numpy(random(4, WIDTH)) * 0.1, torch.ones(plain.model.sizes.hidden, 4) * 0.1)
        Some.deltas = {**Some.deltas, "blocks.1.ffn.key": key}
    some = Some()
    pieces = [Piece(0, words(5, 1), some), Piece(1, words(3, 2)), Piece(2, words(1, 3), some)]
    without = [Piece(3, words(5, 1))]
    compiled.put(3, None)
    assert (compiled.forward(without)[0] - compiled.forward(pieces)[0]).abs().max() > 1e-2
    for runtime in (plain, compiled):
        for slot in range(3):
            runtime.put(slot, None)
    assert (plain.forward(pieces) - compiled.forward(pieces)).abs().max() < 1e-4


@pytest.mark.parametrize(("precision", "near"), [("bfloat16", 0.02), ("int8", 0.05), ("int4", 0.5)])
def test_smaller_forms_stay_near(checkpoint: Path, precision: Precision, near: float) -> None:
    plain, _ = both(checkpoint, torch.float32)
    small = CpuRuntime(load(checkpoint, CPU, torch.bfloat16), precision, 1, 1)
    small.put(0, None)
    piece = [Piece(0, words(80, 1))]
    expected, found = plain.forward(piece), small.forward(piece)
    assert float((expected - found).square().mean().sqrt() / expected.std()) < near


def test_what_it_runs_and_why(checkpoint: Path) -> None:
    _, runtime = both(checkpoint, torch.bfloat16)
    assert runtime.choices["runtime"] == "compiled for this processor, float32, 1 thread"
    assert "kernel" in runtime.choices["products"]
    assert disagreement("rwkv7") == disagreement("rwkv6") == ""


def test_a_model_that_does_not_fit_its_panels(tmp_path: Path) -> None:
    model: RWKV = load(random_checkpoint.make(tmp_path / "odd.safetensors", "rwkv7", 2, 64, vocabulary=64), CPU)
    model.version = "rwkv9"  # type: ignore[misc]
    assert "rwkv9" in suits(model)
    with pytest.raises(ValueError, match="rwkv9"):
        CpuRuntime(model)


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ([Piece(0, [])], "no token"),
        ([Piece(0, [VOCABULARY])], "not among the 512"),
        ([Piece(0, [-1])], "not among"),
        ([Piece(0, [1]), Piece(0, [2])], "share a slot"),
    ],
)
def test_wrong_pieces(checkpoint: Path, pieces: list[Piece], complaint: str) -> None:
    _, runtime = both(checkpoint, torch.float32)
    before = runtime.get(0)
    with pytest.raises(ValueError, match=complaint):
        runtime.forward(pieces)
    assert torch.equal(runtime.get(0), before)


def test_a_pool_that_does_not_fit_into_memory(checkpoint: Path) -> None:
    _, runtime = both(checkpoint, torch.float32)
    with pytest.raises(MemoryError):
        runtime.grow(1 << 32)
    assert len(runtime.states) == 4


WAYS = [Plan(precision, 1) for precision in PRECISIONS] + [
    Plan("bfloat16", 1, 0),
    Plan("int8", 1, 0),
    Plan("int4", 1, 0),
]
if tiles.available():
    WAYS += [Plan(precision, 1, 0, "tiles") for precision in PRECISIONS]
NEAR = {"float32": 2e-6, "bfloat16": 1e-2, "int8": 2e-2, "int4": 0.2}


@pytest.mark.parametrize("plan", WAYS, ids=lambda plan: f"{plan.precision}-{plan.way if plan.many < NEVER else 'own'}")
@pytest.mark.parametrize("shape", [(64, 64), (192, 128), (1000, 96), (32, 768), (320, 2048)])
def test_products(plan: Plan, shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    weights = torch.from_numpy(random(outputs, inputs)).to(torch.bfloat16)
    matrix = Matrix(weights, plan)
    for rows in (1, 2, 5, 6, 13, 16, 31, 47, 70):
        x = random(rows, inputs, seed=rows)
        y = matrix(x, np.full((rows, matrix.width), np.nan, np.float32))
        expected = x.astype(np.float64) @ weights.double().numpy().T
        assert np.abs(y[:, :outputs] - expected).max() / np.abs(expected).max() < NEAR[plan.precision]
        assert not y[:, outputs:].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sparse_row_is_as_a_dense_one(precision: Precision) -> None:
    matrix = Matrix(torch.from_numpy(random(192, 512)).to(torch.bfloat16), Plan(precision, 1))
    chosen = np.array([0, 1, 6, 7, 8, 255, 301, 511])
    x = np.zeros((1, 512), np.float32)
    x[0, chosen] = values = random(len(chosen))
    dense, sparse = (np.empty((1, matrix.width), np.float32) for _ in range(2))
    matrix(x, dense)
    assert np.array_equal(matrix.sparse(values, chosen, sparse), dense)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_our_products_do_not_depend_on_how_many_rows_there_are(precision: Precision) -> None:
    matrix = Matrix(torch.from_numpy(random(192, 512)).to(torch.bfloat16), Plan(precision, 1))
    x = random(29, 512)
    together = matrix(x, np.empty((29, matrix.width), np.float32))
    for row in range(29):
        alone = matrix(x[row : row + 1], np.empty((1, matrix.width), np.float32))
        assert np.array_equal(alone[0], together[row])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_plan_says_why(precision: Precision) -> None:
    plan = make_plan(precision, 1, 512, 256)
    assert plan.precision == precision and plan.reason
    assert plan.many == NEVER or "as fast" in plan.reason


def test_what_fails_half_way_is_lost_and_what_fails_before_is_not(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, runtime = both(checkpoint, torch.bfloat16)
    runtime.forward([Piece(0, [1])])
    before = runtime.get(1)

    def none(*_: object) -> None:
        raise MemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(Pass, "reserve", none)
        with pytest.raises(MemoryError):
            runtime.forward([Piece(1, [1])])
    assert torch.equal(runtime.get(1), before)
    with monkeypatch.context() as patch:
        patch.setattr(runtime._layers[-1], "channel_mix", none)
        with pytest.raises(Lost, match="failed half-way: none left"):
            runtime.forward([Piece(1, [1])])
    assert runtime.forward([Piece(0, [2])]).isfinite().all()
