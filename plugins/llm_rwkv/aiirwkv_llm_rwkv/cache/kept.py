"""Kept states as things that belong to people: they are filed, listed, dropped, given away and taken in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec
import torch
from aiirwkv.errors import BadRequest, Conflict, NotFound
from aiirwkv.types import CacheStats, KeptState
from torch import Tensor

from .file import Damaged, Header, Precision, checksum, decode, encode, ids, raw, verify
from .index import Entry, Prefixes
from .store import Store

__all__ = ["KeptStates"]

Kept = list[KeptState]
LABEL = 200  # characters


class KeptStates:
    """Those of one model. Where an owner is asked for, None means that it does not matter whose they are."""

    def __init__(
        self, folder: Path | None, memory: int, disk: int, fingerprint: str, size: int, vocabulary: int
    ) -> None:
        """As `StateCache`."""
        self.fingerprint, self.size, self.vocabulary = fingerprint, size, vocabulary
        self._store = Store(folder, memory, disk, fingerprint)
        self._lock, self._index = self._store.lock, self._store.index
        self._roots: dict[bytes, tuple[str, str, str]] = {}
        self._hits = self._misses = self._saved = 0

    def root(self, owner: str, state: str = "", adapter: str = "") -> bytes:
        """A namespace: texts of this owner, read with this tuned state and adapter, which their sha256 tell."""
        place = json.dumps([self.fingerprint, self.size, owner, state, adapter]).encode()
        root = blake2b(place, digest_size=16).digest()
        self._roots[root] = (owner, state, adapter)
        return root

    def list(self, owner: str | None) -> Kept:
        """The owner's states, the last used first; also those of other models in the same folder."""
        with self._lock:
            mine = [entry for entry in self._index.entries.values() if owner is None or entry.header.owner == owner]
            return [entry.about() for entry in sorted(mine, key=lambda entry: entry.used, reverse=True)]

    def drop(self, owner: str | None, id: str) -> KeptState:
        """Raises NotFound."""
        with self._lock:
            entry = self._find(owner, id)
            kept = entry.about()
            self._store.forget(entry)
            return kept

    def drop_all(self, owner: str | None) -> Kept:
        """Gives those that were dropped."""
        dropped = []
        for kept in self.list(owner):
            try:
                dropped.append(self.drop(owner, kept.id))
            except NotFound:  # dropped meanwhile to make room
                continue
        return dropped

    def export(self, owner: str | None, id: str) -> bytes:
        """The state as a file, which does not say whose it was and how it was used. Raises NotFound."""
        with self._lock:
            entry = self._find(owner, id)
        header, payload = self._store.load(entry)
        if payload is None:
            raise NotFound(f"the kept state {id} cannot be read from the disk; let the model read the text again")
        plain = msgspec.structs.replace(header, owner="", pinned=False, hits=0, parent=None, checksum=checksum(payload))
        return encode(plain) + raw(payload)

    def import_(self, owner: str, data: bytes, *, model: str = "", label: str = "", pin: bool = True) -> KeptState:
        """
        An exported state, from now on this owner's. `model` is what this model is called.

        It is taken for forged until it has been checked. Raises BadRequest when it is damaged or forged, Conflict when
        another model made it, or when pinned states alone would exceed the budget for the disk.
        """
        try:
            header, tokens, payload = self._check(data, model)
        except Damaged as error:
            raise BadRequest(f"the file cannot be imported as a kept state: {error}") from None
        text = Prefixes(self.root(owner, header.state, header.adapter), tokens)
        header = msgspec.structs.replace(
            header,
            key=text.key(text.length).hex(),
            path=text.marks(),
            owner=owner,
            model=model or header.model,
            label=(label or header.label)[:LABEL],
            pinned=pin,
            hits=0,
        )
        return self._keep(text, header, lambda: (header.dtype, payload)).about()

    def stats(self) -> CacheStats:
        """Bytes, budgets, and what has been spared since the start."""
        with self._lock:
            return CacheStats(
                states=len(self._index.entries),
                memory=self._store.in_memory,
                memory_budget=self._store.memory,
                disk=self._store.on_disk,
                disk_budget=self._store.disk,
                hits=self._hits,
                misses=self._misses,
                tokens_saved=self._saved,
                dropped=self._store.dropped,
            )

    def flush(self) -> bool:
        """Wait until all pinned states are on disk; false if that takes more than a minute."""
        return self._store.flush()

    def close(self) -> None:
        """Write what is worth it to disk; it is there at the next start."""
        self._store.close()

    def _keep(self, text: Prefixes, header: Header, pack: Callable[[], tuple[Precision, Tensor]]) -> Entry:
        """Keep what is described, or add to what is kept already; `pack` gives dtype and payload if they are needed."""
        key = bytes.fromhex(header.key)
        payload = None
        with self._lock:
            old = self._index.entries.get(key)
            if old is not None and not header.adds(old.header):
                self._store.touch(old)
                return old
        if old is not None:
            header.label = header.label or old.header.label
            header.pinned = header.pinned or old.header.pinned
            header.hits, header.created = old.header.hits, old.header.created
            if old.header.logits or not header.logits:
                kept, payload = self._store.load(old)
                if payload is not None:
                    header.dtype, header.logits = kept.dtype, kept.logits
        if payload is None:
            header.dtype, payload = pack()
        with self._lock:
            parent = self._index.longest(text, text.length - 1)
            header.parent = parent.id if parent else None
            entry = Entry(key, header, time.time(), payload)
            self._store.add(entry, parent)
            return entry

    def _find(self, owner: str | None, id: str) -> Entry:
        """The caller holds the lock. Raises NotFound."""
        try:
            entry = self._index.entries.get(bytes.fromhex(id))
        except ValueError:
            entry = None
        if entry is None or owner not in (None, entry.header.owner):
            raise NotFound(f"no kept state {id!r} of yours; `list` tells which there are")
        return entry

    def _check(self, data: bytes, model: str) -> tuple[Header, Sequence[int], Tensor]:
        """Header, token ids and payload of an exported state. Raises Damaged, and Conflict if it is another model's."""
        header, begin = decode(data)
        if header.fingerprint != self.fingerprint:
            raise Conflict(
                f"the state was made by the model {header.model!r} ({header.fingerprint[:12]}…), and this is {model!r} "
                f"({self.fingerprint[:12]}…); a state is of use only to the model that made it"
            )
        if header.size != self.size or header.logits not in (0, self.vocabulary):
            raise Damaged(f"it has {header.size} and {header.logits} floats, not {self.size} and {self.vocabulary}")
        if len(data) - begin != header.nbytes:
            raise Damaged(f"it has {len(data) - begin} bytes of numbers where its header says {header.nbytes}")
        payload = torch.frombuffer(bytearray(memoryview(data)[begin:]), dtype=torch.uint8)
        verify(header, payload)
        tokens = ids(header, payload)
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise Damaged(f"a token id in it is not between 0 and {self.vocabulary - 1}")
        return header, tokens, payload
