"""Adapters: what they change, in whatever names and forms they come, and which model they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from aiirwkv import BadRequest, Conflict, Forbidden, NotFound, User
from aiirwkv.hooks import may
from aiirwkv_llm_rwkv.network.checkpoint import load
from aiirwkv_llm_rwkv.runtimes.runtime import Piece, TorchRuntime
from aiirwkv_llm_rwkv.shelf.adapters import ADAPTER, Adapter, AdapterCard, Adapters, adapters_folder, apply, fold
from aiirwkv_llm_rwkv.shelf.changes import add
from aiirwkv_llm_rwkv.shelf.describe import linears, shapes
from aiirwkv_llm_rwkv.shelf.library import Files
from aiirwkv_llm_rwkv.shelf.shelf import CARD
from safetensors.torch import load_file, save_file
from torch import Tensor

from .conftest import NANO

SHAPES = shapes(NANO / "model.safetensors")
SHA256 = Files.at(NANO).sha256()
TARGETS = ("att.receptance", "att.key", "att.output", "ffn.value")
RANK, ALPHA = 4, 12.0


def someone(name: str = "owner", *roles: str) -> Any:
    user = User(name, roles or ("owner",) if name == "owner" else roles)
    return SimpleNamespace(user=user, may=lambda action, thing: may(user, action, thing))


def factors(prefix: str = "", suffix: str = "", *, pissa: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """For two layers of the built-in model, as files name them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for linear, (out, inputs) in linears(SHAPES).items():
        if linear.split(".", 2)[2] in TARGETS and linear.startswith(("blocks.1.", "blocks.3.")):
            for part in ("", "init_") if pissa else ("",):
                found[f"{prefix}{linear}.{part}lora_A{suffix}"] = torch.randn(RANK, inputs, generator=generator) * 0.05
                found[f"{prefix}{linear}.{part}lora_B{suffix}"] = torch.randn(out, RANK, generator=generator) * 0.05
    return found


def put(data: Path, name: str, tensors: Mapping[str, Tensor], **fields: Any) -> None:
    folder = adapters_folder(data) / name
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / ADAPTER)
    known: dict[str, Any] = {
        "name": name,
        "base": "rwkv7-nano",
        "base_sha256": SHA256,
        "owner": "owner",
        "rank": RANK,
        "alpha": ALPHA,
        "sha256": {ADAPTER: hashlib.sha256((folder / ADAPTER).read_bytes()).hexdigest()},
    }
    (folder / CARD).write_bytes(msgspec.json.encode(AdapterCard(**(known | fields))))


def get(data: Path, name: str, ctx: Any = None) -> Adapter:
    return Adapters(adapters_folder(data)).load(name, ctx or someone(), SHAPES, lambda: SHA256, "rwkv7-nano")


def logits(adapter: Adapter | None, change: Mapping[str, Tensor] | None = None) -> Tensor:
    """What the built-in model says with an adapter, or with another change of its weights."""
    model = load(NANO / "model.safetensors", torch.device("cpu"), torch.float32)
    for name, difference in (change or {}).items():
        weight = model.get_parameter(f"{name}.weight")
        weight.data = weight + difference
    runtime = TorchRuntime(model, 1)
    return runtime.forward([Piece(0, list(range(40, 90)), adapter)])


def test_it_is_as_if_it_were_merged(tmp_path: Path) -> None:
    lora = factors()
    put(tmp_path, "lora", lora)
    names = {name.rpartition(".")[0] for name in lora}
    merged = {name: ALPHA / RANK * lora[f"{name}.lora_B"] @ lora[f"{name}.lora_A"] for name in names}
    plain, adapted = logits(None), logits(get(tmp_path, "lora"))
    assert torch.allclose(adapted, logits(None, merged), atol=1e-4) and not torch.allclose(adapted, plain, atol=0.1)

    pissa = factors(pissa=True)
    put(tmp_path, "pissa", pissa, method="pissa", alpha=RANK)
    merged = {
        name: pissa[f"{name}.lora_B"] @ pissa[f"{name}.lora_A"]
        - pissa[f"{name}.init_lora_B"] @ pissa[f"{name}.init_lora_A"]
        for name in names
    }
    adapter = get(tmp_path, "pissa")
    assert {len(A) for A, _ in adapter.deltas.values()} == {2 * RANK}
    assert torch.allclose(logits(adapter), logits(None, merged), atol=1e-4)


