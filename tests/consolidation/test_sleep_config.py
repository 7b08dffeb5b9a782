"""Settings of sleep that cannot be."""

import math

import pytest

from wakesleep.consolidation.sleep_config import SleepConfig


@pytest.mark.parametrize(
    "options",
    [
        {"offline_ratio": -1.0},
        {"offline_ratio": math.inf},
        {"burst": math.nan},
        {"passes": -1},
        {"span_tokens": 0},
        {"every": 0},
        {"high": 0.05},
        {"low": -0.1},
        {"surprise": 0.0},
        {"tolerance": 1.0},
        {"tail_loss": math.nan},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        SleepConfig(**options)


def test_by_default_nothing_sleeps():
    assert SleepConfig().rule == "none"
