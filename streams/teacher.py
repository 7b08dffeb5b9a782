"""The teacher of the admission head: the read mass that tokens in fact received.

A token that the store rejects is never read, so it gets no gradient; and a gate in the read logits
learns the opposite ranking (noise above facts). So the head is taught apart from the reads: on
steps whose store keeps everything, a token was needed if the answers read it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wakesleep.streams.ranks import ALONE, Ranks
from wakesleep.ttl.state import StoreState, StreamState


def admission_loss(
    state: StreamState,
    judged: Callable[[Tensor], Tensor],
    spared: Callable[[Tensor], Tensor],
    *,
    threshold: float,
    positive_weight: float,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, dict[str, float]]:
    """Binary cross-entropy of the admission head against the read mass of a store that kept all.

    What one head needed, the others are to keep, too: a head that reads nothing in particular would
    otherwise be left with whatever its scores say, and what it reads there is heard nevertheless.
    Gradient reaches the scores of `state` and nothing else.

    Args:
        judged: says of stored positions [B, H, S] which pairs an answer could have read.
        spared: says of them which are no example of what nobody needs, even if nobody read them:
            facts that were asked for too early or not at all look like all other facts, and taken
            for noise they would bring every fact's score down to that of text which resembles one.
        threshold: mass from which a pair counts as needed; what is booked as mass has the same
            floor, so that it takes one answer that read the pair, not many that glanced at it.
        positive_weight: weight of needed pairs.
        ranks: the mean is over the pairs of all; the mean over ranks of what each returns.

    Returns:
        The mean over stores, and means over stores of `precision` and `recall` at logit 0,
        `needed` (share of pairs) and `noise_above` (share of other pairs above the median needed
        one of the same head). Zero without gradient when no pair can be judged.
    """
    losses, rankings = [], []
    for store in stores(state):
        needed = _by_any_head(store.mass.detach() > threshold, store.position)
        seen = judged(store.position) & (store.position >= 0)
        seen = seen & (needed | ~spared(store.position))
        total = ranks.sum(seen.sum())
        if not int(total):
            continue
        score = torch.where(seen, store.score, 0.0)  # the empty places hold -inf
        weight = torch.where(needed, positive_weight, 1.0) * seen
        loss = F.binary_cross_entropy_with_logits(score, needed.float(), weight, reduction="sum")
        losses.append(loss * ranks.world / total)
        if bool(seen.any()):
            rankings.append(_ranking(store.score, seen & needed, seen & ~needed))
    if not losses:
        return torch.zeros((), device=state.position.device), {}
    metrics = {}
    for name in rankings[0] if rankings else ():
        known = [ranking[name] for ranking in rankings if ranking[name] is not None]
        if known:
            metrics[name] = sum(known) / len(known)
    return torch.stack(losses).mean(), metrics


def fact_ranking(
    state: StreamState, position: Tensor, fact: Tensor, until: Tensor, keep_all: bool
) -> dict[str, float]:
    """What became of the tokens that a reader should keep.

    Args:
        position: [B, T] int64 of the tokens that were read, increasing in each lane.
        fact: [B, T] bool, the tokens to keep.
        until: [B] int64, the last position that has left the window.

    Returns:
        `noise_above_facts` if the store kept everything: the share of other pairs that score above
        the median fact, in the head that tells them apart worst. Else `facts_kept`: the share of
        facts that are still stored, mean over heads. Empty when no fact has left the window.
    """
    gone = fact & (position <= until[:, None])
    if not bool(gone.any()):
        return {}
    kept, above = [], []
    for store in stores(state):
        facts, others = (marked(store.position, position, mask) for mask in (fact, ~fact))
        above.append(_above(store.score, facts, others))
        still = marked(store.position, position, gone)
        kept.append(int(still.sum()) / (still.shape[1] * int(gone.sum())))
    if not kept:
        return {}
    if keep_all:
        return {"noise_above_facts": float(torch.cat(above).nan_to_num(1.0).max())}
    return {"facts_kept": sum(kept) / len(kept)}


def marked(stored: Tensor, position: Tensor, mark: Tensor) -> Tensor:
    """Which stored positions [B, H, S] are among `position` where `mark` is set: bool, same shape.

    Args:
        position: [B, T] int64, increasing in each lane.
        mark: [B, T] bool.
    """
    flat = stored.flatten(1)
    column = torch.searchsorted(position, flat).clamp(max=position.shape[1] - 1)
    return ((position.gather(1, column) == flat) & mark.gather(1, column)).view_as(stored)


def stores(state: StreamState) -> list[StoreState]:
    """The stores of all blocks that have one."""
    return [block.store for block in state.blocks if block.store is not None]


def _by_any_head(needed: Tensor, position: Tensor) -> Tensor:
    """Where any head needed a pair of that position, [B, H, S] as `needed`.

    The heads of a store that kept all hold the same positions, each in an order of its own.
    """
    order = position.argsort(-1)
    shared = needed.gather(-1, order).any(1, keepdim=True).expand_as(needed)
    return torch.zeros_like(needed).scatter(-1, order, shared)


def _ranking(score: Tensor, needed: Tensor, other: Tensor) -> dict[str, float | None]:
    """How well scores [B, H, S] tell `needed` from `other` pairs; None where it cannot be said."""
    hits, alarms = int((needed & (score > 0)).sum()), int((other & (score > 0)).sum())
    found = int(needed.sum())
    above = _above(score, needed, other)
    return {
        "precision": hits / (hits + alarms) if hits + alarms else None,
        "recall": hits / found if found else None,
        "needed": found / (found + int(other.sum())),
        "noise_above": None if above.isnan().all() else float(above.nanmean()),
    }


def _above(score: Tensor, wanted: Tensor, other: Tensor) -> Tensor:
    """Share of `other` pairs above the median `wanted` one of their head: [H], nan without any."""
    score = score.detach().transpose(0, 1).flatten(1)  # [H, B S]
    wanted, other = (mask.transpose(0, 1).flatten(1) for mask in (wanted, other))
    median = torch.where(wanted, score, torch.nan).nanmedian(1, keepdim=True).values
    share = ((score > median) & other).sum(1) / other.sum(1)
    return torch.where(median[:, 0].isnan(), torch.nan, share)
