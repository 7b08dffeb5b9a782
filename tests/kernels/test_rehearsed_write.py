"""The write of an MLP against autograd and torch's Adam, and what rehearsal keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wakesleep.kernels import rehearsed_write as kernel
from wakesleep.kernels.rehearsed_write import (
    first_weights,
    mlp_answer,
    rehearsed_write,
)

B, H, K, M, N, R = 2, 3, 8, 16, 5, 12


def draw(num_pairs: int = N, seed: int = 0, width: int = K, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, H, num_pairs, width, generator=generator, dtype=dtype)
    return F.normalize(k, dim=-1), 3 * v


def begin(width: int = K, hidden: int = M, dtype=torch.float64):
    return first_weights(H, width, hidden).to(dtype).expand(B, -1, -1, -1).clone()


def old_keys(rows: int = R):
    return draw(rows, seed=7)[0]


def ones(v):
    return torch.ones_like(v[..., 0])


def test_a_memory_that_was_never_written_answers_nothing():
    s, (k, _) = begin(), draw()
    assert not mlp_answer(s, k).any() and torch.equal(
        first_weights(H, K, M), first_weights(H, K, M)
    )


def test_the_write_is_adam_on_pairs_and_rehearsed_keys():
    (k, v), s, old = draw(), begin(), old_keys()
    s = rehearsed_write(s, k, v, ones(v), torch.zeros_like(old))
    k, v = draw(seed=1)
    weight = 1 + torch.rand(B, H, N, dtype=v.dtype)
    before = mlp_answer(s, old)
    a, b = (t.clone().requires_grad_() for t in s.chunk(2, -1))
    power = v.square().mean((-2, -1)).sqrt()  # [B, H]: each head has a rate of its own for b
    groups = []
    for lane in range(B):
        for head in range(H):
            parts = [t[lane, head].detach().clone().requires_grad_() for t in (a, b)]
            rates = [kernel.RATE, kernel.RATE * float(power[lane, head])]
            groups.append((lane, head, parts, rates))
    for lane, head, parts, rates in groups:
        optimizer = torch.optim.Adam(
            [{"params": [p], "lr": r} for p, r in zip(parts, rates, strict=True)],
            betas=(kernel.BETA1, kernel.BETA2),
            eps=kernel.EPS,
        )
        for step in range(1, kernel.STEPS + 1):
            share = min(1.0, (kernel.STEPS - step + 1) / (kernel.LAST * kernel.STEPS))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            optimizer.zero_grad()
            one, two = (
                F.silu(x[lane, head] @ parts[0]) @ parts[1].T - y[lane, head]
                for x, y in ((k, v), (old, before))
            )
            error = one.square().sum(-1) * weight[lane, head]
            (0.5 * (error.sum() + two.square().sum())).backward()
            optimizer.step()
    after = rehearsed_write(s, k, v, weight, old)
    for lane, head, parts, _ in groups:
        expected = torch.cat([p.detach() for p in parts], -1)
        torch.testing.assert_close(after[lane, head], expected, rtol=1e-6, atol=1e-8)


def test_rows_without_a_pair_write_nothing():
    k, v = draw()
    k[..., 3:, :], v[..., 3:, :] = 0, 0
    old = old_keys()
    some = rehearsed_write(begin(), k, v, ones(v), old)
    few = rehearsed_write(begin(), k[..., :3, :], v[..., :3, :], ones(v)[..., :3], old)
    torch.testing.assert_close(some, few)
    s = rehearsed_write(begin(), k, v, ones(v), torch.zeros_like(old))
    torch.testing.assert_close(s, rehearsed_write(begin(), k, v, ones(v), old[:, :, :0]))
    assert torch.equal(rehearsed_write(s, *torch.zeros_like(torch.stack([k, v])), ones(v), old), s)


def test_heads_and_lanes_do_not_see_each_other():
    k, v = draw()
    whole = rehearsed_write(begin(), k, v, ones(v), old_keys())
    k[1], v[0, 2] = draw(seed=5)[0][1], 9.0
    other = rehearsed_write(begin(), k, v, ones(v), old_keys())
    assert torch.equal(whole[0, :2], other[0, :2]) and not torch.equal(whole[1], other[1])


@pytest.mark.parametrize(("rehearsed", "least", "most"), [(True, 0.9, 1.0), (False, 0.0, 0.6)])
def test_old_pairs_stay_because_they_are_rehearsed(rehearsed, least, most):
    """96 pairs in a width of 32, in three writes: three times what a matrix could hold."""
    k, v = draw(96, width=32, dtype=torch.float32)
    s = begin(32, 128, torch.float32)
    for at in range(0, 96, 32):
        new = (k[:, :, at : at + 32], v[:, :, at : at + 32])
        s = rehearsed_write(s, *new, ones(new[1]), k[:, :, : at if rehearsed else 0])
    near = F.normalize(mlp_answer(s, k), dim=-1) @ F.normalize(v, dim=-1).mT
    right = (near.argmax(-1) == torch.arange(96))[..., :64].double().mean()
    assert least <= right <= most
