"""all-MiniLM-L6-v2 as an ONNX graph whose weights stay in the safetensors file: nothing is exported or stored twice."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

LAYERS, HEADS, WIDTH, EPSILON = 6, 12, 384, 1e-12
FLOAT, INT32, INT64 = 1, 6, 7  # ONNX element types
ELEMENT = {"F32": FLOAT, "I64": INT64}
MICROSOFT = "com.microsoft"  # ONNX Runtime's fused operators


def minilm(weights: Path) -> bytes:
    """
    A serialised ONNX model: the encoder, mean pooling and normalisation.

    Inputs, both int32 (batch, length): `ids`, and `mask` with 1 at tokens and 0 at padding. Output: `vectors`, float32
    (batch, 384), each of length 1. The weights are external data in the folder of `weights`.
    Method: Devlin et al. 2018 (BERT), Reimers and Gurevych 2019 (mean pooling).
    """
    graph = Graph(weights)
    node, weight = graph.node, graph.weight

    def linear(x: str, name: str) -> str:
        return node("FusedMatMul", [x, weight(f"{name}.weight")], transB=1)  # (out, in), as torch keeps it

    def add_and_norm(x: str, residual: str, name: str) -> str:
        inputs = [linear(x, f"{name}.dense"), residual, *norm(name), weight(f"{name}.dense.bias")]
        return node("SkipLayerNormalization", inputs, epsilon=EPSILON)

    def norm(name: str) -> list[str]:
        return [weight(f"{name}.LayerNorm.weight"), weight(f"{name}.LayerNorm.bias")]

    tables = [weight(f"embeddings.{name}_embeddings.weight") for name in ("word", "position", "token_type")]
    kind = node("Sub", ["ids", "ids"], domain="")  # every token is of the first type, 0
    inputs = ["ids", kind, *tables, *norm("embeddings")]
    x = node("EmbedLayerNormalization", inputs, spare=["lengths"], epsilon=EPSILON)
    for layer in range(LAYERS):
        here = f"encoder.layer.{layer}"
        parts = [f"{here}.attention.self.{part}" for part in ("query", "key", "value")]
        bias = node("Concat", [weight(f"{part}.bias") for part in parts], domain="", axis=0)
        seen = node("MultiHeadAttention", [*(linear(x, part) for part in parts), bias, "mask"], num_heads=HEADS)
        x = add_and_norm(seen, x, f"{here}.attention.output")
        wide = linear(x, f"{here}.intermediate.dense")
        wide = node("BiasGelu", [wide, weight(f"{here}.intermediate.dense.bias")])
        x = add_and_norm(wide, x, f"{here}.output")
    # The mean's divisor falls out when the vector is brought to length 1, so a sum does.
    row = node("Unsqueeze", [node("Cast", ["mask"], domain="", to=FLOAT), graph.integers([1])], domain="")
    total = node("Squeeze", [node("MatMul", [row, x], domain=""), graph.integers([1])], domain="")
    node("LpNormalization", [total], "vectors", domain="", axis=-1, p=2)
    return graph.model({"ids": INT32, "mask": INT32}, {"vectors": FLOAT})


class Graph:
    """Collects nodes and weights; writes them as an ONNX ModelProto (field numbers: onnx.proto3 of ONNX 1.17)."""

    def __init__(self, weights: Path) -> None:
        with weights.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            self.header = json.loads(file.read(size))
        self.start = 8 + size
        self.file = weights.name
        self.nodes: list[bytes] = []
        self.tensors: dict[str, bytes] = {}

    def weight(self, name: str) -> str:
        """A tensor of the safetensors file, by reference."""
        entry = self.header[name]
        begin, end = entry["data_offsets"]
        place = {"location": self.file, "offset": str(self.start + begin), "length": str(end - begin)}
        self.tensors[name] = b"".join(
            [
                *(integer(1, size) for size in entry["shape"]),
                integer(2, ELEMENT[entry["dtype"]]),
                text(8, name),
                *(field(13, text(1, key) + text(2, value)) for key, value in place.items()),
                integer(14, 1),  # data_location = EXTERNAL
            ]
        )
        return name

    def integers(self, values: Sequence[int]) -> str:
        """A constant vector."""
        name = f"integers {values}"
        data = struct.pack(f"<{len(values)}q", *values)
        self.tensors[name] = integer(1, len(values)) + integer(2, INT64) + text(8, name) + field(9, data)
        return name

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        output: str = "",
        *,
        spare: Sequence[str] = (),
        domain: str = MICROSOFT,
        **attributes: float,
    ) -> str:
        """One operator; returns the name of its first output. `spare`: names for outputs it must have, unused here."""
        output = output or f"{kind}{len(self.nodes)}"
        self.nodes.append(
            b"".join(
                [
                    *(text(1, name) for name in inputs),
                    *(text(2, name) for name in (output, *spare)),
                    text(3, output),
                    text(4, kind),
                    *(field(5, attribute(name, value)) for name, value in attributes.items()),
                    text(7, domain),
                ]
            )
        )
        return output

    def model(self, inputs: dict[str, int], outputs: dict[str, int]) -> bytes:
        """The whole model; every input and output is a matrix of free size."""
        graph = b"".join(
            [
                *(field(1, node) for node in self.nodes),
                text(2, "minilm"),
                *(field(5, tensor) for tensor in self.tensors.values()),
                *(field(11, matrix(name, kind)) for name, kind in inputs.items()),
                *(field(12, matrix(name, kind)) for name, kind in outputs.items()),
            ]
        )
        opsets = [field(8, text(1, domain) + integer(2, version)) for domain, version in (("", 17), (MICROSOFT, 1))]
        return b"".join([integer(1, 8), field(7, graph), *opsets])


# Protocol Buffers, as far as this needs them


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def integer(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def text(number: int, value: str) -> bytes:
    return field(number, value.encode())


def attribute(name: str, value: float) -> bytes:
    if isinstance(value, int):
        return text(1, name) + integer(3, value) + integer(20, 2)
    return text(1, name) + varint(2 << 3 | 5) + struct.pack("<f", value) + integer(20, 1)


def matrix(name: str, kind: int) -> bytes:
    sizes = b"".join(field(1, text(2, f"{name} {axis}")) for axis in ("rows", "columns"))
    return text(1, name) + field(2, field(1, integer(1, kind) + field(2, sizes)))
