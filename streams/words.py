"""Lists of words and names for generated facts, split into parts that share nothing.

The lists are in `data/words.json`, which names their source and licence.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib import resources
from typing import NamedTuple

SPLITS = ("train", "validation", "test")


class Words(NamedTuple):
    """The words of one split."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    animals: tuple[str, ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    cities: tuple[str, ...]
    jobs: tuple[str, ...]
    colours: tuple[str, ...]
    goods: tuple[str, ...]


def split_of(text: str) -> str:
    """Say to which split a word, name, number or date belongs: 80 / 8 / 12 % by hash."""
    level = hashlib.sha256(text.lower().encode()).digest()[0]
    return "train" if level < 205 else "validation" if level < 225 else "test"


@cache
def load_words(split: str) -> Words:
    """Read the words of `split`.

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    path = resources.files("wakesleep.streams") / "data" / "words.json"
    lists = json.loads(path.read_text(encoding="utf-8"))
    return Words(*(tuple(w for w in lists[name] if split_of(w) == split) for name in Words._fields))
