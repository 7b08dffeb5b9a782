"""Neural memory: weights per head that are learned while the stream is read.

Queries, keys and values are projections of the block's input, shortly convolved; keep, step and
momentum gates come from the same input, per token and head. Which recurrence they drive is in
`kernels/memory_chunk.py` (matrix, mlp) and `kernels/delta_rule.py` (delta).

In a memory with pages (MAC), reads and writes are two calls: `read` with the weights of the page's
start, as often as one likes, and `append` of what is to be written when the page is full. Its
queries are not convolved, so that reads need no state of their own.

Shapes: B lanes, T tokens, D model width, H heads, K head width, h hidden width, C chunk, P open
slots (a chunk, or a page), R convolution taps minus one, N chunks.
Source: Behrouz et al., "Titans: Learning to Memorize at Test Time", arXiv 2501.00663, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wakesleep.kernels.convolution import short_convolution
from wakesleep.kernels.delta_rule import DeltaMemory
from wakesleep.kernels.memory_chunk import Chunks, MatrixMemory, MLPMemory, Stacks
from wakesleep.ttl.grid import Grid, carry, from_chunks, gather, scatter, to_chunks
from wakesleep.ttl.memory_scan import Memory, Scan, scan
from wakesleep.ttl.state import MemoryState

NORM_EPS = 1e-6
GAMMA_INIT = 0.5  # about the RMS of values at the start
GATE_STD = 0.02  # of the gates' weights at the start; their biases decide
ALIKE = 0.9  # share of a key's projection that is the query's, at the start
OUTPUT_GATE_INIT = 0.1  # small, not zero: the block starts nearly without its memory, yet learns


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    kind: Literal["matrix", "mlp", "delta"] = "mlp"
    expansion: int = 2  # hidden width of an mlp per head width
    momentum: bool = True  # delta has none
    max_step: float = 0.1  # part of its own error that one token corrects at most
    max_momentum: float = 0.9  # upper end of the momentum gate
    keep_init: float = 0.995  # share of the weights that a token leaves, at the start of training
    huber: float = 1.0  # RMS of an error beyond which its gradient stops growing; inf = squares
    taps: int = 4  # of the short convolution; 1 = none
    gate_threshold: float = 0.0  # times mean surprise, to be written; 0 = always, inf = never
    page: int | None = None  # tokens between two writes of a MAC memory, a multiple of the chunk

    def __post_init__(self) -> None:
        if self.kind not in ("matrix", "mlp", "delta"):
            raise ValueError(f"kind must be matrix, mlp or delta, got {self.kind!r}")
        limits = {  # lowest, highest, whether the ends are allowed
            "expansion": (1, 64, True, True),
            "max_step": (0, 1, False, True),
            "max_momentum": (0, 0.99, False, True),
            "keep_init": (0, 1, False, False),
            "huber": (0, math.inf, False, True),
            "taps": (1, 64, True, True),
            "gate_threshold": (0, math.inf, True, True),
        }
        for name, (low, high, at_low, at_high) in limits.items():
            value = getattr(self, name)
            if not (low <= value if at_low else low < value) or not (
                value <= high if at_high else value < high
            ):
                ends = "[("[not at_low] + f"{low}, {high}" + "])"[not at_high]
                raise ValueError(f"{name} must be in {ends}, got {value}")
        if self.page is not None and self.page < 1:
            raise ValueError(f"page must be at least 1 token or None, got {self.page}")

    @property
    def levels(self) -> int:
        """2 if the weights have a momentum beside them, else 1."""
        return 2 if self.momentum and self.kind != "delta" else 1


class WriteStats(NamedTuple):
    surprise: Tensor  # [B, T] step * |error|, mean over the heads; beyond a length it means nothing
    per_head: Tensor  # [B, H, T]
    written: Tensor  # [B, T] bool; of pages: what may be, a gate decides when the page is full


class NeuralMemory(nn.Module):
    """A memory per head that learns pairs of key and value as it reads; its state is explicit."""

    def __init__(
        self, config: MemoryConfig, dim: int, num_heads: int, head_dim: int, chunk: int
    ) -> None:
        """chunk: tokens per write, part of the model.

        Raises:
            ValueError: the page is not a multiple of the chunk.
        """
        super().__init__()
        if config.page is not None and config.page % chunk:
            raise ValueError(
                f"page must be a multiple of chunk {chunk}, got {config.page}; "
                f"the nearest is {max(1, round(config.page / chunk)) * chunk}"
            )
        self.config, self.chunk = config, chunk
        self.num_heads, self.head_dim = num_heads, head_dim
        self.open_slots = config.page or chunk
        inner = num_heads * head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        # Pages: keys and values only, queries are not convolved.
        convolved = 3 * inner if config.page is None else 2 * inner
        self.taps = nn.Parameter(torch.randn(convolved, config.taps) * GATE_STD)
        # Rows by gate, each H wide: output, keep, step, momentum.
        self.gates = nn.Linear(dim, (2 + config.levels) * num_heads)
        self.initial = nn.ParameterList(_initial_weights(config, num_heads, head_dim))
        if config.kind == "mlp":
            self.gamma = nn.Parameter(torch.full((num_heads, head_dim), GAMMA_INIT))
            self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.gain = nn.Parameter(torch.ones(num_heads, head_dim))
        self.out = nn.Linear(inner, dim, bias=False)
        self._init_parameters()

    @torch.no_grad()
    def _init_parameters(self) -> None:
        """Start near a copy of what followed, as the window does.

        Queries and keys of equal tokens are alike, the output undoes the values' projection, and
        keys are those of the tokens before: what a head gives back for the last tokens is what came
        behind them before. The first head compares one token, the next two, and so on as far as
        the convolution reaches. Before it has learned, an MLP gives the same for all keys, and the
        bias takes it away: an answer of its own to every key would be as loud as what is learned,
        for it is normalised. Nothing of it is fixed.
        """
        inner = self.out.in_features
        nn.init.normal_(self.qkv.weight, std=self.qkv.in_features**-0.5)
        q, k, v = self.qkv.weight.split(inner)
        k.mul_((1 - ALIKE**2) ** 0.5).add_(q, alpha=ALIKE)
        self.out.weight.copy_(v.T)
        nn.init.normal_(self.gates.weight, std=GATE_STD)
        starts = [OUTPUT_GATE_INIT, self.config.keep_init, 0.5, 0.5][: 2 + self.config.levels]
        self.gates.bias.copy_(torch.tensor(starts).logit().repeat_interleave(self.num_heads))
        if self.config.kind == "mlp":
            same = torch.randn(self.num_heads, 1, self.head_dim)
            same = F.layer_norm(same, same.shape[-1:])
            self.initial[1].copy_((same / self.initial[1].shape[1]).expand_as(self.initial[1]))
            self.bias.copy_(-self.gamma * same[:, 0])
        *queries, keys, values = self.taps.split(inner)
        values[:, -1] += 1.0  # the identity
        longest = self.config.taps - 1 if queries else 1  # without taps, queries are of one token
        for head in range(self.num_heads):
            rows = slice(head * self.head_dim, (head + 1) * self.head_dim)
            count = max(1, min(head + 1, longest))
            if self.config.taps == 1:
                keys[rows] += 1.0
            else:
                keys[rows, -1 - count : -1] += count**-0.5
            for taps in queries:
                taps[rows, -count:] += count**-0.5

    @property
    def dtype(self) -> torch.dtype:
        """Of the state and of all that is computed from it: at least float32."""
        return torch.promote_types(self.out.weight.dtype, torch.float32)

    def init_state(self, batch: int) -> MemoryState:
        """Memory of `batch` lanes that have read nothing.

        The state has what was learned on top of the initial weights, which are parameters: zeros,
        so a gradient reaches them however short the history is. Of the delta rule, which has no
        base to forget to, it has the initial weights themselves.
        """
        H, K, P = self.num_heads, self.head_dim, self.open_slots
        weights = tuple(w.to(self.dtype).repeat(batch, 1, 1, 1) for w in self.initial)
        if self.config.kind != "delta":
            weights = tuple(map(torch.zeros_like, weights))
        like = weights[0].detach()
        pair = like.new_zeros(batch, P, H, K)
        return MemoryState(
            weights=weights,
            momentum=tuple(map(torch.zeros_like, weights)) if self.config.levels == 2 else (),
            k=pair,
            v=pair.clone(),
            gates=like.new_zeros(batch, P, H, 1 + self.config.levels),
            live=torch.zeros(batch, P, dtype=torch.bool, device=like.device),
            tail=like.new_zeros(batch, self.config.taps - 1, self.taps.shape[0]),
            surprise=like.new_zeros(batch, 2),
        )

    def forward(
        self,
        x: Tensor,
        state: MemoryState,
        grid: Grid,
        live: Tensor,
        recompute: bool = False,
        frozen: bool = False,
    ) -> tuple[Tensor, MemoryState, WriteStats]:
        """Read and write x [B, T, D]; every token reads the memory that has learned it.

        Tokens of the open chunk are in the state and their steps are taken again, from the same
        weights, so that a result does not depend on where a stream is cut into calls.

        Args:
            live: [B, T] bool; other rows count as zeros and are not written.
            recompute: do the work of each chunk again in the backward pass.
            frozen: nothing is kept less and nothing is written.

        Returns:
            y [B, T, D], the next state, WriteStats.
        """
        self._check(x, state, grid, paged=False)
        T = x.shape[1]
        x = torch.where(live[..., None], x, x.new_zeros(()))
        projected, tail = short_convolution(self.qkv(x), self.taps, state.tail, grid.lengths)
        q, k, v = projected.view(*x.shape[:2], 3, self.num_heads, self.head_dim).unbind(2)
        gate, gates = self._gates(x)
        if frozen:
            nothing = [1.0] + [0.0] * self.config.levels  # keep, then step and momentum
            gates = gates.new_tensor(nothing).expand_as(gates)
        with torch.autocast(x.device.type, enabled=False):
            q, page = self._unit(q), self._fill(state, grid, k, v, gates, live)
            if not grid.alone:
                q = scatter(grid, q, torch.zeros_like(state.k))
            run, state = self._run(q, page, state, grid, recompute)
            y = from_chunks(run.y, self.num_heads)
            y = y if grid.alone else gather(grid, y, T)
            stats = self._stats(run, grid, T)
        return self._emit(y, gate, x.dtype), state._replace(tail=tail), stats

    def read(self, x: Tensor, state: MemoryState) -> Tensor:
        """M(q) for x [B, T, D] with the weights in `state`, which is not changed: [B, T, D]."""
        B, T, _ = x.shape
        H, K = self.num_heads, self.head_dim
        q = F.linear(x, self.qkv.weight[: H * K]).view(B, T, H, K)
        gate, _ = self._gates(x)
        with torch.autocast(x.device.type, enabled=False):
            q = self._unit(q).transpose(1, 2).reshape(B * H, T, K)
            memory = self._memory(B)
            y = memory.apply(memory.weights(_merge_heads(state.weights)), q)
            y = y.view(B, H, T, K).transpose(1, 2)
        return self._emit(y, gate, x.dtype)

    def append(
        self, x: Tensor, state: MemoryState, grid: Grid, live: Tensor, recompute: bool = False
    ) -> tuple[MemoryState, WriteStats]:
        """Put x [B, T, D] into the open page, and write the page chunk by chunk when it is full.

        Args:
            grid: of pages (`grid.chunk` is the page); no lane may go beyond its open page.
            live: [B, T] bool; other rows count as zeros and are not written.
            recompute: do the work of each chunk again in the backward pass.

        Returns:
            The next state and WriteStats; surprise is the error of the page's start weights.
        """
        self._check(x, state, grid, paged=True)
        B, T, _ = x.shape
        H, K = self.num_heads, self.head_dim
        x = torch.where(live[..., None], x, x.new_zeros(()))
        pairs = F.linear(x, self.qkv.weight[H * K :])
        pairs, tail = short_convolution(pairs, self.taps, state.tail, grid.lengths)
        k, v = pairs.view(B, T, 2, H, K).unbind(2)
        _, gates = self._gates(x)
        with torch.autocast(x.device.type, enabled=False):
            page = self._fill(state, grid, k, v, gates, live)
            stats = self._page_stats(page, state, grid, live)
            _, state = self._run(None, page, state, grid, recompute)
        return state._replace(tail=tail), stats

    def _check(self, x: Tensor, state: MemoryState, grid: Grid, *, paged: bool) -> None:
        if paged != (self.config.page is not None):
            way = "read and append" if self.config.page else "forward"
            raise ValueError(f"page is {self.config.page}: use {way} of this memory")
        if grid.chunk != self.open_slots:
            raise ValueError(f"grid must have chunks of {self.open_slots}, got {grid.chunk}")
        if x.shape[0] != state.live.shape[0]:
            raise ValueError(
                f"x has batch {x.shape[0]} but state has batch {state.live.shape[0]}; call "
                f"init_state({x.shape[0]}) or select lanes of the state"
            )
        if paged and grid.num_chunks > 1:
            raise ValueError(
                f"append fits the open page only, got {int(grid.end.max())} tokens for a page of "
                f"{grid.chunk}; cut the call at page boundaries"
            )

    def _memory(self, batch: int) -> Memory:
        """The rule of this memory for a batch of B * H."""
        c = self.config
        if c.kind == "delta":
            return DeltaMemory()
        limit = c.huber * self.head_dim**0.5
        base = tuple(w.to(self.dtype).repeat(batch, 1, 1) for w in self.initial)
        if c.kind == "matrix":
            return MatrixMemory(self.chunk, c.max_step, limit, base)
        gamma, bias = (p.to(self.dtype).repeat(batch, 1)[:, None] for p in (self.gamma, self.bias))
        return MLPMemory(self.chunk, c.max_step, limit, base, gamma, bias)

    def _unit(self, x: Tensor) -> Tensor:
        """x [..., K] with norm 1 (less near zero), in the state's dtype."""
        return F.rms_norm(x.to(self.dtype), x.shape[-1:], eps=NORM_EPS) * x.shape[-1] ** -0.5

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output gate [B, T, H, 1]; keep, step and momentum [B, T, H, 1 + levels]."""
        gates = self.gates(x).to(self.dtype).sigmoid()
        gates = gates.unflatten(-1, (-1, self.num_heads)).transpose(-1, -2)
        if self.config.levels == 2:
            top = gates.new_tensor([1.0, 1.0, 1.0, self.config.max_momentum])
            gates = gates * top
        return gates[..., :1], gates[..., 1:]

    def _fill(self, state: MemoryState, grid: Grid, k, v, gates, live) -> MemoryState:
        """The open page with the call's tokens behind it: fields k, v, gates, live [B, G, ...]."""
        v = F.silu(v.to(self.dtype))
        new = {"k": self._unit(k), "v": v, "gates": gates, "live": live}
        return state._replace(
            **{name: scatter(grid, x, getattr(state, name)) for name, x in new.items()}
        )

    def _run(
        self, q: Tensor | None, page: MemoryState, state: MemoryState, grid: Grid, recompute: bool
    ) -> tuple[Scan | None, MemoryState]:
        """Scan the filled page [B, G, ...]; the state has what is open afterwards."""
        closed = grid.closed
        opened = {n: carry(grid, getattr(page, n)) for n in ("k", "v", "gates", "live")}
        B, G = page.live.shape
        per = grid.chunk // self.chunk  # chunks that close together
        if q is None and not bool((closed > 0).any()):
            return None, state._replace(**opened)
        number = torch.arange(G // self.chunk, device=closed.device)[:, None] // per
        size = self.chunk  # slots of a chunk that hold something
        if q is not None and grid.alone:
            size = grid.shown
            filled = {n: getattr(page, n)[:, :size] for n in ("k", "v", "gates", "live")}
            page = page._replace(**filled)
        gates = page.gates.reshape(B, -1, size, self.num_heads, page.gates.shape[-1])
        gates = gates.permute(4, 1, 0, 3, 2).flatten(2, 3)  # [2 or 3, N, B * H, C]
        chunks = Chunks(
            q=None if q is None else to_chunks(q, q.shape[1] if grid.alone else self.chunk),
            k=to_chunks(page.k, size),
            v=to_chunks(page.v, size),
            keep=gates[0],
            step=gates[1],
            eta=gates[2] if self.config.levels == 2 else None,
            live=page.live.reshape(B, -1, size).transpose(0, 1),
            closed=number < closed,
        )
        threshold = self.config.gate_threshold
        stacks = self._stacks(state)
        run = scan(self._memory(B), stacks, chunks, state.surprise, threshold, recompute)
        weights, momentum = self._unstack(run.stacks, B)
        state = state._replace(weights=weights, momentum=momentum, surprise=run.mean, **opened)
        return run, state

    def _stacks(self, state: MemoryState) -> Stacks:
        if not state.momentum:
            return _merge_heads(state.weights)
        pairs = zip(state.weights, state.momentum, strict=True)
        return tuple(torch.cat(pair, 2).flatten(0, 1) for pair in pairs)

    def _unstack(self, stacks: Stacks, batch: int) -> tuple[Stacks, Stacks]:
        stacks = tuple(s.unflatten(0, (batch, -1)) for s in stacks)
        if self.config.levels == 1:
            return stacks, ()
        halves = [s.chunk(2, 2) for s in stacks]
        return tuple(h[0] for h in halves), tuple(h[1] for h in halves)

    def _stats(self, run: Scan, grid: Grid, num_tokens: int) -> WriteStats:
        per_head = gather(grid, from_chunks(run.surprise, self.num_heads), num_tokens)  # [B, T, H]
        written = gather(grid, run.written.transpose(0, 1).flatten(1, 2), num_tokens)
        return WriteStats(per_head.mean(-1), per_head.transpose(1, 2), written)

    def _page_stats(self, page: MemoryState, state: MemoryState, grid: Grid, live) -> WriteStats:
        B, P, H, K = page.k.shape
        k, v = (x.transpose(1, 2).reshape(B * H, P, K) for x in (page.k, page.v))
        with torch.no_grad():
            memory = self._memory(B)
            _, norm = memory.errors(memory.weights(_merge_heads(state.weights)), k, v)
            surprise = norm.view(B, H, P).transpose(1, 2) * page.gates[..., 1]
            surprise = gather(grid, surprise, live.shape[1]) * live[..., None]
        return WriteStats(surprise.mean(-1), surprise.transpose(1, 2), live)

    def _emit(self, y: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise every head of y [B, T, H, K], gate it, and project to [B, T, D]."""
        y = F.rms_norm(y, y.shape[-1:], eps=NORM_EPS) * self.gain.to(y.dtype) * gate
        return self.out(y.flatten(2).to(dtype))


def _merge_heads(weights: Stacks) -> Stacks:
    """[B, H, in, out] to [B * H, in, out]."""
    return tuple(w.flatten(0, 1) for w in weights)


def _initial_weights(config: MemoryConfig, num_heads: int, head_dim: int) -> list[nn.Parameter]:
    """Fast weights per layer, [H, in, out]; keys have norm 1, so 1 per element is unit.

    The last ones of an MLP are set by `_init_parameters`.
    """
    H, K = num_heads, head_dim
    if config.kind != "mlp":
        return [nn.Parameter(torch.randn(H, K, K) * 0.1)]
    h = config.expansion * K
    return [nn.Parameter(torch.randn(H, K, h)), nn.Parameter(torch.zeros(H, h, K))]
