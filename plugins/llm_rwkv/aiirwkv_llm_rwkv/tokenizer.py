"""
The tokenizer of RWKV: a vocabulary of byte strings, the longest match wins, single bytes are the fallback.

The vocabulary is read as data, never as code. Texts are encoded by machine code, which Numba makes once and keeps.
"""

from __future__ import annotations

import ast
import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["Tokenizer", "Utf8"]

F = TypeVar("F", bound=Callable[..., Any])

LONGEST = 1024
"""Bytes of a token, at most."""
BLOCK = 1 << 16
"""Ids that are found at once, so that encoding a long text needs little memory beside the text and its ids."""


class Tokenizer:
    """
    Text to token ids and back. Id 0 ends a text; it is not in the vocabulary and stands for no bytes.

    Gives the same ids as the trie of the `rwkv` package. Raises ValueError when a single byte is not in the vocabulary.
    """

    def __init__(self, tokens: Mapping[int, bytes]) -> None:
        self.tokens = dict(tokens)
        self.size = max(self.tokens, default=0) + 1
        ids = {token: id for id, token in self.tokens.items()}
        if missing := {bytes([byte]) for byte in range(256)} - ids.keys():
            raise ValueError(f"it lacks {len(missing)} of the 256 single bytes, so some texts could not be encoded")
        self._trie = _trie(ids)
        self._ids = np.array(range(self.size), object)  # an id is the same Python int wherever it is found
        self._lengths = np.zeros(self.size, np.int64)
        self._lengths[list(self.tokens)] = [len(token) for token in self.tokens.values()]

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """
        Read a vocabulary file: lines of id, Python literal (str or bytes), and length in bytes.

        Raises ValueError that names the line.
        """
        tokens: dict[int, bytes] = {}
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                id, rest = line.split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                value = ast.literal_eval(literal.strip())
                token = value.encode() if isinstance(value, str) else value
                if not isinstance(token, bytes) or len(token) != int(length) or not 1 <= len(token) <= LONGEST:
                    raise ValueError
                if not 1 <= int(id) < 1 << 24:
                    raise ValueError
                tokens[int(id)] = token
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise ValueError(f"line {number} is not of the form: id 'token' length in bytes") from None
        return cls(tokens)

    def encode(self, text: str) -> list[int]:
        """Raises UnicodeEncodeError for a lone surrogate."""
        return self.encode_bytes(text.encode("utf-8"))

    def encode_bytes(self, text: bytes) -> list[int]:
        """Any bytes can be encoded: UTF-8 or not."""
        source = np.frombuffer(text, np.uint8)
        block = np.empty(min(len(source), BLOCK), np.int32)
        found: list[int] = []
        position = 0
        while position < len(source):
            position, count = _encode(source, position, self._trie, block)
            found += self._ids[block[:count]].tolist()
        return found

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """
        The ids of the whole text, and for each part after how many of them it is complete.

        A token may reach into the next part. Since the longest match wins from the left on, another text that begins
        with the same parts has the same ids up to there, but where such a token ends otherwise.
        """
        ids = self.encode("".join(parts))
        ends = np.cumsum([len(part.encode()) for part in parts])
        return ids, (np.searchsorted(np.cumsum(self._lengths[ids]), ends) + 1).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        return self.raw(ids).decode("utf-8", "replace")

    def raw(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; an id outside the vocabulary has none."""
        return b"".join(self.tokens.get(id, b"") for id in ids)

    def countless(self) -> frozenset[int]:
        """Tokens that repetition penalties do not count: spaces, tabs and digits in ascending order, as RWKV has it."""
        return frozenset(id for id, token in self.tokens.items() if token in b" \t0123456789")


def _trie(ids: Mapping[bytes, int]) -> NDArray[np.int32]:
    """
    The vocabulary as a trie in one array of nodes [N, 4], of which 0 is the root.

    Of each node: the lowest byte that goes on from here, how many bytes there are from this to the highest one, the
    node that the lowest leads to (those of the bytes after it follow), and the id of the token that ends here, or 0.
    Nodes that only keep the place of a byte are all 0. Built for all tokens at once, one depth after the other.
    """
    tokens = sorted(ids)  # so the tokens that go on from a node stand together, in the order of their next byte
    text = np.frombuffer(b"".join(tokens), np.uint8).astype(np.int32)
    lengths = np.array([len(token) for token in tokens])
    starts = np.cumsum(lengths) - lengths
    values = np.array([ids[token] for token in tokens], np.int32)
    where = np.zeros(len(tokens), np.int64)  # the node that each token has reached
    level, begin, end = np.zeros((1, 4), np.int32), 0, 1  # the nodes of this depth, and their numbers
    levels = [level]
    for depth in range(int(lengths.max())):
        longer = lengths > depth
        starts, lengths, values, where = starts[longer], lengths[longer], values[longer], where[longer]
        byte = text[starts + depth]
        first = np.flatnonzero(np.diff(where, prepend=-1))  # the first token of each node
        tokens_of_node = np.diff(first, append=len(where))
        low, high = byte[first], byte[first + tokens_of_node - 1]
        span = high - low + 1
        child = end + np.cumsum(span) - span
        level[where[first] - begin, :3] = np.stack([low, span, child], 1)
        where = np.repeat(child - low, tokens_of_node) + byte
        begin, end = end, end + int(span.sum())
        level = np.zeros((end - begin, 4), np.int32)
        whole = lengths == depth + 1
        level[where[whole] - begin, 3] = values[whole]
        levels.append(level)
    return np.concatenate(levels)


def _compiled(signature: str) -> Callable[[F], F]:
    """Compile a function. Its machine code is kept beside this file or in the user's cache, if these can be written."""

    def compile(function: Any) -> Any:
        try:
            return numba.njit(signature, cache=True, nogil=True)(function)
        except RuntimeError:  # there is no place to keep it
            return numba.njit(signature, nogil=True)(function)

    return compile


@_compiled('UniTuple(int64, 2)(Array(uint8, 1, "C", readonly=True), int64, int32[:, ::1], int32[::1])')
def _encode(source: Any, position: int, trie: Any, found: Any) -> tuple[int, int]:
    """Fill `found` with the ids of the source [bytes] from a position on; where it ends, and how many there are."""
    count = 0
    while position < len(source) and count < len(found):
        node, id = 0, 0
        for ahead in range(position, len(source)):
            step = source[ahead] - trie[node, 0]
            if step < 0 or step >= trie[node, 1]:
                break
            node = trie[node, 2] + step
            if trie[node, 3]:
                id, position = trie[node, 3], ahead + 1
        found[count] = id
        count += 1
    return position, count


class Utf8:
    """Bytes in pieces to text in whole characters. Bytes that can never become a character are left out."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def add(self, piece: bytes) -> str:
        return self._decoder.decode(piece)
