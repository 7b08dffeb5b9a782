"""One layer: window (with store), memory and feed-forward, and how they are combined.

    mag  x + attention(h) + memory(h), the memory behind a gate of its own, both read h = norm(x)
    mal  m = x + memory(norm(x)), then m + attention(norm(m))

Source: Titans, arXiv 2501.00663, sections 4.2 and 4.3. There MAG multiplies the two branches; the
sum with a gated memory keeps the attention's values when the memory has nothing to say.

Shapes: B lanes, T tokens, D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wakesleep.ttl.attention import AttentionInput, WindowAttention
from wakesleep.ttl.grid import Grid
from wakesleep.ttl.memory import NeuralMemory
from wakesleep.ttl.state import BlockState


class BlockStats(NamedTuple):
    surprise: Tensor | None  # [B, T] float32 write strength of the memory, None without one
    written: Tensor | None  # [B, T] bool
    nonfinite: Tensor  # [B] int64 rows of the block's input that were not finite


class Block(nn.Module):
    """A residual layer over a carried state."""

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        combine: str,
        attention: WindowAttention,
        memory: NeuralMemory | None,
    ) -> None:
        super().__init__()
        self.combine = combine
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.attention = attention
        self.memory = memory
        if memory is not None and combine == "mal":
            self.memory_norm = nn.RMSNorm(dim, eps=1e-6)
        self.mlp_norm = nn.RMSNorm(dim, eps=1e-6)
        self.mlp_in = nn.Linear(dim, 2 * mlp_dim, bias=False)
        self.mlp_out = nn.Linear(mlp_dim, dim, bias=False)

    def forward(
        self, x: Tensor, state: BlockState, grid: Grid, given: AttentionInput
    ) -> tuple[Tensor, BlockState, BlockStats]:
        """x [B, T, D] to the next layer's input [B, T, D], with the next state.

        A row that is not finite reads as zeros, enters neither window nor store, writes nothing.
        """
        finite = x.isfinite().all(-1)
        nonfinite = (given.live & ~finite).sum(1)
        x = torch.where(finite[..., None], x, x.new_zeros(()))
        given = given._replace(live=given.live & finite)
        x, state, surprise, written = self._mix(x, state, grid, given)
        gate, up = self.mlp_in(self.mlp_norm(x)).chunk(2, -1)
        x = x + self.mlp_out(nn.functional.silu(gate) * up)
        return x, state, BlockStats(surprise, written, nonfinite)

    def _mix(self, x: Tensor, state: BlockState, grid: Grid, given: AttentionInput):
        window, store, memory = state.window, state.store, state.memory
        surprise = per_head = written = None
        if self.memory is not None:
            h = self.memory_norm(x) if self.combine == "mal" else self.norm(x)
            m, memory, wrote = self.memory(h, memory, grid, given.live)
            surprise, per_head, written = wrote
            if self.combine == "mal":
                x = x + m
        a, window, store = self.attention(self.norm(x), window, store, grid, given, per_head)
        x = x + a
        if self.memory is not None and self.combine == "mag":
            x = x + m
        state = state._replace(window=window, store=store, memory=memory)
        return x, state, surprise, written
