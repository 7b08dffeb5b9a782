"""One sleep while it goes on, whatever its rule: what it may spend, and whether it is taken.

At the end, what was read last must be predicted as well as before; a lane where it is not is put
back, bit for bit, and what was spent on it is booked as wasted.

Shapes: B lanes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wakesleep.consolidation.budget import Asleep, Cost, Ledger
from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.consolidation.tail import harm, tail_flops, tail_nats
from wakesleep.ttl.flops import most_keys
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import StreamState, merge

INTERRUPTED = "interrupted"


class SleepReport(NamedTuple):
    """What one sleep did; counts are over all lanes, layers and heads."""

    units: int  # that were written and judged, or passes that were made
    written: int  # pairs that became known
    rejected: int  # writes of heads that the gate refused
    rules: dict[str, int]  # of these, by the rule that refused the full step
    released: int  # places of the store
    audit: float | None  # share of the sealed pairs that are known; None without any
    tail_before: float | None  # nats per token of the window; None if it was not asked
    tail_after: float | None
    reason: str  # why it ended
    accepted: bool  # False: in no lane did anything change
    seconds: float


class Night(ABC):
    """A state that nobody else has seen, and what it cost; one subclass per kind of sleep."""

    def __init__(
        self, model: TTLModel, state: StreamState, config: SleepConfig, ledger: Ledger
    ) -> None:
        self.model, self.config = model, config
        self.start, self.state = state, state
        self.before, self.ledger = ledger, ledger
        self.begin, self.gate_seconds = time.monotonic(), 0.0
        self.units = self.written = self.rejected = self.released = 0
        self.rules: dict[str, int] = {}
        self.tail: Tensor | None = None
        self.tail_cost = Cost(tail_flops(model, state))
        self.most_tail_cost = Cost(tail_flops(model, state, most_keys(model.config)))

    @property
    @abstractmethod
    def questions(self) -> Cost:
        """What is asked at the end beside the window."""

    @property
    @abstractmethod
    def unit_flops(self) -> int:
        """FLOPs of one unit with all that judges it, at most."""

    @abstractmethod
    def work(self, stop: Callable[[], bool]) -> str:
        """Change the state unit by unit; returns why it ended."""

    @property
    @abstractmethod
    def changed(self) -> bool:
        """Whether anything was."""

    @abstractmethod
    def unharmed(self) -> tuple[Tensor, float | None, str]:
        """Lanes [B] bool that keep what they knew, share of the sealed pairs known, what if not."""

    def settled(self) -> StreamState:
        """What the lanes that are taken go on with."""
        return self.state

    @property
    def last_cost(self) -> Cost:
        """What all questions at the end cost at most: sleep lets the softmax see more keys."""
        return total(self.most_tail_cost, self.questions)

    @property
    def least(self) -> int:
        """FLOPs of a look at the window, one unit, and the last look."""
        return self.tail_cost.flops + self.last_cost.flops + self.unit_flops

    def run(self, stop: Callable[[], bool]) -> str:
        """Ask for the window, then work; returns why it ended."""
        if self.config.does_nothing:
            return f"passes={self.config.num_passes} leaves nothing to do"
        if self.config.bucket.level(self.ledger) < self.least:
            return "the budget is smaller than one unit"
        self.spend("gate", self.tail_cost)
        with self.judging():
            self.tail = tail_nats(self.model, self.start)
        return self.work(stop)

    def finish(self, reason: str) -> tuple[StreamState, Ledger, SleepReport]:
        """Take the lanes where nothing was harmed, and put the others back."""
        before = after = audited = None
        lanes = torch.full_like(self.start.position, self.changed, dtype=torch.bool)
        if self.changed:
            tail = Cost(tail_flops(self.model, self.state))
            self.spend("gate", total(tail, self.questions))
            with self.judging():
                lanes, audited, why = self.unharmed()
            reason = reason if bool(lanes.any()) or reason == INTERRUPTED else why
        if bool(lanes.any()) and self.tail is not None:
            with self.judging():
                found = harm(self.tail, tail_nats(self.model, self.state))
            lanes = lanes & ((found.most <= self.config.tail_loss) | ~found.asked)
            if bool(found.asked.any()):
                before, after = (_mean(t[found.asked]) for t in (found.before, found.after))
            if not bool(lanes.any()) and reason != INTERRUPTED:
                reason = "the window was predicted worse"
        accepted = bool(lanes.any())
        state = merge(lanes, self.settled(), self.start) if accepted else self.start
        seconds = time.monotonic() - self.begin
        ledger = self.ledger._replace(
            sleep=self.ledger.sleep.plus(Cost(seconds=seconds - self.gate_seconds)),
            gate=self.ledger.gate.plus(Cost(seconds=self.gate_seconds)),
        )
        spent = ledger.sleep.minus(self.before.sleep)
        back = int((~lanes).sum())
        ledger = self.config.bucket.waste(ledger, share(spent, back, len(lanes)))
        report = SleepReport(
            units=self.units,
            written=self.written,
            rejected=self.rejected,
            rules=self.rules,
            released=self.released,
            audit=audited,
            tail_before=before,
            tail_after=after,
            reason=reason,
            accepted=accepted,
            seconds=seconds,
        )
        return state, ledger, report

    @contextlib.contextmanager
    def judging(self) -> Iterator[None]:
        """Count the seconds in here as the gate's."""
        begin = time.monotonic()
        yield
        self.gate_seconds += time.monotonic() - begin

    def affords(self, cost: Cost) -> bool:
        """Whether this can be paid, and the last questions after it."""
        level = self.config.bucket.level(self.ledger)
        return cost.flops + self.last_cost.flops <= level

    def spend(self, kind: Asleep, cost: Cost) -> None:
        """Pay, before the work is done."""
        self.ledger = self.config.bucket.spend(self.ledger, kind, cost)


def _mean(x: Tensor) -> float | None:
    """The mean, None if it is not finite."""
    mean = float(x.mean())
    return mean if math.isfinite(mean) else None


def share(cost: Cost, part: int, of: int) -> Cost:
    """`part` of `of` equal parts."""
    return Cost(cost.flops * part // of, cost.nbytes * part // of, cost.seconds * part / of)


def total(*costs: Cost) -> Cost:
    """The cost of all."""
    return functools.reduce(Cost.plus, costs, Cost())
