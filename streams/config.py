"""Settings: defaults <- session <- one YAML <- key=value, into frozen dataclasses.

A schema is a frozen dataclass; its annotations say what a value may be, its `__post_init__` says
between which bounds. Nothing is interpolated: `${...}` in a value is text like any other.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from wakesleep.streams.errors import Refused
from wakesleep.streams.values import expected, group_of, parse_literal, parse_value

MAX_YAML_BYTES = 1 << 20  # a recipe is a page of text; anything larger is the wrong file

DOLLAR, NO_DOLLAR = "${", "\ue000{"  # a character for private use: in no recipe

Schema = TypeVar("Schema")


def load_config(
    schema: type[Schema],
    yaml: str | Path | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    session: Mapping[str, Any] | None = None,
) -> tuple[Schema, dict[str, str]]:
    """Merge all layers into a `schema`; say for every dotted key where its value comes from.

    Args:
        yaml: a file with nested or dotted keys.
        overrides: `a.b=c` texts, or a nested mapping with the same keys.
        session: what `as_dict` gave when the session was saved.

    Returns:
        The config and its origins: "default", "session", "file" or "command line" by dotted key.

    Raises:
        Refused: a file that cannot be read, an unknown key, a wrong type, a value out of bounds.
    """
    call = "in the arguments" if isinstance(overrides, Mapping) else "on the command line"
    if not isinstance(overrides, Mapping):
        overrides = split_overrides(overrides)
    layers = {
        "session": (session or {}, "in session.json"),
        "file": (_read_yaml(Path(yaml)) if yaml is not None else {}, f"in {yaml}"),
        "command line": (overrides, call),
    }
    kinds = dict(_leaves(schema))
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    for origin, (layer, where) in layers.items():
        for key, raw in _flatten(layer, kinds, where):
            values[key] = _parse(key, raw, kinds, where)
            given[key] = origin
    config = _build(schema, values, given)
    return config, {key: _origin(key, given) for key in flat(config)}


def split_overrides(texts: Iterable[str]) -> dict[str, str]:
    """Split `key=value` texts; the last of two with the same key counts.

    Raises:
        Refused: a text without `=` or without a key.
    """
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise Refused(
                f"{text!r} is neither a file that exists nor key=value", remedy="See --help."
            )
        pairs[key.strip()] = value
    return pairs


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a config by dotted key, in the order of its fields."""
    values: dict[str, Any] = {}
    parts = config.items() if isinstance(config, Mapping) else _fields(config)
    for name, value in parts:
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(value) or (isinstance(value, Mapping) and value):
            values |= flat(value, f"{key}.")
        else:
            values[key] = value
    return values


def as_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain values for strict JSON: tuples as lists, infinity as "inf"."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {name: plain(part) for name, part in _fields(value)}
        if isinstance(value, Mapping):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value

    return plain(config)


def to_yaml(config: Any, origins: Mapping[str, str] | None = None) -> str:
    """One `dotted.key: value` per line, with the value's origin as a comment where it is given."""
    lines = {key: f"{key}: {json.dumps(as_dict(value))}" for key, value in flat(config).items()}
    if origins is None:
        return "".join(f"{line}\n" for line in lines.values())
    width = max(map(len, lines.values()), default=0)
    return "".join(f"{line:<{width}}  # {origins[key]}\n" for key, line in lines.items())


def nearest_file(path: Path) -> Path | None:
    """The entry of the same folder with the most similar name, None if there is none."""
    if not path.parent.is_dir():
        return None
    names = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / close[0] if close else None


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))


def _leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of everything that can be set, groups included."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, kind = f"{prefix}{field.name}", hints[field.name]
        yield key, kind
        if (group := group_of(kind)) is not None:
            yield from _leaves(group, f"{key}.")


