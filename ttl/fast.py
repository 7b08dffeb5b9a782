"""Fast weights: a linear memory per head that is read awake and written asleep.

They share queries, keys and values with the window and the store, so that a pair of the store is a
pair of the fast weights: sleep writes it once more, here, and its place in the store is free. Keys
and queries are of length 1 and know no position.

Shapes: B lanes, T tokens, H heads, K head width, S store places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wakesleep.ttl.state import FastState, ProbeState

PROBES = 256  # per head: half of them for the gate, half for an audit that it never sees
FLOOR_INIT = 0.1  # RMS of an answer that counts half


@dataclass(frozen=True, kw_only=True)
class FastConfig:
    lam: float = 0.05  # ridge of the protected write; one key of length 1 has weight 1

    def __post_init__(self) -> None:
        if not 1e-6 <= self.lam < math.inf:
            raise ValueError(f"fast.lam must be from 1e-6 to inf, got {self.lam}")


class FastWeights(nn.Module):
    """The read of fast weights; they themselves are in the state."""

    def __init__(self, config: FastConfig, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.num_heads, self.head_dim = config, num_heads, head_dim
        self.gate = nn.Parameter(torch.zeros(num_heads))  # zero: a model without them, at first
        self.floor = nn.Parameter(torch.full((num_heads,), FLOOR_INIT).log())

    def init_state(self, batch: int, capacity: int, like: Tensor) -> FastState:
        """Fast weights of lanes that have never slept, with a store of `capacity` (0 = none)."""
        return no_fast_weights(like, batch, self.num_heads, self.head_dim, capacity)

    def read(self, q: Tensor, state: FastState) -> Tensor:
        """What the fast weights give back for queries q [B, T, H, K], in the same shape and dtype.

        An answer is divided by its RMS, unless that is small: a query that resembles no written key
        gets a faint answer, and it stays faint.
        """
        with torch.autocast(q.device.type, enabled=False):
            unit = unit_key(q).transpose(1, 2)
            y = (unit @ state.s.to(unit.dtype)).transpose(1, 2)  # [B, T, H, K]
            power = y.square().mean(-1, keepdim=True)
            floor = self.floor.to(y.dtype).exp().square()[:, None]
            y = y * (power + floor).rsqrt() * self.gate.to(y.dtype)[:, None]
        return y.to(q.dtype)


def no_fast_weights(
    like: Tensor, batch: int, num_heads: int, head_dim: int, capacity: int = 0
) -> FastState:
    """Nothing written, no probes, on the device of `like` and with probes of its dtype."""
    heads = (batch, num_heads)
    matrix = torch.zeros(*heads, head_dim, head_dim, device=like.device)
    places = torch.full((*heads, capacity), -1, device=like.device)
    k = like.new_zeros(*heads, PROBES, head_dim)
    probes = ProbeState(k, k.clone(), places.new_full((*heads, PROBES), -1))
    return FastState(matrix, matrix.clone(), places, probes)


def follow(asleep: Tensor, position: Tensor) -> Tensor:
    """What `asleep` [B, H, S] says of the places of another store with pairs at position [B, H, N].

    A pair is known by its position: of pairs that are in neither, or in both, -1 or it.
    """
    known = asleep.sort(-1).values
    if not known.shape[-1]:
        return torch.full_like(position, -1)
    found = torch.searchsorted(known, position).clamp(max=known.shape[-1] - 1)
    return torch.where(known.gather(-1, found) == position, position, -1)


def unit_key(k: Tensor) -> Tensor:
    """Keys or queries [..., K] at length 1, float32 at least; zeros stay zeros."""
    return F.normalize(k.to(torch.promote_types(k.dtype, torch.float32)), dim=-1, eps=1e-6)
