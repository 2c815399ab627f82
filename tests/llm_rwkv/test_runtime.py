"""A runtime reads any mix of pieces as the module reads each text alone, and loses no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from aiirwkv_llm_rwkv.network.checkpoint import UNUSED
from aiirwkv_llm_rwkv.network.model import RWKV
from aiirwkv_llm_rwkv.network.rwkv7 import RWKV7, Sizes7
from aiirwkv_llm_rwkv.runtimes.runtime import Piece, TorchRuntime
from torch import Tensor

from .conftest import random_tensors


@dataclass(eq=False)
class Low:
    """An adapter, as far as a runtime cares."""

    deltas: dict[str, tuple[Tensor, Tensor]]


def random_model(seed: int = 0) -> RWKV:
    tensors = random_tensors(seed=seed)
    model = RWKV7(Sizes7.read({name: tensor.shape for name, tensor in tensors.items()}))
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in UNUSED})
    return model.eval().requires_grad_(False)


NAMES = ("blocks.0.att.key", "blocks.1.ffn.value", "blocks.2.att.output", "head")


def random_adapter(model: RWKV, seed: int, names: Sequence[str] = NAMES) -> Low:
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in names:
        outputs, inputs = model.get_submodule(name).weight.shape  # type: ignore[union-attr, operator, misc]
        a, b = torch.randn(4, inputs, generator=generator), torch.randn(outputs, 4, generator=generator)
        deltas[name] = (a * 0.05, b * 0.2)
    return Low(deltas)


def merged(model: RWKV, adapter: Low) -> RWKV:
    weights = dict(model.state_dict())
    for name, (a, b) in adapter.deltas.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + b @ a
    result = type(model)(model.sizes)
    result.load_state_dict(weights)
    return result.eval().requires_grad_(False)


def some_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 1024, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def alone(model: RWKV, pieces: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The last logits and the flat state of one text that the module reads piece by piece."""
    logits, state = torch.empty(0), model.initial_state()
    for tokens in pieces:
        logits, state = model(torch.tensor([list(tokens)]), state, last=True)
    return logits[0, -1], model.layout.flat(state)[0]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return float((a - b).abs().max()) <= tolerance


@pytest.fixture(scope="module")
def model() -> RWKV:
    return random_model()


def test_any_mix_of_pieces(model: RWKV) -> None:
    runtime = TorchRuntime(model, slots=6)
    texts = [
        [some_tokens(length, 10 * slot + i) for i, length in enumerate(lengths)]
        for slot, lengths in enumerate([(1, 1, 40), (7, 1, 1), (7, 20, 1), (1, 20, 1), (33, 1, 5)])
    ]
    for slot in range(5):
        runtime.put(slot, None)
    for step in range(3):
        logits = runtime.forward([Piece(slot, text[step]) for slot, text in enumerate(texts)])
        assert logits.shape == (5, 1024) and logits.dtype == torch.float32 and logits.device.type == "cpu"
    for slot, text in enumerate(texts):
        expected, state = alone(model, text)
        assert close(logits[slot], expected) and close(runtime.get(slot), state)
    assert not runtime.get(5).any(), "a slot that took no part stays as it is"


def test_states_go_out_and_come_back(model: RWKV) -> None:
    runtime = TorchRuntime(model, slots=1)
    runtime.put(0, None)
    runtime.forward([Piece(0, some_tokens(9, 1))])
    kept = runtime.get(0)
    first = runtime.forward([Piece(0, [5])])
    assert not torch.equal(runtime.get(0), kept), "what was given out is a copy"
    runtime.grow(4)
    runtime.put(3, kept)
    assert torch.equal(runtime.get(3), kept) and close(runtime.forward([Piece(3, [5])]), first)
    assert close(runtime.get(0), runtime.get(3))


def test_the_initial_state_is_the_models_own(model: RWKV) -> None:
    own = random_model()
    for i, state in enumerate(own.add_time_state()):
        torch.nn.init.normal_(state, generator=torch.Generator().manual_seed(i))
    runtime = TorchRuntime(own.requires_grad_(False), slots=1)
    runtime.put(0, None)
    assert torch.equal(runtime.get(0), own.layout.flat(own.initial_state())[0])
    assert close(runtime.forward([Piece(0, [3, 4])])[0], alone(own, [[3, 4]])[0])
    assert not close(runtime.forward([Piece(0, [3, 4])])[0], alone(model, [[3, 4]])[0])


def test_rows_have_their_own_adapters(model: RWKV) -> None:
    runtime = TorchRuntime(model, slots=5)
    one, two = random_adapter(model, 1), random_adapter(model, 2)
    adapters = [one, None, two, one, None]
    for step, lengths in enumerate([(6, 6, 6, 6, 6), (1, 1, 1, 1, 9)]):
        pieces = [Piece(slot, some_tokens(n, step * 5 + slot), adapters[slot]) for slot, n in enumerate(lengths)]
        if step == 0:
            for piece in pieces:
                runtime.put(piece.slot, None)
        logits = runtime.forward(pieces)
    plain = alone(model, [some_tokens(6, 0), some_tokens(1, 5)])[0]
    for slot, adapter in enumerate(adapters):
        weights = model if adapter is None else merged(model, adapter)
        expected, state = alone(weights, [some_tokens(6, slot), some_tokens((1, 1, 1, 1, 9)[slot], 5 + slot)])
        assert close(logits[slot], expected) and close(runtime.get(slot), state)
    assert not close(logits[0], plain, 0.05), "the adapter does something"
    runtime.put(0, None)
    assert close(runtime.forward([Piece(0, [7])])[0], alone(model, [[7]])[0]), "and nothing of it stays"


def test_bad_pieces_change_nothing(model: RWKV) -> None:
    runtime = TorchRuntime(model, slots=2)
    runtime.put(0, None)
    runtime.forward([Piece(0, [1, 2, 3])])
    before = runtime.get(0)
    for pieces, reason in [
        ([Piece(0, [])], "no token"),
        ([Piece(0, [5]), Piece(1, [1024])], "not among the 1024"),
        ([Piece(0, [-1])], "not among"),
        ([Piece(0, [1]), Piece(0, [2])], "share a slot"),
    ]:
        with pytest.raises(ValueError, match=reason):
            runtime.forward(pieces)
    assert torch.equal(runtime.get(0), before)


def test_out_of_memory_changes_nothing(model: RWKV, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = TorchRuntime(model, slots=2)
    runtime.put(0, None)
    runtime.put(1, None)
    before = runtime.get(0)
    forward = type(model).forward

    def scant(self: RWKV, tokens: Tensor, *rest: Tensor, **named: bool) -> tuple[Tensor, object]:
        if tokens.shape[1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return forward(self, tokens, *rest, **named)

    monkeypatch.setattr(type(model), "forward", scant)
    with pytest.raises(MemoryError, match="no memory for a batch of 9 tokens: CUDA out of memory"):
        runtime.forward([Piece(0, [1]), Piece(1, [1] * 8)])
    assert torch.equal(runtime.get(0), before)
    runtime.forward([Piece(0, [1]), Piece(1, [1] * 4)])
    with pytest.raises(MemoryError, match="no memory for 1000000000 states"):
        runtime.grow(10**9)
    assert len(runtime.pool) == 2 and not torch.equal(runtime.get(0), before)
