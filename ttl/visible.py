"""What the queries of a chunk may look at: slots of the window, and a bias that hides the others.

Shapes: B lanes, H heads, C queries of a chunk, K head width, W window, P page, L visible places.
"""

from __future__ import annotations

import torch
from torch import Tensor


def open_slots(x: Tensor, chunk: int) -> Tensor:
    """Zeros in place of what the open chunk had: [B, C, ...] for x [B, T, ...]."""
    return x.new_zeros(x.shape[0], chunk, *x.shape[2:])


def overlapping(k: Tensor, v: Tensor, length: int, C: int, cut: bool) -> list:
    """What the window shows during each chunk: keys and values [B, H, ., K], each in pieces.

    Args:
        length: slots that it shows, of those of k and v from every multiple of C on.
        cut: into pieces of C slots. The gradient of one slice of k for each chunk would be as
            large as all of k, for each.
    """
    starts = range(0, k.shape[2] - length + 1, C)
    if not cut:
        return [((k[:, :, n : n + length],), (v[:, :, n : n + length],)) for n in starts]
    pieces = k.split(C, 2), v.split(C, 2)
    return [tuple(x[n // C : (n + length) // C] for x in pieces) for n in starts]


def bias_of(front: int, shown: Tensor, reader, paged: Tensor | None, q: Tensor):
    """What keeps queries q [B, H, C, .] from places with nothing in them; None where all are full.

    Args:
        front: keys in front of the window's, the page's last.
        shown: [B, 1 or C, W + C] bool of the window; paged: [B, H, C, P] of the page.

    Returns:
        [B, 1 or H, 1 or C, L], 0 or -inf but for the page's own bias.
    """
    if paged is None and bool(shown.all()) and (reader is None or reader.full):
        return None
    nothing = q.new_full((), -torch.inf)
    parts = [torch.where(shown, 0.0, nothing)[:, None]]
    if reader is not None:
        parts.append(torch.where(reader.empty, nothing, 0.0)[:, :, None])
    if paged is not None:
        parts.insert(0, paged.to(q.dtype))
        front -= paged.shape[-1]
    parts.insert(0, q.new_zeros(q.shape[0], 1, 1, front))
    shape = torch.broadcast_shapes(*(part.shape[:3] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)
