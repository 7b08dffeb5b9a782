"""What sleep may cost: a ledger of all that was spent, and a budget that is never exceeded.

A bucket fills with `offline_ratio` FLOPs for every FLOP that reading costs, up to `burst`. Sleep,
the gate that judges it, and work that is thrown away are all paid from it, before they run. All
counts are integers, so that

    sleep + gate + wasted  <=  offline_ratio * wake + granted

holds exactly, at every moment and after every interruption: a ledger is saved with the state that
it belongs to. What a sleep did that a signal or a kill cut short is not in either, or a stream that
goes on would not do what one without a break does; a signal's is counted beside it, see `Meters`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

Asleep = Literal["sleep", "gate", "wasted"]


class Cost(NamedTuple):
    """What some work costs."""

    flops: int = 0  # by closed formulas: matrix products, factors and triangular solves
    nbytes: int = 0  # moved between memory and processor, by closed formulas
    seconds: float = 0.0  # measured

    def plus(self, other: Cost) -> Cost:
        """The cost of both."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Cost) -> Cost:
        """The cost of this without that."""
        return Cost(*(a - b for a, b in zip(self, other, strict=True)))


class Ledger(NamedTuple):
    """Everything that was spent since the start of a session, each FLOP under one name."""

    wake: Cost = Cost()  # reading
    sleep: Cost = Cost()  # consolidation that was accepted
    gate: Cost = Cost()  # judging it
    wasted: Cost = Cost()  # consolidation that was rejected
    granted: int = 0  # FLOPs that were granted and spent at rest, beside the ratio
    lost: int = 0  # FLOPs that a full bucket could not take

    @property
    def asleep(self) -> Cost:
        """All that sleep cost, accepted or not."""
        return self.sleep.plus(self.gate).plus(self.wasted)

    def with_extra(self, extra: Ledger) -> Ledger:
        """This ledger after a sleep that was granted apart, and is booked in `extra`."""
        return self._replace(
            sleep=self.sleep.plus(extra.sleep),
            gate=self.gate.plus(extra.gate),
            wasted=self.wasted.plus(extra.wasted),
            granted=self.granted + extra.asleep.flops,
        )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A token bucket: how much may be spent asleep for what was spent awake."""

    offline_ratio: float = 0.0  # FLOPs of sleep per FLOP of reading
    burst: float = math.inf  # FLOPs that can be saved up

    def __post_init__(self) -> None:
        for name, most in (("offline_ratio", 1e6), ("burst", math.inf)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(f"{name} must be from 0 to {most:g}, got {value}")

    def level(self, ledger: Ledger) -> int:
        """FLOPs that may be spent now; negative after a change to a smaller ratio."""
        level = self._most(ledger) - ledger.lost
        return level if math.isinf(self.burst) else min(level, math.floor(self.burst))

    def earn(self, ledger: Ledger, wake: Cost) -> Ledger:
        """The ledger after reading; what does not fit into the bucket is lost."""
        ledger = ledger._replace(wake=ledger.wake.plus(wake))
        return ledger._replace(lost=self._most(ledger) - self.level(ledger))

    def taken_over(self, ledger: Ledger, before: Budget) -> Ledger:
        """The ledger when this budget takes the place of `before`.

        What could be spent then can be spent now, as far as this bucket holds it and this ratio
        would have earned it; nothing is earned after the fact.
        """
        most = self._most(ledger)
        return self.earn(ledger._replace(lost=most - min(most, before.level(ledger))), Cost())

    def spend(self, ledger: Ledger, kind: Asleep, cost: Cost) -> Ledger:
        """The ledger after paying; to be called before the work is done.

        Raises:
            ValueError: it costs more than the level.
        """
        level = self.level(ledger)
        if cost.flops > level:
            raise ValueError(f"{kind} of {cost.flops:,} FLOPs with a budget of {level:,} left")
        return ledger._replace(**{kind: getattr(ledger, kind).plus(cost)})

    def waste(self, ledger: Ledger, cost: Cost) -> Ledger:
        """The ledger when sleep that was paid for is thrown away."""
        return ledger._replace(sleep=ledger.sleep.minus(cost), wasted=ledger.wasted.plus(cost))

    def _most(self, ledger: Ledger) -> int:
        """The level if nothing had been lost."""
        earned = math.floor(Fraction(self.offline_ratio) * ledger.wake.flops)
        return earned + ledger.granted - ledger.asleep.flops
