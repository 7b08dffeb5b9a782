"""Write pairs into a small MLP per head by gradient steps, and rehearse what it knew with them.

A linear memory of width K holds hardly more than K pairs, an MLP several times as many, but no
closed form keeps the old ones. So old answers are written again beside the new pairs: for a sample
of the keys that were written before, what the memory gives for them before the write (rehearsal
without old values: Robins, Connection Science 1995).

The memory is f(k) = silu(k A) B, packed into one tensor s [.., K, 2 M] = [A, B^T]. It begins with
A at random and B zero: then all answers are zero.

Shapes: B lanes, H heads, n pairs, R old keys, K head width, M hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 192  # of Adam per write, at least
RATE = 0.05  # its step size at first, for B in parts of the values' RMS; it falls to 0
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
    weights = torch.cat([weight, torch.ones_like(old[..., 0])], 2)[..., None]
    count = (keys[:, :, : k.shape[2]].square().sum(-1) > 0).sum(-1)  # [B, H]
    # A head without pairs stays: Adam would walk about on the rounding of errors that are zero.
    there = count > 0
    power = v[there].square().mean(-1).sum(-1) / count[there]
    written = s.clone()
    parts = (s[there], keys[there], values[there], weights[there], power.sqrt())
    written[there] = _adam(*parts, steps)
    return written


@torch.no_grad()
def _adam(s: Tensor, k: Tensor, v: Tensor, weight: Tensor, size: Tensor, steps: int) -> Tensor:
    """The memories s [X, K, 2 M] of X heads after all steps, in buffers that are used again.

    Fresh memory for every product and every step would take longer than the sums.

    Args:
        k, v: [X, n, K]; weight: [X, n, 1] of the errors; size: [X] of the values.
    """
    w = torch.stack(s.chunk(2, -1))  # [2, X, K, M]: A, B^T
    a, b = w
    mean, square, slope = torch.zeros_like(w), torch.zeros_like(w), torch.empty_like(w)
    x, gate, hidden = k.new_empty(3, *k.shape[:2], a.shape[-1])
    error = torch.empty_like(v)
    for step in range(1, steps + 1):
        torch.bmm(k, a, out=x)
        torch.sigmoid(x, out=gate)
        torch.mul(x, gate, out=hidden)
        torch.bmm(hidden, b.mT, out=error).sub_(v).mul_(weight)
        torch.bmm(error.mT, hidden, out=slope[1])
        torch.addcmul(gate, hidden, gate, value=-1, out=x).add_(hidden)  # the slope of silu
        torch.bmm(error, b, out=gate).mul_(x)
        torch.bmm(k.mT, gate, out=slope[0])
        mean.lerp_(slope, 1 - BETA1)
        square.mul_(BETA2).addcmul_(slope, slope, value=1 - BETA2)
        torch.div(square, 1 - BETA2**step, out=slope).sqrt_().add_(EPS)
        torch.div(mean, slope, out=slope)[1].mul_(size[:, None, None])
        rate = RATE * min(1.0, (steps - step + 1) / (LAST * steps))
        w.sub_(slope, alpha=rate / (1 - BETA1**step))
    return torch.cat(w.unbind(), -1)
