"""Which of the tokens that leave the window enter the store, and whose places they take.

The store keeps the S best of everything it was ever offered. Scores are compared in float32; of
equal scores the older wins. Freed places are filled in ascending order by the admitted tokens in
the order of their positions, so that reference and fast form agree place by place.

Shapes: B lanes, H heads, S places, C candidates (in the order of their positions).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NUM_BINS = 16  # spans of equal length that a quota shares the store among


class Admission(NamedTuple):
    """The first `min(S, C)` columns are pairs of a freed place and the candidate that takes it."""

    place: Tensor  # [B, H, M] int64, all different
    candidate: Tensor  # [B, H, M] int64
    valid: Tensor  # [B, H, M] bool: the pair is really exchanged


def admit_reference(
    score: Tensor, position: Tensor, new_score: Tensor, new_position: Tensor, span: Tensor | None
) -> Admission:
    """Sort the store and the candidates together and keep the best S.

    Args:
        score, position: [B, H, S], -inf and -1 where a place is empty.
        new_score, new_position: [B, H, C]; -inf for what must not enter.
        span: [B] int64 tokens per bin if every bin has a quota of its own, else None.
    """
    S = score.shape[-1]
    # empty places count as older than every token, the last of them as the oldest: so places fill
    # from 0 upwards
    places = torch.arange(S, device=position.device).expand_as(position)
    order = torch.where(position < 0, -1 - places, position).argsort(dim=-1, stable=True)
    scores = torch.cat([score.gather(-1, order), new_score], -1)
    positions = torch.cat([position.gather(-1, order), new_position], -1)
    best = scores.argsort(dim=-1, descending=True, stable=True)
    if span is not None:
        best = _quota_first(best, positions, scores, span, S // NUM_BINS)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best[..., :S], True)
    kept_place = torch.zeros_like(kept[..., :S]).scatter(-1, order, kept[..., :S])
    M = min(S, new_score.shape[-1])
    place = kept_place.to(torch.uint8).argsort(dim=-1, stable=True)[..., :M]
    candidate = (~kept[..., S:]).to(torch.uint8).argsort(dim=-1, stable=True)[..., :M]
    valid = torch.arange(M, device=score.device) < (~kept_place).sum(-1, keepdim=True)
    return Admission(place, candidate, valid)


def admit_fast(
    score: Tensor, rank: Tensor, new_score: Tensor, most: int | None = None
) -> Admission:
    """The same without sorting the store: the best candidates against the worst places.

    Args:
        rank: [B, H, S] int64 order of the stored pairs, newest = 0 (any value where empty).
        most: no head lets in more than so many, M of the result; None = it is not known.
    """
    M = min(score.shape[-1], new_score.shape[-1] if most is None else most)
    worst = (_ordered_int(score) * 2**32 + rank).topk(M, -1, largest=False, sorted=True).indices
    best = new_score.argsort(dim=-1, descending=True, stable=True)[..., :M]
    wins = new_score.gather(-1, best) > score.gather(-1, worst)
    lost = (~wins).long()
    # what is exchanged comes first, in ascending order; the rest only fills the columns
    place = (worst + lost * score.shape[-1]).sort(-1).values % score.shape[-1]
    candidate = (best + lost * new_score.shape[-1]).sort(-1).values % new_score.shape[-1]
    valid = torch.arange(M, device=score.device) < wins.sum(-1, keepdim=True)
    return Admission(place, candidate, valid)


def order_rank(position: Tensor) -> Tensor:
    """Rank of every stored pair [B, H, S] by position, newest = 0; empty places come last."""
    order = position.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(position.shape[-1], device=position.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def rank_after(rank: Tensor, admission: Admission) -> Tensor:
    """The same once the admitted are in, without sorting: they are newer than all that is stored.

    rank: [B, H, S] int64 as `order_rank` gives it before.
    """
    place, valid = admission.place, admission.valid
    dropped = torch.zeros_like(rank).scatter_(-1, rank.gather(-1, place), valid.long())
    admitted = valid.sum(-1, keepdim=True)
    rank = rank + admitted - dropped.cumsum(-1).gather(-1, rank)  # the older a gap, the fewer close
    newest = admitted - 1 - torch.arange(place.shape[-1], device=rank.device)
    return rank.scatter_(-1, place, torch.where(valid, newest, rank.gather(-1, place)))


def bin_span(position: Tensor, chunk: int) -> Tensor:
    """Tokens per bin, chunk * 2^n, so that `position` [B] tokens fill at most 16 bins."""
    bins = torch.div(position - 1, chunk * NUM_BINS, rounding_mode="floor").clamp(min=0)
    doublings = torch.ceil(torch.log2((bins + 1).double())).long()
    return chunk * 2**doublings


def _quota_first(best: Tensor, positions: Tensor, scores: Tensor, span: Tensor, quota: int):
    """Reorder `best` so that each bin's own top `quota` come before everything else."""
    bins = torch.div(positions, span[:, None, None], rounding_mode="floor").clamp(0, NUM_BINS - 1)
    member = torch.nn.functional.one_hot(bins.gather(-1, best), NUM_BINS)
    in_bin = (member.cumsum(-2) * member).sum(-1) - 1
    filled = scores.gather(-1, best) > -torch.inf
    second = ~((in_bin < quota) & filled)
    return best.gather(-1, second.to(torch.uint8).argsort(dim=-1, stable=True))


def _ordered_int(score: Tensor) -> Tensor:
    """float32 scores as int64 numbers of the same order."""
    bits = (score.float() + 0.0).view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(2**31) - bits)
