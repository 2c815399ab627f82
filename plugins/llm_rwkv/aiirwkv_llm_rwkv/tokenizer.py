"""
The tokenizer of RWKV: a vocabulary of byte strings, the longest match wins, single bytes are the fallback.

The vocabulary is read as data, never as code.
"""

from __future__ import annotations

import ast
import codecs
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["Tokenizer", "Utf8"]


class Tokenizer:
    """
    Text to token ids and back. Id 0 ends a text; it is not in the vocabulary and stands for no bytes.

    Gives the same ids as the trie of the `rwkv` package.
    """

    def __init__(self, tokens: Mapping[int, bytes]) -> None:
        self.tokens = dict(tokens)
        self.ids = {token: id for id, token in self.tokens.items()}
        self.size = max(self.tokens) + 1
        by_start: dict[bytes, set[int]] = {}
        for token in self.ids:
            if len(token) > 1:
                by_start.setdefault(token[:2], set()).add(len(token))
        # The lengths to try, longest first, for each pair of bytes that begins a token.
        self._lengths = {start: sorted(lengths, reverse=True) for start, lengths in by_start.items()}

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
                if not isinstance(token, bytes) or len(token) != int(length) or not token or int(id) < 1:
                    raise ValueError
                tokens[int(id)] = token
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise ValueError(f"line {number} is not of the form: id 'token' length in bytes") from None
        if missing := {bytes([byte]) for byte in range(256)} - set(tokens.values()):
            raise ValueError(f"it lacks {len(missing)} of the 256 single bytes, so some texts could not be encoded")
        return cls(tokens)

    def encode(self, text: str) -> list[int]:
        """Raises UnicodeEncodeError for a lone surrogate."""
        source = text.encode("utf-8")
        ids, lengths = self.ids, self._lengths
        found: list[int] = []
        position = 0
        while position < len(source):
            for length in lengths.get(source[position : position + 2], ()):
                piece = source[position : position + length]
                if (id := ids.get(piece)) is not None:
                    found.append(id)
                    position += len(piece)  # shorter than `length` at the very end
                    break
            else:
                found.append(ids[source[position : position + 1]])
                position += 1
        return found

    def decode(self, ids: Iterable[int]) -> str:
        return self.raw(ids).decode("utf-8", "replace")

    def raw(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; an id outside the vocabulary has none."""
        return b"".join(self.tokens.get(id, b"") for id in ids)

    def countless(self) -> frozenset[int]:
        """Tokens that repetition penalties do not count: spaces, tabs and digits in ascending order, as RWKV has it."""
        return frozenset(id for id, token in self.tokens.items() if token in b" \t0123456789")


class Utf8:
    """Bytes in pieces to text in whole characters. Bytes that can never become a character are left out."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def add(self, piece: bytes) -> str:
        return self._decoder.decode(piece)
