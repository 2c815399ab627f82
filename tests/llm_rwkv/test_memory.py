"""What is reckoned about memory is what is there: parameters, states, and what a batch allocates."""

from __future__ import annotations

import sys

import pytest
import torch
from aiirwkv.errors import PluginError
from aiirwkv_llm_rwkv.network.model import RWKV, Linear
from aiirwkv_llm_rwkv.runtimes.memory import BGE_M3, estimate, parameters, state_bytes
from aiirwkv_llm_rwkv.runtimes.quantise import _small, quantise
from aiirwkv_llm_rwkv.runtimes.runtime import Piece, TorchRuntime

from bench.memory import SHAPES, child, made, sizes_of


@pytest.fixture(params=["rwkv7", "rwkv6"])
def model(request: pytest.FixtureRequest) -> RWKV:
    return made(request.param, 2, 128, 256, torch.bfloat16)


def test_every_parameter_is_counted(model: RWKV) -> None:
    counted = parameters(type(model), model.sizes)
    assert sum(counted) == sum(parameter.numel() for parameter in model.parameters())
    need = estimate(type(model), model.sizes, "bfloat16", slots=4, chunk=1)
    assert need.weights + need.embedding == sum(parameter.nbytes for parameter in model.parameters())
    runtime = TorchRuntime(model, slots=5)
    assert need.states == runtime.pool.nbytes == 5 * state_bytes(model.layout)


def test_official_sizes() -> None:
    """As the files of official models have them."""
    billions = {name: sum(parameters(*sizes_of("rwkv6", *shape))) / 1e9 for name, shape in SHAPES.items()}
    assert billions == pytest.approx({"1.6B": 1.600, "3B": 3.100, "7B": 7.636, "14B": 14.069}, abs=0.001)
    assert BGE_M3.parameters / 1e6 == pytest.approx(568, abs=1)


def test_less_precision_takes_less() -> None:
    kind, sizes = sizes_of("rwkv7", *SHAPES["3B"])
    totals = [estimate(kind, sizes, name, 8, 512).total for name in ("float32", "bfloat16", "int8", "nf4")]
    assert totals == sorted(totals, reverse=True) and totals[0] > 3 * totals[3]


@pytest.mark.parametrize("version", ["rwkv7", "rwkv6"])
def test_a_batch_allocates_what_is_reckoned(version: str) -> None:
    pytest.importorskip("triton")
    allocated, reckoned = child("ragged", version, 2, 128, 24)
    assert 0.85 * reckoned <= allocated <= reckoned


def test_a_model_takes_what_is_reckoned() -> None:
    found = child("resident")
    assert found["taken"] == pytest.approx(found["reckoned"], rel=0.05)


def test_few_bits_are_refused_where_there_are_none(model: RWKV, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match="'nf4' of bitsandbytes is for an NVIDIA GPU, not for cpu"):
        quantise(model, "nf4", torch.device("cpu"))
    with pytest.raises(PluginError, match="starts from weights of 16 bits"):
        quantise(made("rwkv7", 2, 64, 64, torch.float32), "int8", torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(PluginError, match=r"'int8' needs bitsandbytes, which cannot be used here .*: pip install"):
        quantise(model, "int8", torch.device("cuda"))


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.1), ("nf4", 0.25)])
def test_few_bits_say_nearly_the_same(model: RWKV, precision: str, error: float) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    exact = TorchRuntime(model, slots=1).forward([Piece(0, [1, 2, 3])])
    for name, linear in list(model.named_modules()):
        if isinstance(linear, Linear) and name != "head":
            model.set_submodule(name, _small(bnb, linear, precision, torch.bfloat16).to("cpu"))
    near = TorchRuntime(model, slots=1).forward([Piece(0, [1, 2, 3])])
    assert 0 < float((near - exact).square().mean().sqrt() / exact.std()) < error
