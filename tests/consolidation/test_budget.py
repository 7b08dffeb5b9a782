"""The budget of sleep: thousands of random lives, none of which spends more than it earned."""

import math
import random
from fractions import Fraction

import pytest

from wakesleep.consolidation.budget import Budget, Cost, Ledger


def live(seed: int):
    """Read, sleep, be rejected, be interrupted, change the budget: every ledger on the way."""
    draw = random.Random(seed)
    ratio = draw.choice([0.0, 0.1, 0.25, 1 / 3, 1.0, 2.5, 10 ** draw.uniform(-6, 2)])
    burst = draw.choice([math.inf, 0, 1e3, 10 ** draw.uniform(0, 12)])
    budget, ledger = Budget(offline_ratio=ratio, burst=burst), Ledger()
    for _ in range(draw.randrange(1, 60)):
        ledger = budget.earn(ledger, Cost(draw.randrange(10 ** draw.randrange(1, 12))))
        yield budget, ledger
        for _ in range(draw.randrange(4)):
            unit = Cost(draw.randrange(1, 10 ** draw.randrange(1, 11)), draw.randrange(99), 0.5)
            gate = Cost(draw.randrange(10 ** draw.randrange(1, 8)))
            if unit.flops + gate.flops > budget.level(ledger):
                break
            ledger = budget.spend(ledger, "sleep", unit)
            yield budget, ledger
            if draw.random() < 0.2:  # interrupted: no gate, nothing of it stays
                ledger = budget.waste(ledger, unit)
                yield budget, ledger
                break
            ledger = budget.spend(ledger, "gate", gate)
            if draw.random() < 0.3:  # rejected
                ledger = budget.waste(ledger, unit)
            yield budget, ledger
        if draw.random() < 0.05:  # a sleep at rest, on a grant of its own
            extra = Ledger(granted=draw.randrange(10**9))
            extra = Budget().spend(extra, "sleep", Cost(draw.randrange(extra.granted + 1)))
            level, ledger = budget.level(ledger), ledger.with_extra(extra)
            assert budget.level(ledger) == level
            yield budget, ledger


def test_no_life_spends_more_than_it_earned():
    slept = 0
    for seed in range(3000):
        for budget, ledger in live(seed):
            earned = Fraction(budget.offline_ratio) * ledger.wake.flops + ledger.granted
            assert ledger.asleep.flops <= earned, seed
            assert min(min(cost) for cost in ledger[:4]) >= 0 and ledger.lost >= 0, seed
        slept += ledger.asleep.flops > 0
    assert 1000 < slept < 3000


def test_a_bucket_holds_no_more_than_its_burst():
    for seed in range(300):
        for budget, ledger in live(seed):
            assert budget.level(ledger) <= budget.burst


def test_a_unit_that_costs_more_than_is_left_is_not_paid_and_one_that_costs_all_is():
    budget = Budget(offline_ratio=0.25)
    ledger = budget.earn(Ledger(), Cost(401))
    with pytest.raises(ValueError, match=r"sleep of 101 FLOPs with a budget of 100 left"):
        budget.spend(ledger, "sleep", Cost(101))
    ledger = budget.spend(ledger, "sleep", Cost(100))
    assert budget.level(ledger) == 0


def test_the_ratio_is_exact_where_floating_point_is_not():
    wake = 10**22 + 7
    budget = Budget(offline_ratio=0.1)
    level = budget.level(budget.earn(Ledger(), Cost(wake)))
    assert level <= Fraction(0.1) * wake < level + 1


def test_without_a_ratio_nothing_can_be_spent():
    ledger = Budget().earn(Ledger(), Cost(10**15))
    assert Budget().level(ledger) == 0
    with pytest.raises(ValueError, match="gate"):
        Budget().spend(ledger, "gate", Cost(1))


def test_what_is_rejected_stays_paid():
    budget = Budget(offline_ratio=1.0)
    ledger = budget.earn(Ledger(), Cost(100))
    ledger = budget.spend(ledger, "sleep", Cost(60, 7, 1.5))
    level = budget.level(ledger)
    ledger = budget.waste(ledger, Cost(60, 7, 1.5))
    assert budget.level(ledger) == level
    assert (ledger.sleep, ledger.wasted) == (Cost(), Cost(60, 7, 1.5))


def test_a_smaller_ratio_after_the_fact_stops_sleep_until_it_is_paid_back():
    ledger = Budget(offline_ratio=1.0).earn(Ledger(), Cost(100))
    ledger = Budget(offline_ratio=1.0).spend(ledger, "sleep", Cost(100))
    assert Budget(offline_ratio=0.5).level(ledger) == -50
    later = Budget(offline_ratio=0.5).earn(ledger, Cost(120))
    assert Budget(offline_ratio=0.5).level(later) == 10


@pytest.mark.parametrize(("ratio", "burst", "level"), [
    (0.1, 1e9, 10**9), (1.0, 1e9, 10**9), (1.0, 1e6, 10**6), (1.0, math.inf, 10**9),
    (0.25, 1e9, 10**9), (0.0, 1e9, 0),
])  # fmt: skip
def test_what_was_saved_up_is_there_under_another_ratio_or_burst(ratio, burst, level):
    before = Budget(offline_ratio=0.25, burst=1e9)
    ledger, after = before.earn(Ledger(), Cost(10**12)), Budget(offline_ratio=ratio, burst=burst)
    ledger = after.taken_over(ledger, before)
    assert after.level(ledger) == level
    more = after.level(after.earn(ledger, Cost(10**6)))
    assert more == min(burst, level + math.floor(Fraction(ratio) * 10**6))


def test_a_change_of_budget_never_adds_anything_and_the_same_one_changes_nothing():
    last = None
    for seed in range(300):
        for budget, ledger in live(seed):
            assert budget.taken_over(ledger, budget) == ledger
            if last is not None:
                old = budget.level(ledger)
                changed = last.taken_over(ledger, budget)
                level, earned = (
                    last.level(changed),
                    Fraction(last.offline_ratio) * ledger.wake.flops,
                )
                assert level <= min(old, last.burst) and changed.lost >= 0
                assert level + changed.asleep.flops <= earned + changed.granted
        last = budget


@pytest.mark.parametrize(
    "options",
    [{"offline_ratio": -0.1}, {"offline_ratio": math.nan}, {"offline_ratio": 1e7}, {"burst": -1}],
)
def test_absurd_budgets_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be from 0"):
        Budget(**options)
