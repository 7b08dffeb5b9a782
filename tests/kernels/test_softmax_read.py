"""The read with a second softmax, against loops over queries and keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from wakesleep.kernels.softmax_read import Newer, newer_mass, softmax_read

B, H, C, K = 2, 3, 4, 5
FRONT, WINDOW, STORED = 4, 8, 6  # keys: sink, one without time, two of an MLP; window; store
OLDEST = slice(2, 4)
L = FRONT + WINDOW + STORED


def by_loops(logits: Tensor, v: Tensor, sink: Tensor, bias: Tensor, newer: Newer) -> Tensor:
    """One query at a time, its keys with a time in a list, newest first."""
    rows = []
    for b in range(B):
        for h in range(H):
            behind = [] if newer.order is None else newer.order[b, h].tolist()
            window_end = logits.shape[-1] - len(behind)
            times = list(range(window_end - 1, FRONT - 1, -1)) + [window_end + s for s in behind]
            for c in range(C):
                later = range(window_end - C + c + 1, window_end)
                row = (logits[b, h, c] + bias[b, h, 0]).index_fill(
                    0, torch.tensor(later, dtype=torch.int64), -math.inf
                )
                row = torch.cat([sink[h : h + 1], row[1:]])
                first, lowered, passed = row.softmax(0), list(row), row.new_zeros(())
                for place in times:
                    lowered[place] = row[place] - newer.nats[h] * passed
                    passed = passed + first[place]
                for place in range(FRONT)[newer.oldest]:
                    lowered[place] = row[place] - newer.nats[h] * passed
                rows.append(torch.stack(lowered).softmax(0) @ v[b, h])
    return torch.stack(rows).view(B, H, C, K)


@pytest.mark.parametrize("stored", [STORED, 0])
def test_the_second_softmax_and_its_gradients_are_those_of_loops(stored):
    generator = torch.Generator().manual_seed(5)
    length = FRONT + WINDOW + stored

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    logits, v, sink, nats = draw(B, H, C, length), draw(B, H, length, K), draw(H), draw(H)
    bias = torch.zeros(B, H, 1, length, dtype=torch.float64)
    bias[..., FRONT : FRONT + 2] = bias[0, 1, :, -1] = -math.inf  # empty slots, an empty place
    order = None
    if stored:
        order = torch.rand(B, H, stored, generator=generator).argsort(-1)
    newer = Newer(nats, FRONT, OLDEST, order)
    inputs = (logits, v, sink, nats)
    slow = by_loops(logits, v, sink, bias, newer)
    fast, _ = softmax_read(logits.clone(), [v[:, :, :7], v[:, :, 7:]], sink, 8, bias, newer)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(slow)
    for one, other in zip(
        torch.autograd.grad((slow * weight).sum(), inputs),
        torch.autograd.grad((fast * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("apart", [1, 40])
def test_of_equal_stored_pairs_the_newest_is_told_however_close(apart):
    """Three equal keys among others that do not match, 6 nats lower; places are in no order."""
    ranks = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    logits = torch.zeros(1, 1, 1, 2 + 128)
    equal = [2 + int((ranks == 5 + n * apart).nonzero()) for n in range(3)]
    logits[..., equal] = 6.0
    newer = Newer(torch.tensor([16.0]), 1, slice(0, 0), ranks.argsort()[None, None])
    v = torch.zeros(1, 1, 2 + 128, K)
    _, first = softmax_read(logits.clone(), [v], torch.zeros(1), 1, None)
    _, second = softmax_read(logits.clone(), [v], torch.zeros(1), 1, None, newer)
    assert first[..., equal[0]] < 0.34
    assert second[..., equal[0]] > 0.9 > 0.1 > second[..., equal[1:]].sum()


def test_a_pair_without_newer_rival_loses_nothing_for_being_old():
    order = torch.arange(STORED)[None, None]
    p = torch.zeros(1, 1, 1, L)
    p[..., -1] = 1.0  # the oldest takes everything
    mass = newer_mass(p, Newer(torch.ones(1), FRONT, OLDEST, order))
    assert mass[..., FRONT:].abs().max() == 0
    assert mass[..., OLDEST].min() == 1 and mass[..., :2].max() == 0  # sink and such have no time
