"""An MLP memory, all chunks of a call in two Triton kernels.

The function is that of `memory_chunk.MLPMemory` where every live token is written, in its symbols.
What is free of the weights is made for all chunks at once, one program each: the `Plan`, and what a
query sees of the keys, near = (q k^T) * mix. Then a program for each head walks over its chunks.

Hidden columns meet in sums alone, so they are taken a slice at a time, twice in each chunk.
With A, B the weights (base + learned) and s a slice:

    first    z = k A_s    hidden = silu(z)    before += hidden B_s
             alike += hidden hidden^T         square += B_s^T B_s
    then     the errors, their bound, and g, the step on B
    second   f = (g B_s^T) silu'(z)           the step on A
             x = silu(q A_s of the token + near f)
             u += x B_s of the token          like += x hidden^T
             what is learned, and its momentum, move in their slice

and y = q + gamma LN(u + (like * mix) g) + bias. What is learned and its momentum lie where
the stacks go in the end, and are read and overwritten there. No other program touches them, so they
stay in the first-level cache as far as that has room (`stack_bytes`), else in the second-level one.
Registers could not hold them: products of three tf32 passes need all there are.

Shapes: N chunks, X = lanes * heads, B lanes, C chunk, R tokens that read (the last ones), K head
width, h hidden width, s levels of a stack; TILE and ROWS are C and R rounded up.
Source: Behrouz et al., "Titans", arXiv 2501.00663, section 3.2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wakesleep.kernels.dispatch import interpreting
from wakesleep.kernels.memory_chunk import EPS, SLOPE_BOUND, Chunks, MLPMemory, Stacks
from wakesleep.kernels.mlp_plan_triton import SHARES, laid_out, plan_launch, whole
from wakesleep.kernels.parts_triton import SMALLEST, add_dot, tile, tokens

LARGEST = 64  # of chunks and heads: their squares are in registers
SLICE = 32  # hidden columns that are in registers at a time
VARIANCE_FLOOR = tl.constexpr(EPS)
SLOPE = tl.constexpr(SLOPE_BOUND)


@triton.jit
def normalised(x, K: tl.constexpr):
    """LN(x) of rows [TILE, K], without gain, and 1 / the deviation that it divides by [TILE]."""
    centred = x - (tl.sum(x, 1) / K)[:, None]
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / K + VARIANCE_FLOOR)
    return centred * scale[:, None], scale


@triton.jit
def through_norm(d, normed, scale, K: tl.constexpr):
    """J d, for the Jacobian J of a LayerNorm."""
    along = tl.sum(d * normed, 1) / K
    return scale[:, None] * (d - (tl.sum(d, 1) / K)[:, None] - normed * along[:, None])


@triton.jit
def features(
    z_out, k, first, second, base_first, base_second, C,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """before [TILE, K], alike [TILE, TILE] and square [K, K]; z [TILE, WIDTH] is kept."""
    token, column = tl.arange(0, TILE), tl.arange(0, K)
    before = tl.zeros([TILE, K], tl.float32)
    alike = tl.zeros([TILE, TILE], tl.float32)
    square = tl.zeros([K, K], tl.float32)
    for s in range(0, WIDTH, SLICE):
        slot = s + tl.arange(0, SLICE)
        z = tl.zeros([TILE, SLICE], tl.float32)
        for c in range(0, K, PART):
            part = c + tl.arange(0, PART)
            A = tile(first, part, slot, WIDTH) + tile(base_first, part, slot, WIDTH)
            z = add_dot(z, tokens(k, token, part, C, K), A)
        tl.store(z_out + token[:, None] * WIDTH + slot[None, :], z)
        hidden = z * tl.sigmoid(z)
        B = tile(second, slot, column, K) + tile(base_second, slot, column, K)
        before = add_dot(before, hidden, B)
        alike = add_dot(alike, hidden, tl.trans(hidden))
        square = add_dot(square, tl.trans(B), B)
    return before, alike, square


@triton.jit
def outer_step(
    error, normed, scale, gain, alike, overlap, square, gate,
    K: tl.constexpr, TILE: tl.constexpr,
    MAX_STEP: tl.constexpr, LIMIT: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """The step on B [TILE, K]; of errors their norms before clipping, and the step bound [TILE]."""
    norm = tl.sqrt(tl.sum(error * error, 1))
    bent = scale * tl.max(tl.abs(gain), 0)
    kernel = alike + overlap * (SLOPE * SLOPE * tl.sqrt(tl.sum(square * square)))
    total = tl.sum(kernel * bent[None, :], 1) * bent
    token = tl.arange(0, TILE)
    own = tl.sum(tl.where(token[:, None] == token[None, :], kernel, 0.0), 1) * bent * bent
    bound = 1 / tl.maximum(tl.maximum(own, 1.0) / MAX_STEP, SPREAD * total)
    clipped = LIMIT / tl.maximum(norm, LIMIT)
    pull = error * gain[None, :] * (-gate * bound * clipped)[:, None]
    return through_norm(pull, normed, scale, K), norm, bound


@triton.jit
def _step_first(
    z, g, second, base_second, slot,
    K: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The step on A [TILE, SLICE], and hidden."""
    token = tl.arange(0, TILE)
    z = tile(z, token, slot, WIDTH)
    f = tl.zeros_like(z)
    for c in range(0, K, PART):
        part = c + tl.arange(0, PART)
        B = tile(second, slot, part, K) + tile(base_second, slot, part, K)
        f = add_dot(f, tile(g, token, part, K), tl.trans(B))
    sigmoid = tl.sigmoid(z)
    hidden = z * sigmoid
    return f * (sigmoid + hidden - sigmoid * hidden), hidden


