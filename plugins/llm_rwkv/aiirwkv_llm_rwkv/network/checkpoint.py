"""Weights from a safetensors file, mapped into memory, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from aiirwkv.errors import PluginError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .model import RWKV, architecture

__all__ = ["UNUSED", "finite", "load", "loading"]

UNUSED = {f"blocks.0.att.v{i}" for i in range(3)}
"""Official files of RWKV-7 hold these of layer 0, which has no layer below to mix its values with."""

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@contextmanager
def loading(path: Path, device: torch.device) -> Iterator[None]:
    """Turns what can be wrong with a file of weights into a PluginError that says what it is and what to do."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise PluginError(
            f"the model {path} cannot be loaded: it is no safetensors file, or only a part of one ({error}); "
            f"download or convert it again"
        ) from None
    except (MemoryError, torch.OutOfMemoryError):
        raise PluginError(
            f"the model {path} cannot be loaded: it does not fit into the memory of {device}; "
            f"choose a smaller model or another precision"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise PluginError(f"the model {path} cannot be loaded: {str(error).partition(chr(10))[0]}") from None


def load(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> RWKV:
    """
    The model in a file; without `dtype`, in the type of its embedding. On a CPU, a tensor that has the right type
    already is the file's own memory. Tuned initial states stay float32.

    Raises PluginError when the file is not one whole RWKV-6 or RWKV-7 of finite numbers, or does not fit into memory.
    """
    with loading(path, device), safe_open(path, framework="pt", device=str(device)) as file:
        model, stored = _module(file)
        dtype = dtype or stored
        tensors = {}
        for name in file.keys():  # noqa: SIM118
            if name not in UNUSED:
                wanted = torch.float32 if name.endswith(".time_state") else dtype
                tensors[name] = finite(name, file.get_tensor(name), wanted)
        model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _module(file: Any) -> tuple[RWKV, torch.dtype]:
    """The empty module for an open file, and its type, after a look at names, shapes and types only."""
    names = set(file.keys()) - UNUSED
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    kind, sizes = architecture(shapes)
    with torch.device("meta"):
        model = kind(sizes)
        if any(name.endswith(".time_state") for name in names):
            model.add_time_state()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(names):
        if name not in expected:
            raise ValueError(f"the tensor {name} does not belong to an {model.version}")
        if shapes[name] != expected[name]:
            raise ValueError(f"the tensor {name} has shape {shapes[name]}, not {expected[name]}")
        if (stored := file.get_slice(name).get_dtype()) not in TYPES:
            raise ValueError(f"the tensor {name} holds {stored}, not one of {', '.join(TYPES)}")
    if missing := expected.keys() - names:
        raise ValueError(f"the tensor {min(missing)} is missing")
    return model, TYPES[file.get_slice("emb.weight").get_dtype()]


def finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the type wanted. The least and the greatest number are enough to tell, and not a number wins over both."""
    converted = tensor.to(dtype)
    if tensor.numel() and not all(map(torch.isfinite, converted.aminmax())):
        if all(map(torch.isfinite, tensor.aminmax())):
            raise ValueError(f"the tensor {name} holds numbers too great for {str(dtype).removeprefix('torch.')}")
        raise ValueError(f"the tensor {name} holds numbers that are infinite or none; download or train it again")
    return converted
