"""The model: a decoder that reads a stream segment by segment and carries an explicit state.

    logits, state, stats = model(tokens, state)

Shapes: B lanes, T tokens of the call, V vocabulary, D model width, W window, C chunk, S places.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from wakesleep.ttl.attention import AttentionInput, WindowAttention
from wakesleep.ttl.block import Block
from wakesleep.ttl.fast import FastConfig, no_fast_weights
from wakesleep.ttl.grid import behind, carry, make_grid
from wakesleep.ttl.memory import MemoryConfig, NeuralMemory
from wakesleep.ttl.ready import Ready
from wakesleep.ttl.state import (
    SPAN,
    BlockState,
    RecentState,
    StreamState,
    closed_memory,
    merge,
)
from wakesleep.ttl.store import StoreConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    vocab_size: int = 4096  # V
    dim: int = 192  # D
    num_layers: int = 4
    num_heads: int = 3
    head_dim: int = 64  # K
    mlp_dim: int = 512  # hidden width of the SwiGLU feed-forward
    window: int = 256  # W of a new stream, tokens before the open chunk
    chunk: int = 64  # C, tokens per write and boundary; part of the model
    combine: Literal["mac", "mag", "mal"] = "mag"
    memory_layers: tuple[int, ...] = (1,)  # layers with a neural memory
    store_layers: tuple[int, ...] = (2,)  # layers with an exact store
    fast_layers: tuple[int, ...] = ()  # layers with fast weights for sleep to write
    num_persistent: int = 0  # learned pairs that every query sees
    recent: int = 0  # L tokens whose final hidden states are kept, for sleep by recurrence
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    fast: FastConfig = field(default_factory=FastConfig)

    def __post_init__(self) -> None:
        limits = {
            "vocab_size": (16, 2**20),
            "dim": (8, 16384),
            "num_layers": (1, 256),
            "num_heads": (1, 256),
            "head_dim": (4, 1024),
            "mlp_dim": (8, 2**17),
            "window": (1, 2**17),
            "chunk": (1, 4096),
            "num_persistent": (0, 4096),
            "recent": (0, 2**17),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name} must be between {low} and {high}, got {getattr(self, name)}"
                )
        _check_window(self.window, self.chunk)
        if self.recent % self.chunk or self.recent > self.window:
            raise ValueError(
                f"recent must be a multiple of chunk {self.chunk} and at most window "
                f"{self.window}, got {self.recent}"
            )
        for name in ("memory_layers", "store_layers", "fast_layers"):
            for layer in getattr(self, name):
                if not 0 <= layer < self.num_layers:
                    raise ValueError(f"{name} counts from 0 to {self.num_layers - 1}, got {layer}")
        paged = self.memory.page is not None
        if self.memory_layers and paged != (self.combine == "mac"):
            raise ValueError(
                f"memory.page must be {'a number of tokens' if not paged else 'None'} with "
                f"combine={self.combine}, got {self.memory.page}"
            )
        if self.combine == "mac" and self.store.score.startswith("residual"):
            raise ValueError(
                f"store.score={self.store.score} needs errors before the page is written, and "
                "combine=mac writes after it was read; use combine=mag or store.score=learned"
            )
        if self.store.score.startswith("residual"):
            alone = sorted(set(self.store_layers) - set(self.memory_layers))
            if alone:
                raise ValueError(
                    f"store.score={self.store.score} needs a neural memory in the store's layers; "
                    f"add {alone} to memory_layers"
                )


class StepStats(NamedTuple):
    surprise: Tensor  # [B, T] float32 write strength, mean over the layers with a memory
    written: Tensor  # [B, T] float32 share of the memory layers that wrote the token
    nonfinite: Tensor  # [B] int64 rows that were masked in this call
    ready: Ready | None  # for the next call, of one within a chunk and without gradients


class TTLModel(nn.Module):
    """Decoder with window, exact store and neural memory; all that it remembers is in the state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(self._block(i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        # The head is the embedding: at gain 1 a token would begin by predicting itself, at sqrt(D).
        nn.init.constant_(self.norm.weight, config.dim**-0.25)
        for block in self.blocks:
            nn.init.normal_(block.mlp_in.weight, std=config.dim**-0.5)
            # the sum of what all branches add begins about as large as the embedding
            share = (2 * config.num_layers) ** -0.5
            nn.init.normal_(block.mlp_out.weight, std=share * config.mlp_dim**-0.5)
            with torch.no_grad():
                block.attention.out.weight.mul_(share)

    def _block(self, index: int) -> Block:
        c = self.config
        store = c.store if index in c.store_layers else None
        heads = (c.dim, c.num_heads, c.head_dim, c.chunk)
        memory = NeuralMemory(c.memory, *heads) if index in c.memory_layers else None
        page = memory.open_slots if memory is not None and c.combine == "mac" else 0
        fast = c.fast if index in c.fast_layers else None
        attention = WindowAttention(*heads, c.num_persistent, store, fast, page)
        return Block(c.dim, c.mlp_dim, c.combine, attention, memory)

    def init_state(
        self, batch: int, *, window: int | None = None, capacity: int | None = None
    ) -> StreamState:
        """The state of `batch` lanes that have read nothing.

        Args:
            window: W, a multiple of the chunk; the config's if None.
            capacity: S, places of the store per layer and head; the config's if None.
        """
        c = self.config
        window = c.window if window is None else window
        capacity = c.store.capacity if capacity is None else capacity
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"batch and capacity must be at least 1, got batch {batch}, capacity {capacity}"
            )
        _check_window(window, c.chunk)
        weight = self.embedding.weight
        long = {"dtype": torch.int64, "device": weight.device}
        blocks = []
        for block in self.blocks:
            seen = block.attention.init_state(batch, window, capacity)
            memory = block.memory.init_state(batch) if block.memory is not None else None
            page = weight.new_zeros(batch, block.attention.page, 2, c.num_heads, c.head_dim)
            fast = no_fast_weights(weight, batch, 0, c.head_dim)
            if block.attention.fast is not None:
                places = 0 if block.attention.store is None else capacity
                fast = block.attention.fast.init_state(batch, places, weight)
            blocks.append(BlockState(*seen, memory, fast, page))
        nothing = torch.full((batch, c.recent), -1, **long)
        return StreamState(
            blocks=tuple(blocks),
            position=torch.zeros(batch, **long),
            lane=torch.arange(batch, **long),
            ids=torch.full((batch, SPAN + window + c.chunk), -1, **long),
            nonfinite=torch.zeros(batch, **long),
            recent=RecentState(nothing, nothing.clone(), weight.new_zeros(batch, c.recent, c.dim)),
        )

    def reset(self, state: StreamState, lanes: Tensor) -> StreamState:
        """Start the lanes marked in `lanes` [B] bool afresh; the others stay as they are.

        Raises:
            ValueError: the mask is not bool [B].
        """
        if lanes.dtype != torch.bool or lanes.shape != state.position.shape:
            raise ValueError(
                f"lanes must be bool [{state.position.shape[0]}], got {lanes.dtype} "
                f"{list(lanes.shape)}"
            )
        store = next((b.store for b in state.blocks if b.store is not None), None)
        fresh = self.init_state(
            state.position.shape[0],
            window=self.window_of(state),
            capacity=None if store is None else store.position.shape[-1],
        )
        return merge(lanes, fresh._replace(lane=state.lane), state)

    def window_of(self, state: StreamState) -> int:
        """W of this state: it may differ from the config's."""
        return state.ids.shape[1] - SPAN - self.config.chunk

    def forward(
        self,
        tokens: Tensor,
        state: StreamState,
        lengths: Tensor | None = None,
        *,
        read_weight: Tensor | None = None,
        read_floor: float = 0.0,
        rank_table: Tensor | None = None,
        blind: Tensor | None = None,
        recompute: bool = False,
        head: bool = True,
        ready: Ready | None = None,
    ) -> tuple[Tensor, StreamState, StepStats]:
        """Read tokens [B, T] int64; lane b consumes its first lengths[b] (all T if None).

        Args:
            read_weight: [B, T] how much what each query reads counts in the store's `mass`.
            read_floor: shares of a query's attention up to this do not count there.
            rank_table: [B, S] int64, increasing: distances of the stored ranks (spread in
                training, so that every distance of a long stream is a trained one).
            blind: [B, T] bool: tokens that see no other one in any window, so that what they
                predict comes from memory and store (and from the taps of the convolutions).
            recompute: keep less for the backward pass: what is read and written in each chunk of
                attention and memory is computed again there.
            head: False returns the final hidden states instead of logits.
            ready: of the StepStats that came with `state`; less is made anew.

        Returns:
            logits [B, T, V] (or hidden states [B, T, D]), state, StepStats. Rows at and after a
            lane's length mean nothing.

        Raises:
            ValueError: tokens, lengths and state do not fit each other or the vocabulary.
        """
        B, T = self._check(tokens, state, lengths, read_weight, blind, rank_table)
        if lengths is None:
            lengths = torch.full((B,), T, dtype=torch.int64, device=tokens.device)
        inside = torch.arange(T, device=tokens.device) < lengths[:, None]
        tokens = torch.where(inside, tokens, 0)
        grid = make_grid(state.position, lengths, self.config.chunk, T)
        before = SPAN + self.window_of(state)
        ids = behind(grid, tokens, state.ids)
        told = (read_weight, rank_table, read_floor, blind, recompute)
        given = AttentionInput(inside, ids, state.lane, *told)
        x = self.embedding(tokens) * self.config.dim**0.5
        layers = (None,) * len(self.blocks)
        if ready is not None and grid.alone and rank_table is None and not torch.is_grad_enabled():
            layers = ready.for_state(state)
        blocks, stats = [], []
        for block, part, left in zip(self.blocks, state.blocks, layers, strict=True):
            x, part, seen = block(x, part, grid, given._replace(ready=left))
            blocks.append(part)
            stats.append(seen)
        nonfinite = sum(s.nonfinite for s in stats)
        recent = state.recent
        if self.config.recent:
            recent = _recall_last(recent, tokens, state.position, x, lengths)
        state = state._replace(
            blocks=tuple(blocks),
            position=state.position + lengths,
            ids=carry(grid, ids, before=before),
            nonfinite=state.nonfinite + nonfinite,
            recent=recent,
        )
        x = self.norm(x)
        if head:
            x = nn.functional.linear(x, self.embedding.weight)
        layers = tuple(s.ready for s in stats)
        ready = Ready(state, layers) if any(layers) else None
        return x, state, StepStats(*_mean_stats(stats, inside), nonfinite, ready)

    def sleep_pass(
        self, state: StreamState, keep_power: float = 0.0, over: RecentState | None = None
    ) -> StreamState:
        """One more pass of the blocks over the last L tokens: features are refreshed, nothing read.

        Hidden states go on from where the last pass left them, and the fast weights from what it
        wrote; keys, values and gates are made anew. Windows begin empty, as convolutions do; store
        and memory are read and stay as they are. Tokens of the open chunk are left out: reading has
        not written them yet.

        Args:
            keep_power: exponent of what a token's write keeps; 0 = nothing decays in this pass.
            over: other tokens of before (a multiple of the chunk) with hidden states of theirs; the
                store is not read then. The state's own last tokens if None.

        Returns:
            The state with other fast weights, and in `recent` what was passed over, with other
            hidden states.

        Raises:
            ValueError: the model keeps no hidden states, or has nothing that a pass would write.
        """
        recent = state.recent if over is None else over
        self._check_pass(recent)
        c, (B, L) = self.config, recent.ids.shape
        lengths = torch.full((B,), L, dtype=torch.int64, device=recent.ids.device)
        first = (state.position - L).clamp(min=0) // c.chunk * c.chunk
        grid = make_grid(first, lengths, c.chunk, L)
        fresh = self.init_state(B, window=L, capacity=1)
        ids = torch.cat([fresh.ids[:, : SPAN + L], recent.ids], 1)
        boundary = state.position // c.chunk * c.chunk
        closed = (recent.ids >= 0) & (recent.position < boundary[:, None])
        given = AttentionInput(closed, ids, state.lane, None, None, keep_power=float(keep_power))
        x, blocks = recent.hidden, []
        for block, part, empty in zip(self.blocks, state.blocks, fresh.blocks, strict=True):
            memory = closed_memory(part.memory, empty.memory)
            asleep = part._replace(window=empty.window, memory=memory)
            asleep = asleep if over is None else asleep._replace(store=None)
            x, after, _ = block(x, asleep, grid, given)
            blocks.append(part._replace(fast=part.fast._replace(s=after.fast.s)))
        return state._replace(blocks=tuple(blocks), recent=recent._replace(hidden=x))

    def _check_pass(self, recent: RecentState) -> None:
        c = self.config
        if c.combine == "mac" or not c.fast_layers or c.fast.write != "always":
            raise ValueError(
                "passes of sleep need fast_layers, fast.write=always and combine=mag or mal, and "
                f"this model has fast_layers {list(c.fast_layers)}, fast.write={c.fast.write}, "
                f"combine={c.combine}"
            )
        if not recent.ids.shape[1]:
            raise ValueError("this model keeps no hidden states to pass over once more (recent=0)")

    def _check(self, tokens, state, lengths, read_weight, blind, rank_table) -> tuple[int, int]:
        """B and T of a call whose arguments fit each other and this model."""
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be int64 [B, T], got {tokens.dtype} {tuple(tokens.shape)}"
            )
        B, T = tokens.shape
        self._check_state(state)
        if state.position.shape[0] != B:
            raise ValueError(
                f"tokens have batch {B} but the state has batch {state.position.shape[0]}; "
                f"call init_state({B}) or select lanes of the state"
            )
        low, high = tokens.aminmax() if tokens.numel() else (0, 0)
        if not 0 <= low <= high < self.config.vocab_size:
            raise ValueError(
                f"token ids must be from 0 to {self.config.vocab_size - 1}, got "
                f"{int(low)} to {int(high)}; use this model's tokenizer"
            )
        if lengths is not None and (
            not isinstance(lengths, Tensor)
            or lengths.dtype != torch.int64
            or lengths.shape != (B,)
            or bool(((lengths < 0) | (lengths > T)).any())
        ):
            raise ValueError(
                f"lengths must be int64 [{B}] with values from 0 to {T}, got {lengths}"
            )
        for name, given in (("read_weight", read_weight), ("blind", blind)):
            if given is not None and given.shape != tokens.shape:
                raise ValueError(f"{name} must be {[B, T]}, got {list(given.shape)}: one per token")
        stores = [block.store for block in state.blocks if block.store is not None]
        if rank_table is not None and stores:
            places = [B, stores[0].position.shape[-1]]
            if list(rank_table.shape) != places:
                raise ValueError(f"rank_table must be {places}, got {list(rank_table.shape)}")
        return B, T

    def _check_state(self, state: StreamState) -> None:
        """A state of another model would be read as nonsense; one without a store is legal."""
        layers = len(state.blocks)
        if layers != len(self.blocks):
            raise ValueError(f"the state has {layers} layers and the model {len(self.blocks)}")
        for index, (block, part) in enumerate(zip(self.blocks, state.blocks, strict=True)):
            foreign = part.store is not None and block.attention.store is None
            asleep = (block.attention.fast is None) != (part.fast.s.shape[1] == 0)
            if foreign or asleep or (block.memory is None) != (part.memory is None):
                raise ValueError(
                    f"layer {index} of the state has another memory, store or fast weights than "
                    "the model; start from this model's init_state"
                )
            memory = block.memory
            other = memory is not None and part.memory.k.shape[1] != memory.open_slots
            if other or self.window_of(state) % self.config.chunk:
                raise ValueError(
                    "the state was made with another chunk or page than the model's chunk "
                    f"{self.config.chunk}; the chunk length is part of a model"
                )


