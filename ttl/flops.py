"""Closed formulas for the cost of reading: the wake half of the ledger.

`matmul` equals what torch.utils.flop_counter counts on this code (2 per multiply-add of every
matrix product); elementwise work is seen in seconds, not here. `linalg` counts n^2 m per triangular
solve. Costs depend on where a call falls on the chunk grid, so the formulas take the position.

Shapes: B lanes, T tokens, D width, H heads, K head width, W window, C chunk, S places, L visible.
"""

from __future__ import annotations

from typing import NamedTuple

from wakesleep.ttl.memory import memory_flops
from wakesleep.ttl.model import ModelConfig


class PartCost(NamedTuple):
    """One row of the table."""

    part: str  # "head", "layer 2 store", ...
    matmul: int
    linalg: int


def segment_flops(
    config: ModelConfig,
    position: int,
    num_tokens: int,
    *,
    batch: int = 1,
    window: int | None = None,
    capacity: int | None = None,
    head: bool = True,
) -> list[PartCost]:
    """Cost of one call of `num_tokens` that starts at `position`, by part.

    Every lane is at the same position and all its tokens are finite. The store counts as full as
    the tokens that left the window can make it.
    """
    c = config
    W = c.window if window is None else window
    S = c.store.capacity if capacity is None else capacity
    first, last = position // c.chunk, -(-(position + num_tokens) // c.chunk)
    chunks = range(first, max(last, first + 1))
    tokens = batch * num_tokens
    inner = c.num_heads * c.head_dim
    rotary = c.head_dim // 4 // 2 * 2
    per_key = 2 * batch * c.chunk * c.num_heads * (2 * c.head_dim + rotary)
    parts = []
    for layer in range(c.num_layers):
        name = f"layer {layer} "
        parts.append(PartCost(name + "projections", 2 * tokens * c.dim * 4 * inner, 0))
        near = 1 + c.num_persistent + W + c.chunk
        parts.append(PartCost(name + "window", len(chunks) * near * per_key, 0))
        if layer in c.store_layers:
            used = sum(min(S, max(0, n * c.chunk - W)) for n in chunks)
            parts.append(PartCost(name + "store", used * per_key, 0))
            if c.store.score == "learned":
                hidden = c.store.hidden * (c.dim + c.num_heads)
                parts.append(PartCost(name + "admission", 2 * tokens * hidden, 0))
        if layer in c.memory_layers:
            cost = memory_flops(
                c.memory, c.dim, c.num_heads, c.head_dim, c.chunk, len(chunks), batch, num_tokens
            )
            parts.append(PartCost(name + "memory", cost.matmul, cost.linalg))
        parts.append(PartCost(name + "feed-forward", 6 * tokens * c.dim * c.mlp_dim, 0))
    if head:
        parts.append(PartCost("head", 2 * tokens * c.dim * c.vocab_size, 0))
    return parts


def wake_flops(config: ModelConfig, position: int, num_tokens: int, **sizes) -> int:
    """Total of `segment_flops`."""
    return sum(p.matmul + p.linalg for p in segment_flops(config, position, num_tokens, **sizes))
