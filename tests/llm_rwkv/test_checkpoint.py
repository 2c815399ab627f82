"""Loading takes what is one whole RWKV of finite numbers, in the type wanted, and names the fault of all else."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aiirwkv import PluginError
from aiirwkv_llm_rwkv.network.checkpoint import load
from aiirwkv_llm_rwkv.network.model import RWKV
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.random_checkpoint import make

from .conftest import random_tensors

CPU = torch.device("cpu")


def model_at(path: Path) -> RWKV:
    return load(path, CPU, torch.float32)


def test_values_of_layer_0_that_official_files_hold_are_ignored(tmp_path: Path, tiny: Path) -> None:
    names = {f"blocks.0.att.v{i}" for i in range(3)}
    tensors = random_tensors()
    assert names <= tensors.keys()
    without = {name: tensor for name, tensor in tensors.items() if name not in names}
    save_file(without, tmp_path / "m.safetensors")
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(model_at(tiny)(tokens)[0], model_at(tmp_path / "m.safetensors")(tokens)[0])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"head.weight": None}, "the tensor head.weight is missing"),
        (
            {"blocks.1.att.w2": torch.zeros(31, 128)},
            r"the tensor blocks.1.att.w2 has shape \(31, 128\), not \(32, 128\)",
        ),
        ({"blocks.1.att.extra": torch.zeros(1)}, "the tensor blocks.1.att.extra does not belong to an rwkv7"),
        ({"blocks.0.att.r_k": None}, "it holds no RWKV"),
        ({"blocks.0.att.r_k": None, "blocks.0.att.time_decay": torch.zeros(1)}, "it holds an rwkv5"),
        ({"emb.weight": torch.zeros(4)}, "a tensor has a wrong number of dimensions"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(change: dict[str, Tensor | None], complaint: str, tmp_path: Path) -> None:
    changed = {**random_tensors(), **change}
    path = tmp_path / "wrong.safetensors"
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    with pytest.raises(PluginError, match=f"wrong.safetensors cannot be loaded: .*{complaint}"):
        model_at(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PK\x03\x04 a zip"])
def test_a_foreign_or_truncated_file(content: bytes, tmp_path: Path, tiny: Path) -> None:
    for broken in (content, tiny.read_bytes()[:100_000]):
        path = tmp_path / "broken.safetensors"
        path.write_bytes(broken)
        with pytest.raises(PluginError, match=r"broken\.safetensors cannot be loaded"):
            model_at(path)


@pytest.mark.parametrize("version", ["rwkv7", "rwkv6"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_types_are_as_stored_or_as_wanted(version: str, stored: torch.dtype, tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", version, 2, 64, vocabulary=64, dtype=stored)
    tensors = load_file(path)
    for wanted in (None, torch.float32, torch.bfloat16):
        model = load(path, CPU, wanted)
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad
            assert torch.equal(parameter, tensors[name].to(wanted or stored)), name
        assert not model.training


def test_a_tuned_state_stays_exact(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors().items()}
    states = {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(3)}
    save_file(tensors | states, tmp_path / "m.safetensors")
    model = load(tmp_path / "m.safetensors", CPU)
    for block, state in zip(model.layers, states.values(), strict=True):
        assert block.att.time_state is not None and torch.equal(block.att.time_state, state)
    del states["blocks.1.att.time_state"]
    save_file(tensors | states, tmp_path / "m.safetensors")
    with pytest.raises(PluginError, match=r"the tensor blocks\.1\.att\.time_state is missing"):
        load(tmp_path / "m.safetensors", CPU)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_are_found(number: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = random_tensors(version="rwkv6")
    tensors["blocks.2.ffn.value.weight"][77, 5] = number
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "m.safetensors")
    with pytest.raises(PluginError, match=r"the tensor blocks\.2\.ffn\.value\.weight holds numbers that are infinite"):
        load(tmp_path / "m.safetensors", CPU)


def test_numbers_too_great_for_the_type_wanted(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["ln_out.weight"][3] = 1e5
    save_file(tensors, tmp_path / "m.safetensors")
    load(tmp_path / "m.safetensors", CPU, torch.bfloat16)
    with pytest.raises(PluginError, match=r"the tensor ln_out\.weight holds numbers too great for float16"):
        load(tmp_path / "m.safetensors", CPU, torch.float16)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"blocks.1.att.time_maa_w2": torch.zeros(5, 24, 64)}, r"shape \(5, 24, 64\), not \(5, 24, 128\)"),
        ({"blocks.1.ffn.receptance.weight": None}, "the tensor blocks.1.ffn.receptance.weight is missing"),
        ({"blocks.7.ln1.weight": torch.zeros(128)}, "the tensor blocks.7.ln1.weight does not belong to an rwkv6"),
        ({"blocks.0.att.time_faaaa": torch.zeros(3, 64)}, "its sizes are impossible"),
        ({"blocks.0.att.time_faaaa": torch.zeros(0, 64)}, "its sizes are impossible"),
        ({"blocks.0.att.time_faaaa": torch.zeros(())}, "wrong number of dimensions"),
        ({"emb.weight": torch.zeros(1024, 128, dtype=torch.int8)}, "the tensor emb.weight holds I8"),
        ({"blocks.0.att.time_maa_x": None}, "the tensor blocks.0.att.time_maa_x is missing"),
    ],
)
def test_faults_of_an_rwkv6(change: dict[str, Tensor | None], complaint: str, tmp_path: Path) -> None:
    changed = {**random_tensors(version="rwkv6"), **change}
    path = tmp_path / "wrong.safetensors"
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    with pytest.raises(PluginError, match=f"wrong.safetensors cannot be loaded: .*{complaint}"):
        load(path, CPU)


def test_a_name_that_stands_twice(tmp_path: Path, tiny: Path) -> None:
    data = tiny.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    again = json.dumps(header)[:-1] + f', "ln_out.bias": {json.dumps(header["ln_out.weight"])}}}'
    path = tmp_path / "twice.safetensors"
    path.write_bytes(struct.pack("<Q", len(again)) + again.encode() + data[8 + length :])
    with pytest.raises(PluginError, match=r"twice\.safetensors cannot be loaded"):
        load(path, CPU)


def test_tensors_that_claim_more_than_the_file_has(tmp_path: Path) -> None:
    header = json.dumps({"emb.weight": {"dtype": "F32", "shape": [1 << 40, 64], "data_offsets": [0, 1 << 48]}})
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(1000))
    with pytest.raises(PluginError, match="it is no safetensors file, or only a part of one"):
        load(path, CPU)
    path.write_bytes(struct.pack("<Q", 1 << 62) + bytes(1000))
    with pytest.raises(PluginError, match="it is no safetensors file, or only a part of one"):
        load(path, CPU)
    with pytest.raises(PluginError, match="nowhere"):
        load(tmp_path / "nowhere", CPU)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's accounts of memory")
def test_there_is_no_second_copy(tmp_path: Path) -> None:
    """Memory of its own, that is not the file's, hardly grows; not even for a moment."""
    path = make(tmp_path / "m.safetensors", "rwkv7", 2, 512, vocabulary=100_000)
    code = f"""
import re
from pathlib import Path
import torch
from aiirwkv_llm_rwkv.network.checkpoint import load
def status(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
before = status("RssAnon")
model = load(Path({str(path)!r}), torch.device("cpu"))
print(status("RssAnon") - before, status("VmHWM") - status("VmRSS"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    grown, peak = map(float, done.stdout.split())
    assert path.stat().st_size > 200e6
    assert grown < 40 and peak < 40
