"""The gate: good writes pass, forced bad ones are rejected and leave no bit behind."""

from __future__ import annotations

import pytest
import torch

from wakesleep.consolidation.gate import (
    NOISE_CUES,
    RULES,
    STEPS,
    advance,
    audit,
    judge,
    set_aside,
    without_superseded,
)
from wakesleep.consolidation.replay import Pairs, Standard, change, take
from wakesleep.ttl.fast import PROBES, no_fast_weights
from wakesleep.ttl.key_space import unit_key
from wakesleep.ttl.state import FastState, KeyState, select

B, H, K, OLD, NEW = 25, 4, 128, 80, 16
LAM, TOLERANCE = 0.05, 0.9
EXACT = Standard(TOLERANCE, torch.zeros(()))  # queries are keys


def draw_pairs(num_pairs: int, generator: torch.Generator) -> Pairs:
    k = unit_key(torch.randn(B, H, num_pairs, K, generator=generator))
    v = torch.randn(B, H, num_pairs, K, generator=generator)
    chosen = torch.ones(B, H, num_pairs, dtype=torch.bool)
    return Pairs(torch.arange(num_pairs).expand(B, H, -1), chosen, k, v, ~chosen)


def begin(seed: int = 0) -> tuple[FastState, Pairs, Pairs, torch.Tensor, torch.Generator]:
    """Fast weights that know OLD pairs, all of them probes; these, new pairs and cues of noise."""
    generator = torch.Generator().manual_seed(seed)
    old, new = draw_pairs(OLD, generator), draw_pairs(NEW, generator)
    fast = change(no_fast_weights(old.k, B, H, K), old, LAM)
    position = torch.arange(OLD) + 1000 * torch.arange(B * H).view(B, H, 1)
    fast = set_aside(fast, old, position, old.chosen, torch.arange(B))
    cues = unit_key(torch.randn(NOISE_CUES, K, generator=generator))
    return fast, old, new, cues, generator


def test_good_writes_pass_at_full_step():
    fast, _, new, cues, _ = begin()
    verdict = judge(fast, change(fast, new, LAM), new, cues, EXACT)
    assert (verdict.step == 1).double().mean() == 1.0  # false rejections: none of 100
    assert verdict.new_known.min() > 0.99 and verdict.old_known.min() > 0.99


def random_direction(fast, full, old, new, generator):
    noise = torch.randn(fast.s.shape, generator=generator)
    size = (full.s - fast.s).norm(dim=(-2, -1), keepdim=True)
    return fast.s + noise / noise.norm(dim=(-2, -1), keepdim=True) * size


def flipped_sign(fast, full, old, new, generator):
    return fast.s - (full.s - fast.s)


def shuffled_values(fast, full, old, new, generator):
    return change(fast, new._replace(v=new.v.roll(1, 2)), LAM).s


def a_ridge_of_nearly_nothing(fast, full, old, new, generator):
    """As many keys as dimensions, and close ones: what lam / 1000 makes of them."""
    k = unit_key(new.k[:, :, :1] + 1e-3 * new.k)
    return change(fast, new._replace(k=k), LAM / 1000).s


def harm_to_a_tenth(fast, full, old, new, generator):
    """The values of every tenth old pair are turned round, all others stay exactly."""
    k, v = old.k[:, :, ::10], old.v[:, :, ::10]
    gram = old.k @ old.k.mT
    pick = torch.linalg.solve(gram, old.k)[:, :, ::10]  # k_j pick_i = 1 for i = j, else 0
    assert (old.k[:, :, 1] * pick[:, :, 0]).sum(-1).abs().max() < 1e-3 and k.shape == v.shape
    return full.s - 2 * pick.mT @ v


@pytest.mark.parametrize(
    "spoil",
    [
        random_direction,
        flipped_sign,
        shuffled_values,
        a_ridge_of_nearly_nothing,
        harm_to_a_tenth,
    ],
)
def test_forced_bad_updates_are_rejected(spoil):
    rejected = []
    for seed in range(2):
        fast, old, new, cues, generator = begin(seed)
        full = change(fast, new, LAM)
        bad = full._replace(s=spoil(fast, full, old, new, generator))
        verdict = judge(fast, bad, new, cues, EXACT)
        after = advance(fast, bad, verdict.step)
        same = (after.s == fast.s).all(-1).all(-1) & (after.covariance == fast.covariance).all(
            -1
        ).all(-1)
        assert torch.equal(same, verdict.step == 0)
        rejected.append(verdict.step == 0)
    assert torch.cat(rejected).double().mean() >= 0.99


def test_old_answers_that_all_move_a_little_are_kept_from_moving_on():
    """Every old pair is still known, by a cosine of .83: the mean fall refuses it."""
    fast, old, new, cues, generator = begin()
    full = change(fast, new, LAM)
    k = torch.cat([old.k, new.k], 2)
    aside = torch.randn(old.v.shape, generator=generator)
    aside -= (aside * old.v).sum(-1, keepdim=True) / old.v.square().sum(-1, keepdim=True) * old.v
    aside *= 0.672 * old.v.norm(dim=-1, keepdim=True) / aside.norm(dim=-1, keepdim=True)
    s = torch.linalg.pinv(k) @ torch.cat([old.v + aside, new.v], 2)
    verdict = judge(fast, full._replace(s=s), new, cues, EXACT._replace(tolerance=0.8))
    assert (verdict.rule == RULES.index("old answers moved too far")).double().mean() > 0.9
    assert verdict.old_known.min() == 1 and (verdict.step < 1).all()


