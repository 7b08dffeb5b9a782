"""One softmax over everything that a query may see: sink, window and store.

Window keys are rotated by their place in the window, stored keys by their rank, so a query needs
two rotated forms. Both fit one matrix product: with r = the R rotary dimensions, u = r at length 1
and c = the others,

    query       [ s turn(r) |  u / 2  | s c ]        s = the scale of the query's logits
    window key  [  turn(r)  |    0    |  c  ]
    stored key  [     0     | turn(u) |  c  ]

which costs R extra columns and saves a second product and the merge of two softmaxes. What a rank
adds to a logit is thus from -1/2 to 1/2, whatever the weights: it says which of two equal pairs is
the later one, and no pair is lost for being old.

Half a nat over all ranks does not tell two equal pairs that are close together apart. With `Newer`
a second softmax does, whatever their distance: what newer keys take of the first one lowers a
logit, as in stick-breaking attention (arXiv 2410.17980), but by a bounded number of nats, so that
an old pair without a newer rival loses nothing.

Shapes: B lanes, H heads, C queries of a chunk, L visible places (place 0 is the sink), K head
width, R rotary dimensions, S places of stored keys, the last ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wakesleep.kernels.rotary import rotate

HALF = 0.5  # nats; from rank 0 to any other a logit changes by twice that at most


class Newer(NamedTuple):
    """How keys that are newer than others lower the logits of those."""

    nats: Tensor  # [H] by which a logit falls where newer keys take everything
    front: int  # places of keys that have no time, in front of the window's
    oldest: slice  # those of them that are older than all others nevertheless
    order: Tensor | None  # [B, H, S] stored keys, numbered from 0, newest first; None = no store


def widen_query(q: Tensor, turn: Tensor) -> Tensor:
    """q [..., K] at the positions of turn [..., 2, R // 2]: [..., R + K], not yet scaled."""
    r, c = q.split([2 * turn.shape[-1], q.shape[-1] - 2 * turn.shape[-1]], -1)
    return torch.cat([rotate(r, turn), unit(r) * HALF, c], -1)


def scale_query(q: Tensor, scale: Tensor, rotary: int) -> Tensor:
    """A widened query [..., R + K] with scale [..., 1] where no bound forbids it."""
    near, rank, content = q.split([rotary, rotary, q.shape[-1] - 2 * rotary], -1)
    return torch.cat([near * scale, rank, content * scale], -1)


def widen_window_key(k: Tensor, turn: Tensor) -> Tensor:
    """k [..., K] at the positions of turn: [..., R + K]."""
    r, c = k.split([2 * turn.shape[-1], k.shape[-1] - 2 * turn.shape[-1]], -1)
    return torch.cat([rotate(r, turn), torch.zeros_like(r), c], -1)


def widen_placeless_key(k: Tensor, rotary: int) -> Tensor:
    """k [..., K] that is read like a stored one, from no distance: [..., R + K]."""
    r, c = k.split([rotary, k.shape[-1] - rotary], -1)
    return torch.cat([torch.zeros_like(r), unit(r), c], -1)


def widen_stored_key(k: Tensor, turn: Tensor) -> Tensor:
    """k [..., K] at the distances of turn behind the window: [..., R + K]."""
    r, c = k.split([2 * turn.shape[-1], k.shape[-1] - 2 * turn.shape[-1]], -1)
    return torch.cat([torch.zeros_like(r), rotate(unit(r), turn, backwards=True), c], -1)


def unit(r: Tensor) -> Tensor:
    """r at length 1 (0 stays 0)."""
    return torch.nn.functional.normalize(r, dim=-1, eps=1e-6)


def softmax_read(
    logits: Tensor,
    v: list[Tensor],
    sink: Tensor,
    causal_at: int,
    bias: Tensor | None,
    newer: Newer | None = None,
) -> tuple[Tensor, Tensor]:
    """Read values v, softmax over the L places.

    Args:
        logits: [B, H, C, L] products of the scaled queries with the keys, overwritten here; place
            0 belongs to the sink, what is there is ignored.
        v: the values in pieces [B, H, L_i, K] that follow each other; the sink's value is zero.
        sink: [H] logit of the sink.
        causal_at: first place of the queries' own chunk; query i sees the chunk up to place i.
        bias: added to the logits, broadcastable to [B, H, C, L], -inf where nobody may look;
            None where all places hold something.
        newer: read with the second softmax; None = with the first.

    Returns:
        values [B, H, C, K] and probabilities [B, H, C, L].
    """
    B, H, C, _ = logits.shape
    later = torch.ones(C, C, dtype=torch.bool, device=logits.device).triu(1)
    logits[..., causal_at : causal_at + C].masked_fill_(later, -torch.inf)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits[..., 0] = sink[:, None].to(logits.dtype)
    p = torch.softmax(logits, -1)
    if newer is not None:
        logits = logits - newer.nats[:, None, None] * newer_mass(p, newer)
        p = torch.softmax(logits, -1).to(p.dtype)
    pieces = p.flatten(0, 1).split([piece.shape[2] for piece in v], -1)
    out = torch.bmm(pieces[0], v[0].flatten(0, 1))
    for share, piece in zip(pieces[1:], v[1:], strict=True):
        out = torch.baddbmm(out, share, piece.flatten(0, 1))
    return out.view(B, H, C, -1), p


def newer_mass(p: Tensor, newer: Newer) -> Tensor:
    """What keys newer than each take of p [B, H, C, L], float32 at least; 0 for those without time.

    Keys that hold nothing have a p of 0, so their place in the order does not matter.
    """
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    stored = 0 if newer.order is None else newer.order.shape[-1]
    untimed, window, store = p.split([newer.front, p.shape[-1] - newer.front - stored, stored], -1)
    through = window.flip(-1).cumsum(-1).flip(-1)  # of each key and those newer than it
    passed, parts = through[..., :1], [through - window]
    if newer.order is not None:
        places = torch.arange(stored, device=p.device).expand_as(newer.order)
        back = torch.empty_like(newer.order).scatter_(-1, newer.order, places)
        order, back = (x[:, :, None].expand(store.shape) for x in (newer.order, back))
        ordered = store.gather(-1, order)
        through = passed + ordered.cumsum(-1)
        parts.append((through - ordered).gather(-1, back))
        passed = through[..., -1:]
    front = torch.zeros_like(untimed)
    front[..., newer.oldest] = passed
    return torch.cat([front, *parts], -1)
