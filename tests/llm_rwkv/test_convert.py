"""An official .pth becomes safetensors without being run, whatever it holds."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from aiirwkv import PluginError
from aiirwkv_llm_rwkv.network import convert as module
from aiirwkv_llm_rwkv.network.checkpoint import load
from aiirwkv_llm_rwkv.network.convert import convert
from safetensors.torch import load_file

from bench.random_checkpoint import VERSIONS, make, tensors

SMALL = {"vocabulary": 64}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.file}",))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tensor_is_as_it_was(version: str, tmp_path: Path) -> None:
    source = make(tmp_path / "model.pth", version, 2, 64, **SMALL)
    convert(source, tmp_path / "model.safetensors")
    before, after = tensors(version, 2, 64, **SMALL), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
    if version in ("rwkv7", "rwkv6"):
        assert load(tmp_path / "model.safetensors", torch.device("cpu")).emb.weight.dtype == torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "model.safetensors"]


def test_views_shared_and_empty_tensors_and_old_files(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    content = {
        "a": base.t(),
        "b": base,
        "c": torch.nn.Parameter(base[1:, ::2]),
        "d": torch.zeros(0, 3),
        "e": base[0, 1],
    }
    for old in (False, True):
        torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=not old)
        convert(tmp_path / "m.pth", tmp_path / "m.safetensors")
        after = load_file(tmp_path / "m.safetensors")
        assert all(torch.equal(after[name], tensor) for name, tensor in content.items())


@pytest.mark.parametrize("place", ["in the dict", "instead of it", "bare pickle", "in an old file"])
def test_a_malicious_pickle_is_not_run(place: str, tmp_path: Path) -> None:
    trap, source = tmp_path / "trap", tmp_path / "evil.pth"
    content = Evil(trap) if place == "instead of it" else {"emb.weight": torch.zeros(2), "x": Evil(trap)}
    if place == "bare pickle":
        source.write_bytes(pickle.dumps(Evil(trap)))
    else:
        torch.save(content, source, _use_new_zipfile_serialization=place != "in an old file")
    with pytest.raises(PluginError, match=r"evil\.pth cannot be converted: .*not safe to read") as refusal:
        convert(source, tmp_path / "out.safetensors")
    assert "weights_only" not in str(refusal.value), "no word on how to run it all the same"
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]
    torch.load(source, weights_only=False) if place != "bare pickle" else pickle.loads(source.read_bytes())
    assert trap.exists(), "the trap works where it is not avoided"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.zeros(1)], "it holds no tensors by name, but a list"),
        ({}, "it holds no tensors by name, but a dict"),
        ({"a": {"b": torch.zeros(1)}}, "'a' in it is no named tensor, but a dict"),
        ({3: torch.zeros(1)}, "3 in it is no named tensor"),
        ({"a": torch.zeros(4, dtype=torch.int64)}, "the tensor a is torch.int64"),
        ({"a": torch.zeros(4).to_sparse()}, "the tensor a is torch.float32, torch.sparse_coo"),
        ({"a": torch.zeros(1).expand(1 << 30)}, "its tensors are said to have 4294967296 bytes, more than the file's"),
    ],
    ids=["list", "empty", "nested", "number", "integers", "sparse", "expanded"],
)
def test_what_is_no_checkpoint_is_named(content: Any, complaint: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(PluginError, match=complaint):
        convert(tmp_path / "m.pth", tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("fault", ["half", "no end", "empty", "text", "an empty zip", "absent"])
def test_a_broken_file_is_refused_and_an_older_target_stays(fault: str, tmp_path: Path) -> None:
    source = make(tmp_path / "m.pth", "rwkv7", 2, 64, **SMALL)
    data = source.read_bytes()
    match fault:
        case "half":
            source.write_bytes(data[: len(data) // 2])
        case "no end":
            source.write_bytes(data[:-100])
        case "empty":
            source.write_bytes(b"")
        case "text":
            source.write_bytes(b"Not found\n" * 100)
        case "an empty zip":
            with zipfile.ZipFile(source, "w"):
                pass
        case _:
            source.unlink()
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"older")
    with pytest.raises(PluginError, match=r"m\.pth cannot be converted: ") as refusal:
        convert(source, target)
    assert not str(refusal.value).endswith((")", "."))
    assert target.read_bytes() == b"older"
    assert not list(tmp_path.glob(".*"))


def test_it_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START", 0.01)
    source = make(tmp_path / "m.pth", "rwkv7", 2, 64, **SMALL)
    with pytest.raises(PluginError, match="it took longer than"):
        convert(source, tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


@pytest.mark.parametrize(
    ("deed", "expected"),
    [
        ("bytearray(3 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(3 << 20))", "File too large"),
        ("while True: pass", ""),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's accounts of memory")
def test_the_child_is_bounded(deed: str, expected: str, tmp_path: Path) -> None:
    code = f"""
import signal, sys
from pathlib import Path
from aiirwkv_llm_rwkv.network.convert import _restrict
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
Path("m.pth").write_bytes(bytes(1000))
_restrict(Path("m.pth"), 2)
{deed}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and expected in done.stderr
