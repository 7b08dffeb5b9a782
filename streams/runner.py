"""Read segments with a model: carry the state, score every token, count what it costs.

Shapes: B lanes, T tokens of a segment, V vocabulary.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from wakesleep.consolidation.budget import Budget, Cost
from wakesleep.consolidation.replay import opened
from wakesleep.streams.language_model import LanguageModel
from wakesleep.streams.meters import Meters, Span
from wakesleep.streams.segments import Segment
from wakesleep.streams.stream_config import StreamConfig
from wakesleep.ttl.fast import held_keys, open_keys
from wakesleep.ttl.flops import wake_flops
from wakesleep.ttl.state import StreamState, map_state, nbytes

LOSS_ROWS = 128  # tokens whose loss is computed at once


class Carried(NamedTuple):
    """Everything that reading goes on from, as it is saved."""

    stream: StreamState
    logits: Tensor  # [B, V] prediction of the next token; zeros before the first


class StreamRunner:
    """Feed segments to a model, one after the other, and keep the totals.

    Args:
        carried: where to start; lanes that have read nothing if None.
        meters: totals so far; they are added to.
        budget: of sleep, which fills while something is read.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        carried: Carried | None = None,
        meters: Meters | None = None,
        *,
        lanes: int = 1,
        window: int | None = None,
        capacity: int | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.language_model = language_model
        self.budget = budget or Budget()
        sizes = {"window": window, "capacity": capacity}
        self.carried = carried or fresh(language_model, lanes, **sizes)
        self.meters = meters or Meters()
        self.last_surprise = 0.0  # mean of the last segment
        self.last_len = 0  # tokens of the last segment, of several lanes those of the longest
        self._idle_since: float | None = None

    @property
    def state(self) -> StreamState:
        return self.carried.stream

    @property
    def tokens(self) -> int:
        """Tokens that were read since the start of the session."""
        return self.meters.total.tokens

    def start_clock(self) -> None:
        """Begin to count seconds; what happens before the next segment is a pause."""
        self._idle_since = time.monotonic()

    def stop_clock(self) -> None:
        """Count the time since the last segment, too, and then no more."""
        self._count_seconds(time.monotonic())
        self._idle_since = None

    def read(self, segment: Segment) -> None:
        """Read one segment of a single lane and add it to the totals."""
        lengths = np.array([len(segment.ids)])
        self.read_lanes(segment.ids[None], segment.text[None], lengths)

    @torch.inference_mode()
    def read_lanes(
        self,
        ids: np.ndarray,
        text: np.ndarray,
        lengths: np.ndarray,
        reset: np.ndarray | None = None,
    ) -> None:
        """Read one segment of every lane and add them to the totals.

        The time since the segments before is a pause: tokens are fetched, snapshots written,
        questions asked, but nothing is read.

        Args:
            ids: [B, T] int64; text: [B, T] bool, the documents' own among them.
            lengths: [B] int64, how many of a lane's ids count; reset: [B] bool, start afresh first.
        """
        begin = time.monotonic()
        if self._idle_since is not None:
            self.meters.pauses.add(begin - self._idle_since)
        if reset is not None and reset.any():
            self._reset(torch.from_numpy(reset))
        model, before = self.language_model.model, self.carried
        device = before.logits.device
        tokens, counts = torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device)
        logits, stream, stats = model(tokens, before.stream, counts)
        nats = _nats(before.logits, logits, tokens).cpu()
        inside = torch.arange(ids.shape[1], device=device) < counts[:, None]
        span = Span(
            tokens=int(lengths.sum()),
            text_tokens=int(text.sum()),
            text_bytes=self.language_model.tokenizer.num_bytes(ids[text]),
            nats=float(nats[torch.from_numpy(text)].sum()),
            surprise=float(stats.surprise.double()[inside].sum()),
        )
        self.meters.add(span)
        self.last_surprise = span.surprise / max(1, span.tokens)
        self.last_len = int(lengths.max())
        self.meters.nonfinite_rows += int(stats.nonfinite.sum())
        self._earn(before.stream.position.tolist(), lengths.tolist(), time.monotonic() - begin)
        last = logits[torch.arange(len(ids), device=device), (counts - 1).clamp(min=0)]
        last = torch.where(counts[:, None] > 0, last, before.logits)
        self.carried = Carried(_with_let_go(stream), last)
        self._count_seconds(time.monotonic())

    def _reset(self, lanes: Tensor) -> None:
        lanes = lanes.to(self.carried.logits.device)
        stream = self.language_model.model.reset(self.state, lanes)
        logits = torch.where(lanes[:, None], 0.0, self.carried.logits)
        self.carried = Carried(stream, logits)

    def _earn(self, positions: list[int], lengths: list[int], seconds: float) -> None:
        """Book what it cost to read so many tokens from there on, lane by lane."""
        model = self.language_model.model
        held = [open_keys(self.state.blocks[i].fast) for i in model.config.fast_layers]
        window, capacity = model.window_of(self.state), capacity_of(self.state)
        sizes = {"window": window, "capacity": capacity, "held": held}
        flops = sum(
            wake_flops(model.config, position, length, **sizes)
            for position, length in zip(positions, lengths, strict=True)
            if length
        )
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        cost = Cost(flops, weights + 2 * self.state_bytes, seconds)
        self.meters.ledger = self.budget.earn(self.meters.ledger, cost)

    def _count_seconds(self, now: float) -> None:
        if self._idle_since is not None:
            self.meters.seconds += now - self._idle_since
            self.meters.line_seconds += now - self._idle_since
            self._idle_since = now

    def metrics_line(self) -> dict[str, float | int | None]:
        """What happened since the last such line; the sums of the next one start at zero."""
        meters, line = self.meters, self.meters.line
        speed = line.tokens / meters.line_seconds if meters.line_seconds else None
        result = {
            "tokens": self.tokens,
            "bits_per_byte": line.bits_per_byte,
            "surprise": line.surprise / max(1, line.tokens),
            "store_fill": store_fill(self.state),
            "nonfinite_rows": meters.nonfinite_rows,
            "wake_flops": meters.wake_flops,
            "sleep_flops": meters.ledger.asleep.flops,
            "seconds": meters.seconds,
            "tokens_per_second": speed,
        }
        meters.line, meters.line_seconds = Span(), 0.0
        return result

    @property
    def state_bytes(self) -> int:
        return nbytes(self.state)