def test_apply_adds_to_the_output_of_its_linear() -> None:
    A, B = torch.randn(2, 3), torch.randn(5, 2)
    adapter = Adapter("a", "", {"blocks.0.att.key": (A, B)})
    x, y = torch.randn(7, 4, 3), torch.randn(7, 4, 5)
    expected = y + x @ (B @ A).T
    assert apply(adapter, "blocks.0.att.key", x, y) is y and torch.allclose(y, expected, atol=1e-5)
    assert torch.equal(apply(adapter, "blocks.0.att.value", x, y.clone()), y)
    low = apply(adapter, "blocks.0.att.key", x.bfloat16(), torch.zeros(7, 4, 5, dtype=torch.bfloat16))
    assert low.dtype == torch.bfloat16 and torch.allclose(low.float(), x @ (B @ A).T, atol=0.1)


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("", ""),
        ("", ".weight"),
        ("base_model.model.", ".weight"),
        ("base_model.model.", ".default.weight"),
        ("model.", ""),
    ],
)
def test_names_of_the_factors(prefix: str, suffix: str) -> None:
    deltas, plain = fold(factors(prefix, suffix), ALPHA, "lora"), fold(factors(), ALPHA, "lora")
    assert deltas.keys() == plain.keys() and "blocks.1.att.key" in deltas and len(deltas) == 8
    assert all(torch.equal(A, plain[name][0]) and torch.equal(B, plain[name][1]) for name, (A, B) in deltas.items())


KEY = "blocks.1.att.key"


