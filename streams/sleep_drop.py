"""Sleep drop: teach the read of fast weights by taking away what they hold.

The write of fast weights needs no training; the read does. So before some segments a lane sleeps: a
random half of the pairs of its stores is offered, the best of these are written into the fast
weights as a sleep would write them, and leave the store. What is asked of them afterwards can only
be found in the fast weights. Nothing of the write has a gradient; queries, gate and floor have one.

Shapes: B lanes, H heads, S store places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wakesleep.consolidation.replay import change, choose, emptied
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import BlockState, StreamState, merge

OFFERED = 0.5  # share of the stored pairs
UNKNOWN = 0.999  # cosine below which a pair is written, whatever else the fast weights hold


def sleep_drop(
    model: TTLModel, state: StreamState, lanes: Tensor, num_pairs: int, seed: int
) -> StreamState:
    """The state after a sleep of `lanes` [B] bool, of num_pairs per head at most."""
    generator = torch.Generator().manual_seed(seed)
    lam, blocks = model.config.fast.lam, []
    for block in state.blocks:
        if block.store is not None and block.fast.asleep.numel():
            slept = _slept(block, num_pairs, lam, generator)
            block = merge(lanes, slept, block)
        blocks.append(block)
    return state._replace(blocks=tuple(blocks))


def _slept(block: BlockState, num_pairs: int, lam: float, generator) -> BlockState:
    store = block.store
    with torch.no_grad():
        drawn = torch.rand(store.position.shape[1:], generator=generator).to(store.position.device)
        offered = torch.where(drawn < OFFERED, store.position, -1)
        pairs = choose(store._replace(position=offered), block.fast, num_pairs, UNKNOWN)
        fast = change(block.fast, pairs, lam)
        free = torch.zeros_like(store.position, dtype=torch.bool)
        free = free.scatter(-1, pairs.place, pairs.chosen)
    return block._replace(store=emptied(store, free), fast=fast)
