"""What training knows of sleep: passes over what was read last, and pairs that are taken away.

Recurrence: behind a segment in which nothing is asked, more passes of the blocks refine what the
fast weights hold of it; with hard eviction they are all that is left of it. How many passes there
are is drawn for every step, so that one model serves every number.

Sleep drop: the write of fast weights by replay needs no training; the read does. So before some
segments a lane sleeps: a random half of its document's pairs is offered, and of the other text's
about as many as are written; the best of both are written into the fast weights as a sleep would
write them, and leave the store. What is asked of them afterwards can only be found in the fast
weights. Nothing of the write has a gradient; queries and gates have one.

Shapes: B lanes, H heads, S store places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wakesleep.consolidation.gate import without_superseded
from wakesleep.consolidation.replay import (
    change,
    choose,
    emptied,
    keep_keys,
    opened,
    seen_by,
    unseen,
)
from wakesleep.streams.distractors import own
from wakesleep.ttl.key_space import KeySpace
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.resize import clear_window
from wakesleep.ttl.state import BlockState, StreamState, merge

OFFERED = 0.5  # share of the document's stored pairs


def sleep_through(model: TTLModel, state: StreamState, num_passes: int, evict: str) -> StreamState:
    """The state after passes 2 to num_passes over the last tokens.

    Args:
        evict: "hard" empties the windows afterwards, also if there was one pass only; "keep" does
            not.
    """
    for _ in range(num_passes - 1):
        state = model.sleep_pass(state)
    return clear_window(model, state) if evict == "hard" else state


def sleep_drop(
    model: TTLModel,
    state: StreamState,
    lanes: Tensor,
    num_pairs: int,
    seed: int,
    foreign: Sequence[tuple[int, int]] = (),
) -> StreamState:
    """The state after a sleep of `lanes` [B] bool, of num_pairs per head at most.

    Args:
        foreign: ranges of positions at which distractors are: of a store full of these, a random
            half would hardly ever hold what is asked.
    """
    generator = torch.Generator().manual_seed(seed)
    lam, blocks = model.config.fast.lam, []
    for block, module in zip(state.blocks, model.blocks, strict=True):
        if block.store is not None and block.fast.asleep.numel():
            space = module.attention.fast.space
            some = Offer(lanes, num_pairs, foreign)
            block = merge(lanes, _slept(block, space, some, lam, generator), block)
        blocks.append(block)
    return state._replace(blocks=tuple(blocks))


class Offer(NamedTuple):
    """What a sleep may write."""

    lanes: Tensor  # [B] bool: those that sleep
    num_pairs: int  # per head at most
    foreign: Sequence[tuple[int, int]]  # ranges of positions at which distractors are


def _slept(
    block: BlockState, space: KeySpace, offer: Offer, lam: float, generator: torch.Generator
) -> BlockState:
    store, num_pairs = block.store, offer.num_pairs
    with torch.no_grad(), torch.autocast(store.k.device.type, enabled=False):  # as sleep writes
        drawn = torch.rand(store.position.shape[1:], generator=generator).to(store.position.device)
        drawn = torch.where(offer.lanes[:, None, None], drawn, 1.0)  # nothing of other lanes
        others = (store.position >= 0) & ~own(store.position, offer.foreign)
        some = (num_pairs / others.sum(-1, keepdim=True).clamp(min=1)).clamp(max=OFFERED)
        offered = torch.where(drawn < torch.where(others, some, OFFERED), store.position, -1)
        seen, fast = seen_by(space, store._replace(position=offered), block.fast)
        pairs = choose(seen, fast, num_pairs, worth=-math.inf)
        fast = without_superseded(fast, pairs)
        fast = unseen(change(fast, pairs, lam), block.fast)
        fast = keep_keys(fast, store, pairs, pairs.chosen)
        free = torch.zeros_like(store.position, dtype=torch.bool)
        free = free.scatter(-1, pairs.place, pairs.chosen)
        left = emptied(store, free)
        fast = opened(fast, left)
    return block._replace(store=left, fast=fast)
