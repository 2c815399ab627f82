"""What a checkpoint says about itself by the names and shapes of its tensors, and the card that is made from that."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from aiirwkv.errors import BadRequest, PluginError

from ..card import Card, Limits, Prompt, Sampling, Stop
from .disk import file_sha256

__all__ = ["WORLD", "Shapes", "describe", "kind", "linears", "make", "shapes"]

WORLD = 65536
"""Rows of the embedding of models with the World vocabulary, which the `rwkv` package brings along."""
WORLD_LANGUAGES = ["en", "zh", "fr", "es", "de", "pt", "ru", "it", "ja", "ko", "vi", "ar"]
READING = Sampling(temperature=0.3, top_p=0.3, presence=0.0, frequency=0.0)
"""The sampling that RWKV's authors advise for answers from a text, and for code."""
UNCOUNTED = re.compile(r"blocks\.0\.att\.v[012]|.*\.time_state")
"""Official files hold the first of these of layer 0, which does not use them; the others are a state."""
LINEAR = re.compile(r"(blocks\.\d+\.(?:att|ffn)\.(?:receptance|key|value|gate|output))\.weight")

Shapes = Mapping[str, Sequence[int]]


def shapes(path: Path) -> Shapes:
    """Of a safetensors file, whose header must fit its length. Raises BadRequest."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadRequest(f"models: {path.name} is not a safetensors file, or only a part of one: {error}") from None


def kind(shapes: Shapes) -> Literal["base", "state", "adapter"]:
    """What the tensors of these names make. Whether a base is complete is seen when it is loaded."""
    if shapes and all(name.endswith(".time_state") for name in shapes):
        return "state"
    return "adapter" if any("lora_" in name for name in shapes) else "base"


def linears(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """The linears that an adapter may change, as [out, in], by name: "blocks.0.att.key"."""
    return {
        found[1]: (shape[0], shape[1])
        for name, shape in shapes.items()
        if (found := LINEAR.fullmatch(name)) and len(shape) == 2
    }


def describe(name: str, shapes: Shapes, file: str) -> Card:
    """
    The card of a base model, with the forms and the sampling that its family was published with.

    The family shows in the name of the file, if it still has its own: g0 to g1 of RWKV-7, or World. Raises BadRequest
    when the tensors are not an RWKV's.
    """
    from ..network.model import version

    try:
        found = version(shapes)
        rows = shapes["emb.weight"][0]
    except KeyError as error:
        raise BadRequest(f"models: {file} is no whole RWKV: the tensor {error.args[0]} is missing") from None
    except (ValueError, IndexError) as error:
        raise BadRequest(f"models: {file} cannot be served: {error}") from None
    if any(".s_emb" in tensor for tensor in shapes):
        raise BadRequest(f"models: {file} is an RWKV-7 with DeepEmbed (7a, 7b), which is not served")
    world = rows == WORLD and "pile" not in file.lower()
    context = re.search(r"ctx(\d+)", file.lower())
    family, prompt, stop = _family(found, file.lower())
    parameters = sum(math.prod(shape) for tensor, shape in shapes.items() if not UNCOUNTED.fullmatch(tensor))
    return Card(
        name=name,
        version=found,
        description=f"{family}, {parameters / 1e9:.2g} billion parameters",
        parameters=parameters,
        languages=WORLD_LANGUAGES if world else ["en"] if "pile" in file.lower() else [],
        origin=file,
        prompt=prompt,
        stop=stop,
        sampling=READING if world else Sampling(),
        limits=Limits(tokens=int(context[1]) // 2 if context else 0),  # the other half is for the talk
    )


def _family(version: str, file: str) -> tuple[str, Prompt, Stop]:
    label = f"RWKV-{version.removeprefix('rwkv')}"
    if version == "rwkv7":
        if found := re.search(r"(?<![a-z])g[01][a-z]?\d?(?![a-z0-9])", file):
            label += f" {found[0].upper()}, which thinks first when a prompt ends with 'Assistant: <think'"
        return label, Prompt(), Stop()
    # RWKV-6 World and older read a text best as the input of an instruction.
    prompt = Prompt(reading="Instruction: {text}\n\nInput: {documents}\n\nResponse:")
    return label, prompt, Stop(strings=("\n\nUser:", "\n\nInstruction:"))


def make(made: Path, name: str, origin: str, tensors: Shapes, weights: Path, beside: Path | None) -> None:
    """The vocabulary, unless it is the World's, and the card: the one beside the file, or one of our own making."""
    card = describe(name, tensors, weights.name)
    rows, vocabulary = tensors["emb.weight"][0], weights.with_name("vocab.txt")
    if vocabulary.is_file() and (beside or rows != WORLD):
        shutil.copyfile(vocabulary, made / "vocab.txt")
        _check_vocabulary(vocabulary, rows)
    elif rows != WORLD:
        raise BadRequest(
            f"models: {weights.name} has an embedding of {rows} rows, so its vocabulary is not the World's ({WORLD}); "
            "put it as vocab.txt beside the file, and add that"
        )
    found = {path.name: file_sha256(path) for path in sorted(made.iterdir())}
    if beside and (beside / "card.json").is_file():
        try:
            own = Card.load(beside / "card.json")
        except PluginError as error:
            raise BadRequest(f"models: {error}") from None
        if own.version != card.version:
            raise BadRequest(
                f"models: the card of {beside} says {own.version}, and the tensors are an {card.version}'s"
            )
        if wrong := [name for name, digest in own.sha256.items() if found.get(name, digest) != digest]:
            raise BadRequest(f"models: {beside / wrong[0]} is damaged or another one: its sha256 is not its card's")
        card = msgspec.structs.replace(own, name=name, parameters=card.parameters)
    origin = card.origin if card.origin != weights.name else origin
    card = msgspec.structs.replace(card, sha256=found, origin=origin)
    (made / "card.json").write_bytes(msgspec.json.format(msgspec.json.encode(card)))


def _check_vocabulary(path: Path, rows: int) -> None:
    from ..tokenizer import Tokenizer

    try:
        size = Tokenizer.load(path).size
    except (OSError, ValueError) as error:
        raise BadRequest(f"models: the vocabulary {path} cannot be used: {error}") from None
    if size > rows:
        raise BadRequest(f"models: the ids of the vocabulary {path} go up to {size - 1}, the model's to {rows - 1}")
