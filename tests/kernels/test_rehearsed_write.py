"""The write of an MLP against autograd and torch's Adam, and what rehearsal keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wakesleep.kernels import rehearsed_write as kernel
from wakesleep.kernels.rehearsed_write import (
    first_weights,
    mlp_answer,
    mlp_slope,
    rehearsed_keys,
    rehearsed_write,
)

B, H, K, M, N, R = 2, 3, 8, 16, 5, 12


def draw(num_pairs: int = N, seed: int = 0, width: int = K, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, H, num_pairs, width, generator=generator, dtype=dtype)
    return F.normalize(k, dim=-1), 3 * v


def begin(width: int = K, hidden: int = M, dtype=torch.float64):
    s = first_weights(H, width, hidden).to(dtype).expand(B, -1, -1, -1).clone()
    return s, torch.zeros(B, H, width, width, dtype=dtype)


def noise(width: int = K, rows: int = R, seed: int = 7, dtype=torch.float64):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ones(v):
    return torch.ones_like(v[..., 0])


def test_a_memory_that_was_never_written_answers_nothing():
    s, covariance = begin()
    k, _ = draw()
    assert not mlp_answer(s, k).any() and torch.equal(
        first_weights(H, K, M), first_weights(H, K, M)
    )
    assert not rehearsed_keys(covariance, noise()).any()


def test_the_slope_is_that_of_autograd():
    (k, v), s = draw(), begin()[0]
    s = (s + 0.3 * torch.randn(s.shape, dtype=s.dtype)).requires_grad_()
    weight = torch.rand(B, H, N, dtype=s.dtype)
    loss = 0.5 * ((mlp_answer(s, k) - v).square() * weight[..., None]).sum()
    (expected,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(mlp_slope(s.detach(), k, v, weight), expected)


def test_the_write_is_adam_on_pairs_and_rehearsed_keys():
    (k, v), (s, covariance) = draw(), begin()
    s, covariance = rehearsed_write(s, covariance, k, v, ones(v), noise())
    k, v = draw(seed=1)
    weight = 1 + torch.rand(B, H, N, dtype=v.dtype)
    old = rehearsed_keys(covariance, noise())
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
    after, grown = rehearsed_write(s, covariance, k, v, weight, noise())
    for lane, head, parts, _ in groups:
        expected = torch.cat([p.detach() for p in parts], -1)
        torch.testing.assert_close(after[lane, head], expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grown, covariance + k.mT @ k)


def test_rows_without_a_pair_write_nothing():
    k, v = draw()
    k[..., 3:, :], v[..., 3:, :] = 0, 0
    some = rehearsed_write(*begin(), k, v, ones(v), noise())
    few = rehearsed_write(*begin(), k[..., :3, :], v[..., :3, :], ones(v)[..., :3], noise())
    for a, b in zip(some, few, strict=True):
        torch.testing.assert_close(a, b)
    k, v = torch.zeros_like(k), torch.zeros_like(v)
    s, covariance = begin()
    assert torch.equal(rehearsed_write(s, covariance, k, v, ones(v), noise())[0], s)


def test_heads_and_lanes_do_not_see_each_other():
    k, v = draw()
    whole = rehearsed_write(*begin(), k, v, ones(v), noise())[0]
    k[1], v[0, 2] = draw(seed=5)[0][1], 9.0
    other = rehearsed_write(*begin(), k, v, ones(v), noise())[0]
    assert torch.equal(whole[0, :2], other[0, :2]) and not torch.equal(whole[1], other[1])


def test_drawn_keys_have_the_covariance_of_the_written_ones():
    k, _ = draw(400)
    k = F.normalize(k * torch.tensor([5.0, 3, 2, 1, 1, 1, 1, 1]).double(), dim=-1)
    keys = rehearsed_keys(k.mT @ k, noise(rows=20_000))
    share = (keys.mT @ keys / 20_000).diagonal(dim1=-2, dim2=-1)
    expected = (k.mT @ k / 400).diagonal(dim1=-2, dim2=-1)
    # of length 1, so a little less stretched than normal numbers with that covariance
    torch.testing.assert_close(share, expected, atol=0.12, rtol=0)
    assert (share.argsort(-1)[..., -2:] == expected.argsort(-1)[..., -2:]).all()
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones_like(keys[..., 0]))


@pytest.mark.parametrize(("rows", "least", "most"), [(256, 0.9, 1.0), (1, 0.0, 0.6)])
def test_old_pairs_stay_because_they_are_rehearsed(rows, least, most):
    """96 pairs in a width of 32, in three writes: three times what a matrix could hold."""
    k, v = draw(96, width=32, dtype=torch.float32)
    s, covariance = begin(32, 128, torch.float32)
    for turn in range(3):
        part = slice(32 * turn, 32 * turn + 32)
        random = noise(32, rows, seed=turn, dtype=torch.float32)
        given = (k[:, :, part], v[:, :, part])
        s, covariance = rehearsed_write(s, covariance, *given, ones(given[1]), random)
    near = F.normalize(mlp_answer(s, k), dim=-1) @ F.normalize(v, dim=-1).mT
    right = (near.argmax(-1) == torch.arange(96))[..., :64].double().mean()
    assert least <= right <= most
