"""What sleep did to the prediction of what was read last, the last question of the gate.

Shapes: B lanes, n of them with a full window, W window, C chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from wakesleep.ttl.fast import open_keys
from wakesleep.ttl.flops import wake_flops
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import SPAN, StreamState, closed_memory, select

CONFIDENCE = 1.64  # standard errors of a one-sided bound of 95 %


class Harm(NamedTuple):
    """What a change of the state does to the prediction of the window; of lanes asked [B] bool."""

    before: Tensor  # [B] float64 nats per token
    after: Tensor  # [B]
    most: Tensor  # [B] that are lost, with 95 % confidence; inf if a prediction was lost altogether
    asked: Tensor  # [B] bool: two rows at least could be compared


def tail_nats(model: TTLModel, state: StreamState) -> Tensor:
    """Nats [B, W - 1] of the window's tokens, read once more from an empty window.

    Store, memory and fast weights are those of `state`, which is not changed. The memory has
    learned these tokens already, so only the difference of two states means something. NaN in a
    lane whose window is not full, and where a prediction is not finite.
    """
    window, C = model.window_of(state), model.config.chunk
    nats = torch.full((len(state.position), window - 1), math.nan, device=state.position.device)
    full = (state.position // C * C >= window).nonzero()[:, 0]
    if not len(full):
        return nats
    if len(full) < len(nats):
        return nats.index_copy(0, full, tail_nats(model, select(state, full)))
    boundary, ids = state.position // C * C, state.ids[:, SPAN : SPAN + window]
    fresh = model.init_state(state.position.shape[0], window=window, capacity=1)
    blocks = tuple(
        block._replace(
            window=empty.window, memory=closed_memory(block.memory, empty.memory), page=empty.page
        )
        for block, empty in zip(state.blocks, fresh.blocks, strict=True)
    )
    begin = state._replace(
        blocks=blocks, position=boundary - window, ids=fresh.ids, recent=fresh.recent
    )
    logits = model(ids, begin)[0][:, :-1].float()
    nats = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return torch.where(nats.isfinite(), nats, math.nan)


def harm(before: Tensor, after: Tensor) -> Harm:
    """Compare `tail_nats` [B, W - 1] of two states by the rows that were predicted before.

    Rows that were not finite then say nothing; one that is not any more is harm without bound.
    """
    rows = before.isfinite()
    count = rows.sum(1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(rows, x, 0.0).sum(1) / count.clamp(min=1)

    then, worse = before.double(), (after - before).double()
    lost = (rows & ~after.isfinite()).any(1)
    fall = mean(worse)
    error = (mean((worse - fall[:, None]).square()) / (count - 1).clamp(min=1)).sqrt()
    most = torch.where(lost, math.inf, fall + CONFIDENCE * error)
    return Harm(mean(then), mean(then) + fall, most, count > 1)


def tail_flops(model: TTLModel, state: StreamState, held: Sequence[int] | None = None) -> int:
    """What `tail_nats` costs, all lanes together.

    Args:
        held: keys of an MLP that the softmax sees, in each layer of fast weights; None = the
            state's.
    """
    window, C = model.window_of(state), model.config.chunk
    if held is None:
        held = [open_keys(state.blocks[layer].fast) for layer in model.config.fast_layers]
    stores = [block.store for block in state.blocks if block.store is not None]
    capacity = stores[0].position.shape[-1] if stores else None
    sizes = {"window": window, "capacity": capacity, "held": held}
    starts = (state.position // C * C - window).tolist()
    return sum(wake_flops(model.config, at, window, **sizes) for at in starts if at >= 0)
