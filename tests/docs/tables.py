"""A type's fields in the words of the docs: name, kind, default. The docs hold these rows, and test_docs compares."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

SIMPLE: dict[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true/false",
    bytes: "base64",
    Any: "any",
    type(None): "null",
}


def kind(hint: Any) -> str:
    """A type in words; a structure is a link to its own table in docs/hooks.md."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in SIMPLE:
        return SIMPLE[hint]
    if origin is Annotated:
        return kind(arguments[0]) + "".join(_bounds(meta) for meta in arguments[1:])
    if origin is Literal:
        return " ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"list of {kind(arguments[0])}"
    if origin is dict:
        return f"map of {kind(arguments[0])} to {kind(arguments[1])}"
    return f"[{hint.__name__}](#{hint.__name__.lower()})"


def _bounds(meta: msgspec.Meta) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return "".join(
        f", {text} {value}" for key, text in words.items() if (value := getattr(meta, key, None)) is not None
    )


def default(field: msgspec.structs.FieldInfo) -> str:
    """A field's default as JSON, or that it has to be given."""
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(value, msgspec.Struct):
        return "empty"
    return f"`{msgspec.json.encode(value).decode()}`"


def rows(cls: type[msgspec.Struct], *, defaults: bool = True) -> Iterator[str]:
    """The beginning of each row of a table, up to the meaning."""
    for field in msgspec.structs.fields(cls):
        cells = [f"`{field.encode_name}`", kind(field.type)]
        yield "| " + " | ".join([*cells, default(field)] if defaults else cells) + " | "
