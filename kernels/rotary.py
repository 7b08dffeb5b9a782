"""Partial rotary positions: the first R of a head's K dimensions turn, the others are content only.

A pair of dimensions (x, y) at position p is turned by the angle p * f, so that the product of a
query at p and a key at p' depends on p - p' alone (Su et al., RoFormer, arXiv 2104.09864, eq. 34).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(length: int, dims: int, base: float, like: Tensor) -> Tensor:
    """Cosines and sines of positions 0..length-1: [length, 2, dims // 2] in the dtype of `like`."""
    half = dims // 2
    steps = torch.arange(half, dtype=torch.float64, device=like.device) / max(half, 1)
    angle = torch.arange(length, dtype=torch.float64, device=like.device)[:, None] * base**-steps
    return torch.stack([angle.cos(), angle.sin()], 1).to(like.dtype)


def rotate(x: Tensor, turn: Tensor, backwards: bool = False) -> Tensor:
    """Turn x [..., R] by the angles in turn [..., 2, R // 2] (rows of a `rotary_table`)."""
    a, b = x.chunk(2, -1)
    cos, sin = turn.unbind(-2)
    if backwards:
        sin = -sin
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def backward_factors(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Rows f, g [length, R] of a `rotary_table`: x f + swapped(x) g is x turned backwards.

    The same bits as `rotate` gives, in fewer and longer steps where many rows are turned.
    """
    cos, sin = turns.unbind(-2)
    return torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1)


def swapped(x: Tensor) -> Tensor:
    """x [..., R] with its halves the other way round."""
    return torch.cat(x.chunk(2, -1)[::-1], -1)
