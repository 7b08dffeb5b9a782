"""The gate: a write is taken only if nothing that was known before suffers.

A head's write is judged by what it gives back before and after: for the pairs that it wrote, for
pairs from long ago that were set aside and are never replayed, and for cues of noise. Of the steps
1, 1/2, 1/4, 1/8 the largest one that passes is taken; if none does, the head is as it was, bit for
bit. Half of the pairs that are set aside are never seen here: they audit the gate itself.

A pair is known if what a query for its key gives back points to its value. Judged one by one, a
thousand writes could each do a little harm; so what counts is how many of all old pairs are still
known.

Shapes: B lanes, H heads, n pairs of a unit, P probes, N cues of noise, A steps, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wakesleep.consolidation.replay import (
    SAME_KEY,
    Pairs,
    Sample,
    Standard,
    likeness,
    only,
    readable,
    take,
)
from wakesleep.ttl.fast import PROBES, answer, is_linear
from wakesleep.ttl.state import FastState, ProbeState, StoreState
from wakesleep.ttl.store import hash_uniform

STEPS = (1.0, 0.5, 0.25, 0.125)
NEW_KNOWN = 0.5  # share of the written pairs that must be known after the write
OLD_KNOWN = 0.98  # share of the old pairs that must be, unless none is lost
OLD_LOSS = 0.5  # mean fall in cosine of the old pairs, at most, in parts of 1 - tolerance
CONFIDENCE = 1.64  # standard errors of a one-sided bound of 95 %
LOUDEST = 3.0  # mean length of an answer to noise, in lengths of the written values
NOISE_CUES = 64
RULES = (  # by which a step can be refused, in the order in which they are asked
    "the weights were not finite",
    "too few of the new pairs became known",
    "too few of the old pairs stayed known",
    "old answers moved too far",
    "noise was answered too loudly",
)


class Verdict(NamedTuple):
    """What the gate decided for every head."""

    step: Tensor  # [B, H] the step that is taken, 0 = none
    new_known: Tensor  # [B, H] share of the written pairs that are known after it
    old_known: Tensor  # [B, H] share of the old pairs likewise, 1 without any
    loss: Tensor  # [B, H] mean fall in cosine of the old pairs
    rule: Tensor  # [B, H] int64: the first of RULES that refused the full step, else their number


def judge(
    fast: FastState, full: FastState, pairs: Pairs, cues: Tensor, standard: Standard
) -> Verdict:
    """How much of the way from `fast` to `full` may be gone; what is told of step 0 is of step 1.

    Args:
        full: the same fast weights after the write, at full step.
        cues: [N, K] keys of length 1 that mean nothing; a matrix, which any query asks, may not
            answer them much more loudly than written keys, nor more loudly than before.
    """
    tolerance, noise = standard
    k, v, position = (t[:, :, : PROBES // 2] for t in fast.probes)
    old = position >= 0
    before, after = _likeness(fast, full, k.float(), v.float(), noise)
    lost = (before[..., None] >= tolerance) & (after < tolerance)
    fall, error = _mean(before[..., None] - after, old)
    kept, _ = _mean((after >= tolerance).float(), old, empty=1.0)
    no_loss = ~(lost & old[..., None]).any(2)
    _, new = _likeness(fast, full, pairs.k, pairs.v, noise)
    learned, _ = _mean((new >= tolerance).float(), pairs.chosen)
    rules = [
        full.s.isfinite().flatten(2).all(-1)[..., None].expand_as(learned),
        learned >= NEW_KNOWN,
        (kept >= OLD_KNOWN) | no_loss,
        fall + CONFIDENCE * error <= OLD_LOSS * (1 - tolerance),
        _calm(fast, full, pairs, cues) if is_linear(fast.s) else torch.ones_like(no_loss),
    ]
    holds = torch.stack(rules, -1)  # [B, H, A, rules]
    passes = holds.all(-1) & pairs.chosen.any(-1)[..., None]
    at_full = holds[:, :, 0]
    rule = torch.where(at_full.all(-1), len(RULES), at_full.to(torch.uint8).argmin(-1))
    best = passes.to(torch.uint8).argmax(-1, keepdim=True)  # the first that passes, else 0
    steps = torch.tensor(STEPS, device=best.device)
    step = torch.where(passes.any(-1), steps[best[..., 0]], 0.0)
    return Verdict(step, *(t.gather(-1, best)[..., 0] for t in (learned, kept, fall)), rule)


def _calm(fast: FastState, full: FastState, pairs: Pairs, cues: Tensor) -> Tensor:
    """Steps [B, H, A] bool of a matrix after which noise is answered no more loudly than may be."""
    cues = cues.expand(*fast.s.shape[:2], -1, -1)
    loud = _answers(fast, full, cues).norm(dim=-1).mean(2)
    quiet = answer(fast.s, cues).norm(dim=-1).mean(2)
    value = pairs.v.norm(dim=-1).sum(2) / pairs.chosen.sum(2).clamp(min=1)
    return loud <= torch.maximum(quiet, LOUDEST * value)[..., None]


def known_after(fast: FastState, pairs: Pairs, standard: Standard) -> Tensor:
    """Which of the written pairs [B, H, n] `fast` knows."""
    told = likeness(fast.s, pairs.k, pairs.v, standard.noise)
    return pairs.chosen & (told >= standard.tolerance)


def keeps(
    store: StoreState, before: FastState, after: FastState, cues: Tensor, tolerance: float
) -> Tensor:
    """Lanes [B] whose stored pairs are given back as well after passes of sleep as before them.

    What is written awake fades, so few pairs are known outright: what counts is the mean fall in
    cosine over all of them, and how loudly noise is answered.

    Args:
        cues: [N, K] keys of length 1 that mean nothing.
    """
    k, v, usable = readable(store)
    cues, both = cues.to(k.dtype), (before.s.to(k.dtype), after.s.to(k.dtype))
    then, now = (torch.cosine_similarity(k @ s, v, dim=-1) for s in both)
    fall, count = torch.where(usable, then - now, 0.0).flatten(1), usable.flatten(1).sum(1)
    mean = fall.sum(1) / count.clamp(min=1)
    off = torch.where(usable.flatten(1), fall - mean[:, None], 0.0).square().sum(1)
    error = (off / (count * (count - 1)).clamp(min=1)).sqrt()
    quiet, loud = ((cues @ s).norm(dim=-1).mean(-1) for s in both)  # [B, H]
    value = v.norm(dim=-1).sum(-1) / usable.sum(-1).clamp(min=1)
    calm = loud <= torch.maximum(quiet, LOUDEST * value)
    calm = (calm | ~usable.any(-1)).all(-1)  # an empty store says nothing of how loud is loud
    return (mean + CONFIDENCE * error <= OLD_LOSS * (1 - tolerance)) & calm


def audit(fast: FastState, standard: Standard) -> tuple[Tensor, Tensor]:
    """How many of the sealed pairs each head [B, H] knows, and how many it has."""
    k, v, position = (t[:, :, PROBES // 2 :] for t in fast.probes)
    told = likeness(fast.s, k.float(), v.float(), standard.noise)
    known = (told >= standard.tolerance) & (position >= 0)
    return known.sum(-1), (position >= 0).sum(-1)


def advance(fast: FastState, full: FastState, step: Tensor) -> FastState:
    """Go `step` [B, H] of the way; heads with step 0 stay as they are, those with 1 arrive."""
    parts = {}
    for name in ("s", "covariance"):
        old, new = getattr(fast, name), getattr(full, name)
        share = step[..., None, None]
        between = old + share * (new - old)
        parts[name] = torch.where(share == 0, old, torch.where(share == 1, new, between))
    return fast._replace(**parts)


def without_superseded(fast: FastState, pairs: Pairs) -> FastState:
    """Probes and old keys that are true once `pairs` are: a key that gets another value is none."""

    def rest(sample: Sample) -> Sample:
        same = (sample.k.float() @ pairs.k.mT >= SAME_KEY) & pairs.replaces[..., None, :]
        return only(sample, ~same.any(-1))

    return fast._replace(probes=rest(fast.probes), old=rest(fast.old) if fast.old else None)


def set_aside(
    fast: FastState, pairs: Pairs, position: Tensor, known: Tensor, lane: Tensor
) -> FastState:
    """Offer pairs to both halves of the probes.

    Both are fair samples of everything that was ever consolidated: a hash of lane and position says
    which half a pair belongs to and how it ranks, so a sample does not depend on when which pair
    was offered.

    Args:
        position: [B, H, n] of the pairs; known: [B, H, n] bool, those that are offered.
        lane: [B] int64.
    """
    k, v = pairs.k.to(fast.probes.k.dtype), pairs.v.to(fast.probes.v.dtype)
    first = hash_uniform(position, lane[:, None, None], seed=2) < 0.5
    halves = []
    for half, mine in enumerate((first, ~first)):
        held = ProbeState(*(t.chunk(2, 2)[half] for t in fast.probes))
        offered = ProbeState(k, v, torch.where(known & mine, position, -1))
        halves.append(_sample(held, offered, lane))
    return fast._replace(probes=ProbeState(*(torch.cat(p, 2) for p in zip(*halves, strict=True))))


def _sample(held: ProbeState, offered: ProbeState, lane: Tensor) -> ProbeState:
    """As many as `held` has rows, the highest of both by a hash of lane and position."""
    rows = held.position.shape[-1]
    both = ProbeState(*(torch.cat(pair, 2) for pair in zip(held, offered, strict=True)))
    rank = hash_uniform(both.position, lane[:, None, None], seed=1)
    rank = torch.where(both.position >= 0, rank, -1.0)
    best = rank.argsort(dim=-1, descending=True, stable=True)[..., :rows]
    return only(ProbeState(*(take(t, best) for t in both)), rank.gather(-1, best) >= 0)


def _answers(fast: FastState, full: FastState, k: Tensor) -> Tensor:
    """What each step gives back for k [B, H, n, K]: [B, H, n, A, K]."""
    if not is_linear(fast.s):
        return torch.stack([answer(torch.lerp(fast.s, full.s, a), k) for a in STEPS], -2)
    before, after = k @ fast.s, k @ full.s
    steps = torch.tensor(STEPS, dtype=before.dtype, device=before.device)[:, None]
    return before[..., None, :] + steps * (after - before)[..., None, :]


def _likeness(
    fast: FastState, full: FastState, k: Tensor, v: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Of what is given back with v: now [B, H, n], and after each step [B, H, n, A]."""
    now = likeness(fast.s, k, v, noise)
    told = _answers(fast, full, k)
    if not is_linear(fast.s):
        return now, torch.cosine_similarity(told, v[..., None, :], dim=-1)
    steps = torch.tensor(STEPS, dtype=fast.s.dtype, device=fast.s.device)
    on_the_way = torch.lerp(fast.s[:, :, None], full.s[:, :, None], steps[:, None, None])
    beside = noise.square()[..., None] * on_the_way.square().mean(-2).sum(-1)  # [B, H, A]
    length = (told.square().sum(-1) + beside[:, :, None]).sqrt() * v.norm(dim=-1)[..., None]
    return now, (told * v[..., None, :]).sum(-1) / length.clamp(min=1e-8)


def _mean(x: Tensor, of: Tensor, empty: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and standard error [B, H, A] of x [B, H, n, A] over the rows `of` [B, H, n]."""
    weight = of[..., None].to(x.dtype)
    count = weight.sum(2)
    mean = torch.where(count > 0, (x * weight).sum(2) / count.clamp(min=1), empty)
    variance = ((x - mean[:, :, None]).square() * weight).sum(2) / (count - 1).clamp(min=1)
    return mean, (variance / count.clamp(min=1)).sqrt()