@triton.jit
def _look(
    q, near, f, first, base_first, share, slot, R,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """What queries find in the first layer [ROWS, SLICE]."""
    row = tl.arange(0, ROWS)
    x = tl.zeros([ROWS, SLICE], tl.float32)
    of_A, of_S = x, x
    for c in range(0, K, PART):
        part = c + tl.arange(0, PART)
        query = tokens(q, row, part, R, K)
        x = add_dot(x, query, tile(base_first, part, slot, WIDTH))
        of_A = add_dot(of_A, query, tile(first, part, slot, WIDTH))
        if MOMENTUM:
            of_S = add_dot(of_S, query, tile(first, K + part, slot, WIDTH))
    x += of_A * tl.load(share + 4 * TILE + row)[:, None]
    if MOMENTUM:
        x += of_S * tl.load(share + 5 * TILE + row)[:, None]
    for c in range(0, TILE, PART):
        part = c + tl.arange(0, PART)
        seen = tile(near, row, part, TILE)
        x = add_dot(x, seen, tile(f, part, tl.arange(0, SLICE), SLICE))
    return x * tl.sigmoid(x)


@triton.jit
def _advance_first(
    k, f, first, share, slot, C,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    PART: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Move a slice of what A has learned, and its momentum."""
    column = tl.arange(0, K)
    at = first + column[:, None] * WIDTH + slot[None, :]
    A = tl.load(at)
    if MOMENTUM:
        S = tl.load(at + K * WIDTH)
        A = A * tl.load(share + 3 * TILE) + S * tl.load(share + 3 * TILE + 1)
        S *= tl.load(share + 3 * TILE + 2)
    else:
        A *= tl.load(share + 3 * TILE)
    for c in range(0, TILE, PART):
        part = c + tl.arange(0, PART)
        key = tl.trans(tokens(k, part, column, C, K))
        step = tile(f, part, tl.arange(0, SLICE), SLICE)
        A = add_dot(A, key, step * tl.load(share + part)[:, None])
        if MOMENTUM:
            S = add_dot(S, key, step * tl.load(share + TILE + part)[:, None])
    tl.debug_barrier()  # every thread has read the slice that is overwritten
    tl.store(at, A)
    if MOMENTUM:
        tl.store(at + K * WIDTH, S)


@triton.jit
def _advance_second(
    z, g, second, share, slot,
    K: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
    MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Move a slice of what B has learned, and its momentum."""
    column = tl.arange(0, K)
    at = second + slot[:, None] * K + column[None, :]
    B = tl.load(at)
    if MOMENTUM:
        S = tl.load(at + K * WIDTH)
        B = B * tl.load(share + 3 * TILE) + S * tl.load(share + 3 * TILE + 1)
        S *= tl.load(share + 3 * TILE + 2)
    else:
        B *= tl.load(share + 3 * TILE)
    for c in range(0, TILE, PART):
        part = c + tl.arange(0, PART)
        hidden = tile(z, part, slot, WIDTH)
        hidden *= tl.sigmoid(hidden)
        step = tile(g, part, column, K)
        B = add_dot(B, tl.trans(hidden * tl.load(share + part)[:, None]), step)
        if MOMENTUM:
            S = add_dot(S, tl.trans(hidden * tl.load(share + TILE + part)[:, None]), step)
    tl.debug_barrier()
    tl.store(at, B)
    if MOMENTUM:
        tl.store(at + K * WIDTH, S)


@triton.jit
def _copy(to, source, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """SIZE elements in one piece."""
    for start in range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(to + at, tl.load(source + at))


@triton.jit(do_not_specialize=["N", "X", "H", "R"])
def mlp_scan_kernel(
    y, norms, first, second, starts_first, starts_second, scratch, shares, overlap, mixes, nears,
    base_first, base_second, gamma, bias, q, k, v, live, closed,
    y_chunk, y_head, q_chunk, q_head, k_chunk, k_head, v_chunk, v_head, N, X, H, C, R,
    K: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, MOMENTUM: tl.constexpr, READS: tl.constexpr,
    KEEPS: tl.constexpr, MAX_STEP: tl.constexpr, LIMIT: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """All chunks of one head; the stacks are overwritten by those behind the last closed chunk."""
    SIZE: tl.constexpr = K * WIDTH * (1 + MOMENTUM)  # of a stack
    x = tl.program_id(0).to(tl.int64)
    token, column, row = tl.arange(0, TILE), tl.arange(0, K), tl.arange(0, ROWS)
    base_first += x * (K * WIDTH)
    base_second += x * (K * WIDTH)
    first += x * SIZE
    second += x * SIZE
    z = scratch + x * (TILE * (WIDTH + K + SLICE))
    g = z + TILE * WIDTH
    f = g + TILE * K
    for chunk in range(0, N):
        n = tl.cast(chunk, tl.int64)
        at = n * X + x
        from_k, from_q = k + n * k_chunk + x * k_head, q + n * q_chunk + x * q_head
        share, near = shares + at * (SHARES * TILE), nears + at * (ROWS * TILE)
        if KEEPS:
            _copy(starts_first + at * SIZE, first, SIZE, K * SLICE)
            _copy(starts_second + at * SIZE, second, SIZE, K * SLICE)
        before, alike, square = features(
            z, from_k, first, second, base_first, base_second, C, K, WIDTH, SLICE, TILE, PART
        )
        gain, shift = tl.load(gamma + x * K + column), tl.load(bias + x * K + column)
        normed, scale = normalised(before, K)
        error = tokens(from_k, token, column, C, K) + shift[None, :] + normed * gain[None, :]
        error -= tokens(v + n * v_chunk + x * v_head, token, column, C, K)
        written = tl.load(live + (at // H) * C + token, mask=token < C, other=0) != 0
        past = (token[:, None] >= token[None, :]) & written[None, :]
        step, norm, _ = outer_step(
            error, normed, scale, gain, tl.where(past, tl.abs(alike), 0.0),
            tile(overlap + at * (TILE * TILE), token, token, TILE), square,
            tl.load(share + 2 * TILE + token), K, TILE, MAX_STEP, LIMIT, SPREAD,
        )  # fmt: skip
        tl.store(norms + at * C + token, norm, mask=token < C)
        tl.store(g + token[:, None] * K + column[None, :], step)
        advances = tl.load(closed + at // H) != 0
        if READS:
            u = tl.zeros([ROWS, K], tl.float32)
            like = tl.zeros([ROWS, TILE], tl.float32)
        for s in range(0, WIDTH, SLICE):
            tl.debug_barrier()  # z and g are written; f has been read
            slot = s + tl.arange(0, SLICE)
            pull, hidden = _step_first(z, g, second, base_second, slot, K, WIDTH, TILE, PART)
            tl.store(f + token[:, None] * SLICE + tl.arange(0, SLICE)[None, :], pull)
            tl.debug_barrier()
            if READS:
                found = _look(
                    from_q, near, f, first, base_first, share, slot, R,
                    K, WIDTH, SLICE, TILE, ROWS, PART, MOMENTUM,
                )  # fmt: skip
                like = add_dot(like, found, tl.trans(hidden))
                u = add_dot(u, found, tile(base_second, slot, column, K))
                share_of = tl.load(share + 4 * TILE + row)[:, None]
                u = add_dot(u, found * share_of, tile(second, slot, column, K))
                if MOMENTUM:
                    share_of = tl.load(share + 5 * TILE + row)[:, None]
                    u = add_dot(u, found * share_of, tile(second, WIDTH + slot, column, K))
            if advances:
                _advance_first(
                    from_k, f, first, share, slot, C, K, WIDTH, SLICE, TILE, PART, MOMENTUM
                )
                _advance_second(z, g, second, share, slot, K, WIDTH, TILE, PART, MOMENTUM)
        if READS:
            mixed = like * tile(mixes + at * (ROWS * TILE), row, token, TILE)
            normed, _ = normalised(add_dot(u, mixed, tile(g, token, column, K)), K)
            answer = tokens(from_q, row, column, R, K) + shift[None, :] + normed * gain[None, :]
            to_y = y + n * y_chunk + x * y_head + row[:, None] * K + column[None, :]
            tl.store(to_y, answer.to(y.dtype.element_ty), mask=(row < R)[:, None])
        tl.debug_barrier()  # the stacks are written, and g has been read


def mlp_scan_triton(
    memory: MLPMemory,
    stacks: Stacks,
    chunks: Chunks,
    out: tuple[Tensor | None, Stacks] | None = None,
    starts: Stacks | None = None,
) -> tuple[Tensor | None, Stacks, Tensor]:
    """Read and write all chunks; a chunk that is not closed leaves its lane's stacks alone.

    Args:
        memory: float32 weights of X heads.
        stacks: [X, s * K, h] and [X, s * h, K] float32; s = 2 if there is an eta, else 1.
        chunks: every live token is written.
        out: the first two of what is returned, to be overwritten; made if None.
        starts: places [N, ...] for the stacks at the start of each chunk.

    Returns:
        y [N, X, R, K] or None, the stacks, surprise [N, X, C] = step |error at the chunk's start|,
        0 where not live.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.
    """
    _check(memory, stacks, chunks)
    chunks = laid_out(chunks)
    q, k = chunks.q, chunks.k
    if out is None:
        end = (torch.empty_like(s, memory_format=torch.contiguous_format) for s in stacks)
        out = None if q is None else torch.empty_like(q), tuple(end)
    y, end = out
    if (y is None) != (q is None) or (y is not None and (y.shape != q.shape or not whole(y))):
        raise ValueError("out[0] must be as q is, with every chunk in one piece")
    for stack, place in zip(stacks, end, strict=True):
        if place.shape != stack.shape or not place.is_contiguous():
            raise ValueError(f"out[1] must have {list(stack.shape)} in one piece")
        place.copy_(stack)
    for place, stack in zip(starts or (), stacks, strict=False):
        if place.shape != (len(k), *stack.shape) or not place.is_contiguous():
            raise ValueError(f"starts must have {[len(k), *stack.shape]} in one piece")
    if k.numel() == 0:
        return y, end, torch.zeros_like(chunks.keep, dtype=torch.float32)
    norms = torch.empty_like(chunks.keep, dtype=torch.float32)
    with torch.cuda.device_of(k):
        for kernel, grid, args, options in launches(y, norms, end, starts, memory, chunks):
            kernel[grid](*args, **options)
    written = chunks.live.repeat_interleave(k.shape[1] // chunks.live.shape[1], 1)
    return y, end, norms * chunks.step * written


def launches(
    y: Tensor | None,
    norms: Tensor,
    end: Stacks,
    starts: Stacks | None,
    memory: MLPMemory,
    chunks: Chunks,
) -> list[tuple]:
    """Both kernels with grid, arguments and options; tensors, on any device, are `laid_out`."""
    q, k, v, *_, live, closed = chunks
    N, X, C, K = k.shape
    R, h = C if q is None else q.shape[2], end[0].shape[2]
    planned, first = plan_launch(chunks)
    options = first[3] | rule_options(memory) | {"KEEPS": starts is not None}
    scratch = k.new_empty(X, options["TILE"], h + K + options["SLICE"], dtype=torch.float32)
    answer, query = (k, k) if q is None else (y, q)
    slow = [w.contiguous() for w in (*memory.base, memory.gamma, memory.bias)]
    strides = [s for x in (answer, query, k, v) for s in x.stride()[:2]]
    args = (answer, norms, *end, *(starts or end), scratch, *planned, *slow, query, k, v, live,
            closed, *strides, N, X, X // live.shape[1], C, R)  # fmt: skip
    return [first, (mlp_scan_kernel, (X,), args, options)]


def rule_options(memory: MLPMemory) -> dict[str, int | float]:
    """Sizes and numbers of a memory that kernels are compiled for."""
    h = memory.base[0].shape[2]
    limit = min(float(memory.limit), torch.finfo(torch.float32).max)
    spread = 1 + math.log(memory.chunk)
    return {"WIDTH": h, "SLICE": slice_width(h), "MAX_STEP": float(memory.max_step),
            "LIMIT": limit, "SPREAD": spread}  # fmt: skip


def stack_bytes(K: int, h: int, levels: int) -> int:
    """Bytes of what a head has learned, with momentum if `levels` is 2, that a walk overwrites."""
    return 2 * levels * K * h * torch.float32.itemsize


def slice_width(h: int) -> int:
    """Hidden columns in a slice: the largest power of two up to SLICE that divides h."""
    return min(SLICE, h & -h)


def _check(memory: MLPMemory, stacks: Stacks, chunks: Chunks) -> None:
    """Refuse what the kernels would read wrongly, or out of bounds."""
    q, k, v, keep, eta, step, live, closed = chunks
    N, X, C, K = k.shape
    B, h, levels = live.shape[1], stacks[0].shape[-1], 1 if eta is None else 2
    wanted = {
        "stacks[0]": (stacks[0], (X, levels * K, h), torch.float32),
        "stacks[1]": (stacks[1], (X, levels * h, K), torch.float32),
        "base[0]": (memory.base[0], (X, K, h), torch.float32),
        "base[1]": (memory.base[1], (X, h, K), torch.float32),
        "gamma": (memory.gamma, (X, 1, K), torch.float32),
        "bias": (memory.bias, (X, 1, K), torch.float32),
        "v": (v, k.shape, k.dtype),
        "keep": (keep, (N, X, C), keep.dtype),
        "eta": (keep if eta is None else eta, (N, X, C), keep.dtype),
        "step": (step, (N, X, C), keep.dtype),
        "live": (live, (N, B, C), torch.bool),
        "closed": (closed, (N, B), torch.bool),
    }
    if q is not None:
        wanted["q"] = (q, (N, X, min(q.shape[2], C), K), k.dtype)
    for name, (given, shape, dtype) in wanted.items():
        if given.shape != shape or given.dtype != dtype or given.device != k.device:
            has = f"{list(given.shape)} of {given.dtype} on {given.device}"
            raise ValueError(f"{name} must be {list(shape)} of {dtype} on {k.device}, got {has}")
    if B == 0 or X % B:
        raise ValueError(f"live must have a divisor of the {X} heads of all lanes, got {B} lanes")
    if K & (K - 1) or not SMALLEST.value <= K <= LARGEST or C > LARGEST:
        raise ValueError(f"K must be 16, 32 or 64 and C at most {LARGEST}, got {K} and {C}")
    if slice_width(h) < SMALLEST.value:
        raise ValueError(f"the hidden width must be a multiple of {SMALLEST.value}, got {h}")
    if interpreting() and torch.bfloat16 in (k.dtype, keep.dtype):
        raise ValueError("bfloat16 cannot be interpreted: use float16")
