"""A whole sleep on a model that has read something: what it may spend, change, and put back."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wakesleep.consolidation import night
from wakesleep.consolidation import sleep as sleeping
from wakesleep.consolidation.budget import Cost, Ledger
from wakesleep.consolidation.replay import SAME_KEY
from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.consolidation.tail import tail_flops, tail_nats
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.key_space import unit_key
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import named_tensors, select
from wakesleep.ttl.store import StoreConfig

VOCAB, B, H, K = 61, 2, 2, 16
PLENTY = Ledger(wake=Cost(10**12))
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    dim=24,
    num_layers=3,
    num_heads=H,
    head_dim=K,
    mlp_dim=32,
    window=8,
    chunk=4,
    memory_layers=(1,),
    store_layers=(0, 2),
    fast_layers=(0, 2),
    memory=MemoryConfig(kind="matrix"),
    store=StoreConfig(capacity=40, hidden=8),
)


@pytest.fixture(scope="module")
def model() -> TTLModel:
    torch.manual_seed(4)
    return TTLModel(CONFIG).eval()


def read(model, state=None, length=90, seed=0, batch=B):
    tokens = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(tokens, model.init_state(batch) if state is None else state)[1]


USUAL = {"rule": "replay", "offline_ratio": 1.0, "tail_loss": 1.0, "worth": -9.0, "tolerance": 0.9}


def sleep(model, state, ledger=PLENTY, seed=0, stop=lambda: False, **options):
    generator = torch.Generator().manual_seed(seed)
    config = SleepConfig(**{**USUAL, **options})
    return sleeping.sleep(model, state, config, ledger, generator, stop)


def changed(a, b) -> set[str]:
    pairs = zip(named_tensors(a), named_tensors(b), strict=True)
    return {name for (name, x), (_, y) in pairs if not torch.equal(x, y)}


def test_sleep_writes_what_the_store_holds_and_changes_nothing_else(model):
    state = read(model)
    after, ledger, report = sleep(model, state)
    assert report.accepted and report.written > 20 and report.released == 0
    wrote = [f"blocks.{layer}.fast." for layer in (0, 2)]
    assert changed(state, after) and all(
        name.startswith(tuple(wrote)) for name in changed(state, after)
    )
    for layer in (0, 2):
        block = after.blocks[layer]
        told = torch.nn.functional.normalize(block.store.k, dim=-1) @ block.fast.s
        known = torch.cosine_similarity(told, block.store.v, dim=-1) >= 0.9
        marked = block.fast.asleep >= 0
        assert marked.sum() > 20 and not (marked & ~known).any()
    assert ledger.sleep.flops > 0 and ledger.wake == PLENTY.wake
    assert ledger.asleep.seconds == pytest.approx(report.seconds)
    assert ledger.sleep.seconds > 0 < ledger.gate.seconds


def test_heads_that_ask_for_other_things_than_keys_keep_their_pairs(model):
    state, deaf = read(model), copy.deepcopy(model)
    for layer in (0, 2):
        deaf.blocks[layer].attention.fast.space.explained[0] = 0.1
    after, ledger, report = sleep(deaf, state)
    later, _, second = sleep(deaf, after, ledger, seed=1)
    assert report.written > 0 and second.released > 0
    for before, now in zip(state.blocks, later.blocks, strict=True):
        if now.fast.asleep.numel():
            assert torch.equal(now.fast.s[:, 0], before.fast.s[:, 0])
            assert torch.equal(now.store.position[:, 0], before.store.position[:, 0])
            assert (now.store.position[:, 1] < 0).any()
    assert 0.0 < press(deaf, later) < 1.0
    position = torch.zeros_like(state.blocks[0].store.position)
    empty = state.blocks[0].store._replace(position=position.index_fill(1, torch.tensor([1]), -1))
    blocks = [b._replace(store=empty) if b.fast.asleep.numel() else b for b in state.blocks]
    assert press(deaf, state._replace(blocks=tuple(blocks))) == 0.0


def press(model, state, worth=-9.0) -> float:
    return sleeping.pressure(model, state, SleepConfig(worth=worth))


def test_a_second_sleep_frees_the_places_of_what_is_still_known(model):
    after, ledger, first = sleep(model, read(model))
    later, _, second = sleep(model, after, ledger, seed=1)
    assert 0 < second.released <= first.written
    for layer in (0, 2):
        store, marked = after.blocks[layer].store, after.blocks[layer].fast.asleep >= 0
        gone = (store.position >= 0) & (later.blocks[layer].store.position < 0)
        k = unit_key(store.k)
        same = (k @ k.mT >= SAME_KEY) & (store.position[:, :, None] > store.position[..., None])
        superseded = (same & marked[:, :, None]).any(-1)
        assert gone.any() and not (gone & ~marked & ~superseded).any()
    assert second.audit > 0.8


@pytest.mark.parametrize(
    ("options", "wake"), [({"offline_ratio": 0.0}, 10**12), ({}, 0), ({"passes": 0}, 10**12)]
)
def test_without_budget_or_passes_no_bit_changes(model, options, wake):
    awake, ledger = read(model), Ledger(wake=Cost(wake))
    for state in (awake, sleep(model, awake)[0]):  # the second one has places to free
        after, spent, report = sleep(model, state, ledger, **options)
        assert not changed(state, after) and not report.accepted
        assert spent.asleep[:2] == (0, 0) and report.written == report.released == 0


def test_whatever_the_budget_it_is_never_exceeded_and_more_of_it_does_more(model):
    state, written = read(model), []
    whole = sleep(model, state)[1]
    total = whole.sleep.flops + whole.gate.flops + whole.wasted.flops
    for wake in [1, total // 7, total // 3, total // 2, total - 1, total, 2 * total]:
        _, ledger, report = sleep(model, state, Ledger(wake=Cost(wake)))
        assert ledger.sleep.flops + ledger.gate.flops + ledger.wasted.flops <= wake
        written.append(report.written)
    assert written == sorted(written) and written[0] == 0 and written[2] > 0
    assert written[-1] == written[-2] > written[2]


def test_what_is_paid_is_at_least_what_torch_counts(model):
    state = read(model)
    with FlopCounterMode(display=False) as counter:
        _, ledger, report = sleep(model, state)
    paid = ledger.sleep.flops + ledger.gate.flops + ledger.wasted.flops
    factors = report.units * B * H * (-(-(K**3) // 3) + 2 * K**3)
    assert 0 <= paid - factors - counter.get_total_flops() < 0.05 * paid


def spoil(monkeypatch, change) -> None:
    """Let `change` alter how the window is predicted after sleep."""
    nats, calls = night.tail_nats, []

    def spoiled(model, state):
        calls.append(nats(model, state))
        if len(calls) == 2:
            change(calls[-1])
        return calls[-1]

    monkeypatch.setattr(night, "tail_nats", spoiled)


@pytest.mark.parametrize("lanes", [[1], [0, 1]])
def test_a_lane_that_predicts_its_window_worse_is_put_back(model, monkeypatch, lanes):
    state = read(model)
    _, usual, _ = sleep(model, state)

    def change(after):
        after[lanes] += 2.0

    spoil(monkeypatch, change)
    after, ledger, report = sleep(model, state)
    for lane in range(B):
        one = torch.tensor([lane])
        assert bool(changed(select(state, one), select(after, one))) == (lane not in lanes)
    assert report.accepted == (len(lanes) == 1) and report.tail_after > report.tail_before
    assert (report.reason == "the window was predicted worse") == (len(lanes) == 2)
    assert ledger.sleep.flops == pytest.approx(usual.sleep.flops * (1 - len(lanes) / B), abs=1)
    assert ledger.asleep.flops == usual.asleep.flops
    seconds = report.seconds - ledger.gate.seconds
    assert ledger.wasted.seconds == pytest.approx(seconds * len(lanes) / B)


@torch.no_grad()
@pytest.mark.parametrize(("worse", "taken"), [(0.0, True), (20.0, False), (float("nan"), False)])
def test_rows_of_the_window_that_are_not_finite_are_left_out_of_the_look_at_it(
    model, monkeypatch, worse, taken
):
    sick = copy.deepcopy(model)
    third = torch.arange(8)[:, None] == 3
    sick.norm.register_forward_hook(lambda module, given, x: x.masked_fill(third, torch.nan))
    state = read(model, length=88)
    nats = tail_nats(sick, state)
    assert 0 < nats.isnan().sum() < nats.numel()

    def change(after):
        after[nats.isfinite()] += worse

    spoil(monkeypatch, change)
    _, _, report = sleep(sick, state, tail_loss=0.5)
    assert report.accepted == taken
    assert report.tail_before == pytest.approx(float(nats.nanmean(1).mean()))
    assert (report.tail_after is None) == (worse != worse)
    assert (report.reason == "the window was predicted worse") == (not taken)


@torch.no_grad()
def test_a_lane_that_has_just_begun_does_not_hide_what_the_others_lose(model, monkeypatch):
    state = read(model)
    reset = model.reset(state, torch.tensor([True, False]))
    nats = tail_nats(model, reset)
    assert nats[0].isnan().all() and torch.allclose(nats[1], tail_nats(model, state)[1], atol=1e-5)
    with FlopCounterMode(display=False) as counter:
        tail_nats(model, reset)
    assert counter.get_total_flops() == tail_flops(model, reset) > 0
    spoil(monkeypatch, lambda after: after.add_(20.0))
    after, _, report = sleep(model, reset)
    assert not changed(select(after, torch.tensor([1])), select(reset, torch.tensor([1])))
    assert report.tail_after == pytest.approx(report.tail_before + 20.0, abs=1.0)


@torch.no_grad()
def test_the_window_is_read_again_with_store_memory_and_fast_weights_as_they_are(model):
    state = read(model, length=88)
    nats = tail_nats(model, state)
    on = read(model, state, length=2)  # of the open chunk nothing is asked
    assert nats.shape == (B, 7) and torch.equal(nats, tail_nats(model, on))
    blocks = list(state.blocks)
    for layer, part in ((0, "fast"), (1, "memory"), (2, "store")):
        block = blocks[layer]
        match part:
            case "fast":
                model.blocks[0].attention.fast.gates.bias.data.fill_(1.0)
                other = block._replace(fast=block.fast._replace(s=torch.randn(B, H, K, K)))
            case "memory":
                weights = tuple(map(torch.randn_like, block.memory.weights))
                other = block._replace(memory=block.memory._replace(weights=weights))
            case "store":
                other = block._replace(store=block.store._replace(v=torch.randn(B, H, 40, K)))
        spoiled = tuple(other if at == layer else b for at, b in enumerate(blocks))
        assert not torch.allclose(tail_nats(model, state._replace(blocks=spoiled)), nats), part
        model.blocks[0].attention.fast.gates.bias.data.fill_(-1e4)
    assert tail_nats(model, read(model, length=7)).isnan().all()


def test_an_interrupted_sleep_keeps_the_units_that_were_done(model):
    state, asked = read(model), []
    whole = sleep(model, state)[2]
    after, _, report = sleep(model, state, stop=lambda: len(asked) == 3 or asked.append(1))
    assert report.reason == "interrupted" and report.units == 3 < whole.units
    assert report.accepted and changed(state, after)
    untouched, ledger, report = sleep(model, state, stop=lambda: True)
    assert not changed(state, untouched) and ledger.sleep.flops == 0 and not report.accepted


def test_the_same_seed_gives_the_same_bits_and_lanes_do_not_see_each_other(model):
    state = read(model)
    for _ in range(2):
        after, ledger, _ = sleep(model, state)
        again, other, _ = sleep(model, state)
        assert not changed(after, again)
        assert ledger.sleep.flops == other.sleep.flops
        state = after
    first = torch.tensor([0])
    alone = select(read(model), first)
    for _ in range(2):
        alone = sleep(model, alone)[0]
    for (name, a), (_, b) in zip(
        named_tensors(alone), named_tensors(select(after, first)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


def test_reading_goes_on_behind_a_sleep_and_stays_finite(model):
    state, ledger = read(model, length=60), PLENTY
    for turn in range(12):
        state, ledger, report = sleep(model, state, ledger, seed=turn)
        state = read(model, state, length=37, seed=turn)
        assert report.reason in ("nothing more to write", "all passes were made")
    for name, t in named_tensors(state):
        assert not t.is_floating_point() or t.nan_to_num(neginf=0.0).isfinite().all(), name


def test_an_empty_store_and_a_short_stream_are_slept_over_without_harm(model):
    for length in (1, 9):
        state = read(model, length=length)
        after, _, report = sleep(model, state)
        assert not changed(state, after) and report.reason == "nothing more to write"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"store_layers": (0,), "fast_layers": (1,)}, r"fast_layers \[1\], store_layers \[0\]"),
        ({"fast": FastConfig(write="always")}, r"fast.write=always"),
    ],
)
def test_a_model_that_cannot_sleep_is_refused(options, why):
    without = TTLModel(replace(CONFIG, **options))
    with pytest.raises(ValueError, match=why):
        sleep(without, without.init_state(1))


def test_what_is_marked_but_not_released_still_presses_for_sleep(model):
    state = read(model)
    assert press(model, model.init_state(B)) == 0.0
    assert press(model, state) == 1.0 and press(model, state, worth=9.0) == 0.0
    after, ledger, report = sleep(model, state)
    assert report.written > 0 and press(model, after) == 1.0
    later, _, report = sleep(model, after, ledger, seed=1)
    places = 2 * B * H * 40
    assert report.released > 0
    assert press(model, later) == 1 - report.released / places
