"""When sleep is wanted, counted over whole streams."""

from __future__ import annotations

import itertools
import random

import pytest

from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.consolidation.triggers import (
    Signals,
    TriggerState,
    after_sleep,
    observe,
    wanted,
)

WINDOW = 256


def stream(config, segments, surprise=lambda n: 1.0, pressure=lambda n: 0.0, gains=lambda n: True):
    """Tokens at which sleeps happened, and what asked; segments are lengths."""
    state, tokens, slept = TriggerState(), 0, []
    for number, length in enumerate(segments):
        tokens += length
        signals = Signals(length, surprise(number), pressure(number))
        state = observe(config, state, signals)
        if trigger := wanted(config, state, signals, WINDOW):
            slept.append((tokens, trigger))
            state = after_sleep(state, gains(number))
    return slept


@pytest.mark.parametrize("segment", [64, 2048, 3000])
@pytest.mark.parametrize(("trigger", "period"), [("every", 6144), ("eviction", WINDOW)])
def test_the_number_of_sleeps_that_count_tokens_is_a_closed_form(segment, trigger, period):
    config = SleepConfig(trigger=(trigger,), every=6144)
    slept = stream(config, [segment] * 100, gains=lambda n: n % 3 == 0)
    between = -(-period // segment)  # segments from one sleep to the next
    assert len(slept) == 100 // between
    assert [tokens for tokens, _ in slept] == [
        segment * between * (i + 1) for i in range(len(slept))
    ]


def test_pressure_asks_from_the_high_mark_down_to_the_low_one():
    config = SleepConfig(trigger=("pressure",), every=1, high=0.8, low=0.5)
    course = [0.1, 0.7, 0.79, 0.8, 0.7, 0.6, 0.51, 0.5, 0.6, 0.79, 0.9]
    slept = stream(config, [1] * len(course), pressure=course.__getitem__)
    assert [tokens - 1 for tokens, _ in slept] == [3, 4, 5, 6, 10]


def test_surprise_asks_when_more_than_usual_has_summed_up():
    config = SleepConfig(trigger=("surprise",), every=100, surprise=500.0)
    assert stream(config, [100] * 200) == []  # always the same: nothing is above the mean
    burst = stream(config, [100] * 200, surprise=lambda n: 3.0 if 50 <= n < 60 else 1.0)
    assert burst and 5_000 < burst[0][0] <= 6_000 and len(burst) <= 4


def test_a_stream_of_noise_is_slept_on_less_and_less():
    draw = random.Random(1)
    noise = [draw.expovariate(1.0) for _ in range(20_000)]
    config = SleepConfig(trigger=("surprise",), every=100, surprise=10.0)
    useful = stream(config, [100] * 20_000, surprise=noise.__getitem__)
    in_vain = stream(config, [100] * 20_000, surprise=noise.__getitem__, gains=lambda n: False)
    assert len(useful) > 5_000 and len(in_vain) < 50
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(in_vain)]
    assert gaps == sorted(gaps) or max(gaps) >= 100 * 2**10


def test_a_sleep_that_gains_something_ends_the_back_off():
    state = TriggerState(in_vain=9, since=5)
    assert after_sleep(state, gained=True) == TriggerState()
    assert after_sleep(state, gained=False) == TriggerState(in_vain=10)


def test_any_of_several_triggers_asks_and_the_first_one_is_told():
    config = SleepConfig(trigger=("pressure", "every"), every=1000)
    slept = stream(config, [100] * 30, pressure=lambda n: 0.9 if n > 12 else 0.0)
    assert slept == [(1000, "every"), (2000, "pressure"), (3000, "pressure")]


def test_idle_asks_when_nothing_is_left_to_read_and_only_once():
    config, state = SleepConfig(trigger=("idle",)), TriggerState()
    busy, idle = Signals(10, 1.0, 1.0), Signals(0, 1.0, 1.0, idle=True)
    assert wanted(config, state, idle, WINDOW) is None  # nothing was read
    state = observe(config, state, busy)
    assert wanted(config, state, busy, WINDOW) is None
    assert wanted(config, state, idle, WINDOW) == "idle"
    assert wanted(config, after_sleep(state, False), idle, WINDOW) is None
