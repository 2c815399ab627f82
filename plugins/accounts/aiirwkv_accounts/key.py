"""The private key that signs claims: made once, readable by its owner only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from aiirwkv import PluginError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def private_key(path: Path) -> Ed25519PrivateKey:
    """The key in the file, which is made first when it does not exist (32 raw bytes, mode 0600)."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not path.exists():
        _write(path, Ed25519PrivateKey.generate().private_bytes_raw())
    path.chmod(0o600)
    try:
        return Ed25519PrivateKey.from_private_bytes(path.read_bytes())
    except ValueError:
        raise PluginError(
            f"{path} is not an Ed25519 key of 32 bytes; restore it from a backup, or delete it to have a new one made, "
            "which ends all claims"
        ) from None


def _write(path: Path, data: bytes) -> None:
    """Write the whole file at once, unless another process did it first."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
