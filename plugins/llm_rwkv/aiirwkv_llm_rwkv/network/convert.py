"""
Official .pth files to safetensors, once, in a child process that may do little else.

A .pth is a pickle, a program. It is read by torch's reader that knows tensors and nothing else, in a process of its
own with bounds on memory, time and what it may write, so that neither a hostile nor a broken file harms the worker.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from aiirwkv.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["convert"]

START, RATE = 120, 10e6
"""Seconds for the child to start, and the bytes a second that it reads and writes at the slowest."""
SPARE = 1 << 30
"""Bytes of memory that the child may have beside the file, which it maps."""
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
INHERITED = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP")


def convert(source: Path, target: Path) -> None:
    """Write the tensors of `source` to `target`, which appears when it is whole. Raises PluginError."""
    try:
        size = source.stat().st_size
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise _failed(source, f"{target.parent} has {free / 1e9:.1f} GB free of the {size / 1e9:.1f} GB it needs")
        handle, name = tempfile.mkstemp(".part", f".{target.name}.", target.parent)
        os.close(handle)
    except OSError as error:
        raise _failed(source, f"{error.filename}: {error.strerror}") from None
    part = Path(name)
    try:
        _run(source.absolute(), part.absolute(), START + size / RATE)
        part.chmod(source.stat().st_mode & 0o666)
        os.replace(part, target)
    except OSError as error:
        raise _failed(source, f"{error.filename}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _run(source: Path, part: Path, seconds: float) -> None:
    command = [
        sys.executable,
        "-I",
        "-m",
        "aiirwkv_llm_rwkv.network.convert",
        str(source),
        str(part),
        str(int(seconds)),
    ]
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    try:
        done = subprocess.run(
            command,
            env={**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise _failed(source, f"it took longer than {seconds:.0f} seconds") from None
    if done.returncode:
        reason = done.stdout.decode(errors="replace").strip().rpartition("\n")[2]
        raise _failed(source, reason or f"the process that read it ended with {done.returncode}, out of memory or time")


def _failed(source: Path, reason: str) -> PluginError:
    return PluginError(f"the checkpoint {source} cannot be converted: {reason}")


def _restrict(source: Path, seconds: int) -> None:
    """Bound this process, where the platform can. To be called when everything is imported."""
    try:
        import resource
    except ImportError:  # Windows
        return
    size = source.stat().st_size
    limits = {"RLIMIT_CPU": seconds, "RLIMIT_FSIZE": size + (1 << 20), "RLIMIT_CORE": 0}
    statm = Path("/proc/self/statm")
    if statm.is_file():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        limits["RLIMIT_AS"] = now + 2 * size + SPARE
    for name, limit in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _child(source: Path, part: Path, seconds: int) -> None:
    """Raises ValueError, and whatever torch raises for a file that is none."""
    import pickle
    import zipfile

    import torch

    _restrict(source, seconds)
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except pickle.UnpicklingError:  # torch's own words tell how to run it all the same
        raise ValueError(
            "it is damaged, or holds more than tensors, which is not safe to read; get it from where it was published"
        ) from None
    except (EOFError, ValueError, KeyError, AttributeError):
        raise ValueError("it is no checkpoint, or only a part of one; download it again") from None
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ValueError(f"it is no checkpoint, or only a part of one; download it again: {reason[:300]}") from None
    _check(content, source.stat().st_size)
    with part.open("wb") as file:
        _write(content, file)
        file.flush()
        os.fsync(file.fileno())


def _check(content: Any, size: int) -> None:
    from torch import Tensor

    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"it holds no tensors by name, but a {type(content).__name__}")
    total = 0
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} in it is no named tensor, but a {type(tensor).__name__}")
        if str(tensor.dtype).removeprefix("torch.") not in TYPES or not _plain(tensor):
            raise ValueError(f"the tensor {name} is {tensor.dtype}, {tensor.layout}; plain {', '.join(TYPES)} is read")
        total += tensor.numel() * tensor.element_size()
    if total > size:
        raise ValueError(f"its tensors are said to have {total} bytes, more than the file's {size}")


def _plain(tensor: Tensor) -> bool:
    import torch

    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


def _write(content: Mapping[str, Tensor], file: BinaryIO) -> None:
    """As safetensors, with one tensor in memory at a time; the library would take all of them at once."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in content.items():
        end = begin + tensor.numel() * tensor.element_size()
        kind = TYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the numbers begin where vector instructions like them to
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in content.values():
        file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _main(source: str, part: str, seconds: str) -> int:
    try:
        _child(Path(source), Path(part), int(seconds))
    except MemoryError:
        print("it needs more memory than a checkpoint of its size may")
    except Exception as error:
        print(" ".join(str(error).split()) or type(error).__name__)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
