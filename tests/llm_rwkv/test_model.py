"""RWKV-7 and RWKV-6 are exact: against the `rwkv` package, against itself in other cuts, and in its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from aiirwkv_llm_rwkv.network.checkpoint import UNUSED, load
from aiirwkv_llm_rwkv.network.model import RWKV, LayerState, State, architecture
from aiirwkv_llm_rwkv.network.rwkv6 import Sizes6
from aiirwkv_llm_rwkv.network.rwkv7 import Sizes7
from aiirwkv_llm_rwkv.tokenizer import Tokenizer
from safetensors.torch import save_file
from torch import Tensor

from .conftest import NANO, Reference, ask_package, random_tensors
from .questions import READING

CPU = torch.device("cpu")


def model_at(path: Path) -> RWKV:
    return load(path, CPU, torch.float32)


def ours(state: list[Tensor] | None) -> State | None:
    """A state of the package as ours: three tensors a layer, without a batch."""
    if state is None:
        return None
    layers = range(0, len(state), 3)
    return tuple(LayerState(*(part.unsqueeze(0) for part in state[i : i + 3])) for i in layers)


def furthest(a: Any, b: Any) -> float:
    return float((a - b).detach().abs().max())


@torch.inference_mode()
def test_as_the_rwkv_package(reference: Reference) -> None:
    model = model_at(reference.weights)
    tokens = torch.tensor([reference.tokens])
    for start, expected in zip(reference.states, reference.results, strict=True):
        logits, state = model(tokens, ours(start))
        assert furthest(logits[0], expected["logits"]) <= 1e-4
        for mine, theirs in zip(state, ours(expected["state"]) or (), strict=True):
            assert furthest(mine.wkv, theirs.wkv) <= 1e-5 * float(theirs.wkv.abs().max())
            assert furthest(mine.att, theirs.att) <= 1e-4
            assert furthest(mine.ffn, theirs.ffn) <= 1e-4
        text: list[int] = []
        for _ in expected["text"]:
            text.append(int(logits[0, -1].argmax()))
            logits, state = model(torch.tensor([text[-1:]]), state)
        assert text == expected["text"]


@torch.inference_mode()
def test_however_it_is_cut(reference: Reference) -> None:
    model = model_at(reference.weights)
    tokens = torch.tensor([reference.tokens[:200]])
    start = ours(reference.states[1])
    kept = [part.clone() for layer in start or () for part in layer]
    whole, _ = model(tokens, start)
    for cuts in ([1] * 200, [7, 16, 1, 100, 76]):
        state, logits = start, []
        for piece in torch.split(tokens, cuts, 1):
            part, state = model(piece, state)
            logits.append(part)
        assert furthest(torch.cat(logits, 1), whole) <= 1e-4
    assert furthest(model(tokens, start, last=True)[0], whole[:, -1:]) <= 1e-4
    unchanged = [part for layer in start or () for part in layer]
    assert all(torch.equal(a, b) for a, b in zip(kept, unchanged, strict=True)), "a state is a value"


@pytest.mark.parametrize("version", ["tiny", "tiny6"])
@torch.inference_mode()
def test_rows_of_a_batch_do_not_mix(version: str, request: pytest.FixtureRequest) -> None:
    model = model_at(request.getfixturevalue(version))
    tokens = torch.randint(1, 1024, (3, 50), generator=torch.Generator().manual_seed(3))
    together, _ = model(tokens)
    alone = torch.cat([model(row.unsqueeze(0))[0] for row in tokens])
    assert furthest(together, alone) <= 1e-4


@torch.inference_mode()
def test_bfloat16_says_nearly_the_same() -> None:
    tokens = Tokenizer.load(NANO / "vocab.txt").encode("User: " + READING[0][0])
    exact, _ = model_at(NANO / "model.safetensors")(torch.tensor([tokens]))
    half = load(NANO / "model.safetensors", CPU, torch.bfloat16)
    state, logits = half.initial_state(), []
    for piece in torch.split(torch.tensor([tokens]), [len(tokens) - 2, 1, 1], 1):
        part, state = half(piece, state)
        logits.append(part)
    near = torch.cat(logits, 1)
    assert near.dtype == torch.bfloat16 and state[0].wkv.dtype == torch.float32
    assert float((near - exact).abs().mean()) < 0.1 < float(exact.std())


@torch.inference_mode()
def test_a_tuned_state_in_the_checkpoint_is_the_initial_state(reference: Reference, tmp_path: Path) -> None:
    plain = model_at(reference.weights)
    state = ours(reference.states[1])
    assert state is not None
    turned = (layer.wkv[0] if reference.version == "rwkv7" else layer.wkv[0].mT for layer in state)
    tuned = {f"blocks.{i}.att.time_state": wkv.contiguous() for i, wkv in enumerate(turned)}
    save_file({**plain.state_dict(), **tuned}, tmp_path / "tuned.safetensors")
    tokens = torch.tensor([reference.tokens[:64]])
    zeros = plain.initial_state()
    given = tuple(LayerState(zero.att, layer.wkv, zero.ffn) for zero, layer in zip(zeros, state, strict=True))
    mine, _ = model_at(tmp_path / "tuned.safetensors")(tokens)
    assert furthest(mine, plain(tokens, given)[0]) <= 1e-5
    assert furthest(mine, plain(tokens)[0]) > 0.1


@torch.inference_mode()
def test_a_state_in_its_flat_form(reference: Reference) -> None:
    model = model_at(reference.weights)
    state = ours(reference.states[1])
    assert state is not None
    flat = model.layout.flat(state)
    assert flat.shape == (1, model.layout.size) and flat.dtype == torch.float32
    for layer, other in zip(state, model.layout.state(flat), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, other, strict=True))
    _, _, wkv = model.layout.parts(flat)
    official = state[1].wkv[0]
    assert torch.equal(wkv[0, 1], official.mT if reference.version == "rwkv7" else official), "key × value"


@torch.inference_mode()
def test_the_package_too_begins_with_the_tuned_state_of_an_rwkv6(tmp_path: Path) -> None:
    tensors = random_tensors(version="rwkv6")
    generator = torch.Generator().manual_seed(4)
    for i in range(3):
        tensors[f"blocks.{i}.att.time_state"] = torch.randn(2, 64, 64, generator=generator)
    tokens = torch.randint(1, 1024, (40,), generator=generator).tolist()
    [expected] = ask_package(tmp_path, "rwkv6", tensors, tokens, [None])
    save_file(tensors, tmp_path / "m.safetensors")
    model = model_at(tmp_path / "m.safetensors")
    assert furthest(model(torch.tensor([tokens]))[0][0], expected["logits"]) <= 1e-4
    without = model.state_of([None] * 3)
    assert furthest(model(torch.tensor([tokens]), without)[0][0], expected["logits"]) > 0.1


@pytest.mark.parametrize("version", ["rwkv7", "rwkv6"])
def test_every_parameter_can_learn(version: str) -> None:
    """In chunks as in single steps: the same loss, the same gradients."""
    tensors = {name: tensor.double() for name, tensor in random_tensors(2, version=version).items()}
    kind, sizes = architecture({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    model = kind(sizes).double()
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in UNUSED})
    model.add_time_state()
    tokens = torch.randint(1, 1024, (2, 40), generator=torch.Generator().manual_seed(5))

    def gradients(pieces: int) -> tuple[Tensor, dict[str, Tensor]]:
        state, logits = None, []
        for piece in torch.split(tokens[:, :-1], pieces, 1):
            part, state = model(piece, state)
            logits.append(part)
        loss = torch.nn.functional.cross_entropy(torch.cat(logits, 1).flatten(0, 1), tokens[:, 1:].flatten())
        names, parameters = zip(*model.named_parameters(), strict=True)
        return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    whole, steps = gradients(39), gradients(1)
    assert furthest(whole[0], steps[0]) <= 1e-5
    for name, gradient in whole[1].items():
        assert float(gradient.abs().max()) > 0, name
        assert furthest(gradient, steps[1][name]) <= 1e-5 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("version", ["tiny", "tiny6"])
def test_a_time_state_can_learn(version: str, request: pytest.FixtureRequest) -> None:
    model = model_at(request.getfixturevalue(version))
    states = model.add_time_state()
    optimiser = torch.optim.Adam(states, lr=0.3)
    tokens = torch.randint(1, 1024, (1, 24), generator=torch.Generator().manual_seed(5))
    losses = []
    for _ in range(6):
        logits, _ = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert model.head.weight.grad is None


def test_every_size_is_read(tiny: Path, tiny6: Path) -> None:
    same = {"vocabulary": 1024, "layers": 3, "width": 128, "heads": 2}
    assert model_at(tiny).sizes == Sizes7(**same, hidden=512, rank_w=32, rank_a=24, rank_v=16, rank_g=48)
    assert model_at(tiny6).sizes == Sizes6(**same, hidden=448, rank_maa=24, rank_decay=40)
