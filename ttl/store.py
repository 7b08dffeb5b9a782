"""Exact store: a bounded number of key-value pairs, kept verbatim, chosen by a score.

The store is the window's long arm. A token that leaves the window competes for one of S places per
head by a score that was fixed when it was read; what loses is gone. `WindowAttention` reads window
and store in one softmax.

Shapes: B lanes, T tokens, H heads, K head width, S places, C chunk, D model width.
Sources: score "residual" is HOLA's beta * ||e|| (arXiv 2607.02303, section 3); "mass" is the read
mass of H2O (arXiv 2306.14048); the learned head follows LTE (arXiv 2510.20787) with a teacher of
its own, see `ExactStore.score`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from wakesleep.ttl.grid import Grid
from wakesleep.ttl.state import SPAN, StoreState

HORIZON = 2048.0  # tokens that the running mean and variance of raw scores look back


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    capacity: int = 2048  # S, places per head of a new stream
    score: Literal["learned", "residual", "residual_z", "recency", "reservoir", "mass"] = "learned"
    quota: bool = False  # 16 spans of the stream with a share of the places each
    newer: bool = False  # keys lower the logits of older ones that the same query asks for
    hidden: int = 64  # width of the admission head
    seed: int = 0  # of the reservoir

    def __post_init__(self) -> None:
        if not 1 <= self.capacity <= 2**20:
            raise ValueError(f"store.capacity must be between 1 and {2**20}, got {self.capacity}")
        if not 1 <= self.hidden <= 4096:
            raise ValueError(f"store.hidden must be between 1 and 4096, got {self.hidden}")


class AdmissionHead(nn.Sequential):
    """Scores [B, T, H] float32 of hidden states [B, T, D].

    The last product is taken in float32 at least: rounded to bfloat16, most scores would be equal
    to others, and of equal scores the older token wins.
    """

    def __init__(self, dim: int, hidden: int, num_heads: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, num_heads))

    def forward(self, x: Tensor) -> Tensor:
        inner, activation, last = self
        hidden = activation(inner(x))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        weight, bias = last.weight.to(dtype), last.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(hidden.to(dtype), weight, bias).float()


class ExactStore(nn.Module):
    """Scores tokens and keeps the best; it holds no state, only the admission head."""

    def __init__(self, config: StoreConfig, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = head_dim
        if config.score == "learned":
            self.head = AdmissionHead(dim, config.hidden, num_heads)

    def init_state(self, batch: int, capacity: int, like: Tensor) -> StoreState:
        """An empty store of `capacity` places per head, in the dtype and device of `like`."""
        heads = (batch, self.num_heads)
        moments = torch.tensor([0.0, 0.0, 1.0], device=like.device).repeat(*heads, 1)
        pair = like.new_zeros(*heads, 0, self.head_dim)
        number = torch.zeros(*heads, 0, device=like.device)
        position = number.long()
        span = torch.zeros(*heads, 0, SPAN, dtype=torch.int32, device=like.device)
        nothing = StoreState(pair, pair, number, number, position, span, moments)
        return empty_store(nothing, capacity)

    def score(self, x: Tensor, position: Tensor, lane: Tensor, surprise: Tensor | None) -> Tensor:
        """Score of every token [B, T, H] float32, from its block input x [B, T, D].

        The learned head predicts the logit of "a query from beyond the window will read this
        token". Its teacher is the read mass that tokens in fact received; selection itself passes
        no gradient. The layers below learn from the teacher, too: without that, the head went by
        what a token is and not by what is said around it. "residual_z" is
        returned raw, see `z_scores`; "mass" starts at 0 and is counted by the reader.

        Args:
            position: [B, T] int64 since the reset; lane: [B] int64.
            surprise: [B, H, T] write strength of the block's neural memory, for "residual".

        Raises:
            ValueError: the score needs a neural memory and the block has none.
        """
        B, T, _ = x.shape
        match self.config.score:
            case "learned":
                return self.head(x)
            case "residual" | "residual_z":
                if surprise is None:
                    raise ValueError(
                        f"store.score={self.config.score} needs a neural memory in the same block; "
                        "list the layer in memory_layers too, or use store.score=learned"
                    )
                return surprise.detach().float().transpose(1, 2)
            case "recency":
                return position[..., None].expand(B, T, self.num_heads).float()
            case "reservoir":
                uniform = hash_uniform(position, lane[:, None], self.config.seed)
                return uniform[..., None].expand(B, T, self.num_heads)
            case "mass":
                return x.new_zeros(B, T, self.num_heads, dtype=torch.float32)


def empty_store(like: StoreState, capacity: int) -> StoreState:
    """A store of `capacity` empty places for the lanes and heads of `like`, with its moments."""

    def filled(t: Tensor, value: float) -> Tensor:
        return t.new_full((*t.shape[:2], capacity, *t.shape[3:]), value)

    return StoreState(
        k=filled(like.k, 0),
        v=filled(like.v, 0),
        score=filled(like.score, -torch.inf),
        mass=filled(like.mass, 0),
        position=filled(like.position, -1),
        span=filled(like.span, -1),
        moments=like.moments,
    )


def candidates(
    k: Tensor, v: Tensor, score: Tensor, enters: Tensor, position: Tensor, ids: Tensor
) -> StoreState:
    """Tokens that leave the window, as the places of a store that competes with the real one.

    Args:
        k, v: [B, C, H, K]; score: [B, C, H].
        enters: [B, C] bool, False for what is no token or may not enter yet.
        position: [B, C] int64, ascending.
        ids: [B, C + SPAN - 1] token ids; row i of the spans begins at column i.
    """
    H = k.shape[2]
    score = torch.where(enters[..., None], score, -torch.inf).transpose(1, 2)
    around = ids.unfold(1, SPAN, 1).to(torch.int32)
    return StoreState(
        k=k.transpose(1, 2),
        v=v.transpose(1, 2),
        score=score,
        mass=torch.zeros_like(score),
        position=position[:, None].expand(-1, H, -1),
        span=around[:, None].expand(-1, H, -1, -1),
        moments=score.new_zeros(()),
    )


def hash_uniform(position: Tensor, lane: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for every (position, lane, seed): the finaliser of splitmix64."""
    offset = (seed * 0x632BE59BD9B4E019 + 2**63) % 2**64 - 2**63  # as a tensor's int64 would wrap
    z = position * -7046029254386353131 + lane * 0x2545F4914F6CDD1D + offset
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ _shift_right(z, shift)) * factor
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 40).float() * 2.0**-24


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 bit patterns (>> keeps the sign)."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def z_scores(raw: Tensor, opened: Tensor, moments: Tensor, live: Tensor, grid: Grid):
    """Normalise raw scores by the lane's running mean and deviation before each token's chunk.

    Args:
        raw: [B, G, H] raw scores, in the slots of the call's tokens.
        opened: [B, C, H] scores of the open chunk, already normalised.
        moments: [B, H, 3] running count, mean and variance at the last boundary.
        live: [B, G] bool.

    Returns:
        scores [B, G, H] and the moments at the last boundary of the call.
    """
    C = grid.chunk
    fresh, out = grid.fresh(), []
    for n in range(grid.num_chunks):
        here = slice(n * C, (n + 1) * C)
        mean, scale = moments[:, None, :, 1], (moments[:, None, :, 2] + 1e-6).sqrt()
        z = (raw[:, here] - mean) / scale
        if n == 0:
            z = torch.where(fresh[:, here, None], z, opened)
        out.append(z)
        closed = (grid.closed > n)[:, None, None]
        moments = torch.where(closed, update_moments(moments, z, live[:, here]), moments)
    return torch.cat(out, 1), moments


def update_moments(moments: Tensor, z: Tensor, live: Tensor) -> Tensor:
    """Moments [B, H, 3] after a chunk whose z-scores [B, C, H] count where `live` [B, C].

    z was taken with the old mean and deviation, so the raw moments of the chunk follow from it.
    """
    count, mean, variance = moments.unbind(-1)  # [B, H]
    weight = live[..., None].to(z.dtype)
    n = weight.sum(1)
    z = torch.where(live[..., None], z, z.new_zeros(()))
    z_mean = z.sum(1) / n.clamp(min=1)
    z_square = z.square().sum(1) / n.clamp(min=1)
    scale = (variance + 1e-6).sqrt()
    old = count.clamp(max=HORIZON)
    share = n / (old + n).clamp(min=1)
    step = scale * z_mean
    chunk_variance = scale.square() * (z_square - z_mean.square()).clamp(min=0)
    merged = variance + share * (chunk_variance - variance) + share * (1 - share) * step.square()
    return torch.stack([count + n, mean + share * step, merged], -1)
