"""
A kept state as a file: a header in JSON, then the token ids that were read, the state, and the logits after them.

Magic, version and length of the header (8 + 4 + 4 bytes), header, payload; all numbers little-endian. The header is
padded so that the payload begins at a multiple of 512. Nothing in it is executed; a file from elsewhere is checked.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import tempfile
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

__all__ = [
    "SUFFIX",
    "Damaged",
    "Header",
    "NotFinite",
    "Precision",
    "checksum",
    "decode",
    "encode",
    "ids",
    "pack",
    "peek",
    "raw",
    "read",
    "unpack",
    "verify",
    "write",
]

SUFFIX = ".state"
MAGIC, VERSION, BEGIN, ALIGN, LONGEST = b"AIIRWKVS", 1, struct.Struct("<8sII"), 512, 1 << 20
DTYPES = {"float16": torch.float16, "float32": torch.float32}

Precision = Literal["float16", "float32"]
Name = Annotated[str, Meta(max_length=1000)]
Key = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Count = Annotated[int, Meta(ge=0, le=1 << 40)]


class Damaged(ValueError):
    """The file is not a kept state, or no longer one."""


class NotFinite(ValueError):
    """A state that is worth nothing: some of its numbers are infinite or not numbers."""


class Header(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """
    What a payload is. `tokens`, `size` and `logits` count ids and floats; `logits` 0: there are none.

    `state` and `adapter` are the sha256 of what the text was read with, `path` hashes of its prefixes, `parent` the key
    of the longest prefix that was kept, `checksum` the CRC-32 of the payload.
    """

    fingerprint: Name
    key: Key
    parent: Key | None = None
    path: Annotated[list[Name], Meta(min_length=1)]
    owner: Name = ""
    state: Name = ""
    adapter: Name = ""
    model: Name = ""
    label: Name = ""
    tokens: Annotated[int, Meta(ge=1, le=1 << 31)]
    size: Count
    logits: Count = 0
    dtype: Precision = "float16"
    pinned: bool = False
    hits: Count = 0
    created: float = 0.0
    checksum: Name = ""

    @property
    def nbytes(self) -> int:
        """Of the payload."""
        return 4 * self.tokens + (self.size + self.logits) * DTYPES[self.dtype].itemsize

    def adds(self, old: Header) -> bool:
        """Whether it says more of the same text: it has logits, a pin, or another label."""
        logits = self.logits > 0 and not old.logits
        return logits or (self.pinned and not old.pinned) or self.label not in ("", old.label)


def pack(tokens: bytes, state: Tensor, logits: Tensor | None, precision: Precision) -> tuple[Precision, Tensor]:
    """
    The dtype and the payload, uint8 [nbytes], of int32 `tokens`, float32 `state` [size] and `logits` [vocabulary].

    What does not fit into float16 is kept in float32. Raises NotFinite.
    """
    parts = [state] if logits is None else [state, logits]
    peak = max(abs(float(end)) if math.isfinite(end) else math.inf for part in parts for end in torch.aminmax(part))
    if peak == math.inf:
        raise NotFinite("the state holds numbers that are not finite")
    dtype: Precision = precision if peak <= torch.finfo(DTYPES[precision]).max else "float32"
    floats = sum(part.numel() for part in parts)
    payload = torch.empty(len(tokens) + floats * DTYPES[dtype].itemsize, dtype=torch.uint8)
    raw(payload)[: len(tokens)] = tokens
    at = 0
    for part in parts:
        payload[len(tokens) :].view(DTYPES[dtype])[at : at + part.numel()].copy_(part)
        at += part.numel()
    return dtype, payload


def unpack(header: Header, payload: Tensor) -> tuple[Tensor, Tensor | None]:
    """The state and the logits, float32, as copies."""
    floats = payload[4 * header.tokens :].view(DTYPES[header.dtype])
    logits = floats[header.size :].to(torch.float32, copy=True) if header.logits else None
    return floats[: header.size].to(torch.float32, copy=True), logits


def ids(header: Header, payload: Tensor) -> list[int]:
    """The token ids."""
    return payload[: 4 * header.tokens].view(torch.int32).tolist()


def encode(header: Header) -> bytes:
    """All that stands before the payload."""
    text = msgspec.json.encode(header)
    text += b" " * (-(BEGIN.size + len(text)) % ALIGN)
    return BEGIN.pack(MAGIC, VERSION, len(text)) + text


def decode(data: bytes) -> tuple[Header, int]:
    """The header, and where the payload begins, from the beginning of a file or all of it. Raises Damaged."""
    if len(data) < BEGIN.size:
        raise Damaged("it is too short to be a kept state")
    magic, version, length = BEGIN.unpack_from(data)
    if magic != MAGIC:
        raise Damaged("it is not a kept state")
    if version != VERSION:
        raise Damaged(f"it has the version {version} of the format, and this program knows {VERSION}")
    if length > LONGEST or BEGIN.size + length > len(data):
        raise Damaged("its header is cut off")
    try:
        return msgspec.json.decode(data[BEGIN.size : BEGIN.size + length], type=Header), BEGIN.size + length
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"its header cannot be used: {error}") from None


def verify(header: Header, payload: Tensor) -> None:
    """A payload of the right size. Raises Damaged when it is not the header's, or holds numbers that are not finite."""
    if checksum(payload) != header.checksum:
        raise Damaged("its checksum is wrong")
    floats = payload[4 * header.tokens :].view(DTYPES[header.dtype])
    if floats.numel() and not all(math.isfinite(end) for end in torch.aminmax(floats)):
        raise Damaged("it holds numbers that are not finite")


def raw(payload: Tensor) -> memoryview:
    """Its bytes, in place."""
    return payload.numpy().data


def checksum(payload: Tensor) -> str:
    return f"{zlib.crc32(raw(payload)):08x}"


def write(path: Path, start: bytes, payload: Tensor) -> None:
    """All of the file or nothing, for this user's eyes only. `start` is the encoded header. Raises OSError."""
    number, draft = tempfile.mkstemp(".tmp", f"{path.stem}.", path.parent)
    try:
        with os.fdopen(number, "wb") as stream:
            stream.write(start)
            stream.write(raw(payload))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except OSError:
        Path(draft).unlink(missing_ok=True)
        raise


def peek(path: Path) -> tuple[Header, int]:
    """The header of a file, and the file's size, which is right. Raises Damaged and OSError."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        header, begin = _begin(file)
        if size != begin + header.nbytes:
            raise Damaged(f"it has {size} bytes and should have {begin + header.nbytes}")
        return header, size


def read(path: Path) -> tuple[Header, Tensor]:
    """The header and the payload, checked. Raises Damaged and OSError."""
    with _open(path) as file:
        header, begin = _begin(file)
        if os.fstat(file.fileno()).st_size != begin + header.nbytes:  # before memory is taken for it
            raise Damaged("its size is not what its header says")
        file.seek(begin)
        payload = torch.empty(header.nbytes, dtype=torch.uint8)
        if file.readinto(raw(payload)) != header.nbytes:
            raise Damaged("it is cut off")
    verify(header, payload)
    return header, payload


def _open(path: Path) -> BufferedReader:
    """Links are not followed and pipes not waited for: others may have put something into the folder."""
    flags = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise Damaged("it is not a file")
    return os.fdopen(file, "rb")


def _begin(file: BufferedReader) -> tuple[Header, int]:
    start = file.read(4096)
    if len(start) >= BEGIN.size:
        missing = min(BEGIN.unpack_from(start)[2], LONGEST) + BEGIN.size - len(start)
        start += file.read(max(missing, 0))
    return decode(start)
