"""Random models of the true layout, the built-in one, and the `rwkv` package beside them as the reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from aiirwkv_llm_rwkv.shelf.library import BUILT_IN
from aiirwkv_llm_rwkv.tokenizer import Tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.random_checkpoint import tensors

from .questions import READING

NANO = BUILT_IN / "rwkv7-nano"
LOW = {"rwkv7": {"w": 32, "a": 24, "v": 16, "g": 48}, "rwkv6": {"maa": 24, "decay": 40}}


def random_tensors(
    layers: int = 3, width: int = 128, vocabulary: int = 1024, seed: int = 0, version: str = "rwkv7"
) -> dict[str, Tensor]:
    """Random weights with the names and shapes of official files; all ranks differ, so that none can be mixed up."""
    low = LOW.get(version)
    return tensors(version, layers, width, vocabulary=vocabulary, low=low, dtype=torch.float32, seed=seed)


REFERENCE = """
import os, sys
os.environ["RWKV_V7_ON"] = sys.argv[3]  # the package chooses the version of RWKV when it is imported
import torch
torch.set_num_threads(1)
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
case = torch.load(sys.argv[2], weights_only=True)
result = []
for state in case["states"]:
    logits, state = model.forward(case["tokens"], state, full_output=True)
    text, last, after = [], logits[-1], [part.clone() for part in state]
    for _ in range(case["write"]):
        text.append(int(last.argmax()))
        last, after = model.forward([text[-1]], after)
    result.append({"logits": logits, "state": state, "text": text})
torch.save(result, sys.argv[2] + ".result")
"""


def ask_package(
    folder: Path, version: str, weights: dict[str, Tensor], tokens: list[int], states: list[list[Tensor] | None]
) -> list[dict[str, Any]]:
    """What the `rwkv` package makes of the tokens from each state: logits, new state, and the text it goes on with."""
    torch.save(weights, folder / "model.pth")
    torch.save({"tokens": tokens, "states": states, "write": 48}, folder / "case")
    arguments = [str(folder / "model"), str(folder / "case"), "1" if version == "rwkv7" else "0"]
    done = subprocess.run([sys.executable, "-c", REFERENCE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = torch.load(folder / "case.result", weights_only=True)
    return results


class Reference:
    """What the `rwkv` package says to 512 tokens: from no state, and from one that is not zero."""

    def __init__(self, folder: Path, version: str, weights: Path, tokens: list[int]) -> None:
        self.version, self.weights, self.tokens = version, weights, tokens
        content = {name: tensor.float() for name, tensor in load_file(weights).items()}
        width = content["emb.weight"].shape[1]
        layers = sum(name.endswith("ln1.weight") for name in content)
        generator = torch.Generator().manual_seed(2)
        state: list[Tensor] = []
        for _ in range(layers):
            state += [
                torch.randn(width, generator=generator),
                torch.randn(width // 64, 64, 64, generator=generator) * 0.3,
                torch.randn(width, generator=generator),
            ]
        self.states: list[list[Tensor] | None] = [None, state]
        self.results = ask_package(folder, version, content, tokens, self.states)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model.safetensors"
    save_file(random_tensors(), path)
    return path


@pytest.fixture(scope="session")
def tiny6(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny6") / "model.safetensors"
    save_file(random_tensors(version="rwkv6"), path)
    return path


@pytest.fixture(scope="session", params=["tiny", "tiny6", "nano"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    if request.param == "nano":
        text = "\n\n".join(f"User: {passage}\nQuestion: {asked[0][0]}" for passage, asked in READING)
        tokens = Tokenizer.load(NANO / "vocab.txt").encode(text)
        return Reference(folder, "rwkv7", NANO / "model.safetensors", tokens[:512])
    tokens = torch.randint(1, 1024, (512,), generator=torch.Generator().manual_seed(1)).tolist()
    version = "rwkv6" if request.param == "tiny6" else "rwkv7"
    return Reference(folder, version, request.getfixturevalue(request.param), tokens)
