"""Queries and keys as fast weights see them: without what they have in common.

One softmax does not care for what all keys share: it adds the same to every logit. A memory that is
written in closed form or by gradient steps does. Keys of a trained model are nearly all the same
(cosine of two keys .85 at width 64), and such keys leave a memory little to tell them by. So their
mean is taken out and their covariance made even (ZCA: Bell and Sejnowski, Vision Research 1997),
and the same is done to queries, which are then turned towards the keys by a learned matrix.

Means and covariances are those of the texts that a model was trained on; training follows them, as
batch normalisation does, and at any other time they are constants. At first nothing is changed.

Shapes: B lanes, T tokens, H heads, K head width, n keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 0.01  # of the mean variance: directions with less count as noise
MEMORY = 50  # updates that the running moments look back
QUERIES, KEYS = 0, 1


class KeySpace(nn.Module):
    """The maps of a layer's queries and keys, head by head."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        one = torch.eye(head_dim).repeat(2, num_heads, 1, 1)
        self.register_buffer("mean", torch.zeros(2, num_heads, 1, head_dim))  # of queries, of keys
        self.register_buffer("covariance", one.clone())
        self.register_buffer("white", one.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.turn = nn.Parameter(one[0].clone())

    def forward(self, q: Tensor) -> Tensor:
        """Queries [B, T, H, K] in the space of keys, float32 at least; their length means nothing.

        What is zero stays zero.
        """
        with torch.autocast(q.device.type, enabled=False):
            mapped = self._map(q.transpose(1, 2), QUERIES)
            return (mapped @ self.turn.to(mapped.dtype)).transpose(1, 2)

    def keys(self, k: Tensor) -> Tensor:
        """Keys [B, H, n, K] at length 1, float32 at least; what is zero stays zero."""
        return unit_key(self._map(k, KEYS))

    @torch.no_grad()
    def follow(self, queries: Tensor, keys: Tensor) -> None:
        """Take what a step of training has seen into the moments.

        Args:
            queries, keys: [H, K, K + 1] sums: of products, then of the vectors, in float64; each
                divided by the number of vectors.
        """
        share = max(1 / (int(self.updates) + 1), 1 / MEMORY)
        for part, seen in enumerate((queries, keys)):
            mean = seen[..., -1:].mT
            covariance = seen[..., :-1] - mean.mT @ mean
            self.mean[part].lerp_(mean.to(self.mean), share)
            self.covariance[part].lerp_(covariance.to(self.covariance), share)
        variance, axes = torch.linalg.eigh(self.covariance.double())
        usual = variance.mean(-1, keepdim=True).clamp(min=1e-12)
        scale = (variance.clamp(min=0) / usual + LEAST).rsqrt()
        self.white.copy_((axes * scale[..., None, :]) @ axes.mT)
        self.updates += 1

    def _map(self, x: Tensor, part: int) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        mapped = (x - self.mean[part].to(dtype)) @ self.white[part].to(dtype)
        return torch.where(x.any(-1, keepdim=True), mapped, 0.0)


def unit_key(k: Tensor) -> Tensor:
    """Keys or queries [..., K] at length 1, float32 at least; zeros stay zeros."""
    return F.normalize(k.to(torch.promote_types(k.dtype, torch.float32)), dim=-1, eps=1e-6)
