"""What other documents leave behind: what training has instead of ten million tokens.

A store read at full size must be trained at full size, among pairs that scored as high as its own.
A bounded ring keeps the loudest pairs of the last steps: of one lane per step, in the order of the
text, so that what is said of something else is there in whole, as it is in a long stream. Between
two segments a run of them enters the stores of the lanes, as if a long stretch of other text had
passed while the window stood still. Such a stretch leaves another memory, too: that of another
lane, which has gone on so from step to step. What was stored is then read with a memory of a later
time, and with one that has not just begun.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wakesleep.streams.ranks import ALONE, Ranks
from wakesleep.streams.teacher import stores
from wakesleep.ttl.state import SPAN, StoreState, StreamState, detach, map_state, to

REFRESH = 16  # steps that fill the ring once, if each has pairs enough


class Ring(NamedTuple):
    """The pool of one store: P places per head, detached."""

    k: Tensor  # [H, P, K]
    v: Tensor  # [H, P, K]
    score: Tensor  # [H, P] float32
    span: Tensor  # [H, P, SPAN] int32


class Past(NamedTuple):
    """What a memory has learned, without the page that is open: fields of `MemoryState`."""

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    surprise: Tensor


class Pool(NamedTuple):
    rings: tuple[Ring, ...]  # one per store of the model
    written: int  # pairs per head that ever entered; modulo P, the next place to overwrite
    pasts: tuple[Past | None, ...] | None = None  # of all lanes, by block; None: not yet

    @property
    def size(self) -> int:
        """Pairs per head that wait."""
        return min(self.written, self.rings[0].score.shape[1]) if self.rings else 0

    def to(self, device: torch.device) -> Pool:
        """The pool with its tensors on a device."""
        return self._replace(rings=to(self.rings, device), pasts=to(self.pasts, device))


def empty_pool(state: StreamState, places: int) -> Pool:
    """A pool for the stores of `state` with nothing in it."""
    rings = []
    for store in stores(state):
        H, K = store.k.shape[1], store.k.shape[-1]
        pair = store.k.new_zeros(H, places, K)
        span = store.span.new_full((H, places, SPAN), -1)
        rings.append(Ring(pair, pair.clone(), store.score.new_zeros(H, places), span))
    return Pool(tuple(rings), 0)


def pasts_of(state: StreamState) -> tuple[Past | None, ...]:
    """What the memories of a state have learned, by block; None where there is none."""
    memories = (block.memory for block in state.blocks)
    return tuple(m and Past(m.weights, m.momentum, m.surprise) for m in memories)


def collect(
    pool: Pool,
    state: StreamState,
    foreign: list[tuple[int, int]],
    *,
    turn: int,
    passed: bool,
    ranks: Ranks = ALONE,
) -> Pool:
    """Add the loudest pairs of a lane's own documents, and take over what the memories learned.

    Args:
        foreign: intervals of positions whose pairs are distractors themselves.
        turn: number of the step; the lanes take turns.
        passed: whether other text has passed in this step; else the memories are young ones.
        ranks: all have the same pool, of the lanes of all.
    """
    if passed:
        pool = pool._replace(pasts=ranks.gather(detach(pasts_of(state))))
    if not pool.rings:
        return pool
    places = pool.rings[0].score.shape[1]
    wanted = max(1, places // REFRESH)
    lanes = state.position.shape[0]
    owner, lane = divmod(turn % (lanes * ranks.world), lanes)
    loudest = [_loudest(store, foreign, lane, wanted) for store in stores(state)]
    count, loudest = _owned(loudest, wanted, owner, ranks)
    target = (torch.arange(count) + pool.written) % places
    target = target.to(pool.rings[0].score.device)
    rings = []
    for old, new in zip(pool.rings, loudest, strict=True):
        parts = zip(old, new, strict=True)
        rings.append(Ring(*(a.index_copy(1, target, b[:, :count].to(a.dtype)) for a, b in parts)))
    return pool._replace(rings=tuple(rings), written=pool.written + count)


def remember(state: StreamState, pool: Pool, shift: int, ranks: Ranks = ALONE) -> StreamState:
    """Give every lane what the memory of the lane `shift` before it learned in earlier steps."""
    blocks = []
    for block, past in zip(state.blocks, pool.pasts or [None] * len(state.blocks), strict=True):
        if past is not None:
            learned = ranks.mine(map_state(lambda t: t.roll(shift, 0), past))
            block = block._replace(memory=block.memory._replace(**learned._asdict()))
        blocks.append(block)
    return state._replace(blocks=tuple(blocks))


def inject(state: StreamState, pool: Pool, order: Tensor, jump: int, window: int) -> StreamState:
    """Let `jump` tokens of other text pass: their pairs compete for the store by their scores.

    Position and window move on together, so the new pairs are younger than all that left the
    window before and older than what is in it.

    Args:
        order: [B, n] int64, which pairs of the pool a lane gets, oldest first; -1 = none here.
        jump: a multiple of every boundary of the model, at least n.
        window: tokens W that the window shows before the open chunk.
    """
    if order.shape[1] > jump:
        raise ValueError(f"jump must be at least {order.shape[1]}, the number of pairs, got {jump}")
    first = (state.position - window).clamp(min=0)
    rings = iter(pool.rings)
    blocks = []
    for block in state.blocks:
        if block.store is not None:
            block = block._replace(store=_compete(block.store, next(rings), order, first))
        blocks.append(block)
    return state._replace(blocks=tuple(blocks), position=state.position + jump)


def own(position: Tensor, foreign: list[tuple[int, int]]) -> Tensor:
    """Which stored positions [B, H, S] hold a pair that is no distractor: bool, same shape."""
    mask = position >= 0
    for start, stop in foreign:
        mask = mask & ((position < start) | (position >= stop))
    return mask


def _loudest(store: StoreState, foreign: list[tuple[int, int]], lane: int, count: int) -> Ring:
    """The `count` highest scores of every head in a lane, the oldest first; fewer if there are."""
    mine = own(store.position, foreign)[lane]
    score = torch.where(mine, store.score[lane].detach(), -torch.inf)
    chosen = score.topk(min(count, int(mine.sum(1).min())), dim=1).indices
    order = store.position[lane].gather(1, chosen).argsort(1)
    chosen = chosen.gather(1, order)  # [H, n]

    def rows(x: Tensor) -> Tensor:
        index = chosen.view(*chosen.shape, *[1] * (x.dim() - 3))
        return x[lane].detach().gather(1, index.expand(-1, -1, *x.shape[3:]))

    return Ring(rows(store.k), rows(store.v), rows(store.score), rows(store.span))


def _owned(loudest: list[Ring], wanted: int, owner: int, ranks: Ranks) -> tuple[int, list[Ring]]:
    """How many pairs of every head rank `owner` has found, and its rings."""
    count = min(ring.score.shape[1] for ring in loudest)
    if ranks.world == 1:
        return count, loudest
    count = int(ranks.share(torch.tensor(count, device=loudest[0].score.device), owner))

    def whole(x: Tensor) -> Tensor:  # the others may have found fewer, and theirs do not count
        return torch.cat([x, x.new_zeros(x.shape[0], wanted - x.shape[1], *x.shape[2:])], 1)

    return count, [ranks.share(map_state(whole, ring), owner) for ring in loudest]


def _compete(store: StoreState, ring: Ring, order: Tensor, first: Tensor) -> StoreState:
    """The best of the stored pairs and of `order` [B, n] of the ring, positions from first [B]."""
    places = store.score.shape[2]
    given = (order >= 0)[:, None, :]  # [B, 1, n]
    index = order.clamp(min=0)

    def rows(x: Tensor) -> Tensor:
        return x[:, index].transpose(0, 1)  # [H, B, n, ...] to [B, H, n, ...]

    score = torch.where(given, rows(ring.score), -torch.inf)
    position = first[:, None] + torch.arange(order.shape[1], device=order.device)
    position = torch.where(given, position[:, None], -1).expand_as(score)
    new = (rows(ring.k), rows(ring.v), score, torch.zeros_like(score), position, rows(ring.span))
    both = [torch.cat([a, b.to(a.dtype)], 2) for a, b in zip(store[:6], new, strict=True)]
    best = both[2].detach().topk(places, dim=2).indices

    def pick(x: Tensor) -> Tensor:
        index = best.view(*best.shape, *[1] * (x.dim() - 3))
        return x.gather(2, index.expand(-1, -1, -1, *x.shape[3:]))

    return StoreState(*(pick(x) for x in both), moments=store.moments)
