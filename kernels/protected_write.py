"""Write pairs into a linear memory so that what it gave for earlier keys stays as it was.

G, the sum of k k^T over all keys written so far, says how much an earlier answer moves with the
weights. The least change on those keys that takes in new pairs is then closed form:

    R   = V - K S                                     what is missing
    S'  = S + (G + K^T K + lam)^-1 K^T R
    G'  = G + K^T K

This is recursive least squares: however the pairs are cut into blocks, the result is the ridge fit
to all of them at once, if S is the one to those before. Nothing is decayed, no old pair is needed.
A key that was written before and has another value now would get the mean of both: a weight says
how many times a pair counts against what is there.

Shapes: X any batch (lane, head), n pairs, m pairs so far, K key width, V value width.
Source: recursive least squares (Plackett, Biometrika 1950); G is the Fisher information of every
column of S, so elastic weight consolidation (arXiv 1612.00796) is exact here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def protected_write(
    s: Tensor,
    covariance: Tensor,
    k: Tensor,
    v: Tensor,
    lam: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write n pairs at once; sums and factors in float64, results in the dtype of s.

    Args:
        s: [X, K, V] the memory, read as q S.
        covariance: [X, K, K] G.
        k, v: [X, n, K] and [X, n, V]; a row of zeros in both writes nothing.
        lam: ridge, in the units of G: 1 is the weight of one key of length 1.
        weight: [X, n] of each pair in this write, None = 1. In G' every key counts once.

    Returns:
        S' and G'.
    """
    K, V, S, G = (t.double() for t in (k, v, s, covariance))
    grown = G + K.mT @ K
    pulled = K if weight is None else K * weight.double()[..., None]
    inner = grown if weight is None else G + pulled.mT @ K
    change = torch.cholesky_solve(pulled.mT @ (V - K @ S), _factor(inner, lam))
    return (S + change).to(s.dtype), grown.to(covariance.dtype)


def protected_write_reference(
    s: Tensor,
    covariance: Tensor,
    k: Tensor,
    v: Tensor,
    lam: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as it is derived: residuals, through what is uncertain about the new keys.

    S' = S + P K^T (K P K^T + 1 / weight)^-1 (V - K S) with P = (G + lam)^-1, one X after the other.
    """
    weight = k.new_ones(k.shape[:2]) if weight is None else weight
    eye, changed = torch.eye(k.shape[-1], dtype=torch.float64), []
    for S, G, K, V, w in zip(*(t.double() for t in (s, covariance, k, v, weight)), strict=True):
        P = torch.linalg.inv(G + lam * eye)
        seen = K @ P @ K.T + torch.diag(1 / w)
        changed.append((S + P @ K.T @ torch.linalg.inv(seen) @ (V - K @ S), G + K.T @ K))
    weights, covariances = zip(*changed, strict=True)
    return torch.stack(weights).to(s.dtype), torch.stack(covariances).to(covariance.dtype)


def joint_ridge(k: Tensor, v: Tensor, lam: float) -> Tensor:
    """The best linear memory [X, K, V] of m pairs k [X, m, K], v [X, m, V]: the ceiling."""
    K, V = k.double(), v.double()
    return torch.cholesky_solve(K.mT @ V, _factor(K.mT @ K, lam)).to(v.dtype)


def delta_passes(s: Tensor, k: Tensor, v: Tensor, step: float, num_passes: int) -> Tensor:
    """The baseline: go through the pairs again and again, S + step k (v - k S)^T for each.

    Shapes as in `protected_write`; keys of length 1.
    """
    for _ in range(num_passes):
        for K, V in zip(k.unbind(-2), v.unbind(-2), strict=True):
            K = K[..., None, :]
            s = s + step * K.mT @ (V[..., None, :] - K @ s)
    return s


def _factor(covariance: Tensor, lam: float) -> Tensor:
    """Cholesky factor of G + lam."""
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky(covariance + lam * eye)
