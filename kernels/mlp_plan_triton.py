"""What of an MLP memory's chunks does not depend on its weights, in one Triton kernel.

For all chunks of a call at once, one program each: the `Plan` of `memory_chunk`, with shares alone
where that has products, and what queries see of the keys, near = (q k^T) * mix.

Shapes: X = lanes * heads, C chunk, R tokens that read (the last ones), K head width; TILE and ROWS
are C and R rounded up.
Source: Behrouz et al., "Titans", arXiv 2501.00663, section 3.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wakesleep.kernels.memory_chunk import Chunks
from wakesleep.kernels.parts_triton import (
    SMALLEST,
    add_dot,
    gate_products,
    log_gates,
    picked,
    token_products,
)

PART = 32  # terms of a product that are in registers at a time

SHARES = tl.constexpr(6)  # rows of `shares`


@triton.jit(do_not_specialize=["X", "H", "R"])
def mlp_plan_kernel(
    shares, overlap, mixes, nears, q, k, keep, eta, step, live,
    q_chunk, q_head, k_chunk, k_head, X, H, C, R,
    K: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    MOMENTUM: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """A chunk of a head: overlap [TILE, TILE], and of queries mix and near [ROWS, TILE].

    shares [6, TILE] are `write`, the same of the momentum, gate, `carry` (three of four), and of
    queries `read`, the same of the momentum.
    """
    at = tl.program_id(0).to(tl.int64)
    n, x = at // X, at % X
    token, slot = tl.arange(0, TILE), tl.arange(0, ROWS)
    row = C - R + slot
    shares += at * (SHARES * TILE)
    live += (at // H) * C
    k += n * k_chunk + x * k_head
    kept, written = log_gates(keep + at * C, live, token, C)
    last = tl.min(kept, 0)  # the one of the last token: no log of a gate is above 0
    gate = tl.load(step + at * C + token, mask=written, other=0.0).to(tl.float32)
    write = tl.exp(last - kept)
    at_row = picked(kept, token, row)
    mix = gate_products(at_row, kept, row, token)
    tl.store(shares + 3 * TILE, tl.exp(last))
    tl.store(shares + 4 * TILE + slot, tl.exp(at_row))
    if MOMENTUM:
        gate *= 1 - tl.load(eta + at * C + token, mask=written, other=0.0).to(tl.float32)
        moved, _ = log_gates(eta + at * C, live, token, C)
        final = tl.min(moved, 0)
        pushes = tl.where(written, tl.exp(moved), 0.0)
        tl.store(shares + TILE + token, tl.exp(final - moved))
        tl.store(shares + 3 * TILE + 1, tl.sum(write * pushes, 0))
        tl.store(shares + 3 * TILE + 2, tl.exp(final))
        tl.store(shares + 5 * TILE + slot, tl.sum(mix * pushes[None, :], 1))
        write, mix = tl.zeros_like(write), tl.zeros_like(mix)
        for c in range(0, TILE, PART):
            part = c + tl.arange(0, PART)
            kept_part = picked(kept, token, part)
            pushed = gate_products(picked(moved, token, part), moved, part, token)
            counts = tl.load(live + part, mask=part < C, other=0) != 0
            pushed = tl.where(counts[:, None], pushed, 0.0)
            write += tl.sum(tl.exp(last - kept_part)[:, None] * pushed, 0)
            mix = add_dot(mix, gate_products(at_row, kept_part, row, part), pushed)
    tl.store(shares + token, write)
    tl.store(shares + 2 * TILE + token, gate)
    past = (token[:, None] >= token[None, :]) & written[None, :]
    near = tl.abs(token_products(k, k, token, token, C, C, K, PART))
    square = token[:, None] * TILE + token[None, :]
    tl.store(overlap + at * (TILE * TILE) + square, tl.where(past, near, 0.0))
    if READS:
        q += n * q_chunk + x * q_head
        near = token_products(q, k, slot, token, R, C, K, PART)
        square = at * (ROWS * TILE) + slot[:, None] * TILE + token[None, :]
        tl.store(mixes + square, mix)
        tl.store(nears + square, near * mix)


def plan_launch(chunks: Chunks) -> tuple[list[Tensor], tuple]:
    """Places for shares, overlap, mix and near; the kernel, grid, arguments and options for them.

    Args:
        chunks: as `laid_out` gives them.
    """
    q, k, _, keep, eta, step, live, _ = chunks
    N, X, C, K = k.shape
    R = C if q is None else q.shape[2]
    tile, rows = (max(SMALLEST.value, triton.next_power_of_2(n)) for n in (C, R))
    heights = [SHARES.value, tile] if q is None else [SHARES.value, tile, rows, rows]
    places = [k.new_empty(N, X, height, tile, dtype=torch.float32) for height in heights]
    places += places[1:] * (4 - len(places))  # what nobody reads is not written
    query = k if q is None else q
    strides = [s for x in (query, k) for s in x.stride()[:2]]
    gates = (keep, keep if eta is None else eta, step, live)
    args = (*places, query, k, *gates, *strides, X, X // live.shape[1], C, R)
    options = {"K": K, "TILE": tile, "ROWS": rows, "PART": min(K, tile, PART)}
    options |= {"MOMENTUM": eta is not None, "READS": q is not None}
    return places, (mlp_plan_kernel, (N * X,), args, options | {"num_warps": 4, "num_stages": 1})


def laid_out(chunks: Chunks) -> Chunks:
    """The same as the kernels read it: every chunk of q, k and v in one piece, the rest dense."""
    rest = (x if x is None else x.contiguous() for x in chunks[3:])
    return Chunks(*map(whole_chunks, chunks[:3]), *rest)


def whole_chunks(x: Tensor | None) -> Tensor | None:
    """x [N, X, C, K], or a copy of it with every chunk in one piece."""
    return x if x is None or whole(x) else x.contiguous()


def whole(x: Tensor) -> bool:
    """Whether every chunk [C, K] of x [N, X, C, K] lies in one piece."""
    return x.stride()[2:] == (x.shape[3], 1)
