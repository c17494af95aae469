"""The fields of what users write and read, in the words of the documents: test_docs.py holds those to it, generate.py makes pages of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import NODEFAULT, inspect

from edge_agent.config import Limit, Size


@dataclass(frozen=True)
class Field:
    """A field as the documents name it, its type in their words, and its default (NODEFAULT: required)."""

    words: str
    type: Any
    default: Any


def words(kind: inspect.Type) -> str:
    """Return a type in the words of the documents, with its bounds or its values."""
    match kind:
        case inspect.UnionType(types=types):
            return " or ".join(dict.fromkeys(map(words, types)))
        case inspect.LiteralType(values=values):
            return ", ".join(f"`{value}`" for value in sorted(values, key=str))
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return f"list of {words(item)}s"
        case inspect.StrType(pattern=str(pattern)):
            return f"text like `{pattern}`"
        case inspect.StrType(min_length=low, max_length=high):
            said = bounds((("≥", low), ("≤", high)))
            return f"text of {said} characters" if said else "text"
        case inspect.IntType() | inspect.FloatType():
            name = "integer" if isinstance(kind, inspect.IntType) else "number"
            return f"{name} {bounds((('>', kind.gt), ('≥', kind.ge), ('<', kind.lt), ('≤', kind.le)))}".strip()
        case inspect.CustomType(cls=cls):
            return {Path: "path", Size: "size", Limit: "size or 0"}[cls]
    names: dict[type, str] = {
        inspect.BoolType: "boolean", inspect.NoneType: "null", inspect.StructType: "object", inspect.DictType: "object",
        inspect.BytesType: "base64",
    }  # fmt: skip
    return names[type(kind)]


def bounds(signs: tuple[tuple[str, float | None], ...]) -> str:
    return " and ".join(f"{sign} {bound:.16g}" for sign, bound in signs if bound is not None)


def fields_of(struct: Any, leaves: tuple[type, ...] = (), prefix: str = "") -> dict[str, Field]:
    """Return all fields of a struct by their dotted names, those of the structs in it included, but for those of `leaves`."""
    found: dict[str, Field] = {}
    config = struct.__struct_config__
    if config.tag_field:
        found[prefix + config.tag_field] = Field(f"`{config.tag}`", str, NODEFAULT)
    for field in msgspec.structs.fields(struct):
        default = field.default if field.default_factory is NODEFAULT else field.default_factory()
        name, kind = prefix + field.encode_name, inspect.type_info(field.type)
        if isinstance(kind, inspect.DictType):
            name, kind = f"{name}.*", kind.value_type
        parts = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
        items = [part.item_type for part in parts if isinstance(part, inspect.ListType | inspect.VarTupleType)]
        name = f"{name}[]" if items else name
        found[name] = Field(words(kind), field.type, default)
        for part in (*parts, *items):
            if isinstance(part, inspect.StructType) and part.cls not in leaves:
                found |= fields_of(part.cls, leaves, f"{name}.")
    return found
