"""Training follows the queries and keys that fast weights will be asked with.

Shapes: B lanes, T tokens, H heads, K head width, S store places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wakesleep.streams.ranks import Ranks
from wakesleep.ttl.key_space import KeySpace
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import StreamState


class KeySpaces:
    """The key spaces of a model, and what a step shows them: taken behind it, followed later.

    A map must be the same in a step's forward and backward pass.
    """

    def __init__(self, model: TTLModel) -> None:
        fast = [block.attention.fast for block in model.blocks]
        self.spaces = {i: f.space for i, f in enumerate(fast) if f is not None and f.space}
        self.seen: dict[int, Tensor] = {}
        self.taken: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, space in self.spaces.items():
            space.register_forward_hook(self._hook(layer))

    def start(self) -> None:
        """Forget what was seen: a validation, or what a backward pass computed again."""
        self.seen.clear()

    @torch.no_grad()
    def take(self, state: StreamState, ranks: Ranks) -> None:
        """Note the queries since `start`, and the keys in the state's stores, of all ranks."""
        for layer, queries in self.seen.items():
            store = state.blocks[layer].store
            if store is not None:
                keys = _sums(store.k, store.position >= 0)
                self.taken[layer] = (ranks.sum(queries), ranks.sum(keys))

    def follow(self) -> None:
        """Move the maps by what was taken."""
        for layer, sums in self.taken.items():
            if all(bool((count[:, -1, -1] >= 1).all()) for count in sums):
                self.spaces[layer].follow(*(s[:, :-1] / s[:, -1:, -1:] for s in sums))
        self.taken.clear()

    def _hook(self, layer: int):
        def hook(_space: KeySpace | nn.Module, inputs: tuple[Tensor], _mapped: Tensor) -> None:
            q = inputs[0].detach().transpose(1, 2)
            sums = _sums(q, torch.ones_like(q[..., 0], dtype=torch.bool))
            self.seen[layer] = self.seen.get(layer, 0) + sums

        return hook


def _sums(x: Tensor, there: Tensor) -> Tensor:
    """Sums [H, K + 1, K + 1] over rows x [B, H, n, K] that are `there`: products, rows, number."""
    x = torch.cat([x.detach().double(), torch.ones_like(x[..., :1], dtype=torch.float64)], -1)
    x = torch.where(there[..., None], x, 0.0)
    return (x.mT @ x).sum(0)
