"""The keys of sleep: which rule, on what budget, when, and how it is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from wakesleep.consolidation.budget import Budget

Trigger = Literal["every", "eviction", "pressure", "surprise", "idle"]


@dataclass(frozen=True, kw_only=True)
class SleepConfig:
    rule: Literal["none", "replay", "recurrent", "cross"] = "none"
    offline_ratio: float = 0.25  # FLOPs of sleep per FLOP of reading, all of sleep counted
    burst: float = math.inf  # FLOPs that can be saved up
    passes: int | None = None  # replay: units of a layer in one sleep, 8; else N with reading, 2
    trigger: tuple[Trigger, ...] = ()  # any of them asks for sleep; () = the rule's own
    every: int = 2048  # tokens between two sleeps of `every`, and the shortest distance of others
    high: float = 0.5  # pressure from which on sleep is wanted
    low: float = 0.1  # pressure from which on it is not any more
    surprise: float = 4096.0  # sum of surprise above its mean that asks, in means
    worth: float = 0.0  # score from which on a pair is worth it; learned: as likely asked as not
    tolerance: float = 0.6  # cosine of an answer to a query with the value: a pair is known
    tail_loss: float = 0.01  # nats per token that the prediction of the window may lose
    evict: Literal["keep", "hard"] = "keep"  # hard: passes leave the window empty
    span_tokens: int | None = None  # text of the store that `cross` passes over; as the window
    untrained: bool = False  # make passes also with a model that was trained without

    def __post_init__(self) -> None:
        _ = self.bucket
        bounds = {
            "passes": (0, 10_000),
            "span_tokens": (1, 2**20),
            "every": (1, 2**40),
            "low": (0, 1),
            "high": (0, 1),
            "surprise": (1e-6, 1e12),
            "worth": (-1e12, 1e12),
            "tolerance": (0.01, 0.9999),
            "tail_loss": (0, 100),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {value}")
        if self.low > self.high:
            raise ValueError(f"high must be at least low={self.low}, got {self.high}")

    @property
    def num_passes(self) -> int:
        """Units of a layer in one sleep at most (replay), or passes, the first one is reading."""
        return (8 if self.replays else 2) if self.passes is None else self.passes

    @property
    def does_nothing(self) -> bool:
        """Whether no sleep could change anything, whatever its budget."""
        return self.rule == "none" or self.num_passes < (1 if self.replays else 2)

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        """What asks for sleep: a full store for replay, a window's worth of tokens for passes."""
        return self.trigger or (("pressure",) if self.replays else ("eviction",))

    @property
    def replays(self) -> bool:
        """Whether pairs are written, not text passed over."""
        return self.rule in ("none", "replay")

    @property
    def bucket(self) -> Budget:
        """What everything is paid from."""
        return Budget(offline_ratio=self.offline_ratio, burst=self.burst)
