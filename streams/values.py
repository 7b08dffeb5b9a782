"""What a setting may be: texts and YAML scalars into the types that a schema names.

int            10, 10k, 1.5M, 1e6       int | float   the same, or inf
float          0.5, 1e-3, inf           bool          true, false, yes, no, on, off
str            any text                 X | None      also none
Literal[...]   one of its members       tuple[X, ...] 1,2,3 or [1, 2, 3]
dict[str, Any] free keys: whatever each value looks like
"""

from __future__ import annotations

import dataclasses
import math
import types
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Union, get_args, get_origin

MAX_INT = 2**63 - 1  # what a tensor of int64 holds
SUFFIXES = {"k": 1_000, "M": 1_000_000}
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def parse_value(raw: Any, kind: Any) -> Any:
    """Turn `raw` (text of the command line, or a YAML scalar or list) into a `kind`.

    Raises:
        ValueError: it is something else.
    """
    options, optional = _options(kind)
    if optional and (raw is None or str(raw).lower() in ("none", "null")):
        return None
    if options == {int, float}:
        return math.inf if str(raw).lower() in ("inf", ".inf") else parse_count(raw)
    (kind,) = options
    if get_origin(kind) is Literal:
        return _member(raw, get_args(kind))
    if get_origin(kind) is tuple:
        return _tuple(_parts(raw), get_args(kind))
    if get_origin(kind) is dict:
        return {str(key): parse_literal(value) for key, value in _mapping(raw).items()}
    if kind is bool:
        return raw if isinstance(raw, bool) else SWITCHES[_among(str(raw).lower(), SWITCHES)]
    if kind is int:
        return parse_count(raw)
    if kind is float:
        return _number(raw)
    if kind is str and isinstance(raw, str):
        return raw
    raise ValueError(raw)


def parse_count(raw: Any) -> int:
    """Parse a whole number: 10, 10_000, 10k, 1.5M, 1e6.

    Raises:
        ValueError: not a whole number, or beyond 2**63.
    """
    number = _decimal(raw)
    if abs(number) > MAX_INT or number != number.to_integral_value():
        raise ValueError(raw)
    return int(number)


def parse_literal(raw: Any) -> Any:
    """Read a value of a free key by its looks: none, switch, count, number, list or text."""
    if isinstance(raw, list | tuple):
        return [parse_literal(part) for part in raw]
    if not isinstance(raw, str):
        return raw
    text = raw.strip()
    if text.startswith("[") and text.endswith("]"):
        return [parse_literal(part) for part in _parts(text)]
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return SWITCHES[text.lower()]
    for read in (parse_count, _number):
        try:
            return read(text)
        except ValueError:
            continue
    return raw


def expected(kind: Any) -> str:
    """Say in words what a value of `kind` looks like."""
    options, optional = _options(kind)
    tail = ", or none" if optional else ""
    if options == {int, float}:
        return "a whole number (10k, 1M, 1e6), or inf" + tail
    (kind,) = options
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}" + tail
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        size = "" if rest == [Ellipsis] else f" of {1 + len(rest)}"
        return f"a list{size}, each {expected(first)}" + tail
    names = {
        bool: "true or false",
        int: "a whole number (10k, 1M, 1e6)",
        float: "a number",
        str: "text",
    }
    return names.get(kind, "keys with values") + tail


def group_of(kind: Any) -> type | None:
    """The dataclass that `kind` is or may be, None if it is a single value."""
    options, _ = _options(kind)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _options(kind: Any) -> tuple[set, bool]:
    """The alternatives of `kind` without None, and whether None is one."""
    union = get_origin(kind) in (Union, types.UnionType)
    options = set(get_args(kind)) if union else {kind}
    return options - {types.NoneType}, types.NoneType in options


def _decimal(raw: Any) -> Decimal:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError(raw)
    text = str(raw).strip()
    factor = SUFFIXES.get(text[-1:], 1)
    try:
        number = Decimal(text[:-1] if factor > 1 else text)
    except InvalidOperation:
        raise ValueError(raw) from None
    if not number.is_finite() or abs(number.adjusted()) > 400:  # beyond float64 either way
        raise ValueError(raw)
    return number * factor


def _number(raw: Any) -> float:
    text = str(raw).lower()
    if text in ("inf", ".inf", "-inf", "-.inf"):
        return -math.inf if text.startswith("-") else math.inf
    number = float(_decimal(raw))
    if not math.isfinite(number):
        raise ValueError(raw)
    return number


def _member(raw: Any, members: tuple) -> Any:
    by_name = {str(member): member for member in members}
    return by_name[_among("none" if raw is None else str(raw), by_name)]  # YAML's null is none


def _among(text: str, known: dict[str, Any]) -> str:
    if text not in known:
        raise ValueError(text)
    return text


def _tuple(parts: list[Any], kinds: tuple) -> tuple:
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(parts)
    if len(kinds) != len(parts):
        raise ValueError(parts)
    return tuple(parse_value(part, kind) for part, kind in zip(parts, kinds, strict=True))


def _parts(raw: Any) -> list[Any]:
    if isinstance(raw, list | tuple):
        return list(raw)
    text = str(raw).strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    return [part.strip().strip("'\"") for part in text.split(",")] if text.strip() else []


def _mapping(raw: Any) -> dict:
    if not isinstance(raw, dict):
        raise ValueError(raw)
    return raw
