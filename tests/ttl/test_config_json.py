"""Configs survive the way through JSON; what a stranger put there is refused by name."""

import json
import math
from dataclasses import dataclass, field
from typing import Literal

import pytest

from wakesleep.ttl.config_json import config_from_json, config_to_json, parse_json


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    threshold: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    width: int
    name: Literal["near", "far"] = "near"
    layers: tuple[int, ...] = (1, 2)
    quick: bool = False
    seed: int | None = None
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.width > 100:
            raise ValueError(f"width must be at most 100, got {self.width}")


@pytest.mark.parametrize(
    "config",
    [
        Outer(width=3),
        Outer(width=3, name="far", layers=(), quick=True, seed=7),
        Outer(width=3, inner=Inner(rate=1 / 3, threshold=math.inf)),
    ],
)
def test_a_config_survives_strict_json(config):
    text = json.dumps(config_to_json(config), allow_nan=False)
    assert config_from_json(Outer, parse_json(text.encode(), "x")) == config


def test_a_field_that_is_left_out_has_its_default_and_a_whole_number_is_a_float():
    found = config_from_json(Outer, {"width": 3, "inner": {"rate": 1}})
    assert found == Outer(width=3, inner=Inner(rate=1.0))
    assert type(found.inner.rate) is float


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1], "expected an object"),
        ({}, "config.width: missing"),
        ({"width": 3, "widht": 3}, "nearest is 'width'"),
        ({"width": 3, "inner": {"thresold": 1}}, "config.inner.*nearest is 'threshold'"),
        ({"width": 3, "inner": {"__class__": "os.system"}}, "no such key"),
        ({"width": 3.0}, "config.width: expected a whole number"),
        ({"width": "3"}, "config.width: expected a whole number"),
        ({"width": True}, "config.width: expected a whole number"),
        ({"width": 10**30}, "config.width: expected a whole number"),
        ({"width": 101}, "width must be at most 100"),
        ({"width": 3, "name": "os.system"}, "config.name: expected one of near, far"),
        ({"width": 3, "name": ["near"]}, "config.name: expected one of"),
        ({"width": 3, "layers": [1, "2"]}, r"config.layers\[1\]: expected a whole number"),
        ({"width": 3, "layers": [0] * 1000}, "config.layers: expected a list of at most"),
        ({"width": 3, "layers": 1}, "config.layers: expected a list"),
        ({"width": 3, "quick": 1}, "config.quick: expected true or false"),
        ({"width": 3, "inner": {"rate": "nan"}}, "config.inner.rate: expected a number"),
        ({"width": 3, "inner": {"rate": 1e300}}, "config.inner.rate: expected a number"),
        ({"width": 3, "inner": None}, "config.inner: expected an object"),
    ],
)
def test_anything_else_is_refused_by_name(values, words):
    with pytest.raises(ValueError, match=words):
        config_from_json(Outer, values)


AMBIGUOUS = {
    "not a number": b"NaN",
    "infinity": b"[Infinity]",
    "infinity in digits": b"[1e999]",
    "repeated key": b'{"a": 1, "a": 2}',
    "deep": b"[" * 60_000,
    "not UTF-8": b"\xff",
    "cut off": b"{",
    "endless number": b"9" * 9999,
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_json_that_parsers_could_disagree_on_is_refused(case):
    with pytest.raises(ValueError, match="x is not plain JSON") as error:
        parse_json(AMBIGUOUS[case], "x")
    assert len(str(error.value)) < 200
