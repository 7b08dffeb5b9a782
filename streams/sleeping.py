"""Sleep between the segments of a stream: when it is wanted, can be paid, and what it came to.

What is decided depends on what was read and spent alone, and a sleep draws from a generator of its
own number: a stream that was killed and resumed sleeps where, and as, it would have.

Of several lanes those sleep together that are in the middle of a document, once all of these stand
at a boundary of chunks. What a lane whose document has ended holds is forgotten with the next one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from wakesleep.consolidation.budget import Ledger
from wakesleep.consolidation.night import INTERRUPTED
from wakesleep.consolidation.sleep import (
    check_model,
    least_cost,
    pressure,
    sleep,
)
from wakesleep.consolidation.sleep_config import SleepConfig, Trigger
from wakesleep.consolidation.triggers import Signals, after_sleep, observe, wanted
from wakesleep.streams.errors import Refused
from wakesleep.streams.quantities import count
from wakesleep.streams.runner import StreamRunner, store_fill
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import StreamState, put, select


def check_sleep(config: SleepConfig, model: TTLModel) -> None:
    """Refuse a rule that a model cannot sleep by.

    Raises:
        Refused: the model has nothing that sleep could write.
    """
    try:
        check_model(model, config)
    except ValueError as error:
        needs = "with a store and fast weights that sleep alone writes (fast.write=asleep)"
        if not config.replays:
            needs = "whose fast weights are written awake, trained with train.passes"
        remedy = f"use a model {needs}; sleep.rule=none leaves sleep out"
        raise Refused(str(error), "", remedy) from error


class Sleeper:
    """Sleep for a runner; what it remembers is in the runner's meters."""

    def __init__(self, config: SleepConfig, seed: int, runner: StreamRunner) -> None:
        """seed: the session's."""
        self.config, self.seed, self.runner = config, seed, runner
        self.lanes: np.ndarray | None = None  # [B] bool, those that sleep; None: all

    def observe(self) -> None:
        """Take note of the segment that was just read."""
        meters = self.runner.meters
        signals = self._signals()._replace(segment=self.runner.last_len)
        meters.triggers = observe(self.config, meters.triggers, signals)

    def due(self, *, idle: bool = False) -> Trigger | None:
        """What asks for sleep, if it may have it: at a boundary of chunks, with budget for a unit.

        Args:
            idle: nothing is left to read; to the trigger of that name any place will do.
        """
        config = self.config
        if config.does_nothing or not self._numbers.numel():
            return None
        if any(self._to_boundary):
            if not idle or "idle" not in config.triggers:
                return None
            config = dataclasses.replace(config, trigger=("idle",))
        return self._asks(config, idle)

    def reach(self) -> list[int] | None:
        """Tokens of every lane to a boundary, if sleep is due but for that; 0 of those awake."""
        ahead = self._to_boundary
        if self.config.does_nothing or not any(ahead) or self._asks(self.config) is None:
            return None
        return ahead

    def unpaid(self, *, ever: bool = False) -> str | None:
        """Why sleep that is wanted is not paid for, in words; None if it is, or none is wanted.

        Args:
            ever: only if the bucket can never hold enough for it.
        """
        config = self.config
        if config.does_nothing or not config.offline_ratio or (ever and math.isinf(config.burst)):
            return None
        if not self._numbers.numel():
            return None
        if self._wanted(config, idle=not ever) is None:
            return None
        least, holds = self.least, [("sleep.burst", config.burst)]
        holds += [] if ever else [("the budget", self.level)]
        words = f"a sleep takes {count(least)} FLOPs at least"
        return next(
            (f"{words}, {name} is {count(has)}" for name, has in holds if has < least), None
        )

    @property
    def level(self) -> int:
        """FLOPs that may be spent on sleep now."""
        return self.config.bucket.level(self.runner.meters.ledger)

    @property
    def least(self) -> int:
        """FLOPs below which a sleep would not begin."""
        return least_cost(self.runner.language_model.model, self._state, self.config)

    def sleep(
        self, trigger: str, stop: Callable[[], bool], grant: int | None = None
    ) -> dict[str, Any] | None:
        """Sleep once, and tell what came of it; None if `stop` said so: then nothing happened.

        What that cost is counted, but not paid from the budget, or sleep would come later than in a
        stream that was not interrupted.

        Args:
            grant: FLOPs that may be spent, beside the budget; None: what the budget has.
        """
        runner, meters, config = self.runner, self.runner.meters, self.config
        before = meters.ledger
        if grant is not None:
            config = dataclasses.replace(config, offline_ratio=0.0, burst=math.inf)
            before = Ledger(granted=grant)
        number = (self.seed * 1_000_003 + meters.sleeps) % 2**63
        generator = torch.Generator().manual_seed(number)
        model = runner.language_model.model
        state, ledger, report = sleep(model, self._state, config, before, generator, stop)
        if report.reason == INTERRUPTED:
            meters.interrupted_flops += ledger.asleep.flops - before.asleep.flops
            return None
        if report.accepted:
            whole = put(runner.state, self._numbers, state)
            runner.carried = runner.carried._replace(stream=whole)
        meters.ledger = ledger if grant is None else meters.ledger.with_extra(ledger)
        meters.sleeps += 1
        meters.triggers = after_sleep(meters.triggers, gained=report.accepted)
        return {
            "tokens": runner.tokens,
            "trigger": trigger,
            "rule": config.rule,
            **report._asdict(),
            "sleep_flops": ledger.sleep.flops - before.sleep.flops,
            "gate_flops": ledger.gate.flops - before.gate.flops,
            "wasted_flops": ledger.wasted.flops - before.wasted.flops,
            "store_fill": store_fill(runner.state),
        }

    @property
    def _numbers(self) -> torch.Tensor:
        """Numbers [n] int64 of the lanes that sleep."""
        position = self.runner.state.position
        lanes = np.ones(len(position), dtype=bool) if self.lanes is None else self.lanes
        return torch.from_numpy(lanes.nonzero()[0]).to(position.device)

    @property
    def _state(self) -> StreamState:
        """The state of these lanes."""
        state, numbers = self.runner.state, self._numbers
        return state if len(numbers) == len(state.position) else select(state, numbers)

    @property
    def _to_boundary(self) -> list[int]:
        """Tokens of every lane to its next boundary of chunks; 0 at one, and of those awake."""
        chunk = self.runner.language_model.model.config.chunk
        position, numbers = self.runner.state.position, self._numbers
        ahead = torch.zeros_like(position)
        return ahead.index_copy(0, numbers, -position[numbers] % chunk).tolist()

    def _asks(self, config: SleepConfig, idle: bool = False) -> Trigger | None:
        """What asks for sleep and has the budget for it, here or at the next boundary."""
        asks = self._wanted(config, idle)
        return None if asks is None or self.level < self.least else asks

    def _wanted(self, config: SleepConfig, idle: bool) -> Trigger | None:
        model, state = self.runner.language_model.model, self.runner.state
        return wanted(
            config,
            self.runner.meters.triggers,
            self._signals(idle=idle),
            model.config.recent or model.window_of(state),
        )

    def _signals(self, idle: bool = False) -> Signals:
        model = self.runner.language_model.model
        return Signals(
            segment=0,
            surprise=self.runner.last_surprise,
            pressure=pressure(model, self._state, self.config),
            idle=idle,
        )
