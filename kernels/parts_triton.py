"""Parts that Triton kernels share: products, tiles of tensors, and what gates leave of the past.

Gates may be exactly 0 or 1, as in `memory_chunk.plan_chunk`: logarithms stop where what remains is
below rounding, and only differences of them, masked first, are exponentiated.

Shapes: C tokens of a chunk in a tile of TILE, K head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SMALLEST = tl.constexpr(16)  # edge of a tile that tensor cores multiply
LEAST_GATE = tl.constexpr(torch.finfo(torch.float32).eps ** 2)  # what remains is below rounding


@triton.jit
def add_dot(c, a, b):
    """c + a b, on tensor cores as exact as float32 to rounding."""
    return tl.dot(a, b, c, input_precision="tf32x3")


@triton.jit
def tile(x, row, column, stride):
    """x[row, column] of rows `stride` apart."""
    return tl.load(x + row[:, None] * stride + column[None, :])


@triton.jit
def tokens(x, row, column, C, K: tl.constexpr):
    """x[row, column] of a chunk [C, K] as float32; 0 beyond it."""
    at = x + row[:, None] * K + column[None, :]
    return tl.load(at, mask=(row < C)[:, None], other=0.0).to(tl.float32)


@triton.jit
def token_products(x, k, row, token, limit, C, K: tl.constexpr, PART: tl.constexpr):
    """x k^T of rows below `limit` and tokens; a few columns at a time, for registers."""
    found = tl.zeros([row.shape[0], token.shape[0]], tl.float32)
    for c in range(0, K, PART):
        part = c + tl.arange(0, PART)
        key = tl.trans(tokens(k, token, part, C, K))
        found = add_dot(found, tokens(x, row, part, limit, K), key)
    return found


@triton.jit
def log_gates(gates, live, token, C):
    """Sums of the written tokens' log gates [TILE] up to each token, and which are written."""
    written = tl.load(live + token, mask=token < C, other=0) != 0
    gate = tl.load(gates + token, mask=written, other=1.0).to(tl.float32)
    return tl.cumsum(tl.log(tl.maximum(gate, LEAST_GATE)), 0), written


@triton.jit
def gate_products(total, other, row, token):
    """Products of gates from `token` (sums `other`) to `row` (sums `total`); 0 for later ones."""
    gap = tl.minimum(total[:, None] - other[None, :], 0.0)  # what is above 0 would overflow
    return tl.where(row[:, None] >= token[None, :], tl.exp(gap), 0.0)


@triton.jit
def picked(total, token, row):
    """total[row] of a tensor in registers; 0 outside."""
    return tl.sum(tl.where(row[:, None] == token[None, :], total[None, :], 0.0), 1)
