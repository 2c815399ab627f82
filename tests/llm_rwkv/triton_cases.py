"""
The Triton kernels and the GPU's runtime say what plain torch says.

Run by test_triton.py in a process of its own; without a GPU in Triton's interpreter, where a stand-in plays the graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from aiirwkv_llm_rwkv.kernels import fused, plain
from aiirwkv_llm_rwkv.kernels import triton as kernels
from aiirwkv_llm_rwkv.kernels.fused import Texts
from aiirwkv_llm_rwkv.network.checkpoint import UNUSED
from aiirwkv_llm_rwkv.network.model import RWKV
from aiirwkv_llm_rwkv.network.rwkv6 import RWKV6, Sizes6
from aiirwkv_llm_rwkv.network.rwkv7 import RWKV7, Sizes7
from aiirwkv_llm_rwkv.runtimes import cuda, trial
from aiirwkv_llm_rwkv.runtimes.cuda import CudaRuntime
from aiirwkv_llm_rwkv.runtimes.runtime import Piece, TorchRuntime
from torch import Tensor

from .conftest import random_tensors
from .test_runtime import close, random_adapter, some_tokens

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

VERSIONS = ("rwkv7", "rwkv6")
HEADS, HEAD = 2, 64
D = HEADS * HEAD
LENGTHS = (1, 17, 40, 3)


def random_model(version: str, dtype: torch.dtype = torch.float32) -> RWKV:
    tensors = random_tensors(layers=2, width=64, version=version)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model: RWKV = RWKV7(Sizes7.read(shapes)) if version == "rwkv7" else RWKV6(Sizes6.read(shapes))
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in UNUSED})
    return model.to(DEVICE, dtype).eval().requires_grad_(False)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial of less, since an interpreter takes its time."""
    monkeypatch.setattr(trial, "LONG", 600.0)
    if not GPU:
        monkeypatch.setattr(trial, "PROMPT", 2)
        monkeypatch.setattr(trial, "LENGTHS", (17, 1))


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial at all."""
    if not GPU:
        monkeypatch.setattr(trial, "choose", lambda runtime, ragged: None)


def random_texts(seed: int = 0) -> tuple[Texts, Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    length = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    begin = length.cumsum(0, dtype=torch.int32) - length
    text = torch.repeat_interleave(torch.arange(4, dtype=torch.int32, device=DEVICE), length)
    slots = torch.tensor([4, 0, 2, 5], dtype=torch.int32, device=DEVICE)
    return Texts(normal(6, 2 * D + D * HEAD), slots, begin, length, text), normal


def one_by_one(
    read: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor], texts: Texts
) -> tuple[Tensor, Tensor]:
    """Each text alone in plain torch → what is read [N, D], and the pool."""
    pool, ys = texts.pool.clone(), []
    for slot, begin, n in zip(texts.slots.tolist(), texts.begin.tolist(), LENGTHS, strict=True):
        state = pool[slot, 2 * D :].view(1, HEADS, HEAD, HEAD)
        y, after = read(*(x[begin : begin + n].view(1, n, HEADS, HEAD) for x in inputs), state)
        pool[slot, 2 * D :] = after.flatten()
        ys.append(y.view(n, D))
    return torch.cat(ys), pool


def transposed(*given: Tensor) -> tuple[Tensor, Tensor]:
    """wkv7 of plain.py, for a state that is key × value."""
    y, state = plain.wkv7(*given[:-1], given[-1].mT)
    return y, state.mT


WAYS = [{"block": 16}, {"block": 32}, {"block": 64}, {"chunked": False, "block": 16}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_wkv7(way: dict[str, Any]) -> None:
    texts, normal = random_texts()
    N = sum(LENGTHS)
    r, k, v = (normal(N, D) for _ in range(3))
    log_w = -0.606531 * torch.sigmoid(3 * normal(N, D))
    kappa = torch.nn.functional.normalize(normal(N, HEADS, HEAD), dim=-1).view(N, D)
    inputs = (r, log_w, k, v, -kappa, kappa * torch.sigmoid(normal(N, D)))
    expected, pool = one_by_one(transposed, inputs, texts)
    y = torch.empty(N, D, device=DEVICE)
    kernels.wkv(r, log_w, k, v, inputs[4:], None, y, texts, 2 * D, HEADS, **way)
    assert close(y, expected) and close(texts.pool, pool)
    assert torch.equal(texts.pool[[1, 3]], pool[[1, 3]]), "the states of others stay as they are"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_wkv6(way: dict[str, Any]) -> None:
    texts, normal = random_texts()
    N = sum(LENGTHS)
    r, k, v = (normal(N, D) for _ in range(3))
    log_w = -torch.exp((3 * normal(N, D)).clamp(max=5.0))  # from hardly any decay to one that forgets everything
    u = normal(D)
    expected, pool = one_by_one(
        lambda *given: plain.wkv6(*given[:-1], u.view(HEADS, HEAD), given[-1]), (r, log_w, k, v), texts
    )
    y = torch.empty(N, D, device=DEVICE)
    kernels.wkv(r, log_w, k, v, None, u, y, texts, 2 * D, HEADS, **way)
    assert close(y, expected, 2e-4) and close(texts.pool, pool, 2e-4)


def test_sparse_reads_nothing_that_meets_a_zero() -> None:
    _, normal = random_texts()
    hidden, rows = normal(200), normal(200, 96)
    expected = hidden.relu().square() @ rows
    rows[hidden <= 0] = float("nan")
    parts = torch.empty(3, 96, device=DEVICE)
    fused.sparse(hidden, rows, parts)
    assert close(parts.sum(0), expected, 1e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_any_mix_of_pieces(version: str, short: None) -> None:
    model = random_model(version)
    runtime, reference = CudaRuntime(model, slots=5), TorchRuntime(model, slots=5)
    assert runtime.choices["runtime"].startswith("Triton kernels")
    assert "failed" not in runtime.choices["prefill"] and runtime.choices["prefill"].count(" ms") == 3
    assert "failed" not in runtime.choices["decode"] and "not tried" not in str(runtime.choices)
    state = torch.randn(model.layout.size, generator=torch.Generator().manual_seed(1)) * 0.3
    for each in (runtime, reference):
        for slot in range(4):
            each.put(slot, None)
        each.put(2, state)
    for step, lengths in enumerate([(5, 1, 20, 2), (1, 1, 1, 1), (1,), (1, 18)]):
        pieces = [Piece(3 - slot, some_tokens(n, step * 9 + slot)) for slot, n in enumerate(lengths)]
        mine, theirs = runtime.forward(pieces), reference.forward(pieces)
        assert mine.dtype == torch.float32 and mine.device.type == "cpu" and close(mine, theirs)
    for slot in range(5):
        assert close(runtime.get(slot), reference.get(slot))
    runtime.grow(9)
    assert close(runtime.get(2), reference.get(2)) and len(runtime.pool) == 10


@pytest.mark.parametrize("version", VERSIONS)
def test_bfloat16(version: str, untried: None) -> None:
    model = random_model(version, torch.bfloat16)
    runtime, reference = CudaRuntime(model, slots=2), TorchRuntime(random_model(version), slots=2)
    assert runtime.ragged
    for pieces in ([Piece(0, some_tokens(19, 1)), Piece(1, [4])], [Piece(0, [3]), Piece(1, [4])]):
        mine, exact = runtime.forward(pieces), reference.forward(pieces)
    assert float((mine - exact).square().mean().sqrt()) < 0.05 < float(exact.std())


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_have_their_own_adapters(version: str, untried: None) -> None:
    model = random_model(version)
    runtime, reference = CudaRuntime(model, slots=4), TorchRuntime(model, slots=4)
    names = ("blocks.0.att.key", "blocks.1.att.receptance", "blocks.1.att.output", "blocks.1.ffn.value", "head")
    one, two = (random_adapter(model, seed, names) for seed in (1, 2))
    adapters = [two, None, one, two]
    for step, lengths in enumerate([(6, 3, 2, 1), (1, 1, 1, 1)]):
        pieces = [Piece(slot, some_tokens(n, step * 5 + slot), adapters[slot]) for slot, n in enumerate(lengths)]
        mine, theirs = runtime.forward(pieces), reference.forward(pieces)
        assert close(mine, theirs)
    pieces[0].adapter = None
    assert not close(runtime.forward(pieces)[0], reference.forward([Piece(0, pieces[0].tokens, two)])[0], 0.01)


@pytest.mark.skipif(GPU, reason="a stand-in for what a GPU has")
def test_graphs_are_filled_up_and_forgotten(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []

    def record(run: Callable[[], object], memory: Any) -> Callable[[], object]:
        run()
        recorded.append(run)
        return run

    model = random_model("rwkv7")
    runtime, reference = CudaRuntime(model, slots=5), TorchRuntime(model, slots=5)
    monkeypatch.setattr(cuda, "record", record)
    runtime.graphs = True
    for slots in ([3, 0, 4], [1], [2, 3, 4], [0, 1, 2, 3]):
        pieces = [Piece(slot, [7 + slot]) for slot in slots]
        assert close(runtime.forward(pieces), reference.forward(pieces))
    assert len(recorded) == 2, "of four texts, and of one"
    for slot in range(5):
        assert close(runtime.get(slot), reference.get(slot))
    runtime.grow(7)
    assert close(runtime.forward(pieces), reference.forward(pieces)) and len(recorded) == 3
    runtime.forward([Piece(0, [1, 2]), Piece(1, [3])])
    assert len(recorded) == 3, "a text of two tokens needs none"


@pytest.mark.skipif(GPU, reason="a stand-in for what a GPU has")
def test_without_a_graph_it_runs_all_the_same(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(run: Callable[[], object], memory: Any) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model = random_model("rwkv7")
    runtime, reference = CudaRuntime(model, slots=1), TorchRuntime(model, slots=1)
    monkeypatch.setattr(cuda, "record", record)
    runtime.graphs = True
    assert close(runtime.forward([Piece(0, [7])]), reference.forward([Piece(0, [7])]))
    assert close(runtime.get(0), reference.get(0))
    expected = "off: of 1 texts it failed with RuntimeError: operation not permitted when stream is capturing"
    assert runtime.choices["graphs"] == expected


@pytest.mark.parametrize("wrong", [0.0, float("nan")])
def test_what_does_not_agree_is_not_used(wrong: float, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, block: int = 0, chunked: bool = True, **rest: Any) -> None:
        if block == 32:
            raise RuntimeError("out of resource: shared memory")
        given[6].fill_(wrong)

    model = random_model("rwkv7")
    reference = TorchRuntime(model, slots=1).forward([Piece(0, [1, 2, 3])])
    monkeypatch.setattr(trial, "wkv", broken)
    runtime = CudaRuntime(model, slots=1)
    assert runtime.choices.keys() == {"runtime"} and runtime.choices["runtime"].startswith("plain torch: chunks, 32")
    assert "out of resource" in runtime.choices["runtime"] and "off by" in runtime.choices["runtime"]
    assert close(runtime.forward([Piece(0, [1, 2, 3])]), reference)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("rwkv7")
    for name in ("runtimes.ragged", "runtimes.trial", "kernels.triton", "kernels.fused"):
        monkeypatch.delitem(sys.modules, f"aiirwkv_llm_rwkv.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    runtime = CudaRuntime(model, slots=1)
    assert runtime.choices == {"runtime": "plain torch: import of triton halted; None in sys.modules"}
    assert runtime.forward([Piece(0, [1, 2, 3])]).shape == (1, 1024)


def test_heads_that_no_kernel_takes() -> None:
    tensors = {name: tensor.shape for name, tensor in random_tensors(layers=2, width=192).items()}
    tensors["blocks.0.att.r_k"] = torch.Size([4, 48])
    model = RWKV7(Sizes7.read(tensors)).eval().requires_grad_(False)
    assert "this model's have 48" in CudaRuntime(model, slots=1).choices["runtime"]


@pytest.mark.parametrize("version", VERSIONS)
def test_flash_linear_attention_is_asked_as_it_wants(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU; plain torch takes their place, with their arguments."""

    def each(read: Callable[..., Any], inputs: Sequence[Tensor], states: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            read(*(x[:, begin:end].float() for x in inputs), states[i : i + 1])
            for i, (begin, end) in enumerate(zip(ends.tolist(), ends[1:].tolist(), strict=False))
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])

    def chunk_rwkv7(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float, initial_state: Tensor,
        output_final_state: bool, cu_seqlens: Tensor, safe_gate: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, state = each(plain.wkv7, (r, w, k, v, a, b), initial_state.mT, cu_seqlens)
        return y, state.mT

    def chunk_rwkv6(
        r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, scale: float, initial_state: Tensor,
        output_final_state: bool, cu_seqlens: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return each(lambda r, w, k, v, state: plain.wkv6(r, w, k, v, u, state), (r, w, k, v), initial_state, cu_seqlens)

    for name, content in {"": {}, ".ops": {}, ".ops.rwkv6": {"chunk_rwkv6": chunk_rwkv6},
                          ".ops.rwkv7": {"chunk_rwkv7": chunk_rwkv7}}.items():  # fmt: skip
        module = ModuleType(f"fla{name}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, f"fla{name}", module)
    texts, normal = random_texts()
    scan = trial._flash_linear_attention(torch.float32)
    r, k, v, a, b = (0.3 * normal(sum(LENGTHS), D) for _ in range(5))
    log_w, u, y = -torch.rand_like(r), normal(D), torch.empty_like(r)
    if version == "rwkv7":
        inputs: tuple[Tensor, ...] = (r, log_w, k, v, a, b)
        expected, pool = one_by_one(transposed, inputs, texts)
        scan(r, log_w, k, v, (a, b), None, y, texts, 2 * D, HEADS)
    else:
        expected, pool = one_by_one(
            lambda *given: plain.wkv6(*given[:-1], u.view(HEADS, HEAD), given[-1]), (r, log_w, k, v), texts
        )
        scan(r, log_w, k, v, None, u, y, texts, 2 * D, HEADS)
    assert close(y, expected) and close(texts.pool, pool)


def test_out_of_memory_changes_nothing_or_says_so(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = CudaRuntime(random_model("rwkv7"), slots=2)
    runtime.forward([Piece(0, [1, 2, 3])])
    before = runtime.get(0)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "workspace", lambda *_: 1 << 50)
        with pytest.raises(MemoryError, match="no memory for a batch of 3 tokens"):
            runtime.forward([Piece(0, [1, 2]), Piece(1, [3])])
    assert torch.equal(runtime.get(0), before)

    def ragged(batch: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runtime, "ragged", ragged)
    with pytest.raises(RuntimeError, match="a batch of 2 tokens failed half-way"):
        runtime.forward([Piece(0, [1, 2])])
