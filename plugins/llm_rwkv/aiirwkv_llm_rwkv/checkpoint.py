"""Weights from a safetensors file, mapped into memory, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from aiirwkv.errors import PluginError
from safetensors import SafetensorError, safe_open

from .model import RWKV, architecture

__all__ = ["load"]

UNUSED = {f"blocks.0.att.v{i}" for i in range(3)}
"""Official files hold these of layer 0, which has no layer below to mix its values with."""


def load(path: Path, device: torch.device, dtype: torch.dtype) -> RWKV:
    """The model in a file; what has the right type already is used from the file without a copy. Raises PluginError."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = [name for name in file.keys() if name not in UNUSED]  # noqa: SIM118
            kind, sizes = architecture({name: file.get_slice(name).get_shape() for name in names})
            with torch.device("meta"):
                model = kind(sizes)
            if any(name.endswith(".time_state") for name in names):
                model.add_time_state()
            expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            tensors = {}
            for name in names:
                shape = tuple(file.get_slice(name).get_shape())
                if name not in expected:
                    raise ValueError(f"the tensor {name} does not belong to an {model.version}")
                if shape != expected[name]:
                    raise ValueError(f"the tensor {name} has shape {shape}, not {expected[name]}")
                tensors[name] = file.get_tensor(name).to(dtype)
            if missing := expected.keys() - tensors.keys():
                raise ValueError(f"the tensor {min(missing)} is missing")
            model.load_state_dict(tensors, assign=True)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PluginError(f"the model {path} cannot be loaded: {error}") from None
    return model.eval().requires_grad_(False)
