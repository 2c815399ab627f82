"""What tuned states and adapters share: each is a folder with a card and one file, for one base model."""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import msgspec
from aiirwkv import Context
from aiirwkv.errors import BadRequest, Conflict, Forbidden, NotFound, ServiceError
from aiirwkv.types import Model

from .library import unknown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CARD", "Shelf", "TunedCard", "seal"]

CARD = "card.json"


class TunedCard(msgspec.Struct, kw_only=True, frozen=True):
    """
    Where something tuned comes from, and what it is worth: mean loss per answer token, on examples it was not tuned on.

    It belongs to exactly one base model, which `base_sha256`, the hash of the base's weights, tells. What was added
    from elsewhere has none; it belongs to the model of the name `base`, as the one who added it said. `resumed` are the
    steps at which training was taken up again.
    """

    name: str
    kind: str = ""
    version: str = "rwkv7"
    method: str = ""
    base: str
    base_sha256: str
    precision: str = "float32"
    owner: str
    shares: dict[str, Literal["read", "write"]] = {}
    origin: str = ""
    created: float = 0.0
    run: str = ""
    data_sha256: str = ""
    examples: int = 0
    held_out: int = 0
    seed: int = 0
    steps: int = 0
    learning_rate: float = 0.0
    batch_tokens: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0
    seconds: float = 0.0
    resumed: list[int] = []
    parameters: int = 0
    sha256: dict[str, str] = {}


C = TypeVar("C", bound=TunedCard)
T = TypeVar("T")


class Shelf(Generic[C, T]):
    """Tuned things in a folder, for those who may use them. What was used last stays in memory."""

    MEMORY: ClassVar[int] = 1 << 30
    """Bytes that may stay there; a single thing may be larger."""
    noun: ClassVar[str]
    kind: ClassVar[Literal["state", "adapter"]]
    file: ClassVar[str]
    card: type[C]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[str, tuple[T, int]] = {}
        self._lock = threading.Lock()

    def known(self, ctx: Context) -> dict[str, C]:
        """What the caller may read, by name. A broken card is logged, and what it stands for left out."""
        found: dict[str, C] = {}
        for path in sorted(self.folder.glob(f"[!.]*/{CARD}")):
            try:
                card = msgspec.json.decode(path.read_bytes(), type=self.card)
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                logger = logging.getLogger(__name__)
                logger.warning("the card of the %s in %s cannot be used: %s", self.noun, path, error)
                continue
            if ctx.may("read", card):
                found[path.parent.name] = card
        return found

    def find(self, name: str, ctx: Context) -> C:
        """Raises NotFound, also for one that the caller may not read."""
        cards = self.known(ctx)
        if name not in cards:
            raise NotFound(unknown(self.noun, name, cards))
        return cards[name]

    def delete(self, name: str, ctx: Context) -> None:
        """Raises NotFound, and Forbidden for everybody but its owner."""
        card = self.find(name, ctx)
        if not ctx.may("own", card):
            raise Forbidden(f"the {self.noun} {name!r} belongs to {card.owner}, who alone may delete it")
        try:
            shutil.rmtree(self.folder / name)
        except OSError as error:
            raise ServiceError(f"the {self.noun} {name!r} cannot be deleted: {error.strerror}") from None

    def models(self, ctx: Context) -> list[Model]:
        """As the hook `models` lists them."""
        return [
            Model(
                name=name,
                kind=self.kind,
                plugin="llm_rwkv",
                version=card.version,
                parameters=card.parameters,
                size=(self.folder / name / self.file).stat().st_size,
                sha256=card.sha256.get(self.file, ""),
                base=card.base,
                card=msgspec.to_builtins(card),
            )
            for name, card in self.known(ctx).items()
            if (self.folder / name / self.file).is_file()
        ]

    def _for(self, name: str, ctx: Context, base: Callable[[], str], base_name: str) -> C:
        """Its card, if it was made for this base. Raises NotFound and Conflict."""
        card = self.find(name, ctx)
        made = f"the {self.noun} {name!r} was made for the model {card.base!r}"
        if card.base_sha256 and card.base_sha256 != base():
            raise Conflict(
                f"{made} with the sha256 {card.base_sha256[:12]}…, and this worker's has {base()[:12]}…; "
                "tune one for this model"
            )
        if not card.base_sha256 and card.base != base_name:
            here = f"; this is {base_name!r}" if base_name else ""
            raise Conflict(f"{made}{here}: ask with `model` {card.base!r}, or tune one for this model")
        return card

    def _kept(
        self, card: C, name: str, key: str, read: Callable[[Mapping[str, Tensor]], T], size: Callable[[T], int]
    ) -> T:
        """What `read` makes of the tensors of the file, from memory if it is there under the key. Raises Conflict."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        with self._lock:
            if kept := self._loaded.pop(key, None):
                self._loaded[key] = kept  # the last one used is the last one dropped
                return kept[0]
        try:
            data = (self.folder / name / self.file).read_bytes()
            if hashlib.sha256(data).hexdigest() != card.sha256.get(self.file):
                raise ValueError("its sha256 is not its card's")
            thing = read(load(data))
        except KeyError as error:
            reason = f"it lacks the tensor {error.args[0]}"
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error)
        else:
            with self._lock:
                self._loaded[key] = thing, size(thing)
                while len(self._loaded) > 1 and sum(size for _, size in self._loaded.values()) > self.MEMORY:
                    self._loaded.pop(next(iter(self._loaded)))
            return thing
        raise Conflict(f"the {self.noun} {card.name!r} cannot be used: {reason}; tune or add it again")


def seal(made: Path, card: type[TunedCard], fields: Mapping[str, Any], file: str) -> None:
    """Write the card, with the hash of the file that it is for. Raises BadRequest when a field is wrong."""
    sha256 = hashlib.sha256((made / file).read_bytes()).hexdigest()
    try:
        whole = msgspec.convert({**fields, "sha256": {file: sha256}}, card)
    except msgspec.ValidationError as error:
        raise BadRequest(f"models: its card cannot be used: {error}") from None
    (made / CARD).write_bytes(msgspec.json.format(msgspec.json.encode(whole)))
