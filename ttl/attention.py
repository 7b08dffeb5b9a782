"""Attention over window and store in one softmax, chunk by chunk.

During a chunk the window shows the W tokens before it and the chunk itself, and the store is
frozen. When a chunk is complete, the oldest chunk of the window leaves it and competes for the
store's places. So a token is in exactly one place: window, store, or dropped.

No position grows with the stream: window keys are rotated by their slot in the frame of the call,
and the stored pair of rank r (newest = 0) is always read from the distance W + C + r. Behind the
window the rotary dimensions count at length 1: they tell the later of two equal pairs, but from
rank 0 to any other a logit changes by less than one nat, so that no pair is lost for being old.
Keys whose values an MLP of fast weights holds are one more group, read from the last rank of all.

Shapes: B lanes, T tokens, H heads, K head width, W window, C chunk, N chunks, G = N * C slots,
S places, D model width, R rotary dimensions, L visible places.
Sources: queries and keys with RMSNorm and learned gains, HOLA section 3.5 (arXiv 2607.02303);
logits scaled with the log of the number of visible keys, as in SSMax (arXiv 2501.19399).
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wakesleep.kernels.convolution import short_convolution
from wakesleep.kernels.dispatch import softmax_read_form
from wakesleep.kernels.rotary import rotary_table
from wakesleep.kernels.softmax_read import (
    Newer,
    scale_query,
    softmax_read,
    widen_placeless_key,
    widen_query,
    widen_stored_key,
    widen_window_key,
)
from wakesleep.ttl.fast import FastConfig, FastWeights, Told
from wakesleep.ttl.grid import Grid, behind, carry, gather, scatter
from wakesleep.ttl.ready import LayerReady
from wakesleep.ttl.recompute import recomputed
from wakesleep.ttl.state import SPAN, SPAN_AFTER, FastState, StoreState, WindowState
from wakesleep.ttl.store import ExactStore, StoreConfig, candidates, z_scores
from wakesleep.ttl.store_reader import BufferReader, PieceReader
from wakesleep.ttl.visible import bias_of, open_slots, overlapping

TAPS = 4  # of the short convolution on q, k, v
ROTARY_BASE = 10_000.0
NEWER_NATS = 16.0  # at a weight of 1 of `newer`: it is learned at the rate of gains
ALIKE = 0.5  # correlation of the projections of queries and keys at the start


class PageView(NamedTuple):
    """What a memory gave back for the tokens of the open page (MAC), one more group of keys."""

    kv: Tensor  # [B, P, 2, H, K] keys and values, see `WindowAttention.context`
    live: Tensor  # [B, P] bool
    phase: Tensor  # [B] int64 place in the page of the call's slot 0


class AttentionInput(NamedTuple):
    """What a call knows about its tokens besides their hidden states."""

    live: Tensor  # [B, T] bool: inside the lane's length and finite
    ids: Tensor  # [B, SPAN + W + G] int64 token ids of the frame and SPAN before it; -1 = none
    lane: Tensor  # [B] int64
    read_weight: Tensor | None  # [B, T] how much each query's reads count as read mass
    rank_table: Tensor | None  # [B, S] int64 increasing distances of the ranks, None = 0..S-1
    read_floor: float = 0.0  # smaller shares of one query's attention count as no reading
    blind: Tensor | None = None  # [B, T] bool: queries that see of the window themselves alone
    recompute: bool = False  # reads and writes of a chunk are done again in the backward pass
    keep_power: float | None = None  # of what fast weights keep, in a pass of sleep; None = awake
    ready: LayerReady | None = None  # what the call before has left for this layer


class WindowAttention(nn.Module):
    """Sliding-window attention with an optional exact store behind the window."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        chunk: int,
        num_persistent: int,
        store: StoreConfig | None,
        fast: FastConfig | None = None,
        page: int = 0,
    ) -> None:
        """Build it.

        Args:
            num_persistent: learned pairs that every query sees (Titans section 3.3).
            fast: of fast weights that are read with the same queries; None = there are none.
            page: tokens of a page of MAC; 0 = no such group of keys.
        """
        super().__init__()
        self.num_heads, self.head_dim, self.chunk = num_heads, head_dim, chunk
        self.rotary_dims = head_dim // 4 // 2 * 2
        inner = num_heads * head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.taps = nn.Parameter(torch.zeros(3 * inner, TAPS))
        self.q_gain = nn.Parameter(torch.ones(num_heads, head_dim))
        self.k_gain = nn.Parameter(torch.ones(num_heads, head_dim))
        self.sink = nn.Parameter(torch.zeros(num_heads))
        self.size_gain = nn.Parameter(torch.zeros(num_heads))
        # [keys, values]; read like stored keys at distance 0
        pairs = torch.randn(2, num_heads, num_persistent, head_dim) * 0.02
        self.persistent = nn.Parameter(pairs) if num_persistent else None
        self.num_persistent, self.page = num_persistent, page
        self.page_bias = nn.Parameter(torch.zeros(num_heads)) if page else None
        self.out = nn.Linear(inner, dim, bias=False)
        self.store = ExactStore(store, dim, num_heads, head_dim) if store else None
        newer = store is not None and store.newer
        self.newer = nn.Parameter(torch.zeros(num_heads)) if newer else None
        self.fast = FastWeights(fast, dim, num_heads, head_dim, chunk) if fast else None
        self._init_parameters()

    @torch.no_grad()
    def _init_parameters(self) -> None:
        """Start near a copy of what looks alike: recall is then learned from the first step.

        Queries and keys of equal tokens are alike, the output undoes the values' projection, and
        one head compares the last tokens rather than the last one ("mimetic" initialisation,
        Trockman and Kolter, arXiv 2305.09828, for recall 2410.11135). Nothing of it is fixed.
        """
        inner = self.out.in_features
        nn.init.normal_(self.qkv.weight, std=self.qkv.in_features**-0.5)
        q, k, v = self.qkv.weight.split(inner)
        k.mul_((1 - ALIKE**2) ** 0.5).add_(q, alpha=ALIKE)
        self.out.weight.copy_(v.T)
        nn.init.normal_(self.taps, std=0.02)
        self.taps[:, -1] += 1.0  # the identity
        for first in (0, inner):  # of queries, of keys
            self.taps[first : first + self.head_dim] = TAPS**-0.5

    def init_state(
        self, batch: int, window: int, capacity: int
    ) -> tuple[WindowState, StoreState | None]:
        """The state of lanes that have read nothing."""
        like = self.qkv.weight.detach()
        slots = (batch, window + self.chunk)
        pair = like.new_zeros(*slots, self.num_heads, self.head_dim)
        state = WindowState(
            k=pair,
            v=pair.clone(),
            live=torch.zeros(slots, dtype=torch.bool, device=like.device),
            score=torch.zeros(*slots, self.num_heads, device=like.device),
            tail=like.new_zeros(batch, TAPS - 1, self.qkv.out_features),
        )
        if self.store is None:
            return state, None
        return state, self.store.init_state(batch, capacity, like)

    def forward(
        self,
        x: Tensor,
        window: WindowState,
        store: StoreState | None,
        grid: Grid,
        given: AttentionInput,
        surprise: Tensor | None = None,
        page: PageView | None = None,
        fast: FastState | None = None,
    ) -> tuple[Tensor, WindowState, StoreState | None, FastState | None, LayerReady | None]:
        """Read x [B, T, D]; returns values [B, T, D], the next states, what the next call may use.

        Args:
            fast: for a layer with fast weights.
            surprise: [B, H, T] write strength of the block's memory, for the scores that need it.
            page: the open page, this call's tokens included; no lane may go beyond it.
        """
        C, W = self.chunk, window.live.shape[1] - self.chunk
        q, k, v, tail = self._project(x, window.tail, grid)
        opened = WindowState(*(t[:, W:] for t in window[:4]), tail)
        live = scatter(grid, given.live, opened.live)
        score, store = self._score(x, grid, given, live, opened, store, surprise)
        frame = WindowState(
            behind(grid, k, window.k),
            behind(grid, v, window.v),
            torch.cat([window.live[:, :W], live], 1),
            torch.cat([window.score[:, :W], score], 1),
            tail,
        )
        weight = self._read_weight(x, given.read_weight)
        asleep = told = None
        if self.fast is not None:
            pairs = (frame.k[:, W:], frame.v[:, W:], live)
            power = 1.0 if given.keep_power is None else given.keep_power
            asleep, fast = self.fast(x, q, *pairs, fast, grid, power, given.recompute)
            told = given.ready.told if given.ready else self._told(fast, store, given.rank_table, W)
        asking = (q, weight, given.blind)
        if not grid.alone:
            asking = (None if t is None else scatter(grid, t, open_slots(t, C)) for t in asking)
        y, frame, store, ready = self._read_chunks(*asking, frame, store, grid, given, page, told)
        if not grid.alone:
            y = gather(grid, y, x.shape[1])
        state = WindowState(*(carry(grid, t, before=W) for t in frame[:4]), tail)
        y = self.out(y if asleep is None else y + asleep.flatten(2))
        return y, state, store, fast, ready

    def context(self, h: Tensor) -> Tensor:
        """Keys and values [B, T, 2, H, K] of what a memory gave back, h [B, T, D]."""
        inner = self.num_heads * self.head_dim
        kv = nn.functional.linear(h, self.qkv.weight[inner:])
        k, v = kv.view(*h.shape[:2], 2, self.num_heads, self.head_dim).unbind(2)
        k = nn.functional.rms_norm(k, (self.head_dim,), eps=1e-6) * self.k_gain
        return torch.stack([k, v.to(k.dtype)], 2)

    def _front(self, told: Told | None) -> int:
        """Keys in front of the window's: sink, persistent pairs, those of an MLP, page.

        told: pairs of an MLP, keys [B, H, N, R + K] widened.
        """
        rows = told.k.shape[2] if told is not None else 0
        return 1 + self.num_persistent + rows + self.page

    @property
    def _scores_by_mass(self) -> bool:
        return self.store is not None and self.store.config.score == "mass"

    def _project(self, x: Tensor, tail: Tensor, grid: Grid):
        """q, k (RMS-normalised, not rotated) and v, each [B, T, H, K]."""
        qkv, tail = short_convolution(self.qkv(x), self.taps, tail, grid.lengths)
        q, k, v = qkv.view(*x.shape[:2], 3, self.num_heads, self.head_dim).unbind(2)
        norm = nn.functional.rms_norm
        q = norm(q, (self.head_dim,), eps=1e-6) * self.q_gain
        k = norm(k, (self.head_dim,), eps=1e-6) * self.k_gain
        return q, k, v, tail

    def _score(self, x, grid: Grid, given, live, opened, store, surprise):
        """Scores of all slots [B, G, H], and the store with the moments of the last boundary."""
        if store is None:
            return x.new_zeros(*live.shape, self.num_heads, dtype=torch.float32), None
        first = (grid.position + grid.phase)[:, None]
        position = first + torch.arange(x.shape[1], device=x.device)
        raw = self.store.score(x, position, given.lane, surprise)
        score = scatter(grid, raw, opened.score)
        if self.store.config.score == "residual_z":
            score, moments = z_scores(score, opened.score, store.moments, live, grid)
            store = store._replace(moments=moments)
        return score, store

    def _read_weight(self, x: Tensor, read_weight: Tensor | None) -> Tensor | None:
        if read_weight is None and self._scores_by_mass:
            return torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        return read_weight

    def _told(self, fast: FastState, store, rank_table: Tensor | None, window: int):
        """What an MLP holds, its keys as if they were the store's last; None: it holds nothing."""
        told = self.fast.told(fast)
        if told is None:
            return None
        if store is None:
            last = torch.zeros(1, dtype=torch.int64, device=told.k.device)
        elif rank_table is None:
            last = store.position.new_tensor([store.position.shape[-1] - 1])
        else:
            last = rank_table[:, -1]
        behind = window + self.chunk + last  # [B or 1]
        turn = rotary_table(int(behind.max()) + 1, self.rotary_dims, ROTARY_BASE, self.q_gain)
        return told._replace(k=widen_stored_key(told.k, turn[behind, None, None]))

    def _read_chunks(
        self, q, weight, blind, frame: WindowState, store, grid: Grid, given, page, told
    ):
        """The chunk loop: read with the store frozen, then let the oldest chunk leave the window.

        The queries are those of all slots; in a call within one chunk those of its tokens, which
        look no further than the last of them.

        q: [B, G or T, H, K]; weight, blind: [B, G or T] or None; frame: W + G slots.
        Returns values [B, G or T, H * K], the frame with its read mass, the store, and what a call
        after one within a chunk may use.
        """
        C, N = grid.chunk, grid.num_chunks
        W = frame.live.shape[1] - N * C
        first, end, num_queries = (
            (grid.start, grid.stop, q.shape[1]) if grid.alone else (0, N * C, C)
        )
        length = W + grid.shown  # slots that the queries of a chunk look at
        fast = not torch.is_grad_enabled()
        ready = self._prepare(frame, store, grid, given, told, length)
        turns, reader = ready.turns, ready.reader
        q = widen_query(q.transpose(1, 2), turns[W + first : W + end])  # [B, H, slots, R + K]
        k, v = ready.window, frame.v[:, : W + end].transpose(1, 2)
        again = given.recompute and not fast
        read_chunk = recomputed(self._read_chunk) if again else self._read_chunk
        shown = overlapping(k, v, length, C, cut=not fast and not grid.alone)
        leaving = [t.split(C, 1) for t in (frame.k, frame.v)]
        values, score, queries = [], frame.score, q.split(num_queries, 2)
        for n in range(N):
            at = slice(n * C, n * C + length)  # what the window shows during chunk n
            here = slice(n * C, n * C + num_queries)
            alone = None if blind is None else blind[:, here]
            parts = (queries[n], *shown[n], frame.live[:, at], alone)
            seen = copy(reader) if again else reader  # as it is now, for the second time
            y, p = read_chunk(*parts, seen, page, n * C + first, told, weight is not None)
            values.append(y)
            if weight is not None:
                p = p.detach().float()
                p = torch.where(p > given.read_floor, p, 0.0) if given.read_floor else p
                mass = torch.einsum("bhcl,bc->bhl", p, weight[:, here].float())
                score = self._count_mass(mass, score, at, reader, self._front(told))
            if reader is not None and bool((grid.closed > n).any()):
                gone = (*(t[n] for t in leaving), score[:, n * C : (n + 1) * C])
                new = self._candidates(gone, frame.live, n, grid, given)
                reader.admit(new, grid.position + (n + 1) * C, C)
        values = torch.cat(values, 2).transpose(1, 2).flatten(2)
        if grid.stop == C:
            ready = ready._replace(window=None)
        lasts = fast and grid.alone and page is None and given.rank_table is None
        store = reader.state if reader else None
        return values, frame._replace(score=score), store, ready if lasts else None

    def _prepare(
        self, frame: WindowState, store, grid: Grid, given, told: Told | None, length: int
    ) -> LayerReady:
        """Turned keys of the window and the store, and all rotations of this call.

        length: slots of the window that a chunk's queries look at.
        """
        before, W = given.ready, frame.live.shape[1] - grid.num_chunks * grid.chunk
        end = grid.stop if grid.alone else grid.num_chunks * grid.chunk
        if before is None:
            turns = self._turns(W + self.chunk, grid.num_chunks, store, given.rank_table)
        else:
            turns = before.turns
        known = 0 if before is None or before.window is None else before.window.shape[2]
        k = frame.k[:, known : W + end].transpose(1, 2)
        k = widen_window_key(k, turns[known : W + end])
        k = torch.cat([before.window, k], 2) if known else k
        reader = None
        if store is not None and before is not None:
            reader = before.reader.again(store)
        elif store is not None:
            of = (self.store.config.quota, store, turns[W + self.chunk :], given.rank_table)
            head = 0 if grid.alone else self._front(told) + length
            reader = PieceReader(*of) if torch.is_grad_enabled() else BufferReader(*of, head)
        return LayerReady(turns, k, reader, told)

    def _turns(self, near: int, num_chunks: int, store, rank_table) -> Tensor:
        """Rotations of all distances of this call: the frame, then the store's ranks."""
        longest = near + self.chunk * num_chunks
        if store is not None:
            ranks = store.position.shape[-1] if rank_table is None else int(rank_table.max()) + 1
            longest = max(longest, near + ranks)
        return rotary_table(longest, self.rotary_dims, ROTARY_BASE, self.q_gain)

    def _page_bias(self, page: PageView, first: int, num_queries: int) -> Tensor:
        """Bias [B, H, C, P] of the page's keys for queries from slot `first` on: no later ones."""
        slots = torch.arange(self.page, device=page.phase.device)
        own = page.phase[:, None] + first + slots[:num_queries]  # [B, C]
        seen = page.live[:, None] & (slots <= own[..., None])
        bias = self.page_bias[:, None, None]
        return torch.where(seen[:, None], bias, bias.new_full((), -torch.inf))

    def _read_chunk(self, q, k, v, live, blind, reader, page, first, told, probabilities: bool):
        """Read one chunk: q [B, H, C, R + K] against front, window (in pieces) and store.

        first: slot of the first query.

        Returns:
            values [B, H, C, K] and the probabilities [B, H, C, L], which may be None if not asked.
        """
        C = q.shape[2]
        keys, values = self._front_pairs(k[0], v[0], page, told)
        keys, values = [*keys, *k], [*values, *v]
        seen, shown = live.cumsum(1)[:, -C:], live[:, None]  # [B, C] keys up to each query
        if blind is not None:
            own = torch.eye(C, dtype=torch.bool, device=q.device)
            own = nn.functional.pad(own, (live.shape[1] - C, 0))  # [C, slots]
            shown = shown & (own | ~blind[..., None])
            seen = torch.where(blind, live[:, -C:], seen)
        seen = self.num_persistent + seen
        paged = None
        if page is not None:
            paged = self._page_bias(page, first, C)
            seen = seen + paged[:, 0].isfinite().sum(-1)
        seen, values = seen[:, None], [torch.cat(values, 2)]
        if told is not None:
            seen = seen + told.open.sum(-1)[..., None]
        stored = reader is not None and reader.used > 0
        if stored:
            values += reader.values
            seen = seen + reader.count[..., None]  # [B, H, C]
        size = seen.clamp(min=1).to(torch.promote_types(q.dtype, torch.float32)).log()
        scale = 1 + self.size_gain[:, None] * size.to(q.dtype)
        q = scale_query(q, (scale * self.head_dim**-0.5)[..., None], self.rotary_dims)
        front = self._front(told)
        bias = bias_of(front, shown, reader if stored else None, paged, q)
        of = (values, self.sink, front + live.shape[1] - C)
        probabilities = probabilities or self.newer is not None  # for the second softmax
        if softmax_read_form(q, *keys, *values, probabilities=probabilities) == "triton":
            from wakesleep.kernels.softmax_read_triton import softmax_read_triton

            keys = reader.keys(keys) if stored else torch.cat(keys, 2)
            bias = bias if told is None else self._closed(bias, told, keys)
            return softmax_read_triton(q, keys, *of, bias), None
        if stored:
            logits = reader.logits(q, keys)
        else:
            logits = torch.matmul(q, torch.cat(keys, 2).transpose(2, 3))
        if told is not None:
            logits[..., self._rows(told)].masked_fill_(~told.open[:, :, None], -torch.inf)
        newer = None
        if self.newer is not None:
            oldest = slice(0, 0) if told is None else self._rows(told)
            order = reader.newest_first if stored else None
            newer = Newer(NEWER_NATS * self.newer, front, oldest, order)
        return softmax_read(logits, *of, bias, newer)

    def _rows(self, told: Told) -> slice:
        """Places of an MLP's pairs."""
        first = 1 + self.num_persistent
        return slice(first, first + told.k.shape[2])

    def _closed(self, bias: Tensor | None, told: Told, keys: Tensor) -> Tensor:
        """The bias [B, H, 1 or C, L] that also hides those pairs of an MLP that are not open."""
        B, H, L, _ = keys.shape
        closed = keys.new_zeros(B, H, 1, L)
        closed[..., self._rows(told)].masked_fill_(~told.open[:, :, None], -torch.inf)
        return closed if bias is None else closed + bias

    def _front_pairs(self, k: Tensor, v: Tensor, page: PageView | None, told):
        """Keys [B, H, ., R + K] and values [B, H, ., K] of all that is in front of the window's."""
        B, H, _, K = v.shape
        keys, values = [k.new_zeros(B, H, 1, k.shape[-1])], [v.new_zeros(B, H, 1, K)]
        if self.persistent is not None:
            always_k, always_v = self.persistent.expand(B, -1, -1, -1, -1).unbind(1)
            keys.append(widen_placeless_key(always_k, self.rotary_dims))
            values.append(always_v)
        if told is not None:
            keys.append(told.k.to(k.dtype))
            values.append(told.v.to(v.dtype))
        if page is not None:
            page_k, page_v = page.kv.permute(2, 0, 3, 1, 4)  # [B, H, P, K]
            keys.append(widen_placeless_key(page_k, self.rotary_dims))
            values.append(page_v)
        return keys, values

    def _count_mass(self, mass: Tensor, score: Tensor, at: slice, reader, first: int) -> Tensor:
        """Book a chunk's read mass [B, H, L]: the store's in the store, the window's in score.

        first: number of keys in front of the window's.
        """
        end = first + at.stop - at.start
        if reader is not None and reader.used:
            reader.add_mass(mass[..., end:], into_score=self._scores_by_mass)
        if not self._scores_by_mass:
            return score
        window = mass[..., first:end].transpose(1, 2)
        return torch.cat([score[:, : at.start], score[:, at] + window, score[:, at.stop :]], 1)

    def _candidates(self, gone, live: Tensor, n: int, grid: Grid, given: AttentionInput):
        """What leaves the window when chunk n is complete, as C places of a store.

        Args:
            gone: keys, values and scores of its slots, [B, C, H, ...].
            live: [B, W + G] of all slots.
        """
        C = self.chunk
        W = live.shape[1] - grid.num_chunks * C
        at = slice(n * C, (n + 1) * C)
        offset = torch.arange(at.start, at.stop, device=live.device) - W
        position = grid.position[:, None] + offset
        # ids of the spans, none from beyond the boundary: they would depend on the cut
        known = given.ids[:, at.start + SPAN_AFTER + 1 : SPAN + at.start + W + C]
        known = nn.functional.pad(known, (0, C + SPAN - 1), value=-1)[:, : C + SPAN - 1]
        enters = live[:, at] & (position >= 0) & (grid.closed > n)[:, None]
        return candidates(*gone, enters, position, known)
