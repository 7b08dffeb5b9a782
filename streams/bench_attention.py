"""A transformer with full attention, for contrast: it looks back on everything that was read.

Widths, heads and layers are those of a model of ours; positions are rotary, attention is torch's
own, keys and values of what was read are kept in a buffer that is allocated once.

Shapes: T tokens of the call, N tokens read before, V vocabulary, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wakesleep.kernels.rotary import rotary_table, rotate
from wakesleep.streams.bench_measure import Unequal
from wakesleep.ttl.model import ModelConfig

BASE = 10_000.0
TOLERANCE = 1e-9  # of float64 logits


class FullAttention(nn.Module):
    """logits = model(tokens, cache): reads tokens [1, T] behind the N that the cache holds."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)

    def make_cache(self, num_read: int, num_more: int) -> Cache:
        """Room for keys and values; those of `num_read` tokens are noise, as if they were read."""
        like = self.embedding.weight
        c, length = self.config, num_read + num_more
        kv = like.new_empty(c.num_layers, 2, c.num_heads, length, c.head_dim)
        kv[..., :num_read, :].normal_()
        return Cache(kv, num_read, rotary_table(length, c.head_dim, BASE, like))

    def forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits [T, V]; the cache holds T tokens more."""
        T, end = tokens.shape[1], cache.num_read + tokens.shape[1]
        x = self.embedding(tokens[0])
        for layer, kv in zip(self.layers, cache.kv, strict=True):
            x = layer(x, kv[:, :, :end], cache.turns[cache.num_read : end], _mask(x, T, end))
        cache.num_read = end
        return F.linear(self.norm(x), self.embedding.weight)


class Cache:
    """Keys and values [layers, 2, H, room, K] of what was read, and how much that is."""

    def __init__(self, kv: Tensor, num_read: int, turns: Tensor) -> None:
        self.kv, self.num_read, self.turns = kv, num_read, turns


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        inner = config.num_heads * config.head_dim
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.dim, bias=False)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.mlp_in = nn.Linear(config.dim, 2 * config.mlp_dim, bias=False)
        self.mlp_out = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor, kv: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
        """x [T, D] behind N tokens; kv [2, H, N + T, K], of which the last T are written here."""
        T = len(x)
        qkv = self.qkv(self.attention_norm(x)).view(T, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(1, 2, 0, 3)
        kv[0, :, -T:], kv[1, :, -T:] = rotate(k, turns), v
        read = {"attn_mask": mask} if mask is not None else {"is_causal": T > 1}
        y = F.scaled_dot_product_attention(rotate(q, turns)[None], kv[:1], kv[1:], **read)
        x = x + self.out(y[0].transpose(0, 1).flatten(1))
        gate, up = self.mlp_in(self.mlp_norm(x)).chunk(2, -1)
        return x + self.mlp_out(F.silu(gate) * up)


def _mask(like: Tensor, num_tokens: int, end: int) -> Tensor | None:
    """Which keys [T, N + T] each query sees; None where torch knows it."""
    before = end - num_tokens
    if num_tokens == 1 or not before:
        return None
    seen = torch.ones(num_tokens, end, dtype=torch.bool, device=like.device)
    return seen.tril(before)


@torch.inference_mode()
def check_attention(model: FullAttention, seed: int) -> str:
    """See that reading in pieces gives what one call gives, in float64.

    Raises:
        Unequal: it gives something else.
    """
    exact = FullAttention(model.config).double()
    exact.load_state_dict(model.state_dict())
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, 40), generator=draw)
    whole, cache = exact(ids, exact.make_cache(0, 40)), exact.make_cache(0, 40)
    pieces = torch.cat([exact(part, cache) for part in ids.split([17, 1, 1, 21], 1)])
    deviation = float((pieces - whole).abs().max())
    if not deviation <= TOLERANCE:
        raise Unequal(f"reading in pieces is {deviation:.1e} from one call")
    return f"in pieces as in one call in float64, within {deviation:.0e}"
