"""One sleep by recurrence: more passes of the blocks over tokens of before (arXiv 2605.26099).

    rule="recurrent"   over the last L tokens, from the hidden states that reading left
    rule="cross"       over spans of the store, wherever in the stream they come from, from their
                       embeddings; spans meet in the fast weights alone

Reading was the first pass; passes 2 to N are units, paid one by one. Nothing decays in them: N
passes that do forget as much as N times as many tokens. Only the fast weights change. A lane is
taken if it knows what it knew and predicts its window as well as before; with `evict=hard` its
window is empty then.

Shapes: B lanes, L tokens that are passed over, C chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wakesleep.consolidation.budget import Cost
from wakesleep.consolidation.costs import keep_cost, sizes_of
from wakesleep.consolidation.gate import NOISE_CUES, keeps
from wakesleep.consolidation.night import INTERRUPTED, Night, total
from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.consolidation.spans import stored_spans
from wakesleep.ttl.flops import pass_flops
from wakesleep.ttl.key_space import unit_key
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.resize import clear_window
from wakesleep.ttl.state import RecentState, StreamState, nbytes


def check_passes(c: ModelConfig, config: SleepConfig) -> None:
    """Refuse a model that cannot sleep by passes, or was not trained to.

    Raises:
        ValueError: why.
    """
    rule = f"sleep.rule={config.rule}"
    if c.combine == "mac" or not c.fast_layers or c.fast.write != "always":
        raise ValueError(
            f"{rule} needs fast_layers, fast.write=always and combine=mag or mal, and this model "
            f"has fast_layers {list(c.fast_layers)}, fast.write={c.fast.write}, "
            f"combine={c.combine}"
        )
    if config.rule == "recurrent" and not c.recent:
        raise ValueError(f"{rule} needs a model that keeps hidden states, and this has recent=0")
    if config.rule == "cross" and not c.store_layers:
        raise ValueError(f"{rule} needs a store, and this model has none")
    if c.fast.passes == 1 and not config.untrained:
        raise ValueError(
            f"{rule}: this model was trained without passes of sleep (fast.passes=1), and they "
            "would not help it; sleep.untrained=true tries them all the same"
        )


class PassesNight(Night):
    """Sleep by recurrence."""

    def __init__(
        self, model: TTLModel, state: StreamState, config, ledger, generator: torch.Generator
    ) -> None:
        """generator: of the cues; on the CPU."""
        super().__init__(model, state, config, ledger)
        check_passes(model.config, config)
        self.generator = generator
        self.rows = self._rows()
        layers = model.config.fast_layers
        self.judged = [layer for layer in layers if state.blocks[layer].store is not None]
        keeping = (keep_cost(sizes_of(state.blocks[layer])) for layer in self.judged)
        self._keeping = total(*keeping)
        self.pass_cost = self._pass_cost()

    @property
    def questions(self) -> Cost:
        """Of stored pairs and of noise."""
        return self._keeping

    @property
    def unit_flops(self) -> int:
        """Of one pass."""
        return self.pass_cost.flops

    @property
    def changed(self) -> bool:
        """Whether there was a pass at all."""
        return self.units > 0

    def run(self, stop: Callable[[], bool]) -> str:
        """Make all passes that can be paid, if there is something to pass over."""
        if not self.rows:
            return "there is nothing to pass over"
        phase = self.start.position % self.model.config.chunk
        if self.config.evict == "hard" and bool(phase.any()):
            return "a window is emptied at a boundary of chunks only"
        return super().run(stop)

    def work(self, stop: Callable[[], bool]) -> str:
        """Passes 2 to N."""
        rows, cross = list(self.rows), self.config.rule == "cross"
        for _ in range(self.config.num_passes - 1):
            if stop():
                return INTERRUPTED
            if not self.affords(self.pass_cost):
                return "the budget is spent"
            self.spend("sleep", self.pass_cost)
            for index, row in enumerate(rows):
                if cross:
                    self.state = self.model.sleep_pass(self.state, over=row)
                else:
                    self.state = self.model.sleep_pass(self.state)
                rows[index] = self.state.recent
            self.units += 1
            if cross:
                self.state = self.state._replace(recent=self.start.recent)
        return "all passes were made"

    def unharmed(self) -> tuple[Tensor, float | None, str]:
        """Lanes whose fast weights are finite, know what they knew and stay calm at noise."""
        lanes = torch.ones_like(self.start.position, dtype=torch.bool)
        for layer in self.model.config.fast_layers:
            lanes &= self.state.blocks[layer].fast.s.isfinite().flatten(1).all(1)
        for layer in self.judged:
            block, after = self.start.blocks[layer], self.state.blocks[layer].fast
            noise = torch.randn(NOISE_CUES, after.s.shape[-1], generator=self.generator)
            cues = unit_key(noise.to(after.s.device))
            lanes &= keeps(block.store, block.fast, after, cues, self.config.tolerance)
        return lanes, None, "stored pairs were given back worse"

    def settled(self) -> StreamState:
        """The wake state with other fast weights, and with an empty window if that was wanted."""
        state = self.state._replace(recent=self.start.recent)
        return clear_window(self.model, state) if self.config.evict == "hard" else state

    def _rows(self) -> list[RecentState]:
        if self.config.rule == "recurrent":
            recent = self.start.recent
            return [recent] if bool((recent.ids >= 0).any()) else []
        c = self.model.config
        limit = self.config.span_tokens or self.model.window_of(self.start)
        ids, position = stored_spans(self.start, limit, c.chunk)
        scale = c.dim**0.5
        return [
            RecentState(i, p, self.model.embedding(i.clamp(min=0)) * scale)
            for i, p in zip(ids, position, strict=True)
        ]

    def _pass_cost(self) -> Cost:
        """Of one pass over all rows: the bytes are those of weights, fast weights and features."""
        c, B = self.model.config, len(self.start.position)
        stored = 0
        if self.config.rule == "recurrent":
            stores = [block.store for block in self.start.blocks if block.store is not None]
            stored = max((store.position.shape[-1] for store in stores), default=0)
        lengths = [row.ids.shape[1] for row in self.rows]
        flops = sum(pass_flops(c, length, stored, batch=B) for length in lengths)
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        fast = sum(nbytes(self.start.blocks[layer].fast.s) for layer in c.fast_layers)
        features = sum(2 * nbytes(row.hidden) for row in self.rows)
        return Cost(flops, len(lengths) * (weights + 2 * fast) + features)
