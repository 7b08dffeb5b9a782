"""Chunk grid: where the tokens of one call fall among the chunks of their lanes.

Lane b has read `position[b]` tokens, so its open chunk holds `phase = position % C` of them. A call
brings `lengths[b]` more. Laid out on a grid of N whole chunks that starts with the open chunk, all
lanes have their boundaries in the same places, whatever their phases: that is what lets ragged
lanes share every matrix product, and what makes the result independent of where calls are cut.

    open chunk         new tokens of the call            not there yet
    [o o o o n n n n] [n n n n n n n n] [n n n . . . . .]

Shapes: B lanes, T tokens of the call, C chunk, N chunks, G = N * C slots, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    chunk: int  # C
    num_chunks: int  # N
    phase: Tensor  # [B] int64 tokens in the open chunk before the call
    lengths: Tensor  # [B] int64 tokens that the call brings
    position: Tensor  # [B] int64 position of slot 0 since the lane's reset
    aligned: bool  # every lane starts at a boundary and ends at one: reshaping is enough
    start: int | None  # phase of all lanes if they all bring the whole call: slices are enough
    stop: int | None  # `end` of all lanes, if so

    @property
    def alone(self) -> bool:
        """The call's tokens are in one chunk, at the same place of it in all lanes."""
        return self.start is not None and self.num_chunks == 1

    @property
    def shown(self) -> int:
        """Slots of a chunk that are looked at: all; of a call `alone` up to its last token."""
        return self.stop if self.alone else self.chunk

    @property
    def end(self) -> Tensor:
        """[B] int64: first slot that is still empty after the call."""
        return self.phase + self.lengths

    @property
    def closed(self) -> Tensor:
        """[B] int64: chunks that are complete after the call."""
        return self.end // self.chunk

    def fresh(self) -> Tensor:
        """[B, G] bool: slots of tokens that this call brings."""
        slots = self._slots()
        return (slots >= self.phase[:, None]) & (slots < self.end[:, None])

    def _slots(self) -> Tensor:
        return torch.arange(self.num_chunks * self.chunk, device=self.phase.device)


def make_grid(position: Tensor, lengths: Tensor, chunk: int, num_tokens: int) -> Grid:
    """The grid of a call of `num_tokens` columns; position and lengths are [B]."""
    phase = position % chunk
    lanes = set(zip(phase.tolist(), lengths.tolist(), strict=True))
    num_chunks = max(1, -(-max(first + length for first, length in lanes) // chunk))
    (start, length), *others = lanes
    stop = start + length
    if others or not length == num_tokens > 0:
        start = stop = None
    aligned = start == 0 and stop == num_chunks * chunk
    return Grid(chunk, num_chunks, phase, lengths, position - phase, aligned, start, stop)


def scatter(grid: Grid, x: Tensor, opened: Tensor) -> Tensor:
    """Put call tokens x [B, T, ...] behind the open chunk's `opened` [B, C, ...]: [B, G, ...].

    Slots that hold nothing yet are zero (False).
    """
    if grid.aligned:
        return x
    if grid.start is not None:
        return behind(grid, x, opened)
    B, T = x.shape[:2]
    G = grid.num_chunks * grid.chunk
    slots = torch.arange(G, device=x.device)
    column = (slots - grid.phase[:, None]).clamp(0, max(T - 1, 0))  # [B, G]
    if T == 0:
        out = x.new_zeros(B, G, *x.shape[2:])
    else:
        out = _rows(x, column)
        out = torch.where(_like(grid.fresh(), out), out, out.new_zeros(()))
    old = slots[: grid.chunk] < grid.phase[:, None]
    head = torch.where(_like(old, opened), opened, out[:, : grid.chunk])
    return torch.cat([head, out[:, grid.chunk :]], 1)


def behind(grid: Grid, x: Tensor, carried: Tensor) -> Tensor:
    """Put call tokens x [B, T, ...] behind what was carried [B, before + C, ...], see `carry`.

    Returns:
        [B, before + G, ...]; slots that hold nothing yet are zero (False).
    """
    before = carried.shape[1] - grid.chunk
    if grid.start is None:
        return torch.cat([carried[:, :before], scatter(grid, x, carried[:, before:])], 1)
    empty = grid.num_chunks * grid.chunk - grid.stop
    nothing = x.new_zeros(x.shape[0], empty, *x.shape[2:])
    return torch.cat([carried[:, : before + grid.start], x, nothing], 1)


def gather(grid: Grid, y: Tensor, num_tokens: int) -> Tensor:
    """Take the call's tokens out of the grid: y [B, G, ...] to [B, T, ...].

    Columns beyond a lane's length hold some slot's value; nobody may read them.
    """
    if grid.aligned:
        return y
    if grid.start is not None:
        return y[:, grid.start : grid.start + num_tokens]
    columns = grid.phase[:, None] + torch.arange(num_tokens, device=y.device)
    return _rows(y, columns.clamp(max=y.shape[1] - 1))


def carry(grid: Grid, y: Tensor, before: int = 0) -> Tensor:
    """The open chunk after the call, with `before` slots in front of it: [B, before + C, ...].

    y: [B, before + G, ...], slots of the grid preceded by `before` older ones.
    """
    if grid.stop is not None and grid.stop < grid.chunk:
        return y
    nothing = y.new_zeros(y.shape[0], grid.chunk, *y.shape[2:])
    if grid.stop is not None:
        kept = y[:, grid.stop // grid.chunk * grid.chunk :]
        empty = before + grid.chunk - kept.shape[1]
        return torch.cat([kept, nothing[:, :empty]], 1)  # a copy, so that y is not kept alive
    first = (grid.closed * grid.chunk)[:, None]
    columns = torch.arange(before + grid.chunk, device=y.device)
    return _rows(torch.cat([y, nothing], 1), first + columns)


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """Slots by head, [B, G, H, ...], as chunks of every head: [N, B * H, C, ...]."""
    return x.unflatten(1, (-1, chunk)).transpose(2, 3).transpose(0, 1).flatten(1, 2)


def from_chunks(x: Tensor, num_heads: int) -> Tensor:
    """The same back: [N, B * H, C, ...] to [B, G, H, ...]."""
    x = x.unflatten(1, (-1, num_heads)).transpose(2, 3)  # [N, B, C, H, ...]
    return x.transpose(0, 1).flatten(1, 2)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, M, ...] at rows index [B, G] of each lane: [B, G, ...]."""
    index = index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (x.dim() - 2))
