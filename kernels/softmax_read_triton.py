"""The read of `softmax_read` as one Triton kernel: logits and probabilities stay on chip.

One program reads one tile of queries of one head. It walks over the places tile by tile and keeps,
in float32, the largest logit m so far, the sum z of exp(logit - m), and the values' sum a under the
same weights. With m' = max(m, logits) and p = exp(logits - m'), a tile makes of them

    m'        z exp(m - m') + sum p        a exp(m - m') + p v

and a / z is the answer. The sink, whose value is zero, is where they begin: m = its logit, z = 1,
a = 0. So m is finite from the start, and a query that may look nowhere reads zero.

Keys are widened (R + K columns), which is no power of two: a product is that of the first K columns
plus that of the last R. The kernel gives no probabilities and has no backward pass; `dispatch` says
when it is used.

Shapes: B lanes, H heads, C queries of a chunk, L places (place 0 is the sink), K head width, R
rotary dimensions, D = R + K.
Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wakesleep.kernels.dispatch import interpreting

TILE = 64  # queries and places of a tile in half precision
SINGLE_TILE = 32  # in float32, whose products take three passes and twice the registers
SMALLEST = 16  # edge of a tile that tensor cores multiply


@triton.jit
def _read_piece(
    running,
    q_first,
    q_last,
    query,
    keys,
    key_step,
    values,
    value_step,
    bias,
    bias_query,
    bias_step,
    length,
    causal_at,
    C,
    NEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    WIDE_R: tl.constexpr,
    PLACES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go on with m, z and a over `length` places; pointers are those of the first one.

    NEAR: the piece with the sink, at place 0, and the queries' own chunk, from causal_at on.
    """
    m, z, a = running
    first = tl.arange(0, K)
    last = K + tl.arange(0, WIDE_R)
    for start in range(0, length, PLACES):
        place = start + tl.arange(0, PLACES)
        there = place < length
        at = place.to(tl.int64)
        row = keys + at[None, :] * key_step
        k_first = tl.load(row + first[:, None], mask=there[None, :], other=0.0)
        in_last = there[None, :] & (last < K + R)[:, None]
        k_last = tl.load(row + last[:, None], mask=in_last, other=0.0)
        logits = tl.dot(q_first, k_first, input_precision=PRECISION)
        logits = tl.dot(q_last, k_last, logits, input_precision=PRECISION)
        if HAS_BIAS:
            to_bias = bias + at[None, :] * bias_step
            seen = there[None, :]
            if BIAS_PER_QUERY:
                to_bias += query[:, None] * bias_query
                seen = seen & (query < C)[:, None]
            logits += tl.load(to_bias, mask=seen, other=0.0).to(tl.float32)
        visible = there[None, :]
        if NEAR:
            visible = visible & (place > 0)[None, :]
            visible = visible & (place[None, :] - causal_at <= query[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        top = tl.maximum(m, tl.max(logits, 1))
        fade = tl.exp(m - top)
        p = tl.exp(logits - top[:, None])
        v = tl.load(values + at[:, None] * value_step + first[None, :], there[:, None], other=0.0)
        a = tl.dot(p.to(v.dtype), v, a * fade[:, None], input_precision=PRECISION)
        z = z * fade + tl.sum(p, 1)
        m = top
    return m, z, a


@triton.jit(do_not_specialize=["length", "far_length", "causal_at", "C"])
def softmax_read_kernel(
    out,
    q,
    keys,
    near,
    far,
    sink,
    bias,
    out_lane,
    out_head,
    out_query,
    q_lane,
    q_head,
    q_query,
    key_lane,
    key_head,
    key_step,
    near_lane,
    near_head,
    near_step,
    far_lane,
    far_head,
    far_step,
    bias_lane,
    bias_head,
    bias_query,
    bias_step,
    length,
    far_length,
    causal_at,
    C,
    H: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDE_R: tl.constexpr,
    PLACES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = softmax of (q keys^T + bias, with the sink) times the values, near then far.

    Pointers to tensors with strides in elements; a width has stride 1. length: near places.
    """
    lane = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    query = (tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    first = tl.arange(0, K)
    last = K + tl.arange(0, WIDE_R)
    asks = (query < C)[:, None]
    row = q + lane * q_lane + head * q_head + query[:, None] * q_query
    q_first = tl.load(row + first[None, :], mask=asks, other=0.0)
    q_last = tl.load(row + last[None, :], mask=asks & (last < K + R)[None, :], other=0.0)
    keys += lane * key_lane + head * key_head
    near += lane * near_lane + head * near_head
    bias += lane * bias_lane + head * bias_head
    m = tl.zeros([QUERIES], tl.float32) + tl.load(sink + head).to(tl.float32)
    z = tl.zeros([QUERIES], tl.float32) + 1.0
    a = tl.zeros([QUERIES, K], tl.float32)
    m, z, a = _read_piece(
        (m, z, a), q_first, q_last, query, keys, key_step, near, near_step,
        bias, bias_query, bias_step, length, causal_at, C,
        True, HAS_BIAS, BIAS_PER_QUERY, K, R, WIDE_R, PLACES, PRECISION,
    )  # fmt: skip
    behind = tl.cast(length, tl.int64)
    far += lane * far_lane + head * far_head
    m, z, a = _read_piece(
        (m, z, a), q_first, q_last, query, keys + behind * key_step, key_step, far, far_step,
        bias + behind * bias_step, bias_query, bias_step, far_length, causal_at, C,
        False, HAS_BIAS, BIAS_PER_QUERY, K, R, WIDE_R, PLACES, PRECISION,
    )  # fmt: skip
    y = (a / z[:, None]).to(out.dtype.element_ty)
    row = out + lane * out_lane + head * out_head + query[:, None] * out_query
    tl.store(row + first[None, :], y, mask=asks)


def softmax_read_triton(
    q: Tensor,
    keys: Tensor,
    values: list[Tensor],
    sink: Tensor,
    causal_at: int,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Read values v, softmax over the L places: what `softmax_read` gives for q keys^T.

    Args:
        q: [B, H, C, D] scaled and widened queries; keys: [B, H, L, D], that of the sink ignored.
        values: one or two pieces [B, H, L_i, K] that follow each other; the first ends with the
            queries' own chunk.
        sink: [H] logit of the sink.
        causal_at: first place of the queries' own chunk; query i sees the chunk up to place i.
        bias: added to the logits, broadcastable to [B, H, C, L], -inf where nobody may look.
        out: [B, H, C, K] to be overwritten; made if None.

    Returns:
        values [B, H, C, K].

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.
    """
    near, *rest = values
    far = rest[0] if rest else near[:, :, :0]
    shape = (*q.shape[:3], near.shape[-1])
    _check(q, keys, near, far, sink, causal_at)
    if out is None:
        out = near.new_empty(shape)
    if out.shape != shape or out.dtype != q.dtype or out.stride(-1) != 1:
        raise ValueError(f"out must be {list(shape)} of {q.dtype} with its rows in one piece")
    if bias is not None:
        bias = _broadcast(bias, (*q.shape[:3], keys.shape[2]))
    if out.numel():
        rows = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys, near, far))
        grid, args, options = launch(out, *rows, sink.contiguous(), causal_at, bias)
        with torch.cuda.device_of(q):
            softmax_read_kernel[grid](*args, **options)
    return out


def launch(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    near: Tensor,
    far: Tensor,
    sink: Tensor,
    causal_at: int,
    bias: Tensor | None,
) -> tuple[tuple[int, int], tuple, dict]:
    """Grid, arguments and options of the kernel; the tensors, on any device, have been checked."""
    B, H, C, D = q.shape
    K = near.shape[-1]
    tile = SINGLE_TILE if q.dtype == torch.float32 else TILE
    queries = min(tile, max(SMALLEST, triton.next_power_of_2(C)))
    strides = [s for x in (out, q, keys, near, far) for s in x.stride()[:3]]
    strides += (0, 0, 0, 0) if bias is None else bias.stride()
    args = (out, q, keys, near, far, sink, sink if bias is None else bias, *strides)
    options = {
        "H": H,
        "K": K,
        "R": D - K,
        "HAS_BIAS": bias is not None,
        "BIAS_PER_QUERY": bias is not None and bias.stride(2) != 0,
        "QUERIES": queries,
        "WIDE_R": max(SMALLEST, triton.next_power_of_2(D - K)),
        "PLACES": tile,
        "PRECISION": "tf32x3",  # of float32: as exact as float32 products, to rounding
        "num_warps": 4,
        "num_stages": 2,
    }
    grid = (B * H, triton.cdiv(C, queries))
    return grid, (*args, near.shape[2], far.shape[2], causal_at, C), options


def _check(q: Tensor, keys: Tensor, near: Tensor, far: Tensor, sink: Tensor, causal_at: int):
    """Refuse what the kernel would read wrongly, or out of bounds."""
    B, H, C, D = q.shape
    K = near.shape[-1]
    wanted = {
        "keys": (keys, (B, H, near.shape[2] + far.shape[2], D)),
        "values[0]": (near, (B, H, causal_at + C, K)),
        "values[1]": (far, (B, H, far.shape[2], K)),
        "sink": (sink, (H,)),
    }
    for name, (given, shape) in wanted.items():
        if given.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(given.shape)}")
        if given.device != q.device or (given.dtype != q.dtype and name != "sink"):
            has = f"{given.dtype} on {given.device}"
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q is, got {has}")
    if causal_at < 1:
        raise ValueError(f"causal_at must be at least 1, place 0 is the sink's, got {causal_at}")
    if K & (K - 1) or not SMALLEST <= K <= 128 or not 0 < D - K <= K:
        raise ValueError(
            f"K must be a power of two from 16 to 128 and R up to it, got {K}, {D - K}"
        )
    if interpreting() and q.dtype == torch.bfloat16:
        raise ValueError(
            "Triton's interpreter multiplies the bit patterns of bfloat16: use float16"
        )


def _broadcast(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    if any(n not in (1, size) for n, size in zip(bias.shape, shape, strict=True)):
        raise ValueError(f"bias must be broadcastable to {list(shape)}, got {list(bias.shape)}")
    return bias.expand(shape)
