"""The keys of sleep: which rule, on what budget, when, and how it is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from wakesleep.consolidation.budget import Budget

Trigger = Literal["every", "eviction", "pressure", "surprise", "idle"]


@dataclass(frozen=True, kw_only=True)
class SleepConfig:
    rule: Literal["none", "replay"] = "none"
    offline_ratio: float = 0.25  # FLOPs of sleep per FLOP of reading, all of sleep counted
    burst: float = math.inf  # FLOPs that can be saved up
    passes: int = 8  # units of a layer in one sleep, at most
    trigger: tuple[Trigger, ...] = ("pressure",)  # any of them asks for sleep
    every: int = 65_536  # tokens between two sleeps of `every`, and the shortest distance of others
    high: float = 0.8  # pressure from which on sleep is wanted
    low: float = 0.5  # pressure from which on it is not any more
    surprise: float = 4096.0  # sum of surprise above its mean that asks, in means
    tolerance: float = 0.9  # cosine of an answer with the value, from which on a pair is known
    tail_loss: float = 0.01  # nats per token that the prediction of the window may lose

    def __post_init__(self) -> None:
        _ = self.bucket
        bounds = {
            "passes": (0, 10_000),
            "every": (1, 2**40),
            "low": (0, 1),
            "high": (0, 1),
            "surprise": (1e-6, 1e12),
            "tolerance": (0.01, 0.9999),
            "tail_loss": (0, 100),
        }
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} must be from {least} to {most}, got {getattr(self, name)}"
                )
        if self.low > self.high:
            raise ValueError(f"high must be at least low={self.low}, got {self.high}")
        if not self.trigger:
            raise ValueError("trigger must name one of every, eviction, pressure, surprise, idle")

    @property
    def bucket(self) -> Budget:
        """What everything is paid from."""
        return Budget(offline_ratio=self.offline_ratio, burst=self.burst)
