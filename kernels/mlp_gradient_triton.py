"""Steps of an MLP memory's gradient, for the Triton kernel in `mlp_backward_triton`.

The formulas are those of `mlp_chunk`, in its symbols. Each product is a call of `product` on
matrices in memory that are one program's alone, in two rows of slots: WIDE ones with the hidden
columns, of W elements, and NARROW ones of S elements. Between what one thread writes and what
another reads lies a barrier.

Shapes: as in `mlp_scan_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wakesleep.kernels.mlp_scan_triton import normalised, through_norm
from wakesleep.kernels.parts_triton import add_dot, tile, tokens

# Slots [TILE or K, h]; those of queries and of W_B have fewer rows, or K columns.
Z, HIDDEN, BACK, F, D_HIDDEN, D_SLOPE, ZQ, XQ, DZQ, W_A, W_B = (tl.constexpr(i) for i in range(11))
# Slots of tokens by K; the last three are of queries by tokens.
KEY, G, DG, DK, NORMED, ERROR, QUERY, Q_READ, Q_PUSHED, DQ, DU, DU_READ, DU_PUSHED = (
    tl.constexpr(i) for i in range(13)
)
D_LIKE, MIXED, D_NEAR = (tl.constexpr(i) for i in range(13, 16))
NUM_WIDE, NUM_NARROW = tl.constexpr(11), tl.constexpr(16)


@triton.jit
def product(
    a, a_row, a_column, b, b_row, b_column, row, column, SIZE: tl.constexpr, PART: tl.constexpr
):
    """a b of rows `row` of a and columns `column` of b, a sum of SIZE terms."""
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for c in range(0, SIZE, PART):
        part = c + tl.arange(0, PART)
        x = tl.load(a + row[:, None] * a_row + part[None, :] * a_column)
        z = tl.load(b + part[:, None] * b_row + column[None, :] * b_column)
        total = add_dot(total, x, z)
    return total


@triton.jit
def put(x, row, column, stride, value):
    """x[row, column] = value."""
    tl.store(x + row[:, None] * stride + column[None, :], value)


@triton.jit
def add_to(x, row, column, stride, value):
    """x[row, column] += value; it is this program's alone."""
    at = x + row[:, None] * stride + column[None, :]
    before = tl.load(at)
    tl.debug_barrier()
    tl.store(at, before + value)


@triton.jit
def silu_slope(z):
    """silu'(z)."""
    sigmoid = tl.sigmoid(z)
    return sigmoid + z * sigmoid * (1 - sigmoid)


@triton.jit
def prepare(
    wide, narrow, q, k, share, first, second, base_first, base_second, C, R,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, W: tl.constexpr, S: tl.constexpr, MOMENTUM: tl.constexpr,
    READS: tl.constexpr,
):  # fmt: skip
    """Tokens as float32, queries times what they read, and the weights at the chunk's start."""
    token, column, row = tl.arange(0, TILE), tl.arange(0, K), tl.arange(0, ROWS)
    put(narrow + KEY * S, token, column, K, tokens(k, token, column, C, K))
    zeros = tl.zeros([TILE, K], tl.float32)
    put(narrow + DG * S, token, column, K, zeros)
    put(narrow + DK * S, token, column, K, zeros)
    if READS:
        query = tokens(q, row, column, R, K)
        put(narrow + QUERY * S, row, column, K, query)
        read = tl.load(share + 4 * TILE + row)[:, None]
        put(narrow + Q_READ * S, row, column, K, query * read)
        if MOMENTUM:
            read = tl.load(share + 5 * TILE + row)[:, None]
            put(narrow + Q_PUSHED * S, row, column, K, query * read)
    for s in range(0, WIDTH, SLICE):
        slot = s + tl.arange(0, SLICE)
        A = tile(first, column, slot, WIDTH) + tile(base_first, column, slot, WIDTH)
        put(wide + W_A * W, column, slot, WIDTH, A)
        B = tile(second, slot, column, K) + tile(base_second, slot, column, K)
        put(wide + W_B * W, slot, column, K, B)


