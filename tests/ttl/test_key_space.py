"""Key spaces: nothing at first, then queries and keys without what all of them share."""

import pytest
import torch

from wakesleep.kernels.protected_write import protected_write
from wakesleep.ttl.key_space import KEYS, MEMORY, QUERIES, KeySpace, unit_key

H, K = 3, 16


def crowd(n: int, seed: int = 0) -> torch.Tensor:
    """Vectors [H, n, K] that have most in common, the rest in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(H, K, K, generator=generator) * torch.logspace(0, -2, K)[:, None]
    return 3 + torch.randn(H, n, K, generator=generator) @ mix


def moments(x: torch.Tensor) -> torch.Tensor:
    """Means [H, K, K + 1] of products and vectors."""
    x = x.double()
    return torch.cat([x.mT @ x, x.sum(1)[..., None]], -1) / x.shape[1]


def followed(queries: torch.Tensor, keys: torch.Tensor) -> KeySpace:
    space = KeySpace(H, K)
    space.follow(moments(queries), moments(keys))
    return space


def test_a_space_that_has_followed_nothing_changes_no_bit():
    space, x = KeySpace(H, K), torch.randn(2, 5, H, K)
    assert torch.equal(space(x), x)
    assert torch.equal(space.keys(x.transpose(1, 2)), unit_key(x.transpose(1, 2)))


def test_what_was_followed_has_no_mean_and_the_same_spread_in_all_directions():
    queries, keys = crowd(4000, 1), crowd(4000, 2)
    space = followed(queries, keys)
    for part, x in ((QUERIES, queries), (KEYS, keys)):
        mapped = (x - space.mean[part]) @ space.white[part]
        assert mapped.mean(1).abs().max() < 1e-3
        spread = torch.linalg.eigvalsh(torch.stack([m.T.cov() for m in mapped]).double())
        assert (spread.amax(-1) / x.var(1).mean(-1)).max() < 1.01  # no direction stands out
        assert (spread > 0.2 * spread.max()).sum() >= H * (K - 8)  # all but what counts as noise
    turned = space(queries.transpose(0, 1)[None])[0].transpose(0, 1)
    torch.testing.assert_close(turned, (queries - space.mean[QUERIES]) @ space.white[QUERIES])
    alike = unit_key(keys[:, :100]) @ unit_key(keys[:, :100]).mT
    apart = space.keys(keys[None, :, :100])[0]
    assert alike.median() > 0.8 and (apart @ apart.mT).median().abs() < 0.2


def test_keys_that_crowd_together_are_told_apart():
    """Half as many pairs as the width, in a matrix with the usual ridge."""
    keys, values = crowd(K // 2, 3), torch.randn(H, K // 2, K)
    space, zeros = followed(crowd(4000, 3), crowd(4000, 3)), torch.zeros(1, H, K, K)
    known = []
    for k in (unit_key(keys[None]), space.keys(keys[None])):
        s, _ = protected_write(zeros, zeros, k, values[None], lam=0.05)
        known.append((torch.cosine_similarity(k @ s, values, dim=-1) > 0.9).double().mean())
    assert known[0] < 0.5 and known[1] > 0.9


def test_moments_forget_and_zeros_stay_zeros():
    space = followed(crowd(500, 1), crowd(500, 2))
    for _ in range(6 * MEMORY):
        space.follow(moments(crowd(500, 3)), moments(crowd(500, 4)))
    other = followed(crowd(500, 3), crowd(500, 4))
    torch.testing.assert_close(space.mean, other.mean, atol=0.05, rtol=0.01)
    torch.testing.assert_close(space.covariance, other.covariance, atol=0.5, rtol=0.05)
    assert int(space.updates) == 6 * MEMORY + 1
    assert (
        not space(torch.zeros(1, 2, H, K)).any() and not space.keys(torch.zeros(1, H, 2, K)).any()
    )


def test_keys_that_are_all_the_same_leave_the_maps_finite():
    space = followed(torch.ones(H, 10, K), torch.ones(H, 10, K))
    assert space.white.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_maps_of_a_model_in_another_dtype(dtype):
    space = followed(crowd(500, 1), crowd(500, 2))
    x = crowd(7, 3).transpose(0, 1)[None]
    told, exact = space.to(dtype)(x.to(dtype)), space.double()(x.double())
    assert told.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(told.double(), exact, atol=1.0, rtol=0.1)
