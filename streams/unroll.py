"""One training step's forward pass: segments read one after the other, and their loss.

Shapes: B lanes, T tokens per lane and step, K segments of S = T / K tokens, D model width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wakesleep.streams.distractors import Pool, inject, remember
from wakesleep.streams.ranks import ALONE, Ranks
from wakesleep.streams.training_batch import Batch
from wakesleep.streams.training_draws import Draw
from wakesleep.streams.training_sleep import sleep_drop, sleep_through
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.recompute import recomputed
from wakesleep.ttl.state import StreamState, merge


class Unrolled(NamedTuple):
    hidden: Tensor  # [B, T, D]
    state: StreamState  # behind the last segment, with its gradient
    position: Tensor  # [B, T] int64 of every token when it was read, since its lane's reset
    stored: Tensor  # [B, T] int64, the same now: what was in the window during a jump moved on
    foreign: list[tuple[int, int]]  # intervals of positions that distractors have
    nonfinite: int  # rows that the model had to mask
    surprise: Tensor  # [B, T] write strength, mean over the layers with a memory


class TokenLoss(NamedTuple):
    loss: Tensor  # scalar, weighted mean over the predictions
    nats: Tensor  # [B, T] of every prediction that is asked for or weighed, else 0
    blind: Tensor  # scalar, mean over the blind ones of these; nan without any
    said: Tensor  # [B, T] int64 the likeliest token; answer tokens only, else -2
    right: Tensor  # [B, T] bool: it is the target
    stale: Tensor  # [B, T] bool: it is the one that has been overwritten


def unroll(
    model: TTLModel,
    batch: Batch,
    state: StreamState,
    draw: Draw,
    pool: Pool,
    read_floor: float = 0.0,
    recompute: str = "none",
    blind: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Unrolled:
    """Read the K segments of a batch; gradient flows through the state from each to the next.

    A lane whose document starts with a segment is reset before it, and no other lane is. On a step
    that keeps everything, what recalled answers read is booked as the `mass` of the store.

    Args:
        read_floor: smaller shares of a query's attention are not booked.
        recompute: what the backward pass computes again instead of finding it kept: "none", "chunk"
            (reads and writes, chunk by chunk) or "segment" (everything between two states).
        blind: [B, T] bool: tokens that see no others in the window.
        ranks: batch, state and draw are of this rank's lanes, the pool is of all.
    """
    by_chunk = partial(model, recompute=recompute == "chunk")
    read = recomputed(model) if recompute == "segment" else by_chunk
    K = batch.reset.shape[1]
    S = batch.tokens.shape[1] // K
    window = model.window_of(state)
    columns = torch.arange(S, device=batch.tokens.device)
    hidden, position, stored, foreign, surprise, nonfinite = [], [], [], [], [], 0
    for k in range(K):
        here = slice(k * S, (k + 1) * S)
        if bool((batch.reset[:, k] & (state.position > 0)).any()):
            state = model.reset(state, batch.reset[:, k])
        if draw.passes:
            state = remember(state, pool, k + 1, ranks)
        if draw.orders[k] is not None:
            first = max(0, int(state.position[0]) - window)
            foreign.append((first, first + draw.jumps[k]))
            edge = (state.position - window).clamp(min=0)[:, None]
            stored = [torch.where(p < edge, p, p + draw.jumps[k]) for p in stored]
            state = inject(state, pool, draw.orders[k], draw.jumps[k], window)
        if draw.sleeps is not None and bool(draw.sleeps[k].any()):
            seed = draw.sleep_seed + k
            state = sleep_drop(model, state, draw.sleeps[k], draw.sleep_pairs, seed, foreign)
        position.append(state.position[:, None] + columns)
        stored.append(position[-1])
        lengths = batch.lengths[:, k]
        x, state, stats = read(
            batch.tokens[:, here],
            state,
            None if bool((lengths == S).all()) else lengths,
            read_weight=batch.recalled[:, here] if draw.keep_all else None,
            read_floor=read_floor if draw.keep_all else 0.0,
            rank_table=draw.rank_table,
            blind=None if blind is None else blind[:, here],
            head=False,
        )
        if draw.num_passes:
            state = rest(model, state, draw, ~(batch.weight[:, here] > 0).any(1))
        hidden.append(x)
        surprise.append(stats.surprise)
        nonfinite += int(stats.nonfinite.sum())
    parts = (hidden, position, stored, surprise)
    hidden, position, stored, surprise = (torch.cat(part, 1) for part in parts)
    return Unrolled(hidden, state, position, stored, foreign, nonfinite, surprise)


def rest(model: TTLModel, state: StreamState, draw: Draw, quiet: Tensor) -> StreamState:
    """Sleep by recurrence in the lanes where nothing was asked, quiet [B] bool."""
    if not bool(quiet.any()):
        return state
    slept = sleep_through(model, state, draw.num_passes, draw.evict)
    return slept if bool(quiet.all()) else merge(quiet, slept, state)


def next_token_loss(
    hidden: Tensor,
    output: Tensor,
    batch: Batch,
    z_loss: float,
    blind: Tensor | None = None,
    total: Tensor | None = None,
) -> TokenLoss:
    """Weighted cross-entropy of the next token; positions without a weight cost nothing.

    Args:
        hidden: [B, T, D].
        output: [V, D], the output matrix.
        z_loss: weight of the squared log of the softmax's normaliser.
        blind: [B, T] bool, see `unroll`.
        total: sum of the weights that the mean is over; None: of this batch.
    """
    rows = ((batch.weight > 0) | (batch.asked > 0)).flatten().nonzero()[:, 0]
    targets, weight = batch.targets.flatten()[rows], batch.weight.flatten()[rows]
    asked = batch.asked.flatten()[rows] > 0
    logits = F.linear(hidden.flatten(0, 1)[rows], output)
    losses = F.cross_entropy(logits, targets, reduction="none")
    total = (weight.sum() if total is None else total).clamp(min=1e-6)
    loss = (losses * weight).sum() / total
    if z_loss:
        normaliser = torch.logsumexp(logits.float(), -1)
        loss = loss + z_loss * (normaliser.square() * weight).sum() / total
    said = torch.full_like(batch.targets, -2)
    said.view(-1)[rows[asked]] = logits.detach()[asked].argmax(-1)
    right, stale = said == batch.targets, said == batch.stale
    nats = torch.zeros_like(batch.weight)
    nats.view(-1)[rows] = losses.detach().float()
    alone = torch.zeros_like(batch.asked, dtype=torch.bool) if blind is None else blind
    hidden = losses.detach()[alone.flatten()[rows]].mean()
    return TokenLoss(loss, nats, hidden, said, right, stale)


def last_stored(position: Tensor, chunk: int, window: int) -> Tensor:
    """The youngest position that has left the window when `position` [B] is read: [B] int64.

    The window gives up whole chunks, and shows at least W tokens before the open one.
    """
    return position // chunk * chunk - window - 1
