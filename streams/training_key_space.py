"""Training follows the queries and keys that fast weights will be asked with.

Shapes: B lanes, T tokens, H heads, K head width, S store places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wakesleep.streams.ranks import Ranks
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import StoreState, StreamState


class KeySpaces:
    """The key spaces of a model, and what a step shows them: taken behind it, followed later.

    A map must be the same in a step's forward and backward pass.
    """

    def __init__(self, model: TTLModel) -> None:
        self.rotary = [block.attention.rotary_dims for block in model.blocks]
        layers = [(i, block.attention.fast) for i, block in enumerate(model.blocks)]
        layers = [(i, fast) for i, fast in layers if fast is not None and fast.space]
        self.spaces = {i: fast.space for i, fast in layers}
        self.seen: dict[int, list[Tensor]] | None = None  # None: nobody listens
        self.taken: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, fast in layers:
            fast.register_forward_pre_hook(self._hook(layer))

    def start(self) -> None:
        """Listen until `take`: not to validations, nor to what a backward pass computes again."""
        self.seen = {}

    @torch.no_grad()
    def take(
        self,
        state: StreamState,
        position: Tensor,
        asks: Tensor,
        window: int,
        *,
        selects: bool,
        ranks: Ranks,
    ) -> None:
        """Note the keys in the stores behind a step, and which of them its queries found.

        Args:
            position: [B, T] of the step's tokens.
            asks: [B, T] bool: tokens whose queries ask beyond the window, of a whole store.
            selects: whether the stores hold what was chosen; keys of all tokens are other ones.
        """
        heard, self.seen = self.seen, None
        for layer, seen in heard.items():
            store = state.blocks[layer].store
            if store is not None:
                keys = _sums(store.k, store.k, (store.position >= 0) & selects)
                q = torch.cat(seen, 1).transpose(1, 2)
                reach = torch.where(asks, position - window, 0)
                R = self.rotary[layer]
                asked = sum(_asked(q[b], reach[b], store, b, R) for b in range(len(q)))
                self.taken[layer] = (ranks.sum(keys), ranks.sum(asked))

    def follow(self) -> None:
        """Move the maps by what was taken, unless it is not finite: then the run ends anyway."""
        for layer, sums in self.taken.items():
            if all(bool(x.isfinite().all()) for x in sums):
                self.spaces[layer].follow(*sums)
        self.taken.clear()

    def _hook(self, layer: int):
        def hook(_fast: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
            if self.seen is not None:
                self.seen.setdefault(layer, []).append(inputs[1].detach())  # queries

        return hook


def _asked(q: Tensor, reach: Tensor, store: StoreState, lane: int, rotary: int) -> Tensor:
    """Sums over a lane's queries q [H, T, K] and the keys below `reach` [T] most like them.

    The key that a query finds is the one of the largest product, as in attention: by content, for
    the `rotary` dimensions in front only say which of two equal keys is the later one.
    """
    rows = (reach > 0).nonzero()[:, 0]
    q, k, at = q[:, rows].float(), store.k[lane].float(), store.position[lane]
    open_to = (at[:, None] >= 0) & (at[:, None] < reach[rows, None])  # [H, n, S]
    if k.shape[1]:
        best = torch.where(open_to, q[..., rotary:] @ k[..., rotary:].mT, -torch.inf).argmax(
            -1, keepdim=True
        )
        found, there = k.gather(1, best.expand(-1, -1, k.shape[-1])), open_to.any(-1)
    else:
        found, there = torch.zeros_like(q), open_to.any(-1)
    return _sums(q[None], found[None], there[None], both=True)


def _sums(x: Tensor, y: Tensor, there: Tensor, *, both: bool = False) -> Tensor:
    """Sum of (x, 1)^T (y, 1), of (x, 1)^T (x, y, 1) if `both`, over rows [B, H, n, K] `there`."""
    one = there[..., None].double()
    x, y = (torch.where(there[..., None], t.detach().double(), 0.0) for t in (x, y))
    right = [x, y, one] if both else [y, one]
    return (torch.cat([x, one], -1).mT @ torch.cat(right, -1)).sum(0)
