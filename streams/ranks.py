"""The processes of a distributed run: which lanes each of them reads, and how they agree.

Of B lanes, rank r of W reads B / W, one behind the other. What is drawn and what a batch holds is
made for all lanes on every rank, so that a run's numbers do not depend on W; then a rank keeps its
own. Every method but `mine` must be called by all ranks at the same place.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wakesleep.streams.errors import Refused
from wakesleep.ttl.state import map_state

Tree = TypeVar("Tree")


class Ranks(NamedTuple):
    """This process among all; alone, nothing is sent and everything is its own."""

    rank: int = 0
    world: int = 1

    def check(self, lanes: int) -> None:
        """See whether every rank gets as many lanes.

        Raises:
            Refused: it does not.
        """
        if lanes % self.world:
            raise Refused(
                f"train.lanes={lanes} cannot be dealt to {self.world} processes",
                "",
                "train.lanes counts the lanes of all: take a multiple, or fewer trainer.devices",
            )

    def lanes(self, count: int) -> slice:
        """Those of `count` lanes that are this rank's."""
        each = count // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def mine(self, tree: Tree) -> Tree:
        """This rank's lanes of a tree of tensors that start with all lanes."""
        return tree if self.world == 1 else map_state(lambda t: t[self.lanes(len(t))], tree)

    def gather(self, tree: Tree) -> Tree:
        """All lanes of a tree of which every rank has its own; `mine` undoes it."""
        return tree if self.world == 1 else map_state(self._gathered, tree)

    def share(self, tree: Tree, owner: int) -> Tree:
        """What rank `owner` has; the others give a tree of the same shapes."""
        return tree if self.world == 1 else map_state(lambda t: self._shared(t, owner), tree)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, without gradient."""
        if self.world == 1:
            return x.detach()
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, found: bool, device: torch.device | None = None) -> bool:
        """Whether it is so on any rank."""
        return found if self.world == 1 else bool(self.sum(torch.tensor(int(found), device=device)))

    def first(self, text: str) -> str:
        """What the first rank has to say that says anything."""
        texts = [text] * self.world
        if self.world > 1:
            dist.all_gather_object(texts, text)
        return next(filter(None, texts), "")

    def _gathered(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    def _shared(self, x: Tensor, owner: int) -> Tensor:
        given = x.contiguous().clone()
        dist.broadcast(given, owner)
        return given


ALONE = Ranks()
