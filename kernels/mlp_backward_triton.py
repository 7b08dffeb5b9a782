"""Gradients of an MLP memory's chunks in a Triton kernel: a program per head, the last chunk first.

Each chunk is computed again from the stacks at its start, then gone through backwards, a slice of
hidden columns at a time (`mlp_gradient_triton`). Gradients of the stacks are overwritten where they
are; those of the shares that gates decide are returned, for autograd to go on with.

Shapes: as in `mlp_scan_triton`.
Source: Behrouz et al., "Titans", arXiv 2501.00663, section 3.2; the gradient is derived.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wakesleep.kernels.memory_chunk import Chunks, MLPMemory, Stacks
from wakesleep.kernels.mlp_gradient_triton import (
    D_HIDDEN,
    DG,
    DK,
    DQ,
    ERROR,
    NORMED,
    NUM_NARROW,
    NUM_WIDE,
    G,
    Z,
    answer_back,
    carry_back,
    errors_back,
    first_walk,
    near_back,
    prepare,
    put,
    queries_back,
    second_walk,
    steps_back,
    weights_back,
    write_back,
)  # fmt: skip
from wakesleep.kernels.mlp_plan_triton import SHARES, laid_out, plan_launch, whole_chunks
from wakesleep.kernels.mlp_scan_triton import features, normalised, outer_step, rule_options
from wakesleep.kernels.parts_triton import SMALLEST, tile, tokens


@triton.jit
def _again(
    wide, narrow, q, k, v, near, overlap, share, live, first, second, base_first, base_second,
    gain, shift, C, R,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    MOMENTUM: tl.constexpr, READS: tl.constexpr,
    MAX_STEP: tl.constexpr, LIMIT: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """The forward pass of a chunk up to its steps; LayerNorm's scale and the step bound [TILE]."""
    token, column = tl.arange(0, TILE), tl.arange(0, K)
    before, alike, square = features(
        wide + Z * W, k, first, second, base_first, base_second, C, K, WIDTH, SLICE, TILE, PART
    )
    normed, scale = normalised(before, K)
    error = tokens(k, token, column, C, K) + shift[None, :] + normed * gain[None, :]
    error -= tokens(v, token, column, C, K)
    written = tl.load(live + token, mask=token < C, other=0) != 0
    past = (token[:, None] >= token[None, :]) & written[None, :]
    g, _, bound = outer_step(
        error, normed, scale, gain, tl.where(past, tl.abs(alike), 0.0),
        tile(overlap, token, token, TILE), square, tl.load(share + 2 * TILE + token),
        K, TILE, MAX_STEP, LIMIT, SPREAD,
    )  # fmt: skip
    put(narrow + G * S, token, column, K, g)
    put(narrow + NORMED * S, token, column, K, normed)
    put(narrow + ERROR * S, token, column, K, error)
    prepare(
        wide, narrow, q, k, share, first, second, base_first, base_second, C, R,
        K, WIDTH, SLICE, TILE, ROWS, W, S, MOMENTUM, READS,
    )  # fmt: skip
    tl.debug_barrier()
    first_walk(
        wide, narrow, near, first, base_first,
        K, WIDTH, SLICE, TILE, ROWS, PART, W, S, MOMENTUM, READS,
    )  # fmt: skip
    tl.debug_barrier()
    return scale, bound


@triton.jit
def _carries(share, advances, TILE: tl.constexpr, MOMENTUM: tl.constexpr):
    """What becomes of a stack: `carry`, or the identity if the chunk is open."""
    carry = tl.where(advances, tl.load(share + 3 * TILE), 1.0)
    momentum, kept = carry, carry
    if MOMENTUM:
        momentum = tl.where(advances, tl.load(share + 3 * TILE + 1), 0.0)
        kept = tl.where(advances, tl.load(share + 3 * TILE + 2), 1.0)
    return carry, momentum, kept


