"""The gated delta rule of `delta_rule`, all chunks of a call in two Triton kernels.

What is free of the state is made for all chunks at once, one program each: with A the strict lower
triangle of diag(step) (K K^T * mix), the matrix that turns errors into corrections, and what a
query sees of the corrections before it,

    solve = (1 + A)^-1 diag(step)            seen = Q K^T * mix

The inverse grows by doubling: where T inverts the diagonal blocks of one size, and A' are the parts
of A that join two of them, T - T A' T inverts the blocks of twice the size. That is substitution,
block by block, as exact as row by row; a power series of A is not.

Then a program for some columns of each head's values walks over its chunks, with those columns of
the state S on chip (no column needs another one):

    given = K S            u = solve (V - decay * given)            y = decay * Q S + seen u
    S' = keep S + (K * mix of the last token)^T u

where decay and mix are products of keep from the chunk's start, and from one token to another. The
squares of v - k S, for the store's score, fall off on the way.

Shapes: N chunks, X = lanes * heads, B lanes, C chunk, K head width.
Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464, section 3.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wakesleep.kernels.dispatch import interpreting
from wakesleep.kernels.parts_triton import SMALLEST, gate_products, log_gates, token_products

LARGEST = 64  # of chunks and heads: their squares are in registers
COLUMNS = 16  # of the values, in one program
PRECISION = tl.constexpr("tf32x3")  # float32 on tensor cores, as exact as float32 to rounding


@triton.jit
def delta_solve_kernel(
    solve,
    seen,
    q,
    k,
    keep,
    step,
    live,
    q_chunk,
    q_head,
    k_chunk,
    k_head,
    X,
    H: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    READS: tl.constexpr,
):
    """solve and seen [N, X, TILE, TILE] for one chunk of one head."""
    at = tl.program_id(0).to(tl.int64)
    n, x = at // X, at % X
    token = tl.arange(0, TILE)
    square = token[:, None] * TILE + token[None, :]
    solve += at * (TILE * TILE)
    k += n * k_chunk + x * k_head
    total, written = log_gates(keep + at * C, live + (at // H) * C, token, C)
    mix = gate_products(total, total, token, token)
    if READS:
        q += n * q_chunk + x * q_head
        near = token_products(q, k, token, token, C, C, K, SMALLEST)
        tl.store(seen + at * (TILE * TILE) + square, near * mix)
    gate = tl.load(step + at * C + token, mask=written, other=0.0).to(tl.float32)
    A = token_products(k, k, token, token, C, C, K, SMALLEST) * mix * gate[:, None]
    T = tl.where(token[:, None] == token[None, :], 1.0, 0.0)
    for level in range(0, LEVELS):  # blocks of 2^level; of A counts what is below them
        block = token >> level
        joins = (block[:, None] == block[None, :] + 1) & (block % 2 == 1)[:, None]
        joined = tl.dot(T, tl.where(joins, A, 0.0), input_precision=PRECISION)
        T -= tl.dot(joined, T, input_precision=PRECISION)
    tl.store(solve + square, T * gate[None, :])


@triton.jit(do_not_specialize=["N"])
def delta_scan_kernel(
    y,
    end,
    squares,
    start,
    solve,
    seen,
    q,
    k,
    v,
    keep,
    live,
    closed,
    y_chunk,
    y_head,
    q_chunk,
    q_head,
    k_chunk,
    k_head,
    v_chunk,
    v_head,
    N,
    X,
    H: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    READS: tl.constexpr,
):
    """All chunks of one head and of some columns of its values.

    Writes y, the state behind the last closed chunk, and errors squared [K / COLUMNS, N, X, C].
    """
    x = tl.program_id(0).to(tl.int64)
    token, column = tl.arange(0, TILE), tl.arange(0, K)
    ours = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < C)[:, None]
    rows, our_rows = token[:, None] * K + column[None, :], token[:, None] * K + ours[None, :]
    square = token[:, None] * TILE + token[None, :]
    own = column[:, None] * K + ours[None, :]
    squares += tl.program_id(1).to(tl.int64) * N * X * C
    S = tl.load(start + x * (K * K) + own)
    for chunk in range(0, N):
        n = tl.cast(chunk, tl.int64)
        at = n * X + x
        from_k, from_v = k + n * k_chunk + x * k_head, v + n * v_chunk + x * v_head
        key = tl.load(from_k + rows, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(from_v + our_rows, mask=inside, other=0.0).to(tl.float32)
        total, _ = log_gates(keep + at * C, live + (at // H) * C, token, C)
        decay = tl.exp(total)
        given = tl.dot(key, S, input_precision=PRECISION)
        error = given - value
        tl.store(squares + at * C + token, tl.sum(error * error, 1), mask=token < C)
        rest = value - decay[:, None] * given
        u = tl.dot(tl.load(solve + at * (TILE * TILE) + square), rest, input_precision=PRECISION)
        if READS:
            from_q, to_y = q + n * q_chunk + x * q_head, y + n * y_chunk + x * y_head
            query = tl.load(from_q + rows, mask=inside, other=0.0).to(tl.float32)
            answer = tl.dot(query, S, input_precision=PRECISION) * decay[:, None]
            before = tl.load(seen + at * (TILE * TILE) + square)
            answer = tl.dot(before, u, answer, input_precision=PRECISION)
            tl.store(to_y + our_rows, answer.to(y.dtype.element_ty), mask=inside)
        if tl.load(closed + at // H) != 0:
            whole = tl.min(total, 0)  # the last one: no log of keep is above 0
            key *= tl.exp(whole - total)[:, None]
            S = tl.dot(tl.trans(key), u, S * tl.exp(whole), input_precision=PRECISION)
    tl.store(end + x * (K * K) + own, S)


def delta_rule_triton(
    state: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    step: Tensor,
    live: Tensor,
    closed: Tensor,
    out: tuple[Tensor | None, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Read and write all chunks; a chunk that is not closed leaves its lane's state alone.

    Args:
        state: [X, K, K] float32, rows are of the keys.
        q: [N, X, C, K] or None = nobody reads; k, v: [N, X, C, K].
        keep, step: [N, X, C] in [0, 1].
        live: [N, B, C] bool, written; closed: [N, B] bool.
        out: the first two of what is returned, to be overwritten; made if None.

    Returns:
        y [N, X, C, K] or None, the state, surprise [N, X, C] = step |v - k S| at the chunk's start,
        0 where not live.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.
    """
    _check(state, q, k, v, keep, step, live, closed)
    q, k, v = (x if x is None or _whole(x) else x.contiguous() for x in (q, k, v))
    state = state.contiguous()
    if out is None:
        out = None if q is None else torch.empty_like(q), torch.empty_like(state)
    y, end = out
    if end.shape != state.shape or not end.is_contiguous() or (y is None) != (q is None):
        raise ValueError(f"out must be y as q is, and a state {list(state.shape)} in one piece")
    if y is not None and (y.shape != q.shape or not _whole(y)):
        raise ValueError(f"out[0] must be {list(q.shape)} with every chunk in one piece")
    if k.numel() == 0:
        return y, end.copy_(state), torch.zeros_like(keep, dtype=torch.float32)
    dense = [state, *(x.contiguous() for x in (keep, step, live, closed))]
    N, X, C, K = k.shape
    squares = k.new_empty(max(1, K // COLUMNS), N, X, C, dtype=torch.float32)
    with torch.cuda.device_of(k):
        for kernel, grid, args, options in launches(y, end, squares, q, k, v, *dense):
            kernel[grid](*args, **options)
    written = live.repeat_interleave(X // live.shape[1], 1)
    return y, end, squares.sum(0).sqrt() * step * written


def launches(
    y: Tensor | None,
    end: Tensor,
    squares: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    keep: Tensor,
    step: Tensor,
    live: Tensor,
    closed: Tensor,
) -> list[tuple]:
    """Both kernels with grid, arguments and options; the tensors, on any device, are checked."""
    N, X, C, K = k.shape
    tile = max(SMALLEST.value, triton.next_power_of_2(C))
    solve = k.new_empty(N, X, tile, tile, dtype=torch.float32)
    seen = solve if q is None else torch.empty_like(solve)
    answer, query = (k, k) if q is None else (y, q)
    options = {"H": X // live.shape[1], "C": C, "K": K, "TILE": tile, "READS": q is not None}
    options |= {"num_warps": 4, "num_stages": 1}
    strides = [s for x in (answer, query, k, v) for s in x.stride()[:2]]
    first = (solve, seen, query, k, keep, step, live, *strides[2:6], X)
    then = (answer, end, squares, state, solve, seen, query, k, v, keep, live, closed)
    return [
        (delta_solve_kernel, (N * X,), first, options | {"LEVELS": tile.bit_length() - 1}),
        (delta_scan_kernel, (X, squares.shape[0]), (*then, *strides, N, X),
         options | {"COLUMNS": min(K, COLUMNS)}),
    ]  # fmt: skip


def _whole(x: Tensor) -> bool:
    """Whether every chunk [C, K] of x [N, X, C, K] lies in one piece."""
    return x.stride()[2:] == (x.shape[3], 1)


def _check(state, q, k, v, keep, step, live, closed) -> None:
    """Refuse what the kernels would read wrongly, or out of bounds."""
    N, X, C, K = k.shape
    B = live.shape[1]
    wanted = {
        "state": (state, (X, K, K), torch.float32),
        "q": (k if q is None else q, k.shape, k.dtype),
        "v": (v, k.shape, k.dtype),
        "keep": (keep, (N, X, C), keep.dtype),
        "step": (step, (N, X, C), keep.dtype),
        "live": (live, (N, B, C), torch.bool),
        "closed": (closed, (N, B), torch.bool),
    }
    for name, (given, shape, dtype) in wanted.items():
        if given.shape != shape or given.dtype != dtype or given.device != k.device:
            has = f"{list(given.shape)} of {given.dtype} on {given.device}"
            raise ValueError(f"{name} must be {list(shape)} of {dtype} on {k.device}, got {has}")
    if B == 0 or X % B:
        raise ValueError(f"live must have a divisor of the {X} heads of all lanes, got {B} lanes")
    if K & (K - 1) or not SMALLEST.value <= K <= LARGEST or C > LARGEST:
        raise ValueError(f"K must be 16, 32 or 64 and C at most {LARGEST}, got {K} and {C}")
    if interpreting() and torch.bfloat16 in (k.dtype, keep.dtype):
        raise ValueError("bfloat16 cannot be interpreted: use float16")
