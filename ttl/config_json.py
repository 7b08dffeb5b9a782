"""Configs as plain JSON and back, strict enough for a file that a stranger wrote.

A config is a tree of frozen dataclasses. Their annotations say what a value may be; nothing in the
file can name a class. How large a value may be is said by the dataclass itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

MAX_NUMBER = 2**31 - 1  # of either sign; tighter bounds belong to the dataclass
MAX_ITEMS = 256  # of a list, such as the layers that have a store

Schema = TypeVar("Schema")


def config_to_json(config: Any) -> dict[str, Any]:
    """Return the fields of a config as plain JSON values: tuples as lists, infinity as "inf"."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return config_to_json(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return "inf" if value == math.inf else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def config_from_json(schema: type[Schema], values: Any, where: str = "config") -> Schema:
    """Build a `schema` from plain JSON values; a field that is left out has its default.

    Raises:
        ValueError: not an object, an unknown key (its nearest neighbour is named), a missing key
            without default, a value of another type, or one that the dataclass refuses.
    """
    if type(values) is not dict:
        raise ValueError(f"{where}: expected an object with named values, found {_short(values)}")
    hints = get_type_hints(schema)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1, cutoff=0)
            raise ValueError(f"{where}.{_short(name)}: no such key; the nearest is {near[0]!r}")
    for field in dataclasses.fields(schema):
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and field.name not in values:
            raise ValueError(f"{where}.{field.name}: missing, and it has no default")
    parsed = {k: _parse(hints[k], raw, f"{where}.{k}") for k, raw in values.items()}
    try:
        return schema(**parsed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON without NaN, infinities (1e999 is one), repeated keys or deep nesting.

    Raises:
        ValueError: anything else.
    """

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            refuse(text)
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return found

    try:
        hooks = {"parse_constant": refuse, "parse_float": finite, "object_pairs_hook": unique}
        return json.loads(data.decode(), **hooks)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not plain JSON: {_short(str(error))}") from error


def _parse(kind: Any, raw: Any, where: str) -> Any:
    """One value of the annotated type `kind`; a whole number is a float too, True is no number."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if raw is None and NoneType in args:
            return None
        (kind,) = (arg for arg in args if arg is not NoneType)
        return _parse(kind, raw, where)
    if dataclasses.is_dataclass(kind):
        return config_from_json(kind, raw, where)
    if origin is tuple and type(raw) is list and len(raw) <= MAX_ITEMS:
        return tuple(_parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    if origin is Literal and type(raw) is str and raw in args:
        return raw
    if kind is bool and type(raw) is bool:
        return raw
    if kind is float and raw == "inf":
        return math.inf
    numbers = {int: (int,), float: (int, float)}.get(kind, ())
    if type(raw) in numbers and abs(raw) <= MAX_NUMBER:
        return kind(raw)
    raise ValueError(f"{where}: expected {_expected(kind)}, found {_short(raw)}")


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list of at most {MAX_ITEMS}"
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    return names[kind] if kind is bool else f"{names[kind]} of at most {MAX_NUMBER}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
