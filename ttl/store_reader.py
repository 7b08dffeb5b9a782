"""The store during one call: what its queries read, and who enters at the boundaries.

Two forms with the same results, place by place; the state that they were made from never changes.
`BufferReader` is for reading without gradients: it overwrites places and keeps the keys of a
query's whole view (window, then store) in one buffer. `PieceReader` is for gradients: it moves no
pair until as many were dropped as the store has places. The store as it was, and each chunk that
left the window since, stay where they are; what changes at a boundary are numbers, namely which
pair is in which place.

Shapes: B lanes, H heads, S places, C chunk, K head width, R rotary dimensions, L places that are
read (for `PieceReader`: pairs that were in the store at any time of the call).
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wakesleep.kernels.admission import (
    Admission,
    admit_fast,
    admit_reference,
    bin_span,
    order_rank,
    rank_after,
)
from wakesleep.kernels.rotary import backward_factors, rotate, swapped
from wakesleep.kernels.softmax_read import unit
from wakesleep.ttl.state import StoreState


class BufferReader:
    """Without gradients: places are overwritten, in tensors of its own."""

    def __init__(
        self, quota: bool, state: StoreState, turns: Tensor, rank_table: Tensor | None, head: int
    ) -> None:
        """A reader of `state`.

        Args:
            turns: [at least S, 2, R // 2] rotation of each distance, rank 0 first.
            rank_table: [B, S] int64 distance of each rank, None = the rank itself.
            head: number of keys in front of the store's; 0 = they stay in tensors of their own,
                which is less work for few queries.
        """
        self.quota, self.state, self.rank_table = quota, state, rank_table
        self.factors = backward_factors(turns)
        self.owned = self.lent = False  # the state's pairs; the keys
        B, H, S, K = state.k.shape
        self.head, R = head, 2 * turns.shape[-1]
        self.buffer = state.k.new_zeros(B, H, head + S, K + R)
        self.buffer[:, :, head:, 2 * R :] = state.k[..., R:]
        self.direction = unit(state.k[..., :R])  # what turns, before it is turned
        self.swapped = swapped(self.direction)
        self.rank = order_rank(state.position)
        self._refresh()

    def again(self, state: StoreState) -> BufferReader:
        """The same for a state with the same pairs; what this one has stays as it is."""
        other = copy(self)
        other.state, other.owned, other.lent = state, False, True
        return other

    def logits(self, q: Tensor, window: list[Tensor]) -> Tensor:
        """Products of q [B, H, C, R + K] with the `window` keys, then the store's: [B, H, C, .]."""
        if self.head:
            return torch.matmul(q, self.keys(window).transpose(2, 3))
        groups = torch.cat(window, 2), self.buffer[:, :, : self.used]
        return torch.cat([torch.matmul(q, keys.transpose(2, 3)) for keys in groups], -1)

    def keys(self, window: list[Tensor]) -> Tensor:
        """The `window` keys, then the store's: [B, H, head + L, R + K], overwritten by the next."""
        if not self.head:
            return torch.cat([*window, self.buffer[:, :, : self.used]], 2)
        torch.cat(window, 2, out=self.buffer[:, :, : self.head])
        return self.buffer[:, :, : self.head + self.used]

    @property
    def values(self) -> list[Tensor]:
        """What is read, in pieces [B, H, L_i, K] of the L places."""
        return [self.state.v[:, :, : self.used]]

    @property
    def empty(self) -> Tensor:
        """[B, H, L] bool: places that hold nothing (other lanes are fuller)."""
        return self.state.position[:, :, : self.used] < 0

    @property
    def newest_first(self) -> Tensor:
        """[B, H, L] int64 the places that are read, newest first, empty ones anywhere."""
        return self.rank[..., : self.used].argsort(-1)

    def admit(self, new: StoreState, end: Tensor, chunk: int) -> None:
        """Let the candidates `new` (places = the chunk that leaves; -inf = must not enter) compete.

        end: [B] int64 tokens read at this boundary.
        """
        old = self.state
        if self.quota:
            span = bin_span(end, chunk)
            chosen = admit_reference(old.score, old.position, new.score, new.position, span)
        else:
            # late in a stream these are one or two, and what follows costs by their number
            better = new.score > old.score.amin(-1, keepdim=True)
            most = int(better.sum(-1).max())
            if not most:
                return
            chosen = admit_fast(old.score, self.rank, new.score, most)
        if not self.owned:
            old = StoreState(*(t.clone(memory_format=torch.contiguous_format) for t in old))
            self.state, self.owned = old, True
        if self.lent:
            self.buffer, self.lent = self.buffer.clone(), False
            self.direction, self.swapped = self.direction.clone(), self.swapped.clone()
        rows = exchange(chosen, old.position.shape[-1], new.position.shape[-1])
        for target, source in zip(old[:-1], new[:-1], strict=True):  # all but the moments
            put(target, source, rows, inplace=True)
        R = self.direction.shape[-1]
        direction = unit(new.k[..., :R])
        put(self.direction, direction, rows, inplace=True)
        put(self.swapped, swapped(direction), rows, inplace=True)
        behind = rows.target + (rows.target // old.position.shape[-1] + 1) * self.head
        content = nn.functional.pad(new.k[..., R:], (2 * R, 0))
        put(self.buffer, content, rows._replace(target=behind), inplace=True)
        self.rank = rank_after(self.rank, chosen)
        self._refresh()

    def add_mass(self, mass: Tensor, into_score: bool) -> None:
        """Count attention mass [B, H, L] that was read from the stored pairs."""
        mass = nn.functional.pad(mass, (0, self.state.score.shape[-1] - mass.shape[-1]))
        score = self.state.score + mass if into_score else self.state.score
        self.state = self.state._replace(mass=self.state.mass + mass, score=score)

    def _refresh(self) -> None:
        """Recompute what follows from the positions: fill, and from how far keys are read."""
        self.count, self.used = _taken(self.state.position)
        self.full = bool((self.count == self.used).all())
        distance = distances(self.rank[..., : self.used], self.rank_table)
        near, across = (
            f.index_select(0, distance.flatten()).unflatten(0, distance.shape) for f in self.factors
        )
        turned = near * self.direction[:, :, : self.used]
        turned += across * self.swapped[:, :, : self.used]
        R = turned.shape[-1]
        self.buffer[:, :, self.head : self.head + self.used, R : 2 * R] = turned


class PieceReader:
    """With gradients: pairs stay where they are, places hold their numbers.

    Its attributes are replaced, never changed, so that a shallow copy stays as it is.
    """

    def __init__(
        self, quota: bool, state: StoreState, turns: Tensor, rank_table: Tensor | None
    ) -> None:
        """A reader of `state`; see `BufferReader`."""
        self.quota, self.turns, self.rank_table = quota, turns, rank_table
        self.score, self.mass, self.position = state.score, state.mass, state.position
        self._begin_with(state)
        self._refresh()

    def logits(self, q: Tensor, window: list[Tensor]) -> Tensor:
        """Products of q [B, H, C, R + K] with the `window` keys, then the store's: [B, H, C, .]."""
        parts = [torch.matmul(q, torch.cat(window, 2).transpose(2, 3))]
        R = 2 * self.turns.shape[-1]
        turning, content = q[..., R:].split([R, q.shape[-1] - 2 * R], -1)
        sizes = [k.shape[2] for k, _, _ in self.read]
        for (r, c, _), distance in zip(self.read, self.distance.split(sizes, -1), strict=True):
            turned = rotate(r, self.turns[distance], backwards=True)
            product = torch.matmul(turning, turned.transpose(2, 3))
            parts.append(product + torch.matmul(content, c.transpose(2, 3)))
        return torch.cat(parts, -1)

    @property
    def values(self) -> list[Tensor]:
        """What is read, in pieces [B, H, L_i, K] of the L pairs."""
        return [v for _, _, v in self.read]

    @property
    def newest_first(self) -> Tensor:
        """[B, H, L] int64 the pairs that are read, newest first, dropped ones anywhere."""
        return self.distance.argsort(-1)

    @property
    def state(self) -> StoreState:
        """The store as it is now."""
        old = self.pieces[0]._replace(score=self.score, mass=self.mass, position=self.position)
        if len(self.pieces) == 1:
            return old
        fields = {}
        for name in ("k", "v", "span"):
            pairs = torch.cat([getattr(piece, name) for piece in self.pieces], 2)
            number = _row_number(self.number, pairs.shape[2]).flatten()
            pairs = pairs.flatten(0, 2).index_select(0, number)
            fields[name] = pairs.unflatten(0, self.number.shape)
        return old._replace(**fields)

    def admit(self, new: StoreState, end: Tensor, chunk: int) -> None:
        """Let candidates compete; see `BufferReader`."""
        span = bin_span(end, chunk) if self.quota else None
        chosen = admit_reference(self.score, self.position, new.score, new.position, span)
        if not bool(chosen.valid.any()):
            return
        if self.used > 2 * self.number.shape[-1]:  # or what was dropped long ago would be read on
            self._begin_with(self.state)
        before = sum(piece.k.shape[2] for piece in self.pieces)
        number = before + torch.arange(new.k.shape[2], device=new.k.device)
        rows = exchange(chosen, self.position.shape[-1], new.position.shape[-1])
        self.score = put(self.score, new.score, rows)
        self.mass = put(self.mass, new.mass, rows)
        self.position = put(self.position, new.position, rows)
        self.number = put(self.number, number.expand(new.position.shape), rows)
        like = self.pieces[0]
        new = new._replace(k=new.k.to(like.k.dtype), v=new.v.to(like.v.dtype))
        self.pieces = [*self.pieces, new]
        self.read = [*self.read, self._readable(new.k, new.v)]
        self._refresh()

    def add_mass(self, mass: Tensor, into_score: bool) -> None:
        """Count attention mass [B, H, L] that was read from the stored pairs."""
        unread = mass.new_zeros(*mass.shape[:2], self.score.shape[-1] - self.first)
        mass = torch.cat([mass[..., : self.first], unread, mass[..., self.first :]], -1)
        mass = mass.gather(-1, self.number)
        self.mass = self.mass + mass
        self.score = self.score + mass if into_score else self.score

    def _begin_with(self, state: StoreState) -> None:
        """Take the pairs of a state as the first and only piece."""
        S = state.k.shape[2]
        number = torch.arange(S, device=state.k.device)
        self.number = number.expand(state.position.shape)  # [B, H, S] pair of each place
        self.pieces = [state]  # their pairs are numbered through
        self.first = _taken(state.position)[1]
        self.read = [self._readable(state.k[:, :, : self.first], state.v[:, :, : self.first])]

    def _readable(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotary part (at length 1) and content of the keys, and values, as they are multiplied."""
        dtype, device = v.dtype, v.device.type
        if torch.is_autocast_enabled(device):  # once, and not for every chunk that reads them
            dtype = torch.get_autocast_dtype(device)
        R = 2 * self.turns.shape[-1]
        return unit(k[..., :R]), k[..., R:].to(dtype), v.to(dtype)

    def _refresh(self) -> None:
        """Recompute what follows from the positions: fill, and who is read from how far."""
        places = self.position.shape[-1]
        shape = (*self.position.shape[:2], sum(piece.k.shape[2] for piece in self.pieces))
        distance = distances(order_rank(self.position), self.rank_table)
        distance = distance.new_zeros(shape).scatter(-1, self.number, distance)
        empty = torch.ones(shape, dtype=torch.bool, device=distance.device)
        empty = empty.scatter(-1, self.number, self.position < 0)
        self.distance, self.empty = (
            torch.cat([x[..., : self.first], x[..., places:]], -1) for x in (distance, empty)
        )
        self.count, _ = _taken(self.position)
        self.used = self.empty.shape[-1]
        self.full = not bool(self.empty.any())


def distances(rank: Tensor, rank_table: Tensor | None) -> Tensor:
    """Distances behind the window of ranks [B, H, L]; see `BufferReader` for the table."""
    if rank_table is None:
        return rank
    return rank_table[:, None].expand(-1, rank.shape[1], -1).gather(-1, rank)


def _taken(position: Tensor) -> tuple[Tensor, int]:
    """How many places of each head are taken [B, H], and the number of the last one plus 1.

    Places fill from 0 upwards, and all heads alike; what sleep has released are holes in them.
    """
    taken = position >= 0
    last = taken.flatten(0, 1).any(0).nonzero()
    return taken.sum(-1), int(last[-1]) + 1 if len(last) else 0


class Exchange(NamedTuple):
    """The pairs that are really exchanged; rows of all lanes and heads are numbered through."""

    target: Tensor  # [N] int64 row of the store, all different
    source: Tensor  # [N] int64 row of the candidates


def exchange(admission: Admission, places: int, offered: int) -> Exchange:
    """The rows of an admission to a store of `places` from `offered` candidates."""
    valid = admission.valid
    target, source = (
        _row_number(index, size)[valid]
        for index, size in ((admission.place, places), (admission.candidate, offered))
    )
    return Exchange(target, source)


def put(target: Tensor, source: Tensor, rows: Exchange, inplace: bool = False) -> Tensor:
    """Write rows of source [B, H, C, ...] over those of target [B, H, S, ...].

    Not by `scatter`: on a CPU it turns the whole of a bfloat16 target into float32 and back.

    inplace: overwrite the target, which must be contiguous.
    """
    new = source.flatten(0, 2).index_select(0, rows.source).to(target.dtype)
    if inplace:
        target.view(-1, *target.shape[3:]).index_copy_(0, rows.target, new)
        return target
    return target.flatten(0, 2).index_copy(0, rows.target, new).view(target.shape)


def _row_number(index: Tensor, places: int) -> Tensor:
    """An index [B, H, N] of places as rows of all lanes and heads, `places` each."""
    B, H, _ = index.shape
    first = torch.arange(0, B * H * places, places, device=index.device)
    return index + first.view(B, H, 1)
