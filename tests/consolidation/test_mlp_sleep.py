"""Sleep that writes an MLP per head: it holds what no matrix can, behind the same gate."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wakesleep.consolidation.budget import Cost, Ledger
from wakesleep.consolidation.gate import NOISE_CUES, judge, set_aside
from wakesleep.consolidation.replay import Pairs, Standard, change, choose, keep_keys, seen_by
from wakesleep.consolidation.sleep import least_cost, pressure, sleep
from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.ttl.fast import FastConfig, answer, no_fast_weights, open_keys
from wakesleep.ttl.key_space import unit_key
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import SPAN, StoreState, named_tensors
from wakesleep.ttl.store import StoreConfig

B, H, K, OLD, NEW = 4, 5, 32, 80, 16
LAM, TOLERANCE = 0.05, 0.6
EXACT = Standard(TOLERANCE, torch.zeros(()))  # queries are keys
PLENTY = Ledger(wake=Cost(10**13))


def draw_pairs(num_pairs: int, generator: torch.Generator) -> Pairs:
    k = unit_key(torch.randn(B, H, num_pairs, K, generator=generator))
    v = torch.randn(B, H, num_pairs, K, generator=generator)
    chosen = torch.ones(B, H, num_pairs, dtype=torch.bool)
    return Pairs(torch.arange(num_pairs).expand(B, H, -1), chosen, k, v, ~chosen)


def begin(seed: int):
    """An MLP that knows more pairs than a matrix could, all of them probes."""
    generator = torch.Generator().manual_seed(seed)
    old, new = draw_pairs(OLD, generator), draw_pairs(NEW, generator)
    fast = change(no_fast_weights(old.k, B, H, K, hidden=8 * K), old, LAM)
    position = torch.arange(OLD) + 1000 * torch.arange(B * H).view(B, H, 1)
    number, span = torch.zeros(B, H, OLD), torch.zeros(B, H, OLD, SPAN)
    store = StoreState(old.k, old.v, number, number, position, span, number[..., :3])
    fast = keep_keys(fast, store, old, old.chosen)
    fast = set_aside(fast, old, position, old.chosen, torch.arange(B))
    cues = unit_key(torch.randn(NOISE_CUES, K, generator=generator))
    return fast, old, new, cues, generator


def random_direction(fast, full, old, new, generator):
    noise = torch.randn(fast.s.shape, generator=generator)
    size = (full.s - fast.s).norm(dim=(-2, -1), keepdim=True)
    return fast.s + noise / noise.norm(dim=(-2, -1), keepdim=True) * size


def flipped_sign(fast, full, old, new, generator):
    return fast.s - (full.s - fast.s)


def shuffled_values(fast, full, old, new, generator):
    return change(fast, new._replace(v=new.v.roll(1, 2)), LAM).s


def other_values_for_a_tenth(fast, full, old, new, generator):
    """Every tenth old pair is written as well, its value turned round, and not rehearsed."""
    k = torch.cat([new.k, old.k[:, :, ::10]], 2)
    v = torch.cat([new.v, -old.v[:, :, ::10]], 2)
    replaces = torch.arange(k.shape[2]) >= NEW
    chosen = torch.ones(B, H, k.shape[2], dtype=torch.bool)
    both = Pairs(new.place, chosen, k, v, replaces.expand(B, H, -1))
    return change(fast, both, LAM).s


def test_good_writes_pass_and_forced_bad_ones_are_rejected():
    passed, rejected, known = [], {}, []
    for seed in range(2):
        fast, old, new, cues, generator = begin(seed)
        full = change(fast, new, LAM)
        passed.append(judge(fast, full, new, cues, EXACT).step > 0)
        told = answer(full.s, old.k)
        known.append(torch.cosine_similarity(told, old.v, dim=-1) >= TOLERANCE)
        for spoil in (random_direction, flipped_sign, shuffled_values, other_values_for_a_tenth):
            spoiled = full._replace(s=spoil(fast, full, old, new, generator))
            verdict = judge(fast, spoiled, new, cues, EXACT)
            rejected.setdefault(spoil.__name__, []).append(verdict.step == 0)
    assert torch.stack(passed).double().mean() >= 0.97
    assert torch.stack(known).double().mean() > 0.97
    for name, verdicts in rejected.items():
        assert torch.stack(verdicts).double().mean() >= 0.99, name


def build(kind: str) -> tuple[TTLModel, ModelConfig]:
    torch.manual_seed(4)
    config = ModelConfig(
        vocab_size=61,
        dim=24,
        num_layers=2,
        num_heads=2,
        head_dim=16,
        mlp_dim=32,
        window=8,
        chunk=4,
        memory_layers=(),
        store_layers=(1,),
        fast_layers=(1,),
        store=StoreConfig(capacity=80, hidden=8),
        fast=FastConfig(kind=kind, expansion=8),
    )
    return TTLModel(config).eval(), config


def night(model, state, ledger=PLENTY, seed=0, **options):
    usual = {"offline_ratio": 1.0, "tail_loss": 9.0, "tolerance": 0.5, "worth": -9.0}
    config = SleepConfig(rule="replay", **(usual | options))
    return sleep(model, state, config, ledger, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def read():
    model, _ = build("mlp")
    tokens = torch.randint(61, (2, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model, model(tokens, model.init_state(2))[1]


def test_more_is_written_than_into_a_matrix_and_nothing_else_changes(read):
    model, state = read
    after, ledger, report = night(model, state)
    changed = {
        name
        for (name, a), (_, b) in zip(named_tensors(state), named_tensors(after), strict=True)
        if not torch.equal(a, b)
    }
    assert changed and all(name.startswith("blocks.1.fast.") for name in changed)
    matrix, config = build("matrix")
    matrix.load_state_dict(model.state_dict(), strict=False)  # but for the gates that a matrix has
    fresh = no_fast_weights(state.blocks[1].store.k, 2, 2, 16, 80)
    other = state._replace(blocks=(state.blocks[0], state.blocks[1]._replace(fast=fresh)))
    linear = night(matrix, other)[2]
    assert config.fast.kind == "matrix" and report.written > 1.2 * linear.written > 0
    again, _, second = night(model, after, ledger, seed=1)
    assert second.released > 0.7 * report.written and second.audit > 0.9
    assert (again.blocks[1].store.position >= 0).sum() < (state.blocks[1].store.position >= 0).sum()


def test_heads_that_ask_for_other_things_than_keys_cost_no_write(read):
    model, state = read
    deaf = copy.deepcopy(model)
    deaf.blocks[1].attention.fast.space.explained[0] = 0.1
    (_, whole, all_of_it), (after, half, report) = (
        night(m, state, passes=1) for m in (model, deaf)
    )
    assert 0 < report.written < all_of_it.written
    assert torch.equal(after.blocks[1].fast.s[:, 0], state.blocks[1].fast.s[:, 0])
    assert half.sleep.flops < 0.6 * whole.sleep.flops


def test_it_pays_at_least_what_torch_counts_and_never_more_than_it_has(read):
    model, state = read
    with FlopCounterMode(display=False) as counter:
        _, ledger, report = night(model, state)
    paid = ledger.sleep.flops + ledger.gate.flops + ledger.wasted.flops
    assert 0 <= paid - counter.get_total_flops() < 0.05 * paid
    for wake in (paid - 1, paid // 2):
        _, less, smaller = night(model, state, Ledger(wake=Cost(wake)))
        assert less.sleep.flops + less.gate.flops + less.wasted.flops <= wake
        assert smaller.reason == "the budget is spent" != report.reason
    assert 0 < smaller.written < report.written  # a cheaper unit


def test_later_sleeps_pay_for_the_keys_that_the_softmax_sees_by_then(read):
    model, state = read
    seen, ledger = [], PLENTY
    for turn in range(4):
        with FlopCounterMode(display=False) as counter:
            state, after, _ = night(model, state, ledger, seed=turn)
        paid = after.asleep.flops - ledger.asleep.flops
        assert 0 <= paid - counter.get_total_flops() < 0.05 * paid, turn
        seen.append(open_keys(state.blocks[1].fast))
        ledger = after
        with torch.no_grad():
            tokens = torch.randint(61, (2, 60), generator=torch.Generator().manual_seed(turn))
            state = model(tokens, state)[1]
    assert seen[0] == 0 < seen[1] < seen[3]


def test_a_second_sleep_never_spends_more_than_it_has(read):
    model, state = read
    state, released = night(model, state)[0], []
    config = SleepConfig(rule="replay", worth=-9.0)
    least = least_cost(model, state, config)
    for budget in (least, 2 * least, 10 * least):
        with FlopCounterMode(display=False) as counter:
            _, ledger, report = night(model, state, Ledger(wake=Cost(budget)), seed=1)
        assert counter.get_total_flops() <= ledger.asleep.flops <= budget
        released.append(report.released)
    assert released[-1] > 0
    assert night(model, state, Ledger(wake=Cost(least - 1)), seed=1)[2].reason.startswith("the bu")


def test_a_sleep_in_vain_still_shows_keys_of_pairs_that_were_pushed_out_awake(read):
    model, state = read
    slept, ledger, _ = night(model, state)
    tokens = torch.randint(61, (2, 200), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        state = model(tokens, slept)[1]
    block = state.blocks[1]
    bare = block.fast._replace(asleep=torch.full_like(block.fast.asleep, -1))
    state = state._replace(blocks=(state.blocks[0], block._replace(fast=bare)))
    after, spent, report = night(model, state, ledger, worth=1e9)
    old, position = after.blocks[1].fast.old, after.blocks[1].store.position
    inside = (old.position[..., None] == position[..., None, :]).any(-1)
    assert torch.equal(old.open, (old.position >= 0) & ~inside) and old.open.any()
    assert report.accepted and report.written == report.released == 0
    again = night(model, after, spent, worth=1e9)[2]
    assert not again.accepted and again.reason == "nothing more to write"


def test_a_full_mlp_forgets_only_for_a_store_that_is_full_of_better_pairs(read):
    model, state = read
    store = state.blocks[1].store
    space, places, K = model.blocks[1].attention.fast.space, *store.k.shape[2:]
    _, fast = seen_by(space, store, state.blocks[1].fast)
    rows = fast.old.position.shape[-1]
    k = unit_key(torch.randn(fast.old.k.shape, generator=torch.Generator().manual_seed(0)))
    held = torch.arange(rows).expand_as(fast.old.position)
    old = fast.old._replace(k=k, score=torch.full_like(fast.old.score, 5.0), position=held)
    full = fast._replace(old=old)

    def asks(better: int, fast, worth: float = -1e9) -> tuple[list[int], bool]:
        """Pairs chosen per head, and whether they press, with so many of a higher score."""
        score = torch.where(torch.arange(places) < better, 6.0, 4.0).expand_as(store.score)
        part = store._replace(score=score)
        chosen = choose(seen_by(space, part, fast)[0], fast, 2 * places, worth).chosen.sum(-1)
        block = state.blocks[1]._replace(store=part, fast=fast)
        now = state._replace(blocks=(state.blocks[0], block))
        return chosen.unique().tolist(), pressure(model, now, SleepConfig(worth=worth)) > 0

    assert places > 3 * K and (store.position >= 0).all()
    assert asks(places - K - 1, full) == ([0], False)
    assert asks(places - K, full) == ([K], True)
    assert asks(places, full) == ([2 * K], True)
    some = fast._replace(old=old._replace(position=torch.where(held < K - 1, -1, held)))
    assert asks(0, some) == ([0], False)  # too few rows are empty, and what fills others is better
    empty = old._replace(
        position=torch.where(held < K, -1, held), score=old.score.masked_fill(held < K, -9e9)
    )
    assert asks(0, fast._replace(old=empty)) == ([K], True)
    assert asks(0, fast)[0][0] > places // 2 and asks(0, fast)[1]  # each has a row of its own


def test_the_same_seed_gives_the_same_bits(read):
    model, state = read
    one, other = night(model, state)[0], night(model, state)[0]
    assert torch.equal(one.blocks[1].fast.s, other.blocks[1].fast.s)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kind": "mlp", "write": "always"}, "written asleep only"),
        ({"kind": "cube"}, "fast.kind must be matrix or mlp"),
        ({"kind": "mlp", "expansion": 0}, "fast.expansion must be"),
    ],
)
def test_kinds_that_cannot_be_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        FastConfig(**options)


def test_what_sleep_wrote_into_an_mlp_is_read_once_the_store_has_let_go_of_it(read):
    model, state = read
    tokens = torch.randint(61, (2, 30), generator=torch.Generator().manual_seed(3))
    slept, ledger, _ = night(model, state)
    again = night(model, slept, ledger, seed=1)[0]
    fast, store = again.blocks[1].fast, again.blocks[1].store
    outside = ~(fast.old.position[..., None] == store.position[..., None, :]).any(-1)
    assert torch.equal(fast.old.open, outside & (fast.old.position >= 0)) and fast.old.open.any()
    forgotten = again.blocks[1]._replace(fast=fast._replace(s=torch.zeros_like(fast.s)))
    with torch.no_grad():
        awake, half, whole, mute = (
            model(tokens, s)[0]
            for s in (state, slept, again, again._replace(blocks=(again.blocks[0], forgotten)))
        )
    assert torch.equal(awake, half)
    assert not torch.allclose(awake, whole)
    assert (whole - awake).norm() < 0.7 * (mute - awake).norm()
