"""A random RWKV-7 of the true layout, the built-in one, and the `rwkv` package beside them as the reference."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aiirwkv_llm_rwkv.library import BUILT_IN
from aiirwkv_llm_rwkv.tokenizer import Tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from .questions import READING

NANO = BUILT_IN / "rwkv7-nano"


def random_tensors(layers: int = 3, width: int = 128, vocabulary: int = 1024, seed: int = 0) -> dict[str, Tensor]:
    """Random weights with the names and shapes of official files; all ranks differ, so that none can be mixed up."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    heads, ranks = width // 64, {"w": 32, "a": 24, "v": 16, "g": 48}
    tensors = {
        "emb.weight": normal(vocabulary, width, std=0.02),
        "blocks.0.ln0.weight": 1 + normal(width, std=0.05),
        "blocks.0.ln0.bias": normal(width, std=0.05),
        "ln_out.weight": 1 + normal(width, std=0.05),
        "ln_out.bias": normal(width, std=0.05),
        "head.weight": normal(vocabulary, width, std=1 / math.sqrt(width)),
    }
    for layer in range(layers):
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        for norm in (f"blocks.{layer}.ln1", f"blocks.{layer}.ln2", f"{att}ln_x"):
            tensors[f"{norm}.weight"] = 1 + normal(width, std=0.05)
            tensors[f"{norm}.bias"] = normal(width, std=0.05)
        for name in "rwkvag":
            tensors[f"{att}x_{name}"] = torch.rand(1, 1, width, generator=generator)
        decay = -5.5 + 5 * (torch.arange(width) / (width - 1)) ** 1.2
        for name, bias in (("w", decay), ("a", 0.0), ("v", 0.7)):
            tensors[f"{att}{name}0"] = bias + normal(1, 1, width, std=0.3)
        for name, rank in ranks.items():
            tensors[f"{att}{name}1"] = normal(width, rank, std=1 / math.sqrt(width))
            tensors[f"{att}{name}2"] = normal(rank, width, std=1 / math.sqrt(rank))
        tensors[f"{att}k_k"] = 0.85 + normal(1, 1, width, std=0.05)
        tensors[f"{att}k_a"] = 1 + normal(1, 1, width, std=0.05)
        tensors[f"{att}r_k"] = normal(heads, 64, std=0.1)
        for name in ("receptance", "key", "value", "output"):
            tensors[f"{att}{name}.weight"] = normal(width, width, std=0.7 / math.sqrt(width))
        tensors[f"{ffn}x_k"] = torch.rand(1, 1, width, generator=generator)
        tensors[f"{ffn}key.weight"] = normal(4 * width, width, std=0.7 / math.sqrt(width))
        tensors[f"{ffn}value.weight"] = normal(width, 4 * width, std=0.25 / math.sqrt(width))
    return tensors


REFERENCE = """
import os, sys
os.environ["RWKV_V7_ON"] = "1"  # the package chooses the version of RWKV when it is imported
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


class Reference:
    """What the `rwkv` package says to 512 tokens: from no state, and from one that is not zero."""

    def __init__(self, folder: Path, weights: Path, tokens: list[int]) -> None:
        self.weights, self.tokens = weights, tokens
        tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
        width = tensors["emb.weight"].shape[1]
        layers = sum(name.endswith("att.r_k") for name in tensors)
        generator = torch.Generator().manual_seed(2)
        self.states: list[list[Tensor] | None] = [None, []]
        for _ in range(layers):
            assert self.states[1] is not None
            self.states[1] += [
                torch.randn(width, generator=generator),
                torch.randn(width // 64, 64, 64, generator=generator) * 0.3,
                torch.randn(width, generator=generator),
            ]
        torch.save(tensors, folder / "model.pth")
        torch.save({"tokens": self.tokens, "states": self.states, "write": 48}, folder / "case")
        done = subprocess.run(
            [sys.executable, "-c", REFERENCE, str(folder / "model"), str(folder / "case")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        self.results = torch.load(folder / "case.result", weights_only=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model.safetensors"
    save_file(random_tensors(), path)
    return path


@pytest.fixture(scope="session", params=["tiny", "nano"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    if request.param == "tiny":
        generator = torch.Generator().manual_seed(1)
        return Reference(folder, tiny, torch.randint(1, 1024, (512,), generator=generator).tolist())
    text = "\n\n".join(f"User: {passage}\nQuestion: {asked[0][0]}" for passage, asked in READING)
    tokens = Tokenizer.load(NANO / "vocab.txt").encode(text)
    return Reference(folder, NANO / "model.safetensors", tokens[:512])
