"""The models on this machine: the built-in ones, those in the data directory, and one given by its path."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from aiirwkv.errors import BadRequest, PluginError

from ..card import Card
from .describe import WORLD, describe, shapes
from .disk import file_sha256

__all__ = ["BUILT_IN", "WORLD", "Files", "find", "known", "unknown"]

BUILT_IN = Path(__file__).parents[1] / "models"


@dataclass(frozen=True)
class Files:
    """A model's card and files. Without a vocab.txt beside the weights, the World vocabulary is meant."""

    card: Card
    weights: Path

    @classmethod
    def at(cls, path: Path) -> Files:
        """From a folder with model.safetensors, or a .safetensors file; without a card.json, it speaks for itself."""
        weights = path / "model.safetensors" if path.is_dir() else path
        if weights.suffix != ".safetensors":
            raise PluginError(f"the model {weights} is not a .safetensors file; add it: aiirwkv models add {weights}")
        if not weights.is_file():
            raise PluginError(f"the model {weights} does not exist")
        card = weights.with_name("card.json")
        name = path.name if path.is_dir() else path.stem
        return cls(Card.load(card) if card.is_file() else _presumed(name, weights), weights)

    def vocabulary(self, rows: int) -> Path:
        """The vocabulary for an embedding of so many rows."""
        path = self.weights.with_name("vocab.txt")
        return self.world() if rows == WORLD and not path.is_file() else path

    @staticmethod
    def world() -> Path:
        """The World vocabulary, out of the `rwkv` package, which is not imported for it."""
        package = importlib.util.find_spec("rwkv")
        assert package is not None and package.origin is not None
        return Path(package.origin).with_name("rwkv_vocab_v20230424.txt")

    def verify(self) -> None:
        """Raises PluginError when a file is not the one that the card was written for."""
        for name, expected in self.card.sha256.items():
            path = self.weights.with_name(name)
            if _sha256(path) != expected:
                raise PluginError(f"the model file {path} is damaged or another one: its sha256 is not its card's")

    def sha256(self) -> str:
        """Of the weights: what the card says, to which `verify` holds it; without a card, from the file."""
        return self.card.sha256.get(self.weights.name) or _sha256(self.weights)


def _presumed(name: str, weights: Path) -> Card:
    """A card for weights that have none; what is wrong with them is said when they are loaded."""
    try:
        return describe(name, shapes(weights), weights.name)
    except BadRequest:
        return Card(name=name)


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise PluginError(f"the model file {path} cannot be read: {error.strerror}") from None


def known(folders: Sequence[Path]) -> dict[str, Files]:
    """The models in these folders, by name. A broken card is logged, and its model left out."""
    found: dict[str, Files] = {}
    for card in (path for folder in folders for path in sorted(folder.glob("[!.]*/card.json"))):
        try:
            files = Files.at(card.parent)
            found[files.card.name] = files
        except PluginError as error:
            logging.getLogger(__name__).warning("%s", error)
    return found


def find(model: str, folders: Sequence[Path]) -> Files:
    """A model by its name, or by the path of its folder or file."""
    models = known(folders)
    if model in models:
        return models[model]
    path = Path(model).expanduser()
    if path.exists():
        return Files.at(path)
    raise PluginError(unknown("model", model, models) + ", and no file has this name")


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """What to say when there is no such thing."""
    names = sorted(names)
    close = get_close_matches(name, names, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    there = f"there are: {', '.join(names)}" if names else "there are none"
    return f"no {kind} {name!r}{hint}; {there}"