def test_the_gate_never_sees_the_sealed_half_of_the_probes_and_the_audit_no_other():
    fast, _, new, cues, generator = begin()
    full, halves = change(fast, new, LAM), []
    for half in (slice(0, PROBES // 2), slice(PROBES // 2, None)):
        v = fast.probes.v.clone()
        v[:, :, half] = torch.randn(v[:, :, half].shape, generator=generator)
        halves.append(fast._replace(probes=fast.probes._replace(v=v)))
    seen, sealed = halves

    def verdict(fast):
        return judge(fast, full._replace(probes=fast.probes), new, cues, EXACT)

    assert all(map(torch.equal, verdict(sealed), verdict(fast)))
    assert not torch.equal(verdict(seen).old_known, verdict(fast).old_known)
    assert all(map(torch.equal, audit(seen, EXACT), audit(fast, EXACT)))
    known, count = audit(sealed, EXACT)
    assert known.sum() == 0 < count.min() and torch.equal(audit(fast, EXACT)[0], count)


def test_an_update_that_is_not_finite_is_rejected():
    fast, _, new, cues, _ = begin()
    full = change(fast, new, LAM)
    full.s[0, 0, 0, 0], full.s[1, 1] = torch.nan, torch.inf
    verdict = judge(fast, full, new, cues, EXACT)
    assert verdict.step[0, 0] == verdict.step[1, 1] == 0
    assert (verdict.step == 1).sum() == B * H - 2
    assert advance(fast, full, verdict.step).s.isfinite().all()


def test_without_pairs_nothing_passes():
    fast, _, new, cues, _ = begin()
    empty = new._replace(chosen=torch.zeros_like(new.chosen), k=0 * new.k, v=0 * new.v)
    assert (judge(fast, change(fast, empty, LAM), empty, cues, EXACT).step == 0).all()


def test_a_step_too_far_is_shortened():
    fast, _, new, cues, _ = begin()
    full = change(fast, new, LAM)
    far = full._replace(s=fast.s + 8 * (full.s - fast.s))
    verdict = judge(fast, far, new, cues, EXACT)
    assert set(verdict.step.unique().tolist()) <= set(STEPS[1:])
    between = advance(fast, far, verdict.step)
    share = verdict.step[..., None, None]
    torch.testing.assert_close(between.s, fast.s + share * (far.s - fast.s))


def test_many_small_harms_are_not_more_than_one_large_one():
    """Each of a hundred writes is nearly harmless; what is known of the old pairs stays."""
    fast, old, _, cues, generator = begin()
    few = torch.arange(4)
    fast, old = select(fast, few), select(old, few)
    for _ in range(100):
        new = select(draw_pairs(2, generator), few)
        full = change(fast, new, LAM)
        verdict = judge(fast, full, new, cues, EXACT)
        fast = advance(fast, full, verdict.step)
    known = torch.cosine_similarity(old.k @ fast.s, old.v, dim=-1) >= TOLERANCE
    assert known.double().mean() > 0.93


def test_probes_are_a_fair_sample_of_everything_that_was_offered():
    fast, seen = no_fast_weights(torch.zeros(1), 1, 1, 4), []
    for turn in range(40):
        pairs = Pairs(*(torch.zeros(1, 1, 50, *shape) for shape in ((), (), (4,), (4,), ())))
        position = torch.arange(turn * 50, turn * 50 + 50).expand(1, 1, -1)
        known = torch.ones(1, 1, 50, dtype=torch.bool)
        fast = set_aside(fast, pairs, position, known, torch.zeros(1, dtype=torch.int64))
        seen.append(fast.probes.position[0, 0])
    last = seen[-1]
    assert len(set(last.tolist())) == PROBES and (last >= 0).all()
    assert abs(last.double().mean() - 1000) < 120  # of 2,000, whenever they were offered
    for half in (last[: PROBES // 2], last[PROBES // 2 :]):
        assert abs(half.double().mean() - 1000) < 180
    assert (seen[0] >= 0).sum() == 50


@pytest.mark.parametrize("size", [16, 40, 7])
def test_probes_do_not_depend_on_how_the_offers_were_cut(size):
    width, offered = 4, 400  # more than there is room for
    pairs = draw_pairs(offered, torch.Generator().manual_seed(0))
    pairs = pairs._replace(k=pairs.k[..., :width], v=pairs.v[..., :width])
    position = torch.arange(offered) + 1000 * torch.arange(B * H).view(B, H, 1)

    def offer(size: int):
        fast = no_fast_weights(pairs.k, B, H, width)
        for at in range(0, offered, size):
            piece = Pairs(*(t[:, :, at : at + size] for t in pairs))
            here = position[:, :, at : at + size]
            fast = set_aside(fast, piece, here, piece.chosen, torch.arange(B))
        return [take(t, fast.probes.position.argsort(-1)) for t in fast.probes]

    for cut, whole in zip(offer(size), offer(offered), strict=True):
        assert torch.equal(cut, whole)


def test_a_probe_or_old_key_that_gets_another_value_is_dropped():
    fast, _, new, _, _ = begin()
    k = torch.cat([fast.probes.k[:, :, :1], new.k[:, :, 1:]], 2)
    replaces = torch.arange(NEW) == 0
    pairs = new._replace(k=k, replaces=replaces.expand(B, H, -1))
    position = fast.probes.position
    old = KeyState(fast.probes.k, position.float(), position, position >= 0)
    both = without_superseded(fast._replace(old=old), pairs)
    left = both.probes
    assert torch.equal(both.old.k, left.k) and torch.equal(both.old.position, left.position)
    assert (left.position[:, :, 0] == -1).all() and not left.k[:, :, 0].any()
    assert torch.equal(left.position[:, :, 1:], fast.probes.position[:, :, 1:])