@triton.jit
def first_walk(
    wide, narrow, near, first, base_first,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    MOMENTUM: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """hidden, g B^T, the step on A, and of queries z and x."""
    token, row = tl.arange(0, TILE), tl.arange(0, ROWS)
    for s in range(0, WIDTH, SLICE):
        slot = s + tl.arange(0, SLICE)
        z = tile(wide + Z * W, token, slot, WIDTH)
        put(wide + HIDDEN * W, token, slot, WIDTH, z * tl.sigmoid(z))
        back = product(narrow + G * S, K, 1, wide + W_B * W, 1, K, token, slot, K, PART)
        put(wide + BACK * W, token, slot, WIDTH, back)
        put(wide + F * W, token, slot, WIDTH, back * silu_slope(z))
        if READS:
            tl.debug_barrier()
            zq = product(narrow + QUERY * S, K, 1, base_first, WIDTH, 1, row, slot, K, PART)
            zq += product(narrow + Q_READ * S, K, 1, first, WIDTH, 1, row, slot, K, PART)
            if MOMENTUM:
                pushed = first + K * WIDTH
                zq += product(narrow + Q_PUSHED * S, K, 1, pushed, WIDTH, 1, row, slot, K, PART)
            zq += product(near, TILE, 1, wide + F * W, WIDTH, 1, row, slot, TILE, PART)
            put(wide + ZQ * W, row, slot, WIDTH, zq)
            put(wide + XQ * W, row, slot, WIDTH, zq * tl.sigmoid(zq))


@triton.jit
def answer_back(
    wide, narrow, dy, d_mix, mix, share, second, base_second, gain, R,
    K: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr, W: tl.constexpr, S: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Through y = q + gamma LN(u) + bias to du and d_like; gradients of gamma and bias [K]."""
    token, column, row = tl.arange(0, TILE), tl.arange(0, K), tl.arange(0, ROWS)
    xq = wide + XQ * W
    read = tl.load(share + 4 * TILE + row)[:, None]
    like = product(xq, WIDTH, 1, wide + HIDDEN * W, 1, WIDTH, row, token, WIDTH, PART)
    mixed = like * tile(mix, row, token, TILE)
    put(narrow + MIXED * S, row, token, TILE, mixed)
    tl.debug_barrier()
    u = product(narrow + MIXED * S, TILE, 1, narrow + G * S, K, 1, row, column, TILE, PART)
    u += product(xq, WIDTH, 1, base_second, K, 1, row, column, WIDTH, PART)
    u += product(xq, WIDTH, 1, second, K, 1, row, column, WIDTH, PART) * read
    if MOMENTUM:
        pushed = tl.load(share + 5 * TILE + row)[:, None]
        u += product(xq, WIDTH, 1, second + K * WIDTH, K, 1, row, column, WIDTH, PART) * pushed
    normed, scale = normalised(u, K)
    d = tokens(dy, row, column, R, K)
    put(narrow + DQ * S, row, column, K, d)
    du = through_norm(d * gain[None, :], normed, scale, K)
    put(narrow + DU * S, row, column, K, du)
    put(narrow + DU_READ * S, row, column, K, du * read)
    if MOMENTUM:
        put(narrow + DU_PUSHED * S, row, column, K, du * pushed)
    tl.debug_barrier()
    d_mixed = product(narrow + DU * S, K, 1, narrow + G * S, 1, K, row, token, K, PART)
    put(d_mix, row, token, TILE, d_mixed * like)
    put(narrow + D_LIKE * S, row, token, TILE, d_mixed * tile(mix, row, token, TILE))
    d_g = product(narrow + MIXED * S, 1, TILE, narrow + DU * S, K, 1, token, column, ROWS, PART)
    put(narrow + DG * S, token, column, K, d_g)
    return tl.sum(d * normed, 0), tl.sum(d, 0)


@triton.jit
def queries_back(
    wide, narrow, share, near, slot, first, second, base_first, base_second,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Of a slice: gradients of hidden and f, and of both shares of the queries [ROWS]."""
    token, column, row = tl.arange(0, TILE), tl.arange(0, K), tl.arange(0, ROWS)
    s = tl.min(slot, 0)
    xq = tile(wide + XQ * W, row, slot, WIDTH)
    query = tile(narrow + QUERY * S, row, column, K)
    dx = product(narrow + DU * S, K, 1, base_second, 1, K, row, slot, K, PART)
    dx += product(narrow + D_LIKE * S, TILE, 1, wide + HIDDEN * W, WIDTH, 1, row, slot, TILE, PART)
    part = product(narrow + DU * S, K, 1, second, 1, K, row, slot, K, PART)
    read = tl.load(share + 4 * TILE + row)[:, None]
    dx += part * read
    d_read = tl.sum(part * xq, 1)
    d_pushed = tl.zeros_like(d_read)
    if MOMENTUM:
        pushed = tl.load(share + 5 * TILE + row)[:, None]
        part = product(narrow + DU * S, K, 1, second + K * WIDTH, 1, K, row, slot, K, PART)
        dx += part * pushed
        d_pushed += tl.sum(part * xq, 1)
    of_slice = wide + DZQ * W + s
    put(of_slice, row, slot - s, WIDTH, dx * silu_slope(tile(wide + ZQ * W, row, slot, WIDTH)))
    tl.debug_barrier()
    dq = product(of_slice, WIDTH, 1, base_first + s, 1, WIDTH, row, column, SLICE, PART)
    part = product(of_slice, WIDTH, 1, first + s, 1, WIDTH, row, column, SLICE, PART)
    dq += part * read
    d_read += tl.sum(part * query, 1)
    if MOMENTUM:
        of_S = first + K * WIDTH + s
        part = product(of_slice, WIDTH, 1, of_S, 1, WIDTH, row, column, SLICE, PART)
        dq += part * pushed
        d_pushed += tl.sum(part * query, 1)
    add_to(narrow + DQ * S, row, column, K, dq)
    of_like = narrow + D_LIKE * S
    d_hidden = product(of_like, 1, TILE, wide + XQ * W, WIDTH, 1, token, slot, ROWS, PART)
    d_f = product(near, 1, TILE, wide + DZQ * W, WIDTH, 1, token, slot, ROWS, PART)
    return d_hidden, d_f, d_read, d_pushed


@triton.jit
def write_back(
    wide, narrow, share, slot, d_first, d_second, counts, level,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    PART: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Of a slice, through what a chunk added to one level of the stacks.

    Gradients of hidden and f, and of the level's share `write` [TILE]; dk and dg are added up.
    """
    token, column = tl.arange(0, TILE), tl.arange(0, K)
    s = tl.min(slot, 0)
    write = (tl.load(share + level * TILE + token) * counts)[:, None]
    d_first += level * K * WIDTH
    d_second += level * K * WIDTH
    of_key = product(narrow + KEY * S, K, 1, d_first, WIDTH, 1, token, slot, K, PART)
    of_g = product(narrow + G * S, K, 1, d_second, 1, K, token, slot, K, PART)
    d_write = tl.sum(of_key * tile(wide + F * W, token, slot, WIDTH), 1)
    d_write += tl.sum(of_g * tile(wide + HIDDEN * W, token, slot, WIDTH), 1)
    dk = product(wide + F * W + s, WIDTH, 1, d_first + s, 1, WIDTH, token, column, SLICE, PART)
    add_to(narrow + DK * S, token, column, K, dk * write)
    dg = product(
        wide + HIDDEN * W + s, WIDTH, 1, d_second + s * K, K, 1, token, column, SLICE, PART
    )
    add_to(narrow + DG * S, token, column, K, dg * write)
    return of_g * write, of_key * write, d_write * counts


@triton.jit
def carry_back(
    d_stack, stack, row, column, stride, carry, carry_momentum, keep_momentum,
    SIZE: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Of a tile, through carry * stack: gradients of the three numbers; d_stack is overwritten."""
    at = row[:, None] * stride + column[None, :]
    d, x = tl.load(d_stack + at), tl.load(stack + at)
    of_carry = tl.sum(d * x)
    of_momentum, of_keep = of_carry * 0, of_carry * 0
    if MOMENTUM:
        later, pushed = tl.load(d_stack + SIZE + at), tl.load(stack + SIZE + at)
        of_momentum, of_keep = tl.sum(d * pushed), tl.sum(later * pushed)
        later = later * keep_momentum + d * carry_momentum
        tl.debug_barrier()
        tl.store(d_stack + SIZE + at, later)
    tl.debug_barrier()
    tl.store(d_stack + at, d * carry)
    return of_carry, of_momentum, of_keep


@triton.jit
def steps_back(
    wide, narrow, d_f, slot, d_second, d_base_second,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    PART: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Of a slice, through f = (g B^T) silu'(z); BACK is overwritten by the gradient of g B^T."""
    token, column = tl.arange(0, TILE), tl.arange(0, K)
    s = tl.min(slot, 0)
    back, z = tile(wide + BACK * W, token, slot, WIDTH), tile(wide + Z * W, token, slot, WIDTH)
    put(wide + D_SLOPE * W, token, slot, WIDTH, d_f * back)
    tl.debug_barrier()
    back = wide + BACK * W
    put(back, token, slot, WIDTH, d_f * silu_slope(z))
    tl.debug_barrier()
    d = product(back, 1, WIDTH, narrow + G * S, K, 1, slot, column, TILE, PART)
    add_to(d_second, slot, column, K, d)
    add_to(d_base_second, slot, column, K, d)
    second = wide + W_B * W + s * K
    d = product(back + s, WIDTH, 1, second, K, 1, token, column, SLICE, PART)
    add_to(narrow + DG * S, token, column, K, d)
    tl.debug_barrier()


@triton.jit
def weights_back(
    wide, narrow, slot, d_first, d_second, d_base_first, d_base_second,
    K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    W: tl.constexpr, S: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Of a slice: what queries leave for the base, for what is learned and for its momentum."""
    column = tl.arange(0, K)
    dzq, xq, PUSHED = wide + DZQ * W, wide + XQ * W, K * WIDTH
    d = product(narrow + QUERY * S, 1, K, dzq, WIDTH, 1, column, slot, ROWS, PART)
    add_to(d_base_first, column, slot, WIDTH, d)
    d = product(narrow + Q_READ * S, 1, K, dzq, WIDTH, 1, column, slot, ROWS, PART)
    add_to(d_first, column, slot, WIDTH, d)
    d = product(xq, 1, WIDTH, narrow + DU * S, K, 1, slot, column, ROWS, PART)
    add_to(d_base_second, slot, column, K, d)
    d = product(xq, 1, WIDTH, narrow + DU_READ * S, K, 1, slot, column, ROWS, PART)
    add_to(d_second, slot, column, K, d)
    if MOMENTUM:
        d = product(narrow + Q_PUSHED * S, 1, K, dzq, WIDTH, 1, column, slot, ROWS, PART)
        add_to(d_first + PUSHED, column, slot, WIDTH, d)
        d = product(xq, 1, WIDTH, narrow + DU_PUSHED * S, K, 1, slot, column, ROWS, PART)
        add_to(d_second + PUSHED, slot, column, K, d)


@triton.jit
def near_back(
    wide, narrow, d_mix, mix,
    K: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Through near = (q k^T) * mix."""
    token, column, row = tl.arange(0, TILE), tl.arange(0, K), tl.arange(0, ROWS)
    query, key, d_near = narrow + QUERY * S, narrow + KEY * S, narrow + D_NEAR * S
    d = product(wide + DZQ * W, WIDTH, 1, wide + F * W, 1, WIDTH, row, token, WIDTH, PART)
    near = product(query, K, 1, key, 1, K, row, token, K, PART)
    add_to(d_mix, row, token, TILE, d * near)
    put(d_near, row, token, TILE, d * tile(mix, row, token, TILE))
    tl.debug_barrier()
    dq = product(d_near, TILE, 1, key, K, 1, row, column, TILE, PART)
    add_to(narrow + DQ * S, row, column, K, dq)
    dk = product(d_near, 1, TILE, query, K, 1, token, column, ROWS, PART)
    add_to(narrow + DK * S, token, column, K, dk)


@triton.jit
def errors_back(
    narrow, dv, gate, bound, scale, gain, C,
    K: tl.constexpr, TILE: tl.constexpr, S: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Through g and the errors, back to `before` [TILE, K]; also of the gate, gamma and bias."""
    token, column = tl.arange(0, TILE), tl.arange(0, K)
    normed, error = (
        tile(narrow + NORMED * S, token, column, K),
        tile(narrow + ERROR * S, token, column, K),
    )
    dg, g = tile(narrow + DG * S, token, column, K), tile(narrow + G * S, token, column, K)
    norm = tl.sqrt(tl.sum(error * error, 1))
    clip = LIMIT / tl.maximum(norm, LIMIT)
    theta = -gate * bound
    clipped = error * clip[:, None]
    outer = clipped * gain[None, :] * theta[:, None]
    d_outer = through_norm(dg, normed, scale, K)
    d_gate = -bound * tl.sum(d_outer * clipped * gain[None, :], 1)
    d_gain = tl.sum(d_outer * clipped * theta[:, None], 0)
    d = d_outer * gain[None, :] * theta[:, None]
    along = tl.sum(d * error, 1) / tl.maximum(norm * norm, 1e-37)
    along = tl.where(norm >= LIMIT, along, 0.0)  # of a clipped error only its direction moved
    d = (d - error * along[:, None]) * clip[:, None]
    at = token[:, None] * K + column[None, :]
    tl.store(dv + at, -d, mask=(token < C)[:, None])
    add_to(narrow + DK * S, token, column, K, d)
    d_gain += tl.sum(d * normed, 0)
    d_normed = d * gain[None, :] - scale[:, None] * (
        dg * (tl.sum(outer * normed, 1) / K)[:, None]
        + outer * (tl.sum(dg * normed, 1) / K)[:, None]
    )
    d_scale = scale * tl.sum(dg * g, 1) / K
    d_before = through_norm(d_normed, normed, scale, K) - d_scale[:, None] * normed
    return d_before, d_gate, d_gain, tl.sum(d, 0)


@triton.jit
def second_walk(
    wide, narrow, d_first, d_second, d_base_first, d_base_second,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    PART: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Through before = silu(k A) B at the chunk's start; DG has the gradient of `before`."""
    token, column = tl.arange(0, TILE), tl.arange(0, K)
    dz = wide + D_SLOPE * W
    for s in range(0, WIDTH, SLICE):
        slot = s + tl.arange(0, SLICE)
        d = product(wide + HIDDEN * W, 1, WIDTH, narrow + DG * S, K, 1, slot, column, TILE, PART)
        add_to(d_second, slot, column, K, d)
        add_to(d_base_second, slot, column, K, d)
        d = product(narrow + DG * S, K, 1, wide + W_B * W, 1, K, token, slot, K, PART)
        d += tile(wide + D_HIDDEN * W, token, slot, WIDTH)
        z = tile(wide + Z * W, token, slot, WIDTH)
        sigmoid = tl.sigmoid(z)
        bend = sigmoid * (1 - sigmoid) * (2 + z * (1 - 2 * sigmoid))  # silu''(z)
        d = d * silu_slope(z) + tile(dz, token, slot, WIDTH) * bend
        tl.debug_barrier()
        put(dz, token, slot, WIDTH, d)
        tl.debug_barrier()
        d = product(narrow + KEY * S, 1, K, dz, WIDTH, 1, column, slot, TILE, PART)
        add_to(d_first, column, slot, WIDTH, d)
        add_to(d_base_first, column, slot, WIDTH, d)
    d = product(dz, WIDTH, 1, wide + W_A * W, 1, WIDTH, token, column, WIDTH, PART)
    add_to(narrow + DK * S, token, column, K, d)