@triton.jit
def _slices_back(
    wide, narrow, near, share, d_share, advances, first, second, base_first, base_second,
    d_first, d_second, d_base_first, d_base_second,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    MOMENTUM: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """Through reads and writes of a chunk, slice by slice, back to its steps and to hidden."""
    token, column, row = tl.arange(0, TILE), tl.arange(0, K), tl.arange(0, ROWS)
    counts = advances.to(tl.float32)
    carry, momentum, kept = _carries(share, advances, TILE, MOMENTUM)
    d_write, d_read = tl.zeros([TILE], tl.float32), tl.zeros([ROWS], tl.float32)
    d_later, d_pushed = d_write, d_read
    of_carry, of_momentum, of_kept = counts * 0, counts * 0, counts * 0
    for s in range(0, WIDTH, SLICE):
        tl.debug_barrier()
        slot = s + tl.arange(0, SLICE)
        d_hidden = tl.zeros([TILE, SLICE], tl.float32)
        d_f = d_hidden
        if READS:
            d_hidden, d_f, part, pushed = queries_back(
                wide, narrow, share, near, slot, first, second, base_first, base_second,
                K, WIDTH, SLICE, TILE, ROWS, PART, W, S, MOMENTUM,
            )  # fmt: skip
            d_read, d_pushed = d_read + part, d_pushed + pushed
        h, f, part = write_back(
            wide, narrow, share, slot, d_first, d_second, counts, 0,
            K, WIDTH, SLICE, TILE, PART, W, S,
        )  # fmt: skip
        d_hidden, d_f, d_write = d_hidden + h, d_f + f, d_write + part
        if MOMENTUM:
            tl.debug_barrier()
            h, f, part = write_back(
                wide, narrow, share, slot, d_first, d_second, counts, 1,
                K, WIDTH, SLICE, TILE, PART, W, S,
            )  # fmt: skip
            d_hidden, d_f, d_later = d_hidden + h, d_f + f, d_later + part
        tl.debug_barrier()
        a, b, c = carry_back(
            d_first, first, column, slot, WIDTH, carry, momentum, kept, K * WIDTH, MOMENTUM
        )
        of_carry, of_momentum, of_kept = of_carry + a, of_momentum + b, of_kept + c
        a, b, c = carry_back(
            d_second, second, slot, column, K, carry, momentum, kept, K * WIDTH, MOMENTUM
        )
        of_carry, of_momentum, of_kept = of_carry + a, of_momentum + b, of_kept + c
        put(wide + D_HIDDEN * W, token, slot, WIDTH, d_hidden)
        steps_back(
            wide, narrow, d_f, slot, d_second, d_base_second, K, WIDTH, SLICE, TILE, PART, W, S
        )
        if READS:
            weights_back(
                wide, narrow, slot, d_first, d_second, d_base_first, d_base_second,
                K, WIDTH, ROWS, PART, W, S, MOMENTUM,
            )  # fmt: skip
    tl.store(d_share + token, d_write)
    tl.store(d_share + TILE + token, d_later)
    tl.store(d_share + 3 * TILE, of_carry * counts)
    tl.store(d_share + 3 * TILE + 1, of_momentum * counts)
    tl.store(d_share + 3 * TILE + 2, of_kept * counts)
    tl.store(d_share + 4 * TILE + row, d_read)
    tl.store(d_share + 5 * TILE + row, d_pushed)


@triton.jit(do_not_specialize=["N", "X", "H", "R"])
def mlp_backward_kernel(
    d_first, d_second, d_base_first, d_base_second, d_slow, dq, dk, dv, d_mix, d_shares,
    wide, narrow, dy, starts_first, starts_second, shares, overlap, mixes, nears,
    base_first, base_second, gamma, bias, q, k, v, live, closed,
    y_chunk, y_head, q_chunk, q_head, k_chunk, k_head, v_chunk, v_head, N, X, H, C, R,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, MOMENTUM: tl.constexpr, READS: tl.constexpr,
    MAX_STEP: tl.constexpr, LIMIT: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """All chunks of one head, the last one first."""
    SIZE: tl.constexpr = K * WIDTH * (1 + MOMENTUM)
    EDGE: tl.constexpr = TILE if TILE > K else K
    W: tl.constexpr = EDGE * WIDTH
    S: tl.constexpr = EDGE * EDGE
    x = tl.program_id(0).to(tl.int64)
    token, column, row = tl.arange(0, TILE), tl.arange(0, K), tl.arange(0, ROWS)
    wide += x * (NUM_WIDE * W)
    narrow += x * (NUM_NARROW * S)
    d_first += x * SIZE
    d_second += x * SIZE
    base_first += x * (K * WIDTH)
    base_second += x * (K * WIDTH)
    d_base_first += x * (K * WIDTH)
    d_base_second += x * (K * WIDTH)
    gain, shift = tl.load(gamma + x * K + column), tl.load(bias + x * K + column)
    for reverse in range(0, N):
        n = tl.cast(N - 1 - reverse, tl.int64)
        at = n * X + x
        first, second = starts_first + at * SIZE, starts_second + at * SIZE
        share, d_share = shares + at * (SHARES * TILE), d_shares + at * (SHARES * TILE)
        mix, near = mixes + at * (ROWS * TILE), nears + at * (ROWS * TILE)
        scale, bound = _again(
            wide, narrow, q + n * q_chunk + x * q_head, k + n * k_chunk + x * k_head,
            v + n * v_chunk + x * v_head, near, overlap + at * (TILE * TILE), share,
            live + (at // H) * C, first, second, base_first, base_second, gain, shift, C, R,
            K, WIDTH, SLICE, TILE, ROWS, PART, W, S, MOMENTUM, READS, MAX_STEP, LIMIT, SPREAD,
        )  # fmt: skip
        d_gain, d_shift = tl.zeros_like(gain), tl.zeros_like(gain)
        if READS:
            d_gain, d_shift = answer_back(
                wide, narrow, dy + n * y_chunk + x * y_head, d_mix + at * (ROWS * TILE), mix,
                share, second, base_second, gain, R,
                K, WIDTH, TILE, ROWS, PART, W, S, MOMENTUM,
            )  # fmt: skip
        _slices_back(
            wide, narrow, near, share, d_share, tl.load(closed + at // H) != 0, first, second,
            base_first, base_second, d_first, d_second, d_base_first, d_base_second,
            K, WIDTH, SLICE, TILE, ROWS, PART, W, S, MOMENTUM, READS,
        )  # fmt: skip
        tl.debug_barrier()
        if READS:
            near_back(
                wide, narrow, d_mix + at * (ROWS * TILE), mix, K, WIDTH, TILE, ROWS, PART, W, S
            )
            tl.debug_barrier()
        gate = tl.load(share + 2 * TILE + token)
        d_before, d_gate, gain_part, shift_part = errors_back(
            narrow, dv + at * (C * K), gate, bound, scale, gain, C, K, TILE, S, LIMIT
        )
        tl.store(d_share + 2 * TILE + token, d_gate)
        tl.store(d_slow + at * (2 * K) + column, d_gain + gain_part)
        tl.store(d_slow + at * (2 * K) + K + column, d_shift + shift_part)
        tl.debug_barrier()
        put(narrow + DG * S, token, column, K, d_before)
        tl.debug_barrier()
        second_walk(
            wide, narrow, d_first, d_second, d_base_first, d_base_second,
            K, WIDTH, SLICE, TILE, PART, W, S,
        )  # fmt: skip
        tl.debug_barrier()
        d = tile(narrow + DK * S, token, column, K)
        to_k = dk + at * (C * K) + token[:, None] * K + column[None, :]
        tl.store(to_k, d, mask=(token < C)[:, None])
        if READS:
            d = tile(narrow + DQ * S, row, column, K)
            to_q = dq + at * (R * K) + row[:, None] * K + column[None, :]
            tl.store(to_q, d, mask=(row < R)[:, None])
        tl.debug_barrier()


class TokenGradients(NamedTuple):
    """What `mlp_backward_triton` gives besides the gradients of the stacks; float32."""

    q: Tensor | None  # [N, X, R, K]
    k: Tensor  # [N, X, C, K]
    v: Tensor  # [N, X, C, K]
    base: Stacks
    slow: Tensor  # [N, X, 2, K] of gamma and bias
    shares: Tensor  # [N, X, 6, TILE], see `mlp_plan_kernel`
    mix: Tensor  # [N, X, ROWS, TILE]


def mlp_backward_triton(
    memory: MLPMemory,
    starts: Stacks,
    d_stacks: Stacks,
    dy: Tensor | None,
    chunks: Chunks,
) -> TokenGradients:
    """Gradients from those of y and of the stacks at the end.

    Args:
        starts: [N, X, ...] stacks at the start of each chunk, as `mlp_scan_triton` keeps them.
        d_stacks: of the stacks at the end; overwritten by those of the stacks at the start.
        dy: as q, or None if nothing depends on y.
    """
    if dy is None:
        chunks = chunks._replace(q=None)
    chunks, dy = laid_out(chunks), whole_chunks(dy)
    found, launches = backward_launches(memory, starts, d_stacks, dy, chunks)
    with torch.cuda.device_of(chunks.k):
        for kernel, grid, args, options in launches if chunks.k.numel() else ():
            kernel[grid](*args, **options)
    return found


def backward_launches(
    memory: MLPMemory,
    starts: Stacks,
    d_stacks: Stacks,
    dy: Tensor | None,
    chunks: Chunks,
) -> tuple[TokenGradients, list[tuple]]:
    """Places for the gradients, and both kernels with grid, arguments and options."""
    q, k, v, *_, live, closed = chunks
    N, X, C, K = k.shape
    R = C if q is None else q.shape[2]
    places, first = plan_launch(chunks)
    options = first[3] | rule_options(memory)
    options |= {"SLICE": SMALLEST.value, "PART": SMALLEST.value}  # for registers, and short code
    edge, empty = max(options["TILE"], K), partial(k.new_empty, dtype=torch.float32)
    dq, dk, dv = (None if x is None else empty(*x.shape) for x in (q, k, v))
    base = tuple(torch.zeros_like(w, memory_format=torch.contiguous_format) for w in memory.base)
    slow, shares, mix = empty(N, X, 2, K), torch.empty_like(places[0]), torch.empty_like(places[2])
    wide = empty(X, NUM_WIDE.value, edge, memory.base[0].shape[2])
    narrow = empty(X, NUM_NARROW.value, edge, edge)
    query, d_query, d_answer = (k, dk, k) if q is None else (q, dq, dy)
    strides = [s for x in (d_answer, query, k, v) for s in x.stride()[:2]]
    weights = [w.contiguous() for w in (*memory.base, memory.gamma, memory.bias)]
    args = (*d_stacks, *base, slow, d_query, dk, dv, mix, shares, wide, narrow, d_answer, *starts,
            *places, *weights, query, k, v, live, closed, *strides,
            N, X, X // live.shape[1], C, R)  # fmt: skip
    launch = (mlp_backward_kernel, (X,), args, options)
    return TokenGradients(dq, dk, dv, base, slow, shares, mix), [first, launch]
