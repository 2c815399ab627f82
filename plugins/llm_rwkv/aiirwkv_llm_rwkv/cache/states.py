"""
The state cache: what a model remembers of texts it has read, so that it reads them only once.

It knows token ids and flat states, neither models nor requests. Every method may be called from any thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aiirwkv.errors import Conflict
from torch import Tensor

from . import file
from .file import Header, NotFinite, Precision
from .index import Entry, Prefixes
from .kept import LABEL, KeptStates

__all__ = ["Entry", "Found", "StateCache"]

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """The longest kept prefix: its length in tokens, the flat float32 state after it, and the logits, if kept."""

    length: int
    state: Tensor
    logits: Tensor | None
    entry: Entry


class StateCache(KeptStates):
    """
    Kept states of one model, by owner, tuned state, adapter and token ids.

    An engine asks `begin` for the prefixes that it would keep, then `longest`, reads on, calls `keep` and `done`.
    """

    def __init__(
        self,
        folder: Path | None,
        memory: int,
        disk: int,
        fingerprint: str,
        size: int,
        *,
        vocabulary: int = 65536,
        precision: Precision = "float16",
    ) -> None:
        """
        `memory` and `disk` are budgets in bytes; without a `folder` nothing goes to disk. `fingerprint` tells weights
        and numerics apart, `size` is the number of floats of a state. In float16 continuing differs by about 5e-9 nats
        from not having stopped, in float32 by nothing. What lies in the folder from earlier is known at once.
        """
        super().__init__(folder, memory, disk, fingerprint, size, vocabulary)
        self.precision: Precision = precision
        self._begun: set[bytes] = set()

    def keys(self, root: bytes, tokens: Sequence[int], cuts: Sequence[int]) -> list[bytes]:
        """The keys of the text's prefixes of these lengths."""
        text = Prefixes(root, tokens)
        return [text.key(cut) for cut in cuts]

    def begin(self, *keys: bytes) -> bool:
        """
        Say that the prefixes with these keys are being read from now on, until `done`.

        False, and nothing said, when somebody is at one of them already: ask again later.
        """
        with self._lock:
            if not self._begun.isdisjoint(keys):
                return False
            self._begun.update(keys)
            return True

    def done(self, *keys: bytes) -> None:
        """They are kept now, or nobody is at them any more."""
        with self._lock:
            self._begun.difference_update(keys)

    def longest(self, root: bytes, tokens: Sequence[int], limit: int | None = None) -> Found | None:
        """
        The longest kept prefix of at most `limit` tokens; the whole text only if its logits were kept as well.

        Counts as a hit or a miss. A state that is not in memory is read from the disk meanwhile.
        """
        whole = len(tokens)
        limit = whole if limit is None else min(limit, whole)
        text = Prefixes(root, tokens[:limit])
        while limit > 0:
            with self._lock:
                entry = self._index.longest(text, limit, lambda kept: kept.tokens < whole or kept.header.logits > 0)
            if entry is None:
                break
            header, payload = self._store.load(entry)
            if payload is not None:
                with self._lock:
                    self._hits += 1
                    self._saved += entry.tokens
                    entry.header.hits += 1
                    self._store.touch(entry)
                return Found(entry.tokens, *file.unpack(header, payload), entry)
            limit = entry.tokens - 1
        with self._lock:
            self._misses += 1
        return None

    def shared(self, root: bytes, tokens: Sequence[int]) -> int:
        """
        How many tokens, in steps of 256, a kept text begins with as well.

        Where it exceeds what `longest` finds, texts part after it: the place for one more state (Marconi's branch
        point).
        """
        text = Prefixes(root, tokens)
        with self._lock:
            return self._index.shared(text)

    def keep(
        self,
        root: bytes,
        tokens: Sequence[int],
        state: Tensor,
        logits: Tensor | None = None,
        *,
        owner: str,
        model: str = "",
        label: str = "",
        pin: bool = False,
    ) -> Entry | None:
        """
        Keep the flat state, float [size], after these tokens, and the logits of the last of them, float [vocabulary].

        If it is kept already, a label, a pin or logits are added to it. None: its numbers are not finite. Raises
        Conflict when pinned states alone would exceed the budget for the disk.
        """
        place = self._roots.get(root)
        if place is None or place[0] != owner:
            raise ValueError("a state is kept under a root of its owner")
        if state.shape != (self.size,) or not len(tokens):
            raise ValueError(f"a state of {self.size} floats after some tokens was expected, not {tuple(state.shape)}")
        text = Prefixes(root, tokens)
        header = Header(
            fingerprint=self.fingerprint,
            key=text.key(text.length).hex(),
            path=text.marks(),
            owner=owner,
            state=place[1],
            adapter=place[2],
            model=model,
            label=label.encode(errors="replace").decode()[:LABEL],
            tokens=text.length,
            size=self.size,
            logits=0 if logits is None else logits.numel(),
            pinned=pin,
            created=time.time(),
        )
        try:
            return self._keep(text, header, lambda: file.pack(text.data, state, logits, self.precision))
        except NotFinite as error:
            if pin:
                raise Conflict(
                    f"{header.label or 'the text'} cannot be kept: {error}; check the model's weights"
                ) from None
            log.warning("a text of %d tokens is not kept: %s", len(tokens), error)
            return None
