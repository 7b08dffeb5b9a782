"""Sleep by recurrence and over spans of the store: what it costs, changes and puts back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wakesleep.consolidation import night, passes_sleep
from wakesleep.consolidation import sleep as sleeping
from wakesleep.consolidation.budget import Cost, Ledger
from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.consolidation.spans import stored_spans
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.resize import clear_window
from wakesleep.ttl.state import RecentState, named_tensors, select
from wakesleep.ttl.store import StoreConfig

VOCAB, B, L = 61, 2, 16
PLENTY = Ledger(wake=Cost(10**12))
WRITES = {f"blocks.{layer}.fast.s" for layer in (0, 2)}
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    dim=24,
    num_layers=3,
    num_heads=2,
    head_dim=16,
    mlp_dim=32,
    window=L,
    chunk=4,
    memory_layers=(1,),
    store_layers=(0, 2),
    fast_layers=(0, 2),
    recent=L,
    memory=MemoryConfig(kind="matrix"),
    store=StoreConfig(capacity=20, hidden=8),
    fast=FastConfig(write="always", passes=4),
)
rules = pytest.mark.parametrize("rule", ["recurrent", "cross"])


@pytest.fixture(scope="module")
def model() -> TTLModel:
    torch.manual_seed(4)
    return TTLModel(CONFIG).eval()


def read(model, state=None, length=88, seed=0):
    tokens = torch.randint(VOCAB, (B, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(tokens, model.init_state(B) if state is None else state)[1]


def sleep(model, state, rule, ledger=PLENTY, stop=lambda: False, **options):
    defaults = {"rule": rule, "offline_ratio": 1.0, "tail_loss": 9.0, "tolerance": 0.5, "passes": 4}
    config = SleepConfig(**{**defaults, **options})
    return sleeping.sleep(model, state, config, ledger, torch.Generator().manual_seed(0), stop)


def changed(a, b) -> set[str]:
    pairs = zip(named_tensors(a), named_tensors(b), strict=True)
    return {name for (name, x), (_, y) in pairs if not torch.equal(x, y)}


def spent(ledger: Ledger) -> int:
    return ledger.sleep.flops + ledger.gate.flops + ledger.wasted.flops


@torch.inference_mode()
def test_recurrence_is_passes_two_to_n_and_changes_fast_weights_alone(model):
    state = read(model)
    after, ledger, report = sleep(model, state, "recurrent")
    expected = state
    for _ in range(3):
        expected = model.sleep_pass(expected)
    assert changed(state, after) == WRITES and report.units == 3
    for layer in (0, 2):
        assert torch.equal(after.blocks[layer].fast.s, expected.blocks[layer].fast.s)
    assert report.accepted and report.reason == "all passes were made"
    assert ledger.sleep.flops > 0 == ledger.wasted.flops
    assert ledger.asleep.seconds == pytest.approx(report.seconds)


@torch.inference_mode()
def test_spans_meet_in_the_fast_weights_alone(model):
    state = read(model)
    after, _, report = sleep(model, state, "cross", span_tokens=40)
    assert changed(state, after) == WRITES and report.units == 3
    ids, positions = stored_spans(state, 40, 4)
    assert len(ids) > 1
    rows = [
        RecentState(i, p, model.embedding(i.clamp(min=0)) * CONFIG.dim**0.5)
        for i, p in zip(ids, positions, strict=True)
    ]
    expected = state
    for _ in range(3):
        for index, row in enumerate(rows):
            # a state whose windows and stores are empty: what is read comes from the fast weights
            fresh = model.init_state(B)
            blocks = tuple(
                old._replace(window=new.window, store=new.store)
                for old, new in zip(expected.blocks, fresh.blocks, strict=True)
            )
            alone = model.sleep_pass(expected._replace(blocks=blocks, recent=row))
            rows[index] = alone.recent
            fast = zip(expected.blocks, alone.blocks, strict=True)
            expected = expected._replace(
                blocks=tuple(old._replace(fast=new.fast) for old, new in fast)
            )
    for layer in (0, 2):
        got, want = after.blocks[layer].fast.s, expected.blocks[layer].fast.s
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@rules
@pytest.mark.parametrize(
    ("options", "wake"), [({"offline_ratio": 0.0}, 10**12), ({}, 0), ({"passes": 1}, 10**12)]
)
@pytest.mark.parametrize("evict", ["keep", "hard"])
def test_without_budget_or_with_one_pass_no_bit_changes(model, rule, options, wake, evict):
    state = read(model)
    after, ledger, report = sleep(
        model, state, rule, Ledger(wake=Cost(wake)), evict=evict, **options
    )
    assert not changed(state, after) and not report.accepted and spent(ledger) == 0


@rules
def test_whatever_the_budget_it_is_never_exceeded_and_more_of_it_does_more(model, rule):
    state, units = read(model), []
    total = spent(sleep(model, state, rule)[1])
    for wake in [1, total // 3, total // 2, 2 * total // 3, total - 1, total, 2 * total]:
        _, ledger, report = sleep(model, state, rule, Ledger(wake=Cost(wake)))
        assert spent(ledger) <= wake
        units.append(report.units)
    assert units == sorted(units) and units[0] == 0 and units[-2:] == [3, 3]
    assert 0 < units[-3] < 3


@rules
def test_what_is_paid_is_at_least_what_torch_counts(model, rule):
    state = read(model)
    with FlopCounterMode(display=False) as counter:
        _, ledger, _ = sleep(model, state, rule)
    assert 0 <= spent(ledger) - counter.get_total_flops() < 0.15 * spent(ledger)


@rules
@torch.inference_mode()
def test_hard_eviction_leaves_the_window_empty_where_sleep_was_taken(model, rule, monkeypatch):
    state = read(model)
    kept = sleep(model, state, rule)[0]
    after, _, report = sleep(model, state, rule, evict="hard")
    assert report.accepted and not changed(after, clear_window(model, kept))
    nats, calls = night.tail_nats, []

    def spoiled(model, state):
        calls.append(nats(model, state))
        if len(calls) == 2:
            calls[-1][1] += 20.0
        return calls[-1]

    monkeypatch.setattr(night, "tail_nats", spoiled)
    half, ledger, _ = sleep(model, state, rule, evict="hard")
    first, second = torch.tensor([0]), torch.tensor([1])
    assert not changed(select(half, first), select(after, first))
    assert not changed(select(half, second), select(state, second))
    assert ledger.wasted.flops == pytest.approx(ledger.sleep.flops, abs=1)


@rules
@pytest.mark.parametrize("factor", [-1.0, 50.0])
def test_a_lane_that_loses_what_it_knew_or_shouts_at_noise_is_put_back(
    model, rule, factor, monkeypatch
):
    state, ordinary = read(model), TTLModel.sleep_pass

    def harmful(self, state, *given, **named):
        after = ordinary(self, state, *given, **named)
        blocks = list(after.blocks)
        s = blocks[2].fast.s.clone()
        s[1] *= factor
        blocks[2] = blocks[2]._replace(fast=blocks[2].fast._replace(s=s))
        return after._replace(blocks=tuple(blocks))

    monkeypatch.setattr(TTLModel, "sleep_pass", harmful)
    after, ledger, report = sleep(model, state, rule, passes=2)
    lanes = [bool(changed(select(state, t), select(after, t))) for t in torch.arange(2)[:, None]]
    assert lanes == [True, False] and report.accepted and ledger.wasted.flops > 0


@rules
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fast_weights_that_are_not_finite_are_put_back(rule, bad, monkeypatch):
    """Also where neither stored pairs nor a full window would show it."""
    model = TTLModel(replace(CONFIG, store_layers=(2,), window=32)).eval()
    state, ordinary = read(model, length=24), TTLModel.sleep_pass
    if rule == "cross":
        state = state._replace(blocks=(state.blocks[0], state.blocks[1], read(model).blocks[2]))

    def broken(self, state, *given, **named):
        after = ordinary(self, state, *given, **named)
        blocks = list(after.blocks)
        s = blocks[0].fast.s.clone()
        s[:, 0, 0, 0] = bad
        blocks[0] = blocks[0]._replace(fast=blocks[0].fast._replace(s=s))
        return after._replace(blocks=tuple(blocks))

    monkeypatch.setattr(TTLModel, "sleep_pass", broken)
    after, ledger, report = sleep(model, state, rule)
    assert not changed(state, after) and not report.accepted
    assert report.reason == "stored pairs were given back worse" and ledger.sleep.flops == 0


@rules
def test_an_interrupted_sleep_keeps_the_passes_that_were_made(model, rule):
    state, asked = read(model), []
    after, _, report = sleep(model, state, rule, stop=lambda: len(asked) == 2 or asked.append(1))
    assert report.reason == "interrupted" and report.units == 2
    assert not changed(after, sleep(model, state, rule, passes=3)[0])


@rules
def test_inside_a_chunk_what_reading_has_not_written_is_left_out(model, rule):
    state = read(model)
    on = read(model, state, length=3, seed=1)
    after, _, report = sleep(model, on, rule)
    assert report.accepted and changed(on, after) == WRITES
    seen = on.recent
    if rule == "recurrent":
        spoiled = seen._replace(hidden=torch.cat([seen.hidden[:, :-3], torch.randn(B, 3, 24)], 1))
        again = sleep(model, on._replace(recent=spoiled), rule)[0]
        for layer in (0, 2):
            assert torch.equal(again.blocks[layer].fast.s, after.blocks[layer].fast.s)
    one = read(model, after, length=9, seed=2)
    assert all(t.isfinite().all() for name, t in named_tensors(one) if name.endswith("fast.s"))
    untouched, ledger, report = sleep(model, on, rule, evict="hard")
    assert not changed(on, untouched) and spent(ledger) == 0
    assert "boundary of chunks" in report.reason


def test_an_empty_store_is_slept_over_without_a_pass(model):
    state = read(model, length=8)
    after, ledger, report = sleep(model, state, "cross")
    assert not changed(state, after) and report.reason == "there is nothing to pass over"
    assert spent(ledger) == 0


@rules
def test_the_same_bits_again_and_lanes_do_not_see_each_other(model, rule):
    state = read(model)
    after = sleep(model, state, rule)[0]
    assert not changed(after, sleep(model, state, rule)[0])
    first = torch.tensor([0])
    alone = sleep(model, select(state, first), rule)[0]
    for layer in (0, 2):
        got, want = alone.blocks[layer].fast.s[0], after.blocks[layer].fast.s[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "options", "why"),
    [
        ("recurrent", {"recent": 0}, r"recent=0"),
        ("cross", {"store_layers": ()}, r"needs a store"),
        ("cross", {"fast": FastConfig(passes=4)}, r"fast.write=asleep"),
        ("recurrent", {"fast_layers": ()}, r"fast_layers \[\]"),
        ("recurrent", {"fast": FastConfig(write="always")}, r"fast.passes=1.*sleep.untrained=true"),
    ],
)
def test_a_model_that_cannot_sleep_so_is_refused(rule, options, why):
    without = TTLModel(replace(CONFIG, **options))
    with pytest.raises(ValueError, match=why):
        sleep(without, without.init_state(1), rule)
    if "untrained" in why:
        assert not sleep(without, without.init_state(1), rule, untrained=True)[2].accepted
    assert passes_sleep.check_passes(CONFIG, SleepConfig(rule=rule)) is None
