"""Compile every Triton kernel for a GPU that need not be here: python compile_kernels.py 80 90."""

from __future__ import annotations

import sys
from typing import Any

import triton
from aiirwkv_llm_rwkv.kernels import fused
from aiirwkv_llm_rwkv.kernels import triton as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HALF = ("r", "g", "out", "mixes", "weight", "bias", "hidden", "rows", "x", "add")
WHOLE = {"size", "offset", "heads", "N", "count", "plane", "D", "per_part"}
NUMBERS = {"slots", "begin", "length", "text"}
WKV = {"HEAD": 64, "CHUNK": 16}

KERNELS: list[tuple[Any, dict[str, Any], int]] = [
    (fused._mix, {"D": 2560, "BLOCK": 4096, "MIXES": 6, "ADD": 1, "KEEP": False}, 8),
    (fused._mix, {"D": 2048, "BLOCK": 2048, "MIXES": 1, "ADD": 16, "KEEP": True}, 4),
    (fused._activate, {"TANH": 0, "SIGMOID": 2, "BLOCK": 1024}, 4),
    (fused._activate, {"TANH": -1, "SIGMOID": -1, "BLOCK": 1024}, 4),
    (fused._sparse, {"BLOCK": 128, "ROWS": 32}, 4),
    (kernels._step7, {"HEAD": 64, "FIRST": True}, 2),
    (kernels._step7, {"HEAD": 64, "FIRST": False}, 2),
    (kernels._step6, {"HEAD": 64}, 2),
    (kernels._prepare7, {"HEAD": 64, "TOKENS": 16, "FIRST": False}, 4),
    (kernels._finish, {"HEAD": 64, "TOKENS": 16, "V7": True}, 4),
    (kernels._scan, {**WKV, "BLOCK": 16, "PRECISION": "ieee", "V7": True}, 2),
    (kernels._scan, {**WKV, "BLOCK": 16, "PRECISION": "ieee", "V7": False}, 2),
    (kernels._chunk7, {**WKV, "BLOCK": 32, "PRECISION": "tf32x3", "V7": True}, 4),
    (kernels._chunk7, {**WKV, "BLOCK": 16, "PRECISION": "ieee", "V7": True}, 8),
    (kernels._chunk6, {**WKV, "BLOCK": 32, "PRECISION": "tf32x3", "V7": False}, 4),
]


def compiled(kernel: Any, constants: dict[str, Any], warps: int, capability: int) -> int:
    """The bytes of its machine code."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in WHOLE and not name.endswith("_"):
            return "i32"
        return "*i32" if name in NUMBERS else "*bf16" if name in HALF else "*fp32"

    signature = {name: kind(name) for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    target = GPUTarget("cuda", capability, 32)
    return len(triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"])


for capability in map(int, sys.argv[1:]):
    for kernel, constants, warps in KERNELS:
        print(capability, kernel.__name__, compiled(kernel, constants, warps, capability))
