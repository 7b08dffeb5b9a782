"""One layer: window (with store), memory and feed-forward, and how they are combined.

    mag  x + attention(h) + memory(h), the memory behind a gate of its own, both read h = norm(x)
    mal  m = x + memory(norm(x)), then m + attention(norm(m))
    mac  x + y * gate(M(y)), with y = attention over window, store and M(norm(x)) of the open page;
         M is the memory at the page's start, and what it learns at the page's end is y

Source: Titans, arXiv 2501.00663, sections 4.1 to 4.3. There MAG multiplies the two branches; the
sum with a gated memory keeps the attention's values when the memory has nothing to say.

Shapes: B lanes, T tokens, D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wakesleep.ttl.attention import AttentionInput, PageView, WindowAttention
from wakesleep.ttl.grid import Grid, carry, scatter
from wakesleep.ttl.memory import NeuralMemory
from wakesleep.ttl.pages import Piece, cut_at_pages, put_columns, take_columns, take_input
from wakesleep.ttl.ready import LayerReady
from wakesleep.ttl.state import BlockState


class BlockStats(NamedTuple):
    surprise: Tensor | None  # [B, T] float32 write strength of the memory, None without one
    written: Tensor | None  # [B, T] bool
    nonfinite: Tensor  # [B] int64 rows of the block's input that were not finite
    ready: LayerReady | None  # for the next call


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
        # 0 times what is not finite is NaN, as is any sum of it: a tenth of the time of isfinite.
        finite = (x.detach() * 0).sum(-1) == 0
        nonfinite = (given.live & ~finite).sum(1)
        x = torch.where(finite[..., None], x, x.new_zeros(()))
        given = given._replace(live=given.live & finite)
        x, state, surprise, written, ready = self._mix(x, state, grid, given)
        gate, up = self.mlp_in(self.mlp_norm(x)).chunk(2, -1)
        x = x + self.mlp_out(nn.functional.silu(gate) * up)
        return x, state, BlockStats(surprise, written, nonfinite, ready)

    def _mix(self, x: Tensor, state: BlockState, grid: Grid, given: AttentionInput):
        """What attention and memory add to x; the next state, surprise, written, what is ready."""
        if self.memory is None:
            a, window, store, fast, ready = self.attention(
                self.norm(x), state.window, state.store, grid, given, fast=state.fast
            )
            return x + a, state._replace(window=window, store=store, fast=fast), None, None, ready
        match self.combine:
            case "mag":
                h = self.norm(x)
                m, memory, wrote = self._remember(h, state, grid, given)
                x, read = x + m, h
            case "mal":
                h = self.memory_norm(x)
                m, memory, wrote = self._remember(h, state, grid, given)
                x = x + m
                read = self.norm(x)
            case "mac":
                return self._mix_pages(x, state, grid, given)
        a, window, store, fast, ready = self.attention(
            read, state.window, state.store, grid, given, wrote.per_head, fast=state.fast
        )
        state = state._replace(window=window, store=store, memory=memory, fast=fast)
        return x + a, state, wrote.surprise, wrote.written, ready

    def _remember(self, h: Tensor, state: BlockState, grid: Grid, given: AttentionInput):
        """What the memory says of h, its next state and what it wrote; asleep it writes nothing."""
        frozen = given.keep_power is not None
        return self.memory(h, state.memory, grid, given.live, given.recompute, frozen)

    def _mix_pages(self, x: Tensor, state: BlockState, grid: Grid, given: AttentionInput):
        """MAC, page by page: no piece of the call crosses a boundary of its lane."""
        h, added = self.norm(x), torch.zeros_like(x)
        surprise = x.new_zeros(x.shape[:2], dtype=torch.float32)
        written = torch.zeros_like(given.live)
        for piece in cut_at_pages(grid, self.memory.open_slots, x.shape[1]):
            part = take_columns(piece, h)
            y, state, wrote = self._mix_page(part, state, piece, take_input(piece, grid, given))
            added = put_columns(piece, added, y)
            surprise = put_columns(piece, surprise, wrote.surprise)
            written = put_columns(piece, written, wrote.written)
        return x + added, state, surprise, written, None

    def _mix_page(self, h: Tensor, state: BlockState, piece: Piece, given: AttentionInput):
        """y * gate(M(y)), with y what attention reads from page, window and store: [B, t, D]."""
        pages, memory = piece.pages, state.memory
        kv = self.attention.context(self.memory.read(h, memory))
        kv = scatter(pages, kv, state.page.to(kv.dtype))
        live = scatter(pages, given.live, memory.live)
        view = PageView(kv, live, piece.chunks.position % pages.chunk)
        y, window, store, fast, _ = self.attention(
            h, state.window, state.store, piece.chunks, given, page=view, fast=state.fast
        )
        gate = 2 * self.memory.read(y, memory).sigmoid()  # 1 for a memory with nothing to say
        memory, wrote = self.memory.append(y, memory, pages, given.live, given.recompute)
        page = carry(pages, kv).to(state.page.dtype)
        return y * gate, BlockState(window, store, memory, fast, page), wrote
