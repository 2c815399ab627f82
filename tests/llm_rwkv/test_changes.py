"""Models added, pulled and deleted; what fails leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from aiirwkv import BadRequest, Conflict, NotFound, ServiceError
from aiirwkv_llm_rwkv.card import Card, Prompt
from aiirwkv_llm_rwkv.network.checkpoint import load
from aiirwkv_llm_rwkv.shelf import changes, disk
from aiirwkv_llm_rwkv.shelf.changes import Added, add, delete, name_for, pull, tidy
from aiirwkv_llm_rwkv.shelf.disk import staging
from aiirwkv_llm_rwkv.shelf.library import Files, known
from aiirwkv_llm_rwkv.shelf.source import Source
from safetensors.torch import load_file, save_file
from torch import Tensor

from .conftest import NANO, random_tensors
from .site import Site, serving


def world(version: str = "rwkv7") -> dict[str, Tensor]:
    """A small model with an embedding as large as the World vocabulary."""
    tensors = random_tensors(layers=2, width=64, vocabulary=8, version=version)
    table = torch.zeros(65536, 64, dtype=torch.bfloat16)
    return tensors | {"emb.weight": table, "head.weight": table.clone()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elsewhere") / "rwkv7-g1a-0.4b-20250905-ctx4096.safetensors"
    save_file(world(), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "models"


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as site:
        yield site


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Add


def test_a_file_is_linked_and_gets_a_card(checkpoint: Path, folder: Path) -> None:
    assert add(checkpoint, folder, name="g1") == Added("g1", "base", "linked")
    weights = folder / "g1" / "model.safetensors"
    assert weights.samefile(checkpoint) and left(folder) == ["g1/card.json", "g1/model.safetensors"]
    files = known([folder])["g1"]
    files.verify()
    card = files.card
    assert card.sha256 == {"model.safetensors": digest(checkpoint)} and files.sha256() == digest(checkpoint)
    model = load(checkpoint, torch.device("cpu"), torch.float32)
    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (card.version, card.name, card.origin) == ("rwkv7", "g1", checkpoint.name)
    assert card.prompt == Prompt() and "G1A, which thinks first" in card.description and "zh" in card.languages
    assert (card.sampling.temperature, card.sampling.presence, card.limits.tokens) == (0.3, 0.0, 2048)
    assert not card.demonstration
    with pytest.raises(Conflict, match="there is a 'g1' already"):
        add(checkpoint, folder, name="g1")


def test_where_it_cannot_be_linked_it_is_copied(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(changes.os, "link", refuse)
    assert add(checkpoint, folder).how == "copied"
    copy = folder / checkpoint.stem / "model.safetensors"
    assert copy.read_bytes() == checkpoint.read_bytes() and not copy.samefile(checkpoint)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(ServiceError, match="is full: 1 MB are free"):
        add(checkpoint, folder, name="other")
    assert {path.split("/")[0] for path in left(folder)} == {checkpoint.stem}


@pytest.mark.parametrize(
    ("version", "file", "label", "reading"),
    [
        ("rwkv7", "RWKV-x070-World-0.4B-v2.9-20250107-ctx4096", "RWKV-7,", "{documents}\n\nUser: {text}"),
        ("rwkv7", "rwkv7-g1", "RWKV-7 G1,", "{documents}\n\nUser: {text}"),
        ("rwkv7", "rwkv7-g0a-7.2b-20250829-ctx4096", "RWKV-7 G0A,", "{documents}\n\nUser: {text}"),
        ("rwkv6", "RWKV-x060-World-1B6-v2.1-20240328-ctx4096", "RWKV-6,", "Instruction: {text}\n\nInput: {documents}"),
        ("rwkv5", "RWKV-5-World-0.4B-v2", "RWKV-5,", "Instruction: {text}\n\nInput: {documents}"),
        ("rwkv4", "RWKV-4-World-0.1B-v1", "RWKV-4,", "Instruction: {text}\n\nInput: {documents}"),
    ],
)
def test_what_a_checkpoint_says_of_itself(
    version: str, file: str, label: str, reading: str, tmp_path: Path, folder: Path
) -> None:
    save_file(world(version), tmp_path / f"{file}.safetensors")
    add(tmp_path / f"{file}.safetensors", folder)
    card = known([folder])[file].card
    assert card.version == version and card.description.startswith(label) and card.prompt.reading.startswith(reading)
    assert card.prompt.question == "User: {text}\n\nAssistant:" and card.limits.tokens in (0, 2048)
    bare = Files.at(tmp_path / f"{file}.safetensors").card
    assert bare == msgspec.structs.replace(card, sha256={}, origin=bare.origin), "it says the same without being added"


def test_a_folder_keeps_its_card_and_vocabulary(folder: Path) -> None:
    assert add(NANO, folder, name="mine").how in ("linked", "copied")
    there, here = Card.load(NANO / "card.json"), known([folder])["mine"]
    assert here.card == msgspec.structs.replace(there, name="mine")
    here.verify()
    load(here.weights, torch.device("cpu"), torch.float32)
    assert here.vocabulary(1024).read_bytes() == (NANO / "vocab.txt").read_bytes()


def test_a_model_with_a_vocabulary_of_its_own_needs_it(tiny: Path, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadRequest, match="1024 rows, so its vocabulary is not the World's"):
        add(tiny, folder, name="a")
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(tiny, mine / "small.safetensors")
    shutil.copy(NANO / "vocab.txt", mine)
    add(mine / "small.safetensors", folder, name="a")
    assert set(known([folder])["a"].card.sha256) == {"model.safetensors", "vocab.txt"}
    (mine / "vocab.txt").write_text("1 'a' 1\nimport os")
    with pytest.raises(BadRequest, match=r"vocab.txt cannot be used: line 2"):
        add(mine / "small.safetensors", folder, name="b")
    lines = [f"{byte + 1} b'\\x{byte:02x}' 1" for byte in range(256)]
    (mine / "vocab.txt").write_text("\n".join([*lines, "1024 'long' 4"]))
    with pytest.raises(BadRequest, match="go up to 1024, the model's to 1023"):
        add(mine / "small.safetensors", folder, name="b")
    assert {path.split("/")[0] for path in left(folder)} == {"a"}


def bad_files(folder: Path) -> dict[str, str]:
    """File or folder to what is said of it."""
    whole = world()

    def put(name: str, tensors: dict[str, Tensor], card: str = "", weights: str = "model.safetensors") -> None:
        (folder / name).mkdir()
        save_file(tensors, folder / name / weights)
        if card:
            (folder / name / "card.json").write_text(card)

    save_file(whole, folder / "cut.safetensors")
    content = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(content[:-1])
    (folder / "long.safetensors").write_bytes(content + b"1")
    (folder / "empty.safetensors").touch()
    (folder / "zip.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "nothing").mkdir()
    save_file({"model.layers.0.weight": torch.zeros(2)}, folder / "llama.safetensors")
    save_file({}, folder / "none.safetensors")
    save_file({name: tensor for name, tensor in whole.items() if name != "emb.weight"}, folder / "headless.safetensors")
    save_file(whole | {"blocks.0.ffn.s_emb.weight": torch.zeros(2)}, folder / "deep.safetensors")
    put("broken card", whole, "{")
    put("other version", whole, '{"name": "a", "version": "rwkv6"}')
    put("damaged", whole, '{"name": "a", "sha256": {"model.safetensors": "00"}}')
    return {
        "cut.safetensors": "not a safetensors file, or only a part of one",
        "long.safetensors": "not a safetensors file",
        "empty.safetensors": "not a safetensors file",
        "zip.safetensors": "not a safetensors file",
        "model.gguf": "neither a .safetensors nor a .pth",
        "nothing": "has no model.safetensors",
        "llama.safetensors": "it holds no RWKV",
        "none.safetensors": "it holds no RWKV",
        "headless.safetensors": "no whole RWKV: the tensor emb.weight is missing",
        "deep.safetensors": "DeepEmbed",
        "broken card": "card.json cannot be used",
        "other version": "says rwkv6, and the tensors are an rwkv7's",
        "damaged": "its sha256 is not its card's",
    }


def test_what_is_no_model_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    for name, complaint in bad_files(tmp_path).items():
        with pytest.raises(BadRequest, match=complaint):
            add(tmp_path / name, folder, name="a")
        assert not list(folder.iterdir()), name
    with pytest.raises(NotFound, match=r"there is no .*/gone on the worker's machine"):
        add(tmp_path / "gone", folder)


@pytest.mark.parametrize(
    "name", ["../x", "a/b", ".a", "..", "-rf", "states", "adapters", "a" * 65, "a b", "a\n", "ä", "C:\\x", "a\0"]
)
def test_names_are_names(name: str, checkpoint: Path, folder: Path) -> None:
    with pytest.raises(BadRequest, match="`name` is"):
        add(checkpoint, folder, name=name)
    with pytest.raises((BadRequest, NotFound)):
        delete(name, folder)
    assert not folder.exists()


def test_a_name_comes_from_the_file() -> None:
    assert name_for("RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth") == "RWKV-x060-World-1B6-v2.1-20240328-ctx4096"
    assert (
        name_for("../.a b(1).safetensors") == "a-b-1-" and name_for(".pth") == "model" and len(name_for("x" * 99)) == 64
    )


def test_a_built_in_name_is_taken(checkpoint: Path, folder: Path) -> None:
    with pytest.raises(Conflict, match="there is a 'rwkv7-nano' already"):
        add(checkpoint, folder, name="rwkv7-nano")


def test_two_at_a_time(checkpoint: Path, folder: Path) -> None:
    with staging(folder, "a"), pytest.raises(Conflict, match="a is being written already"):
        add(checkpoint, folder, name="a")
    assert add(checkpoint, folder, name="a").kind == "base"


def test_a_pth_file_is_converted(tmp_path: Path, folder: Path) -> None:
    tensors = world("rwkv6")
    torch.save(tensors, tmp_path / "RWKV-x060-World.pth")
    assert add(tmp_path / "RWKV-x060-World.pth", folder) == Added("RWKV-x060-World", "base", "converted")
    files = known([folder])["RWKV-x060-World"]
    files.verify()
    assert files.card.version == "rwkv6" and files.weights.suffix == ".safetensors"
    back = load_file(files.weights)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)


def test_a_malicious_pth_file_is_refused(tmp_path: Path, folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path / 'harm'}",))

    torch.save({"emb.weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for name in ("evil", "text"):
        with pytest.raises(BadRequest, match=f"{name}.pth"):
            add(tmp_path / f"{name}.pth", folder)
        assert not list(folder.iterdir())
    assert not (tmp_path / "harm").exists()


# Pull


def test_a_pull_that_breaks_is_taken_up_again(checkpoint: Path, folder: Path, site: Site) -> None:
    data = checkpoint.read_bytes()
    there = Source(site.put("/g1.safetensors", data, pause=0.001) + "?token=secret")
    told: list[tuple[float, float, str]] = []
    stop = threading.Event()

    def progress(done: float, total: float, note: str) -> None:
        told.append((done, total, note))
        if done >= 1:
            stop.set()

    with pytest.raises(ServiceError, match="it was stopped"):
        pull(there, folder, progress=progress, stop=stop)
    assert known([folder]) == {} and {path.split("/")[0] for path in left(folder)} == {".g1"}
    tidy(folder)
    assert ".g1/g1.safetensors.part" in left(folder), "it can go on"
    site.put("/g1.safetensors", data)
    told.clear()
    stop.clear()
    progress = lambda *step: told.append(step)  # noqa: E731
    assert pull(there, folder, progress=progress, sha256=digest(checkpoint)) == Added("g1", "base", "moved")
    assert site.asked[-1].headers["range"].startswith("bytes=") and site.asked[-1].sent < len(data)
    assert told[0][1] == round(len(data) / 1e6, 1) and {note for _, _, note in told} == {"MB", "looks at it"}
    assert left(folder) == ["g1/card.json", "g1/model.safetensors"]
    card = known([folder])["g1"].card
    assert card.origin == f"{site.url}/g1.safetensors" and "secret" not in str(card)
    asked = len(site.asked)
    assert pull(there, folder).how == "there already" and len(site.asked) == asked, "a job may come twice"
    with pytest.raises(Conflict, match="there is a 'g1' already"):
        pull(Source(f"{site.url}/other.safetensors"), folder, name="g1")


def test_a_pulled_pth_is_converted(folder: Path, tmp_path: Path, site: Site) -> None:
    torch.save(world(), tmp_path / "a.pth")
    there = Source(site.put("/rwkv7-g1.pth", (tmp_path / "a.pth").read_bytes()))
    assert pull(there, folder) == Added("rwkv7-g1", "base", "converted")
    assert left(folder) == ["rwkv7-g1/card.json", "rwkv7-g1/model.safetensors"]


def test_what_was_pulled_and_is_no_model_leaves_nothing(folder: Path, site: Site) -> None:
    for path in ("/a.safetensors", "/a.pth"):
        with pytest.raises(BadRequest):
            pull(Source(site.put(path, b"<html>sorry</html>")), folder)
        assert not list(folder.iterdir())
    with pytest.raises(NotFound, match="check the name of the file"):
        pull(Source(f"{site.url}/gone.pth"), folder)
    with pytest.raises(BadRequest, match=r"neither a .safetensors nor a .pth"):
        pull(Source(f"{site.url}/a.gguf"), folder)
    assert not list(folder.iterdir())


def test_the_rest_of_a_pull_can_be_deleted(folder: Path, site: Site) -> None:
    there = Source(site.put("/a.pth", bytes(9_000_000), cuts=[1_000_000], pause=0.001))
    stop = threading.Event()
    with pytest.raises(ServiceError):
        pull(there, folder, progress=lambda *_: stop.set(), stop=stop)
    assert left(folder)
    delete("a", folder)
    assert not list(folder.iterdir())


# Delete


def test_only_what_is_here_and_not_in_use_is_deleted(checkpoint: Path, folder: Path) -> None:
    add(checkpoint, folder, name="a")
    (folder / "states" / "s").mkdir(parents=True)
    with pytest.raises(Conflict, match="'a' is loaded; first: aiirwkv models unload a"):
        delete("a", folder, loaded=["a", "b"])
    with pytest.raises(Conflict, match="is built in"):
        delete("rwkv7-nano", folder)
    with pytest.raises(NotFound, match=r"no model 'b'; there are: a, rwkv7-nano"):
        delete("b", folder)
    with pytest.raises(BadRequest):
        delete("states", folder)
    delete("a", folder)
    assert known([folder]) == {} and checkpoint.is_file() and [path.name for path in folder.iterdir()] == ["states"]


def test_what_a_dead_process_left_is_tidied(folder: Path) -> None:
    for path in (".a/made/model.safetensors", ".a/lock", ".b/deleted/card.json", "c/card.json", ".d/lock"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    with staging(folder, "d"):
        tidy(folder)
        assert left(folder) == [".d/lock", "c/card.json"]
