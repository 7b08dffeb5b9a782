"""Key spaces: nothing at first, then keys without what all of them share, and queries as keys."""

import copy

import pytest
import torch

from wakesleep.kernels.protected_write import protected_write
from wakesleep.ttl.key_space import MEMORY, KeySpace, unit_key

H, K, MANY = 3, 16, 4000


def crowd(n: int, seed: int = 0) -> torch.Tensor:
    """Vectors [H, n, K] that have most in common, the rest in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(H, K, K, generator=generator) * torch.logspace(0, -2, K)[:, None]
    return 3 + torch.randn(H, n, K, generator=generator) @ mix


def askers(keys: torch.Tensor, noise: float = 0.1) -> torch.Tensor:
    """Queries for keys [H, n, K]: turned, stretched, far away, and disturbed."""
    generator = torch.Generator().manual_seed(9)
    turn = torch.randn(H, K, K, generator=generator)
    return 5 + (keys + noise * torch.randn(keys.shape, generator=generator)) @ turn


def sums(*parts: torch.Tensor) -> torch.Tensor:
    """Sum of (x, 1)^T (x, ..., 1) of rows x, ... [H, n, K]; of keys alone (k, 1)^T (k, 1)."""
    one = torch.ones(H, parts[0].shape[1], 1, dtype=torch.float64)
    left = torch.cat([parts[0].double(), one], -1)
    return left.mT @ torch.cat([*(p.double() for p in parts), one], -1)


def followed(keys: torch.Tensor, queries: torch.Tensor | None = None) -> KeySpace:
    space = KeySpace(H, K)
    space.follow(sums(keys), sums(keys if queries is None else queries, keys))
    return space


def test_a_space_that_has_followed_little_changes_no_bit():
    space, x = KeySpace(H, K), torch.randn(2, 5, H, K)
    keys = crowd(MANY)
    space.follow(sums(keys), sums(keys[:, : 2 * K - 1], keys[:, : 2 * K - 1]))
    assert torch.equal(space(x), x)
    assert torch.equal(space.keys(x.transpose(1, 2)), unit_key(x.transpose(1, 2)))
    space.follow(sums(keys), sums(keys[:, :2], keys[:, :2]))
    assert not torch.equal(space(x), x)


def test_mapped_keys_have_no_mean_and_no_direction_that_stands_out():
    keys = crowd(MANY, 2)
    space = followed(keys)
    mapped = keys @ space.key_map[:, :K] + space.key_map[:, K:]
    assert mapped.mean(1).abs().max() < 1e-3
    spread = torch.linalg.eigvalsh(torch.stack([m.T.cov() for m in mapped]).double())
    assert (spread.amax(-1) / keys.var(1).mean(-1)).max() < 1.01
    assert (spread > 0.2 * spread.max()).sum() >= H * (K - 8)  # all but what counts as noise
    alike, apart = unit_key(keys[:, :100]), space.keys(keys[None, :, :100])[0]
    assert (alike @ alike.mT).median() > 0.8 and (apart @ apart.mT).median().abs() < 0.2
    torch.testing.assert_close(apart, unit_key(mapped[:, :100]))


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_queries_are_mapped_to_the_keys_they_found(noise):
    keys = crowd(MANY, 2)
    queries = askers(keys, noise)
    space, fresh = followed(keys, queries), crowd(200, 2)
    told = unit_key(space(askers(fresh, noise).transpose(0, 1)[None])[0].transpose(0, 1))
    alike = (told * space.keys(fresh[None])[0]).sum(-1)
    assert alike.mean() > (0.7 if noise else 0.9)
    raw = unit_key(askers(fresh, noise)) * unit_key(fresh)
    assert raw.sum(-1).mean() < 0.5


def test_heads_whose_queries_tell_nothing_of_keys_do_not_answer():
    keys = crowd(MANY, 2)
    queries = askers(keys, 0.1)
    queries[1] = crowd(MANY, 5)[1]
    space = followed(keys, queries)
    assert space.answers.tolist() == [True, False, True]
    assert space.explained[1] < 0.05 and (space.explained <= 1).all()
    assert KeySpace(H, K).answers.all()


def test_the_map_of_queries_is_the_fit_of_least_squares():
    keys = crowd(MANY, 2)
    queries = askers(keys, 1.0)
    space = followed(keys, queries)
    told = space(queries.transpose(0, 1)[None].double())[0].transpose(0, 1)
    wanted = keys.double() @ space.key_map[:, :K].double() + space.key_map[:, K:].double()
    ones = torch.ones(H, MANY, 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([queries.double(), ones], -1), wanted).solution
    fit = torch.cat([queries.double(), ones], -1) @ best
    error, least = ((x - wanted).square().mean() for x in (told, fit))
    assert least <= error < 1.05 * least  # the ridge costs a little


def test_keys_that_crowd_together_are_told_apart():
    """Half as many pairs as the width, in a matrix with the usual ridge."""
    keys, values = crowd(K // 2, 3), torch.randn(H, K // 2, K)
    space, zeros = followed(crowd(MANY, 3)), torch.zeros(1, H, K, K)
    known = []
    for k in (unit_key(keys[None]), space.keys(keys[None])):
        s, _ = protected_write(zeros, zeros, k, values[None], lam=0.05)
        known.append((torch.cosine_similarity(k @ s, values, dim=-1) > 0.9).double().mean())
    assert known[0] < 0.5 and known[1] > 0.9


def test_moments_forget_and_weigh_by_number():
    old, new = crowd(500, 1), crowd(500, 2)
    space = followed(old)
    for _ in range(6 * MEMORY):
        space.follow(sums(new), sums(new, new))
    torch.testing.assert_close(space.keys_seen.double(), sums(new) / 500, atol=0.5, rtol=0.02)
    both, left = followed(old[:, :400]), 400 - 400 // MEMORY
    both.follow(sums(new[:, :300]), sums(new[:, :1], new[:, :1]))
    mean = (sums(old[:, :400]) * left / 400 + sums(new[:, :300])) / (left + 300)
    torch.testing.assert_close(both.keys_seen.double(), mean, atol=1e-4, rtol=1e-5)
    nothing = {name: value.clone() for name, value in both.named_buffers()}
    both.follow(0 * sums(new), 0 * sums(new, new))
    assert torch.equal(both.asked_seen, nothing["asked_seen"])


def test_zeros_stay_zeros_and_keys_that_are_all_the_same_leave_the_maps_finite():
    space, zeros = followed(crowd(500, 1)), torch.zeros(1, 2, H, K)
    assert not space(zeros).any() and not space.keys(zeros.transpose(1, 2)).any()
    space = followed(torch.ones(H, 100, K))
    assert space.key_map.isfinite().all() and space.query_map.isfinite().all()


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.float64, 1e-12)])
def test_maps_of_a_model_in_another_dtype(dtype, error):
    space, x = followed(crowd(500, 1)), crowd(7, 1).transpose(0, 1)[None]
    exact = copy.deepcopy(space).double()(x.double())
    told = space.to(dtype)(x.to(dtype))
    assert told.dtype == torch.promote_types(dtype, torch.float32)
    assert (told - exact).norm() <= error * exact.norm()


def test_noise_is_what_a_query_has_beside_the_key_that_it_looks_for():
    assert (KeySpace(H, K).noise - 0.2).abs().max() < 1e-6  # nothing followed yet: the least
    keys = torch.randn(H, MANY, K, generator=torch.Generator().manual_seed(1))
    space = followed(keys, askers(keys, noise=0.7))
    asked = unit_key(
        askers(keys, noise=0.7).double() @ space.query_map[:, :K].double()
        + space.query_map[:, K:].double()
    )
    cosine = (asked * space.keys(keys[None])[0]).sum(-1)
    along = (1 + space.noise.double() ** 2).rsqrt()
    torch.testing.assert_close(cosine.mean(1), along, atol=0.05, rtol=0)
