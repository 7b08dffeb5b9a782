"""The keys of `wakesleep stream`: what a session is read with.

A session remembers its keys (`config` in session.json); a later call gives only what should differ:
`load_config(StreamConfig, overrides=given, session=manifest["config"])`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from wakesleep.consolidation.sleep_config import SleepConfig

# Fixed for a session's life, as model and tokenizer are: another value needs another session.
FIXED_KEYS = ("dtype", "seed", "lanes", "keep_ids", "facts.count", "facts.seed", "facts.kinds")


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    capacity: int | None = None  # places per layer and head; none: the model's

    def __post_init__(self):
        _check("capacity", self.capacity, 1, 1 << 20)


@dataclass(frozen=True, kw_only=True)
class FactsOptions:
    count: int | None = None  # planted in what is read first; none: 64 in the bundled one, else 0
    seed: int = 0
    kinds: str = "all"  # or names of fact families, separated by commas

    def __post_init__(self):
        _check("count", self.count, 0, 100_000)
        _check("seed", self.seed, 0, 2**53)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    model: str | None = None  # model folder; none: the one that is shipped
    limit_tokens: int | float = math.inf  # tokens of the document, planted ones included
    window: int | None = None  # tokens of exact short-term memory; none: the model's
    store: StoreOptions = field(default_factory=StoreOptions)
    facts: FactsOptions = field(default_factory=FactsOptions)
    sleep: SleepConfig = field(default_factory=SleepConfig)
    segment_len: int = 2048  # tokens of one model call
    save_every: int | float = 1_000_000  # tokens between snapshots, rounded up to whole segments
    keep_ids: bool | None = None  # append every token id to ids.bin; none: with one lane
    lanes: int = 1  # documents read side by side
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # of weights and window
    threads: int | None = None  # CPU threads; none: as many as torch takes
    seed: int = 0
    errors: Literal["strict", "replace"] = "strict"  # what to do with bytes that are not text
    encoding: str = "utf-8"
    max_ratio: int | float = 1000  # bytes out per byte in; beyond it a packed file is refused

    def __post_init__(self):
        _check("limit_tokens", self.limit_tokens, 1, math.inf)
        _check("window", self.window, 1, 1 << 16)
        _check("segment_len", self.segment_len, 1, 1 << 16)
        _check("save_every", self.save_every, 1, math.inf)
        _check("lanes", self.lanes, 1, 1024)
        _check("threads", self.threads, 1, 1024)
        _check("seed", self.seed, 0, 2**53)
        _check("max_ratio", self.max_ratio, 1, math.inf)


def _check(name: str, value: Any, low: int, high: int | float) -> None:
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high:,}, got {value:,}")
