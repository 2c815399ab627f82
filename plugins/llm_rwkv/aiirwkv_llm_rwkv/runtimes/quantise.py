"""Linears of 8 or 4 bits on an NVIDIA GPU, by the library bitsandbytes, which need not be installed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from aiirwkv.errors import PluginError
from torch import nn

from ..network.model import RWKV, Linear

__all__ = ["quantise"]

OUTLIERS = 6.0
"""int8: inputs beyond this are multiplied in 16 bits (Dettmers et al., "LLM.int8()", 2022)."""


def quantise(model: RWKV, precision: Literal["int8", "nf4"], device: torch.device) -> RWKV:
    """
    Move a model of 16 bits to a GPU, linear by linear, so that only the small form of each ever lies there.

    The head, the low-rank matrices and the embedding keep their 16 bits: they are small, the harm would not be.
    Raises PluginError without a GPU, without bitsandbytes, and for float32.
    """
    if device.type != "cuda":
        raise PluginError(f"the precision {precision!r} of bitsandbytes is for an NVIDIA GPU, not for {device}")
    dtype = model.ln_out.weight.dtype
    if dtype == torch.float32:
        raise PluginError(f"the precision {precision!r} starts from weights of 16 bits; load them as bfloat16")
    try:
        import bitsandbytes as bnb
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise PluginError(
            f"the precision {precision!r} needs bitsandbytes, which cannot be used here ({reason}): "
            "pip install bitsandbytes, or choose bfloat16"
        ) from None
    for name, linear in list(model.named_modules()):
        if isinstance(linear, Linear) and name != "head":
            model.set_submodule(name, _small(bnb, linear, precision, dtype).to(device))
    return model.to(device)


def _small(bnb: Any, linear: Linear, precision: str, dtype: torch.dtype) -> nn.Module:
    """The same linear, which becomes small when it is moved to the GPU."""
    shape, weight = (linear.in_features, linear.out_features), linear.weight.detach().contiguous()
    small: nn.Module
    if precision == "int8":
        small = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
        small.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        small = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        small.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return small.eval()
