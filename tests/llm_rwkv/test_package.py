"""RWKV-4 and 5 through the `rwkv` package: what it says, for many texts in turn, and nothing read as a pickle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from aiirwkv import PluginError
from aiirwkv_llm_rwkv.runtimes.package import ListLayout, PackageRuntime
from aiirwkv_llm_rwkv.runtimes.runtime import Piece, Runtime
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.random_checkpoint import make, tensors

from .conftest import ask_package

OLD = ["rwkv4", "rwkv5", "rwkv5.1", "rwkv5.2"]
SMALL = {"vocabulary": 512, "dtype": torch.float32}


@pytest.fixture(scope="module", params=OLD)
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("old")
    return request.param, make(folder / "model.safetensors", request.param, 3, 128, **SMALL)


def some_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(1, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def furthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_as_the_package_itself(old: tuple[str, Path], tmp_path: Path) -> None:
    version, path = old
    tokens = some_tokens(200, 1)
    [expected] = ask_package(tmp_path, version, load_file(path), tokens, [None])
    runtime: Runtime = PackageRuntime(path)
    assert runtime.choices["runtime"].startswith(f"the `rwkv` package: RWKV-{version.removeprefix('rwkv')} is served")
    assert runtime.vocabulary == 512
    runtime.grow(1)
    runtime.put(0, None)
    logits = runtime.forward([Piece(0, tokens)])
    assert logits.shape == (1, 512) and furthest(logits[0], expected["logits"][-1]) <= 1e-4
    assert isinstance(runtime.layout, ListLayout)
    state = runtime.get(0)
    assert state.shape == (runtime.layout.size,) and state.dtype == torch.float32
    assert len(expected["state"]) == (15 if version == "rwkv4" else 9)
    assert furthest(state, runtime.layout.laid(expected["state"])) <= 1e-4 * max(1.0, float(state.abs().max()))
    text = []
    for _ in expected["text"]:
        text.append(int(logits[0].argmax()))
        logits = runtime.forward([Piece(0, text[-1:])])
    assert text == expected["text"]


def test_texts_do_not_disturb_each_other(old: tuple[str, Path]) -> None:
    runtime = PackageRuntime(old[1], slots=2)
    first, second = some_tokens(300, 2), some_tokens(40, 3)
    for slot in (0, 1):
        runtime.put(slot, None)
    alone = [runtime.forward([Piece(0, first)]), runtime.forward([Piece(1, second)])]
    ends = runtime.get(0), runtime.get(1)
    for slot in (0, 1):
        runtime.put(slot, None)
    runtime.forward([Piece(1, second[:7]), Piece(0, first[:1])])
    middle = runtime.get(1)
    runtime.grow(3)
    logits = runtime.forward([Piece(0, first[1:]), Piece(1, second[7:])])
    runtime.put(2, middle)
    again = runtime.forward([Piece(2, second[7:])])
    assert torch.equal(again[0], logits[1]) and torch.equal(runtime.get(2), runtime.get(1))
    for i in (0, 1):
        assert furthest(logits[i], alone[i][0]) <= 1e-4
        assert furthest(runtime.get(i), ends[i]) <= 1e-4 * max(1.0, float(ends[i].abs().max()))


def test_what_it_cannot_do_it_says(old: tuple[str, Path]) -> None:
    runtime = PackageRuntime(old[1], slots=1)
    runtime.put(0, None)
    before = runtime.get(0)
    for piece in (Piece(0, []), Piece(0, [512]), Piece(0, [-1])):
        with pytest.raises(ValueError, match="token"):
            runtime.forward([piece])

    class Low:
        deltas: dict[str, tuple[Tensor, Tensor]] = {}

    with pytest.raises(ValueError, match="an adapter cannot be used with an RWKV-"):
        runtime.forward([Piece(0, [1], Low())])
    assert torch.equal(runtime.get(0), before)


def test_torch_is_left_as_it_was(old: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", None)
    PackageRuntime(old[1])
    assert not torch.backends.cuda.matmul.allow_tf32
    import rwkv.model

    assert rwkv.model.torch is torch


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"blocks.1.ln1.weight": None}, "the tensor blocks.1.ln1.weight is missing"),
        ({"emb.weight": None}, "the tensor emb.weight is missing"),
        ({"blocks.2.ffn.key.weight": None}, "package fails with KeyError: .blocks.2.ffn.key.weight"),
        ({"blocks.2.ffn.key.weight": torch.zeros(3, 3)}, "package fails with RuntimeError"),
        ({"blocks.999999999.ln1.weight": torch.zeros(128)}, "the tensor blocks.3.ln1.weight is missing"),
        (
            {"blocks.0.att.key.weight": torch.full((128, 128), float("nan"))},
            "att.key.weight holds numbers that are inf",
        ),
        ({"blocks.0.att.time_state": torch.zeros(2, 64, 64)}, "a tuned state, which is not supported for an rwkv5"),
        ({"blocks.0.att.r_k": torch.zeros(2, 64)}, "it holds an rwkv7, not an RWKV-4 or 5"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(change: dict[str, Tensor | None], complaint: str, tmp_path: Path) -> None:
    changed = {**tensors("rwkv5.2", 3, 128, **SMALL), **change}
    path = tmp_path / "wrong.safetensors"
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    with pytest.raises(PluginError, match=rf"wrong\.safetensors cannot be loaded: .*{complaint}"):
        PackageRuntime(path)
    path.write_bytes(b"PK")
    with pytest.raises(PluginError, match="it is no safetensors file"):
        PackageRuntime(path)


def test_bfloat16(tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", "rwkv5.2", 3, 128, vocabulary=512)
    said = []
    for precision in ("fp32", "bf16"):
        runtime = PackageRuntime(path, "cpu", precision, slots=1)
        runtime.put(0, None)
        said.append(runtime.forward([Piece(0, some_tokens(30, 4))])[0])
    assert said[1].dtype == torch.float32 and float((said[1] - said[0]).abs().mean()) < 0.1 < float(said[0].std())
