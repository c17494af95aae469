"""What a strict reader would have taken: the field that was probably meant, or the words that a field has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set
from difflib import get_close_matches
from functools import cache
from typing import Any

from msgspec import inspect

_REFUSED = re.compile(
    r"(?:Object contains unknown field `(?P<field>.*?)`|Invalid (?:enum )?value (?P<word>.*?))(?: - at `\$(?P<path>[^`]*)`)?", re.DOTALL
)
_PLACE = re.compile(r"(?:\.\w+(?:\[[0-9]{1,4}\])?)*", re.ASCII)
_END = 1024
"""Characters of a text at each end, more than all the fields to a place take."""
LONGEST_TEXT = 200
"""Characters of what is said of a field or word; where it is longer, no similar field is looked for."""
LONGEST_QUOTED, LIKE = 64, 0.8
"""Of an unknown field that is quoted where the text is not: its characters, and how like a known one it is (difflib's ratio)."""


def explain(error: Exception, kind: Any) -> str:
    """Return what msgspec found wrong in a document of type `kind`, with a hint where it knows of one: for an unknown field the one
    with a similar name, at its place or elsewhere in the document; for a wrong word those that would do."""
    text = str(error)
    if (refused := _refused(text)) is None:
        return text
    said, path = text[:LONGEST_TEXT], _names_in(refused["path"])
    if (wrong := refused["field"]) is None:
        return f"{said}{_takes(_words(kind, path))}"
    return f"{said}{_did_you_mean(_meant(wrong, kind, path))}" if said == text else said


def explain_unquoted(error: Exception, kind: Any) -> str:
    """Return the same for a document whose text is not repeated: nothing of it is quoted but an unknown field that is like a known one."""
    if (refused := _refused(str(error))) is None:
        return str(error)
    path, wrong = _names_in(refused["path"]), refused["field"]
    told = _PLACE.fullmatch(refused["path"] or "") and any(_at(_type(kind), path))  # else it is part of the field's own name
    place = f" - at `${refused['path']}`" if told and path else ""
    if wrong is None:
        return f"Invalid value{place}{_takes(_words(kind, path))}"
    if told and len(wrong) <= LONGEST_QUOTED and (meant := _meant(wrong, kind, path, LIKE)):
        return f"Object contains unknown field `{wrong}`{place}{_did_you_mean(meant)}"
    return f"Object contains an unknown field{place}{_takes(_fields(kind, path if told else ()))}"


def _refused(text: str) -> re.Match[str] | None:
    """Read what msgspec says; a field or word without end is not read to its end."""
    return _REFUSED.fullmatch(text if len(text) <= 2 * _END else text[:_END] + text[-_END:])


def _names_in(path: str | None) -> list[str]:
    return [name for part in (path or "").replace("[...]", "").split(".") if (name := part.partition("[")[0])]


def _fields(kind: Any, path: Sequence[str]) -> set[str]:
    return {field.encode_name for found in _at(_type(kind), path) if isinstance(found, inspect.StructType) for field in found.fields}


def _words(kind: Any, path: Sequence[str]) -> set[str]:
    return {str(word) for found in _at(_type(kind), path) if isinstance(found, inspect.LiteralType) for word in found.values}


def _meant(wrong: str, kind: Any, path: Sequence[str], like: float = 0.6) -> set[str]:
    """Return the fields that one of another name at a path may be meant for, each with those that it is in."""
    if close := get_close_matches(wrong, sorted(_fields(kind, path)), 1, like):
        return {".".join([*path, close[0]])}
    elsewhere = list(_names(_type(kind), ()))
    close = get_close_matches(wrong, sorted({names[-1] for names in elsewhere}), 1, like)
    return {".".join(names) for names in elsewhere if names[-1] in close}


def _did_you_mean(names: Set[str]) -> str:
    return f" (did you mean {' or '.join(f'`{name}`' for name in sorted(names))}?)" if names else ""


def _takes(words: Set[str]) -> str:
    return f" (it takes {', '.join(f'`{word}`' for word in sorted(words))})" if words else ""


@cache
def _type(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def _at(kind: inspect.Type, path: Sequence[str]) -> Iterator[inspect.Type]:
    """Yield the types that a document of a type may have at a path; lists and tables of any keys are no step of it."""
    for part in _parts(kind):
        if not path:
            yield part
        elif isinstance(part, inspect.StructType):
            if [part.tag_field] == path:
                yield inspect.LiteralType((part.tag,))
            for field in part.fields:
                if field.encode_name == path[0]:
                    yield from _at(field.type, path[1:])


def _names(kind: inspect.Type, parents: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield every field of a type with those that it is in."""
    for part in _parts(kind):
        for field in part.fields if isinstance(part, inspect.StructType) else ():
            yield (*parents, field.encode_name)
            yield from _names(field.type, (*parents, field.encode_name))


def _parts(kind: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(kind, inspect.Metadata):
        yield from _parts(kind.type)
    elif isinstance(kind, inspect.UnionType):
        for part in kind.types:
            yield from _parts(part)
    elif isinstance(kind, inspect.DictType):
        yield from _parts(kind.value_type)
    elif isinstance(kind, inspect.ListType | inspect.VarTupleType):
        yield from _parts(kind.item_type)
    else:
        yield kind