@pytest.mark.parametrize(
    ("change", "card", "complaint"),
    [
        ({}, {"base": "big", "base_sha256": "f" * 64}, "for the model 'big' with the sha256 ffffffffffff…, and this"),
        ({}, {"base": "big", "base_sha256": ""}, "for the model 'big'; this is 'rwkv7-nano': ask with `model` 'big'"),
        ({}, {"sha256": {ADAPTER: "0" * 64}}, "its sha256 is not its card's; tune or add it again"),
        ({f"{KEY}.lora_A": torch.zeros(4, 8)}, {}, r"does not fit 'rwkv7-nano'.* blocks.1.att.key is \(192, 8\)"),
        ({f"{KEY}.lora_B": torch.zeros(8, 4)}, {}, r"blocks.1.att.key is \(8, 192\) .*, in the model \(192, 192\)"),
        ({f"{KEY}.lora_A": torch.zeros(3, 192)}, {}, "have the ranks 3 and 4"),
        ({f"{KEY}.lora_A": torch.full((4, 192), torch.nan)}, {}, "not finite"),
        ({f"{KEY}.lora_A": torch.zeros(4)}, {}, "no matrix"),
        ({f"{KEY}.lora_A": None}, {}, "blocks.1.att.key lacks its lora_A"),
        ({"emb.lora_A": torch.zeros(4, 8), "emb.lora_B": torch.zeros(8, 4)}, {}, "it changes emb, which is no linear"),
        ({"blocks.9.att.key.lora_A": torch.zeros(4, 8), "blocks.9.att.key.lora_B": torch.zeros(8, 4)}, {}, "blocks.9"),
        ({"blocks.0.ln1.weight": torch.zeros(4)}, {}, "ln1.weight is no low-rank factor: .* must be merged"),
        ({"blocks.0.att.key.disha": torch.zeros(4, 4)}, {}, "disha is no low-rank factor"),
        ({}, {"method": "pissa"}, "lacks the factors that PiSSA began with"),
        ({f"{KEY}.init_lora_A": torch.zeros(4, 192)}, {}, "its card says lora"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    change: dict[str, Tensor | None], card: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in (factors() | change).items() if tensor is not None}
    put(tmp_path, "a", tensors, **card)
    with pytest.raises(Conflict, match=f"(?s).*the adapter 'a' .*{complaint}|{complaint}"):
        get(tmp_path, "a")


def test_nothing_is_no_adapter(tmp_path: Path) -> None:
    put(tmp_path, "a", {})
    with pytest.raises(Conflict, match="it holds nothing"):
        get(tmp_path, "a")
    (adapters_folder(tmp_path) / "a" / ADAPTER).write_bytes(b"x" * 100)
    with pytest.raises(Conflict, match="its sha256"):
        get(tmp_path, "a")
    (adapters_folder(tmp_path) / "a" / ADAPTER).unlink()
    with pytest.raises(Conflict, match="No such file"):
        get(tmp_path, "a")


def test_an_adapter_is_its_owners_and_theirs_with_whom_it_is_shared(tmp_path: Path) -> None:
    put(tmp_path, "hers", factors(), owner="ada", shares={"role:team": "read"})
    put(tmp_path, "ours", factors(seed=1))
    shelf = Adapters(adapters_folder(tmp_path))
    ada, eve, tom = someone("ada"), someone("eve"), someone("tom", "team")
    listed = {name: [model.name for model in shelf.models(who)] for name, who in {"ada": ada, "eve": eve}.items()}
    assert listed == {"ada": ["hers"], "eve": []} and len(shelf.models(someone())) == 2
    [model] = shelf.models(tom)
    assert (model.kind, model.base, model.card["alpha"], model.size > 0) == ("adapter", "rwkv7-nano", ALPHA, True)
    assert get(tmp_path, "hers", tom).deltas
    with pytest.raises(NotFound, match="no adapter 'hers'; there are none"):
        get(tmp_path, "hers", eve)
    with pytest.raises(Forbidden, match="belongs to ada, who alone may delete it"):
        shelf.delete("hers", tom)
    with pytest.raises(NotFound):
        shelf.delete("../ours", someone())
    shelf.delete("hers", ada)
    assert [model.name for model in shelf.models(someone())] == ["ours"]


def test_it_is_read_once_while_there_is_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a", factors())
    put(tmp_path, "b", factors(seed=1))
    put(tmp_path, "stronger", factors(), alpha=2 * ALPHA)
    shelf = Adapters(adapters_folder(tmp_path))

    def get(name: str) -> Adapter:
        return shelf.load(name, someone(), SHAPES, lambda: SHA256)

    a = get("a")
    assert get("a") is a and len({a.sha256, get("b").sha256, get("stronger").sha256}) == 3
    monkeypatch.setattr(Adapters, "MEMORY", 2 * a.bytes)
    assert get("a") is a  # now the last one used
    put(tmp_path, "c", factors(seed=2))
    get("c")
    assert get("a") is a
    monkeypatch.setattr(Adapters, "MEMORY", 1)
    assert get("b").deltas and get("a") is not a


# Added from elsewhere


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "data" / "models"


def test_of_the_peft_library(tmp_path: Path, models: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    save_file(factors("base_model.model.", ".weight"), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "rwkv7-nano"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    added = add(folder, models, owner="ada")
    assert (added.name, added.kind) == ("mine", "adapter")
    assert {path.name for path in (models / "adapters" / "mine").iterdir()} == {CARD, ADAPTER}
    card = Adapters(models / "adapters").find("mine", someone())
    assert (card.owner, card.base, card.base_sha256, card.rank, card.alpha) == ("ada", "rwkv7-nano", "", RANK, ALPHA)
    assert (card.method, card.version, card.targets) == ("lora", "rwkv7", sorted(TARGETS))
    assert card.parameters == sum(tensor.numel() for tensor in factors().values())
    put(tmp_path, "direct", factors())
    adapter = get(models.parent, "mine")
    assert torch.equal(logits(adapter), logits(get(tmp_path, "direct")))
    with pytest.raises(Conflict, match="this is 'another'"):
        Adapters(models / "adapters").load("mine", someone(), SHAPES, lambda: SHA256, "another")
    for change, complaint in [
        ({"use_dora": True}, "uses use_dora"),
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"r": "x"}, "adapter_config.json of .* cannot be used"),
        ({"lora_alpha": 0}, "does not say its alpha"),
        ({"base_model_name_or_path": None}, "name it as `base`"),
        ({"base_model_name_or_path": "/models/big"}, "no model 'big'; there are: rwkv7-nano"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises((BadRequest, NotFound), match=complaint):
            add(folder, models, name="b")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    add(folder, models, name="rs")
    assert Adapters(models / "adapters").find("rs", someone()).alpha == ALPHA * RANK**0.5
    assert not [path for path in models.iterdir() if path.name != "adapters"]


def test_of_rwkv_peft(tmp_path: Path, models: Path) -> None:
    torch.save(factors(), tmp_path / "lora.pth")
    with pytest.raises(
        BadRequest, match=r"does not say its alpha; put it as adapter.safetensors \(or .pth\) into a folder"
    ):
        add(tmp_path / "lora.pth", models, base="rwkv7-nano")
    folder = tmp_path / "pissa"
    folder.mkdir()
    both = factors(pissa=True)
    torch.save({name: tensor for name, tensor in both.items() if "init_" not in name}, folder / "adapter.pth")
    init = {f"model.{name}": tensor for name, tensor in both.items() if "init_" in name}
    torch.save(init, folder / "init_pissa.pth")
    add(folder, models, base="rwkv7-nano")
    card = Adapters(models / "adapters").find("pissa", someone())
    assert (card.method, card.rank, card.alpha) == ("pissa", RANK, RANK)
    assert load_file(models / "adapters" / "pissa" / ADAPTER).keys() == both.keys()
    put(tmp_path, "direct", both, method="pissa", alpha=RANK)
    assert torch.equal(logits(get(models.parent, "pissa")), logits(get(tmp_path, "direct")))


def test_of_our_own(tmp_path: Path, models: Path) -> None:
    put(tmp_path, "a", factors(), owner="ada", loss_after=0.5, shares={"eve": "write"})
    folder = adapters_folder(tmp_path) / "a"
    add(folder, models, owner="bob")
    card = Adapters(models / "adapters").find("a", someone())
    assert (card.owner, card.shares, card.loss_after, card.base_sha256, card.alpha) == ("bob", {}, 0.5, SHA256, ALPHA)
    content = (folder / ADAPTER).read_bytes()
    (folder / ADAPTER).write_bytes(content[:-1] + b"\x01")
    with pytest.raises(BadRequest, match="its sha256 is not its card's"):
        add(folder, models, name="b")
    (folder / ADAPTER).write_bytes(content)
    (folder / CARD).write_text((folder / CARD).read_text().replace(SHA256, "f" * 64))
    with pytest.raises(Conflict, match="was made for another 'rwkv7-nano'"):
        add(folder, models, name="b")
    (folder / CARD).write_text('{"alpha": "much", "base": "rwkv7-nano"}')
    with pytest.raises(BadRequest):
        add(folder, models, name="b")
    assert [path.name for path in models.rglob("*") if path.is_dir()] == ["adapters", "a"]
