"""Looking at a verb's dataclass: which keys exist, what they hold."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

hints = functools.cache(get_type_hints)


def hint(schema: type, key: str) -> Any:
    """The declared type of a dotted key, also inside mappings (raises KeyError)."""
    name, _, rest = key.partition(".")
    found = hints(schema)[name]
    if not rest:
        return found
    inner: Any = next((kind for kind in (found, *get_args(found)) if dataclasses.is_dataclass(kind)), None)
    if get_origin(found) is not dict:
        return hint(inner, rest) if inner else Any
    return hint(inner, rest.rpartition(".")[2]) if inner and "." in rest else get_args(found)[1]


def section(schema: type, field: dataclasses.Field) -> type | None:
    """The dataclass a field holds, also behind `| None`; None where it holds a value or a mapping."""
    kind = hints(schema)[field.name]
    if get_origin(kind) is dict:
        return None
    return next((one for one in (kind, *get_args(kind)) if dataclasses.is_dataclass(one)), None)  # type: ignore[return-value]


def find(schema: type, key: str) -> dataclasses.Field:
    """The field a dotted key names; keys inside a free mapping give the mapping's field (raises KeyError)."""
    name, _, rest = key.partition(".")
    field = next((field for field in dataclasses.fields(schema) if field.name == name), None)
    if field is None:
        raise KeyError(key)
    if not rest or get_origin(hints(schema)[name]) is dict:
        return field
    inner = section(schema, field)
    if inner is None:
        raise KeyError(key)
    return find(inner, rest)


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a config dataclass, leaves and branches."""
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        inner = section(schema, field)
        if inner is not None:
            yield from keys(inner, f"{prefix}{field.name}.")


def leaves(schema: type) -> list[str]:
    """The dotted keys that hold a value: all but the sections."""
    every = list(keys(schema))
    branches = {key.rpartition(".")[0] for key in every}
    return [key for key in every if key not in branches]
