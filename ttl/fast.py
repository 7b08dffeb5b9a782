"""Fast weights: a linear memory per head that is read awake and written asleep.

They share queries, keys and values with the window and the store, so that a pair of the store is a
pair of the fast weights: sleep writes it once more, here, and its place in the store is free. Keys
and queries are of length 1 and know no position.

Shapes: B lanes, T tokens, H heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wakesleep.ttl.state import FastState

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

    def init_state(self, batch: int) -> FastState:
        """Fast weights of lanes that have never slept."""
        shape = (batch, self.num_heads, self.head_dim, self.head_dim)
        nothing = torch.zeros(shape, device=self.gate.device)
        return FastState(nothing, nothing.clone())

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


def unit_key(k: Tensor) -> Tensor:
    """Keys or queries [..., K] at length 1, float32 at least; zeros stay zeros."""
    return F.normalize(k.to(torch.promote_types(k.dtype, torch.float32)), dim=-1, eps=1e-6)