def _flatten(
    layer: Mapping, kinds: Mapping[str, Any], where: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted keys of a layer; a mapping is opened unless its key takes one as a value."""
    for name, raw in layer.items():
        if not isinstance(name, str):
            raise Refused(f"{prefix}{name!r} is no key: a key is text", where)
        key = f"{prefix}{name}"
        if isinstance(raw, Mapping) and get_origin(kinds.get(key)) is not dict:
            yield from _flatten(raw, kinds, where, f"{key}.")
        else:
            yield key, raw


def _origin(key: str, given: Mapping[str, str]) -> str:
    """Where a key is from, or else the mapping that it is in."""
    parts = key.split(".")
    heads = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((given[head] for head in heads if head in given), "default")


def _parse(key: str, raw: Any, kinds: Mapping[str, Any], where: str) -> Any:
    kind = kinds.get(key)
    if kind is None:
        if _free_group(key, kinds):
            return parse_literal(raw)
        near = _nearest(key, kinds)
        remedy = "" if near else "All keys and their values: --print-config"
        raise Refused(f"{key}: no such key{near}", where, remedy)
    group = group_of(kind)
    if group is not None and not (raw is None or str(raw).lower() == "none"):
        names = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(group))
        raise Refused(f"{key}={raw}: this is a group of keys", where, f"Set one of: {names}")
    try:
        return parse_value(raw, kind)
    except ValueError:
        raise Refused(f"{key}={raw}: expected {expected(kind)}", where) from None


def _free_group(key: str, kinds: Mapping[str, Any]) -> str | None:
    """The group `a` of a key `a.b` whose names are not ours to know, such as `trainer`."""
    parts = key.split(".")
    heads = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((head for head in heads if get_origin(kinds.get(head)) is dict), None)


def _nearest(key: str, kinds: Mapping[str, Any]) -> str:
    """The key that was probably meant; the last part of a dotted key is enough to find it."""
    tails = {known.rpartition(".")[2]: known for known in reversed(list(kinds))}
    names = tails | {known: known for known in kinds}
    for text in (key, key.rpartition(".")[2]):
        if close := difflib.get_close_matches(text, names, n=1):
            return f"; did you mean {names[close[0]]}?"
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
    return f"; the nearest one is {names[close[0]]}" if close else ""


def _build(
    schema: type[Schema],
    values: Mapping[str, Any],
    given: Mapping[str, str],
    prefix: str = "",
    start: Schema | None = None,
) -> Schema:
    """Construct `schema` from dotted values, over `start` (the defaults of its place) if given."""
    hints = get_type_hints(schema)
    below: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        key = f"{prefix}{field.name}"
        inner = {k: v for k, v in values.items() if k.startswith(f"{key}.")}
        group = group_of(hints[field.name])
        if inner and group is not None:
            below[field.name] = _build(group, inner, given, f"{key}.", _default(field, start))
        elif inner:
            free = {k.removeprefix(f"{key}."): v for k, v in inner.items()}
            below[field.name] = {**(_default(field, start) or {}), **values.get(key, {}), **free}
        elif key in values:
            below[field.name] = values[key]
        elif start is None and _default(field, None) is dataclasses.MISSING:
            raise Refused(f"{key}: needed, and without a default", "", f"Add {key}=VALUE.")
    try:
        return schema(**below) if start is None else dataclasses.replace(start, **below)
    except ValueError as error:
        what = _located(error, prefix, schema)
        raise Refused(what, _source(what, given)) from error


def _default(field: dataclasses.Field, start: Any) -> Any:
    if start is not None:
        return getattr(start, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _located(error: ValueError, prefix: str, schema: type) -> str:
    """The first line of a schema's complaint, with the dotted key where it starts with a name."""
    what = (str(error).splitlines() or [type(error).__name__])[0]
    names = {field.name for field in dataclasses.fields(schema)}
    head = what.split(" ")[0].split("=")[0].split(".")[0]
    if not prefix or what.startswith(prefix):
        return what
    return f"{prefix}{what}" if head in names else f"{prefix.rstrip('.')}: {what}"


def _source(what: str, given: Mapping[str, str]) -> str:
    """Where the keys that a complaint names were set."""
    words = set(re.findall(r"\w+", what))
    keys = [key for key in given if key.rpartition(".")[2] in words]
    return ", ".join(f"{key} is from the {given[key]}" for key in keys[:3])


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if not path.is_file():
        near = nearest_file(path)
        raise Refused(f"{path}: no such file", remedy=f"Did you mean {near}?" if near else "")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise Refused(f"{path}: larger than {MAX_YAML_BYTES:,} bytes, so no YAML of settings")
    try:
        text = path.read_text(encoding="utf-8").replace(DOLLAR, NO_DOLLAR)
        layer = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception as error:  # YAML, encoding and omegaconf each have a family of their own
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{path}: not readable as YAML", reason) from error
    if not isinstance(layer, dict):
        raise Refused(f"{path}: expected keys with values, not a list")
    return _restored(layer)


def _restored(value: Any) -> Any:
    """The value with its `${` again, which OmegaConf would have taken apart."""
    if isinstance(value, str):
        return value.replace(NO_DOLLAR, DOLLAR)
    if isinstance(value, dict):
        return {_restored(key): _restored(part) for key, part in value.items()}
    return [_restored(part) for part in value] if isinstance(value, list) else value
