"""Queries and keys as fast weights see them: without what they have in common.

One softmax does not care for what all keys share: it adds the same to every logit. A memory that is
written in closed form or by gradient steps does. Keys of a trained model are nearly all the same
(cosine of two keys .85 at width 64), and such keys leave a memory little to tell them by. So their
mean is taken out and their covariance made even (ZCA: Bell and Sejnowski, Vision Research 1997).
And a query is no key: what a query says of the key that attention finds for it is the affine map
of least squares, from queries that asked beyond the window. A matrix is asked with that; an MLP
with keys that it holds.

Both maps come from moments of what a model was trained on; training follows them, as batch
normalisation does, and at any other time they are constants. At first nothing is changed.

Some heads of a model do not ask by likeness, but for what is near or late: their queries tell next
to nothing of the keys they find. What is written for them could never be read (`answers`).

Shapes: B lanes, T tokens, H heads, K head width, n keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 0.01  # of the mean variance is added to all: directions with less are noise
ANSWERS = 0.4  # of the keys' variance that queries must tell of what they find
NOISE = 0.2  # at least, of a query against the key that it looks for, in lengths of the key
MEMORY = 200  # steps of training that the moments look back


class KeySpace(nn.Module):
    """The maps of a layer's queries and keys, head by head."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        H, K = num_heads, head_dim
        same = torch.cat([torch.eye(K), torch.zeros(1, K)]).repeat(H, 1, 1)
        self.register_buffer("key_map", same.clone())  # rows of a matrix, then what is added
        self.register_buffer("query_map", same)
        self.register_buffer("explained", torch.ones(H))  # of the keys' variance, by queries
        # means of (k, 1)^T (k, 1) and of (q, 1)^T (q, k, 1), and of how many rows they are
        self.register_buffer("keys_seen", torch.zeros(H, K + 1, K + 1))
        self.register_buffer("asked_seen", torch.zeros(H, K + 1, 2 * K + 1))
        self.register_buffer("counts", torch.zeros(2, H, dtype=torch.int64))

    def forward(self, q: Tensor) -> Tensor:
        """Queries [B, T, H, K] as keys, float32 at least; their length means nothing.

        What is zero stays zero.
        """
        with torch.autocast(q.device.type, enabled=False):
            return _mapped(q.transpose(1, 2), self.query_map).transpose(1, 2)

    def keys(self, k: Tensor) -> Tensor:
        """Keys [B, H, n, K] at length 1, float32 at least; what is zero stays zero."""
        return unit_key(_mapped(k, self.key_map))

    @property
    def answers(self) -> Tensor:
        """Heads [H] bool whose queries can find what is written."""
        return self.explained >= ANSWERS

    @property
    def noise(self) -> Tensor:
        """Length [H] of what a query has beside the key it looks for, in lengths of that key.

        A share e of the key's variance is told by it, so the cosine of both is the root of e.
        """
        told = self.explained.clamp(min=ANSWERS)  # heads with less are not written
        return (1 / told - 1).clamp(min=0).sqrt().clamp(min=NOISE)

    @torch.no_grad()
    def follow(self, keys: Tensor, asked: Tensor) -> None:
        """Take what a step of training has seen into the moments, and make the maps anew.

        Until twice as many queries were seen as a head is wide, they stay as they are.

        Args:
            keys: [H, K + 1, K + 1] sum of (k, 1)^T (k, 1) over keys.
            asked: [H, K + 1, 2 K + 1] sum of (q, 1)^T (q, k, 1) over queries and what they found.
        """
        for part, (seen, new) in enumerate(((self.keys_seen, keys), (self.asked_seen, asked))):
            number = new[:, -1, -1].round().long()
            self.counts[part] -= self.counts[part] // MEMORY
            self.counts[part] += number
            share = number / self.counts[part].clamp(min=1)
            mean = new / number.clamp(min=1)[:, None, None]
            seen.lerp_(mean.to(seen), share[:, None, None].to(seen))
        if self.counts[1].min() >= 2 * self.key_map.shape[-1]:
            self._solve()

    def _solve(self) -> None:
        K = self.key_map.shape[-1]
        keys, asked = self.keys_seen.double(), self.asked_seen.double()
        mean = keys[:, K:, :K]
        spread = keys[:, :K, :K] - mean.mT @ mean
        variance, axes = torch.linalg.eigh(spread)
        usual = variance.mean(-1, keepdim=True).clamp(min=1e-12)
        scale = (variance.clamp(min=0) / usual + LEAST).rsqrt()
        white = (axes * scale[..., None, :]) @ axes.mT
        self.key_map.copy_(torch.cat([white, -mean @ white], 1))
        query, found = asked[:, K:, :K], asked[:, K:, K : 2 * K]
        covariance = asked[:, :K, :K] - query.mT @ query
        usual = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
        ridge = LEAST * usual[:, None, None] * torch.eye(K).to(covariance)
        joint = asked[:, :K, K : 2 * K] - query.mT @ found
        turn = torch.linalg.solve(covariance + ridge, joint) @ white
        self.query_map.copy_(torch.cat([turn, (found - mean) @ white - query @ turn], 1))
        spreads = (turn.mT @ covariance @ turn, white.mT @ spread @ white)
        told, whole = (s.diagonal(dim1=-2, dim2=-1).sum(-1) for s in spreads)
        self.explained.copy_((told / whole.clamp(min=1e-12)).clamp(0, 1))


def _mapped(x: Tensor, affine: Tensor) -> Tensor:
    """x [B, H, n, K] by maps [H, K + 1, K], float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, affine = x.to(dtype), affine.to(dtype)
    return torch.where(x.any(-1, keepdim=True), x @ affine[:, :-1] + affine[:, -1:], 0.0)


def unit_key(k: Tensor) -> Tensor:
    """Keys or queries [..., K] at length 1, float32 at least; zeros stay zeros."""
    return F.normalize(k.to(torch.promote_types(k.dtype, torch.float32)), dim=-1, eps=1e-6)
