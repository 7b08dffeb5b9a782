"""Calls cut at page boundaries, for a memory that is read and written by pages (MAC).

A page's tokens are read with the weights of its start and written at its end, so a call is read in
pieces, none of which crosses a boundary of its lane. Lanes may be at different places of their
pages: each contributes to a piece what its own page still takes.

Shapes: B lanes, T tokens of the call, t tokens of a piece, W window, C chunk, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wakesleep.ttl.attention import AttentionInput
from wakesleep.ttl.grid import Grid, make_grid


class Piece(NamedTuple):
    columns: Tensor  # [B, t] int64 columns of the call; those beyond the length repeat others
    inside: Tensor  # [B, t] bool
    chunks: Grid  # of this piece
    pages: Grid  # one page


def cut_at_pages(grid: Grid, page: int, num_tokens: int) -> Iterator[Piece]:
    """The pieces of a call of `num_tokens` columns on the chunk grid `grid`; at least one."""
    first, done = grid.position + grid.phase, torch.zeros_like(grid.lengths)
    while True:
        take = torch.minimum(grid.lengths - done, page - (first + done) % page)
        t = int(take.max())
        offset = torch.arange(t, device=done.device)
        yield Piece(
            columns=(done[:, None] + offset).clamp(max=max(num_tokens - 1, 0)),
            inside=offset < take[:, None],
            chunks=make_grid(first + done, take, grid.chunk, t),
            pages=make_grid(first + done, take, page, t),
        )
        done = done + take
        if bool((done == grid.lengths).all()):
            return


def take_columns(piece: Piece, x: Tensor) -> Tensor:
    """Rows of the call x [B, T, ...] that belong to the piece: [B, t, ...]."""
    index = piece.columns.view(*piece.columns.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def put_columns(piece: Piece, x: Tensor, part: Tensor) -> Tensor:
    """The call x [B, T, ...] with the rows of the piece [B, t, ...] in their places."""
    lane, row = piece.inside.nonzero(as_tuple=True)
    return x.index_put((lane, piece.columns[lane, row]), part[lane, row].to(x.dtype))


def take_input(piece: Piece, grid: Grid, given: AttentionInput) -> AttentionInput:
    """What is known about the piece's tokens, in the frame of the piece."""
    ids = given.ids
    before = ids.shape[1] - grid.num_chunks * grid.chunk
    width = before + piece.chunks.num_chunks * grid.chunk
    shift = piece.chunks.position - grid.position  # slots between the two frames' beginnings
    slots = shift[:, None] + torch.arange(width, device=ids.device)
    weight, blind = given.read_weight, given.blind
    return given._replace(
        live=take_columns(piece, given.live) & piece.inside,
        ids=ids.gather(1, slots.clamp(max=ids.shape[1] - 1)),
        read_weight=None if weight is None else take_columns(piece, weight) * piece.inside,
        blind=None if blind is None else take_columns(piece, blind),
    )