def fresh(
    language_model: LanguageModel,
    lanes: int = 1,
    *,
    window: int | None = None,
    capacity: int | None = None,
) -> Carried:
    """Lanes that have read nothing. Their first tokens count as log V nats."""
    model = language_model.model
    stream = model.init_state(lanes, window=window, capacity=capacity)
    logits = torch.zeros(lanes, model.config.vocab_size, device=stream.position.device)
    return Carried(stream, logits.to(next(model.parameters()).dtype))


def on_meta(language_model: LanguageModel, config: StreamConfig) -> Carried:
    """The shapes of a session's state, without memory for the numbers."""
    model = language_model.model
    with torch.device("meta"):
        plan = type(model)(model.config).to(next(model.parameters()).dtype)
    empty = language_model._replace(model=plan)
    return fresh(empty, config.lanes, window=config.window, capacity=config.store.capacity)


def to_device(carried: Carried, device: torch.device) -> Carried:
    """The same numbers on another device."""
    return map_state(lambda t: t.to(device), carried)


def capacity_of(state: StreamState) -> int | None:
    """Places of the store per layer and head; None without a store."""
    stores = [block.store for block in state.blocks if block.store is not None]
    return stores[0].position.shape[-1] if stores else None


def store_fill(state: StreamState) -> float | None:
    """Share of the store's places that hold a pair, over all layers; None without a store."""
    stores = [block.store for block in state.blocks if block.store is not None]
    if not stores:
        return None
    return sum(float((s.position >= 0).double().mean()) for s in stores) / len(stores)


def _with_let_go(state: StreamState) -> StreamState:
    """The state in which the next segment reads from an MLP what the store has let go of."""
    blocks = tuple(
        block._replace(fast=opened(block.fast, block.store)) if held_keys(block.fast) else block
        for block in state.blocks
    )
    return state._replace(blocks=blocks)


def _nats(before: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood [B, T] float64 of each token, given those before it.

    A prediction that is not finite counts as none, that is, as log V.

    before: [B, V] logits at the token before the first one; logits: [B, T, V].
    """
    first = _loss(before, tokens[:, 0])[:, None]
    rest = _loss(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    nats = torch.cat([first, rest.view(len(tokens), -1)], 1).double()
    return torch.where(nats.isfinite(), nats, math.log(logits.shape[-1]))


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood [N] of tokens [N] under logits [N, V], in float32 at least.

    A few rows at a time: all of a segment's logits in float32 are larger than any cache.
    """
    pieces = zip(logits.split(LOSS_ROWS), tokens.split(LOSS_ROWS), strict=True)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.cat([cross_entropy(part.to(wide), of, reduction="none") for part, of in pieces])