def _recall_last(recent: RecentState, tokens, position, hidden, lengths) -> RecentState:
    """The last L tokens of every lane, of those before the call and of the call's."""
    B, L = recent.ids.shape
    at = lengths[:, None] + torch.arange(L, device=lengths.device)

    def last(old: Tensor, new: Tensor) -> Tensor:
        both = torch.cat([old, new.to(old.dtype)], 1)
        return both.gather(1, at.view(B, L, *[1] * (old.dim() - 2)).expand(-1, -1, *old.shape[2:]))

    columns = position[:, None] + torch.arange(tokens.shape[1], device=lengths.device)
    return RecentState(
        last(recent.ids, tokens), last(recent.position, columns), last(recent.hidden, hidden)
    )


def _check_window(window: int, chunk: int) -> None:
    if window < 1 or window % chunk:
        nearest = max(1, round(window / chunk)) * chunk
        raise ValueError(
            f"window must be a multiple of chunk {chunk}, got {window}; the nearest is {nearest}"
        )


def _mean_stats(stats: list, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Surprise and written share, averaged over the layers with a memory."""
    nothing = torch.zeros(inside.shape, dtype=torch.float32, device=inside.device)
    found = [s for s in stats if s.surprise is not None]
    if not found:
        return nothing, nothing
    surprise = sum(s.surprise for s in found) / len(found)
    written = sum(s.written.float() for s in found) / len(found)
    return surprise, written
