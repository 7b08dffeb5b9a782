"""The keys of `wakesleep tune`: what is read, what is searched through, and what counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from wakesleep.streams.config import flat, load_config
from wakesleep.streams.errors import Refused
from wakesleep.streams.stream_config import StreamConfig

# Every trial gives these itself, or they are no setting to choose.
OWN_KEYS = ("limit_tokens", "facts.count", "facts.seed", "keep_ids", "lanes", "seed", "save_every")
COMMON_KEYS = ("model", "device", "dtype", "threads")  # as all commands have them
LONGEST = 64  # values of one key


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    document: str | None = None  # a file or folder to read; none: the bundled one
    tokens: int = 500_000  # of it that are read with each setting and seed
    questions: int = 64  # facts that are planted in it and asked for at the end
    goal: Literal["recall", "bits_per_byte"] = "recall"  # what is made best against FLOPs
    seeds: tuple[int, ...] = (0, 1)  # of the planted facts; each setting is read once with each
    trials: int = 24  # settings to measure
    seed: int = 0  # of the search
    most_state_bytes: int | None = None  # settings whose state is larger are left out
    model: str | None = None  # folder; none: the shipped one
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None  # of each process; none: as `stream` has it, shared by workers
    search: dict[str, Any] = field(default_factory=dict)  # key of `stream`: values to choose from
    stream: dict[str, Any] = field(default_factory=dict)  # keys of `stream` that stay as they are

    def __post_init__(self) -> None:
        bounds = {"tokens": 2**62, "trials": 100_000, "most_state_bytes": 2**62}
        for name, most in bounds.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most:,}, got {value:,}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1:,}, got {self.seed}")
        least = 1 if self.goal == "recall" else 0
        if not least <= self.questions <= 100_000:
            raise ValueError(
                f"questions must be from {least} to 100,000 with goal={self.goal}, "
                f"got {self.questions}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different whole numbers from 0, got {self.seeds}")
        if not self.search:
            raise ValueError("search names the keys to choose: search.window=256,512")
        for key in COMMON_KEYS:
            if key in flat(self.stream) | self.search and getattr(self, key) not in (None, "auto"):
                raise ValueError(f"{key} and stream.{key} or search.{key} are given; leave one out")
        for key, values in self.search.items():
            if not isinstance(values, list) or not 1 <= len(values) <= LONGEST:
                raise ValueError(
                    f"search.{key} must be a list of 1 to {LONGEST} values, got {values}"
                )
            if any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(f"search.{key} must be a list of different values, got {values}")

    @property
    def grid(self) -> int:
        """Settings that there are."""
        return math.prod(map(len, self.search.values()))

    @property
    def kept(self) -> dict[str, Any]:
        """Keys of `stream` that every setting has."""
        common = {key: getattr(self, key) for key in COMMON_KEYS}
        given = {key: value for key, value in common.items() if value not in (None, "auto")}
        return given | flat(self.stream)

    def settings(self) -> list[dict[str, Any]]:
        """All of them, each {key: value}; the first has the first value of every key."""
        return [
            dict(zip(self.search, values, strict=True))
            for values in itertools.product(*self.search.values())
        ]

    def stream_config(self, values: Mapping[str, Any], seed: int | None = None) -> StreamConfig:
        """The config of a stream with these values of searched keys.

        Args:
            seed: of the planted facts; None: as a user would stream, with nothing planted.

        Raises:
            Refused: a key or a value that `stream` does not have, or that a trial gives itself.
        """
        given = self.kept | dict(values)
        for key in given:
            if key in OWN_KEYS:
                raise Refused(f"{key} is no key to tune", "", "tokens, questions and seeds are")
        if seed is not None:
            given |= {"limit_tokens": self.tokens, "facts.count": self.questions}
            given |= {"facts.seed": seed, "keep_ids": False}
        return load_config(StreamConfig, None, given)[0]
