"""Triggers: when a system wants to sleep. Whether it may is the budget's business.

    every      `every` tokens were read since the last sleep
    eviction   as many tokens as the window holds were read since the last sleep
    pressure   the store is nearly full, until sleep has made room
    surprise   more surprise than usual has summed up since the last sleep
    idle       nothing is left to read

Several of them ask together (any). Surprise alone would ask for ever on a stream of noise: sleeps
that come to nothing double the distance to the next one, except for the two that count tokens.

The state is a tuple of plain numbers: what was observed goes in, the next state comes out.
"""

from __future__ import annotations

from typing import NamedTuple

from wakesleep.consolidation.sleep_config import SleepConfig, Trigger

HORIZON = 65_536  # tokens over which the running mean of surprise forgets
MOST_DOUBLINGS = 10
PATIENCE = 2  # sleeps in a row that may come to nothing before the distance is doubled


class TriggerState(NamedTuple):
    """What triggers remember of a stream."""

    since: int = 0  # tokens read since the last sleep
    pressed: bool = False  # the pressure was high, and has not been low since
    weight: float = 0.0  # tokens that the mean of surprise stands for
    mean: float = 0.0  # of surprise
    excess: float = 0.0  # surprise above the mean since the last sleep
    in_vain: int = 0  # sleeps in a row that came to nothing


class Signals(NamedTuple):
    """What is known of a stream at a boundary between segments; of several lanes, the means."""

    segment: int  # tokens of the last segment, of several lanes those of the longest
    surprise: float  # mean of the last segment
    pressure: float  # share of the store's places that hold a pair
    idle: bool = False  # nothing is left to read


def observe(config: SleepConfig, state: TriggerState, signals: Signals) -> TriggerState:
    """The state after a segment was read."""
    n = signals.segment
    above = max(0.0, signals.surprise - state.mean) * n if state.weight else 0.0
    weight = min(state.weight, HORIZON) + n
    mean = state.mean + (signals.surprise - state.mean) * n / max(weight, 1)
    pressed = signals.pressure >= config.high or (state.pressed and signals.pressure > config.low)
    seen = state._replace(weight=weight, mean=mean, excess=state.excess + above, pressed=pressed)
    return seen._replace(since=state.since + n)


def wanted(
    config: SleepConfig, state: TriggerState, signals: Signals, window: int
) -> Trigger | None:
    """The first trigger that asks for sleep now, None if none does."""
    since = state.since
    doublings = min(state.in_vain // PATIENCE, MOST_DOUBLINGS)
    apart = since >= config.every * 2**doublings
    for trigger in config.triggers:
        match trigger:
            case "every":
                asks = since >= config.every
            case "eviction":
                asks = since >= window
            case "pressure":
                asks = apart and state.pressed
            case "surprise":
                asks = apart and state.excess >= config.surprise * state.mean > 0
            case "idle":
                asks = signals.idle and since > 0
        if asks:
            return trigger
    return None


def after_sleep(state: TriggerState, gained: bool) -> TriggerState:
    """The state after a sleep, which wrote or released something if it `gained`."""
    in_vain = 0 if gained else state.in_vain + 1
    return state._replace(since=0, excess=0.0, in_vain=in_vain)
