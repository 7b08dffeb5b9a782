"""Write pairs into a small MLP per head by gradient steps, and rehearse what it knew with them.

A linear memory of width K holds hardly more than K pairs, an MLP several times as many, but no
closed form keeps the old ones. So old answers are written again beside the new pairs: for a sample
of the keys that were written before, what the memory gives for them before the write (rehearsal
without old values: Robins, Connection Science 1995). Keys made up in their place protect less:
those of a real stream crowd together.

The memory is f(k) = silu(k A) B, packed into one tensor s [.., K, 2 M] = [A, B^T]. It begins with
A at random and B zero: then all answers are zero.

Shapes: B lanes, H heads, n pairs, R old keys, K head width, M hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 192  # of Adam per write
RATE = 0.01  # its step size at first, for B in parts of the values' RMS; it falls to 0
LAST = 0.3  # share of the steps in which it falls
BETA1, BETA2, EPS = 0.9, 0.99, 1e-8


def mlp_answer(s: Tensor, k: Tensor) -> Tensor:
    """f(k): what the memory s [B, H, K, 2 M] gives back for keys k [B, H, n, K], in their shape."""
    a, b = s.chunk(2, -1)
    return F.silu(k @ a) @ b.mT


def first_weights(num_heads: int, head_dim: int, hidden: int) -> Tensor:
    """[H, K, 2 M] of a memory that was never written: the same numbers wherever it begins."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(num_heads, head_dim, hidden, generator=generator)  # for keys of length 1
    return torch.cat([a, torch.zeros_like(a)], -1)


def rehearsed_write(
    s: Tensor, k: Tensor, v: Tensor, weight: Tensor, old: Tensor, steps: int = STEPS
) -> Tensor:
    """The memory after the pairs were written.

    The loss is half the squared error, summed over pairs and rehearsed keys.

    Args:
        s: [B, H, K, 2 M].
        k, v: [B, H, n, K], keys of length 1, rows without a pair zero.
        weight: [B, H, n] of the pairs' errors.
        old: [B, H, R, K] keys of length 1 that are rehearsed, rows without one zero.
    """
    keys = torch.cat([k, old], 2)
    values = torch.cat([v, mlp_answer(s, old)], 2)
    weights = torch.cat([weight, torch.ones_like(old[..., 0])], 2)
    there = k.square().sum(-1) > 0
    count = there.sum(-1, keepdim=True)[..., None]  # [B, H, 1, 1]
    power = v.square().mean(-1, keepdim=True).sum(2, keepdim=True) / count.clamp(min=1)
    half = s.shape[-1] // 2
    # A head without pairs stays: Adam would walk about on the rounding of errors that are zero.
    first = (count > 0).to(s.dtype).expand_as(s[..., :half])
    rate = torch.cat([first, power.sqrt().expand_as(s[..., half:])], -1)
    mean, square = torch.zeros_like(s), torch.zeros_like(s)
    for step in range(1, steps + 1):
        slope = mlp_slope(s, keys, values, weights)
        mean = BETA1 * mean + (1 - BETA1) * slope
        square = BETA2 * square + (1 - BETA2) * slope * slope
        size = RATE * min(1.0, (steps - step + 1) / (LAST * steps))
        move = (mean / (1 - BETA1**step)) / ((square / (1 - BETA2**step)).sqrt() + EPS)
        s = s - size * rate * move
    return s


def mlp_slope(s: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """Gradient [B, H, K, 2 M] of half the squared error, each row n times its weight [B, H, n]."""
    a, b = s.chunk(2, -1)
    x = k @ a
    gate = x.sigmoid()
    hidden = x * gate
    error = (hidden @ b.mT - v) * weight[..., None]
    inner = (error @ b) * (gate * (1 + x * (1 - gate)))
    return torch.cat([k.mT @ inner, error.mT @ hidden], -1)
