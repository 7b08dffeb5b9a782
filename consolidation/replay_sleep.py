"""One sleep by replay: units of pairs, layer after layer, each behind a gate.

First, places of pairs that an earlier sleep wrote are released, if they are still known. Then the
layers with fast weights take turns writing one unit each, until nothing is left to write, the gate
refuses, or the next unit with all that judges it would cost more than there is.

Shapes: B lanes, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wakesleep.consolidation.budget import Cost
from wakesleep.consolidation.costs import (
    Sizes,
    Unit,
    audit_cost,
    choose_cost,
    gate_cost,
    keys_cost,
    mark_cost,
    release_cost,
    sizes_of,
    write_cost,
)
from wakesleep.consolidation.gate import (
    NOISE_CUES,
    RULES,
    advance,
    audit,
    judge,
    known_after,
    set_aside,
    without_superseded,
)
from wakesleep.consolidation.night import INTERRUPTED, Night, share, total
from wakesleep.consolidation.replay import (
    Standard,
    can_be_asked,
    change,
    choose,
    emptied,
    keep_keys,
    mark,
    opened,
    release,
    seen_by,
    take,
    unseen,
)
from wakesleep.ttl.key_space import KeySpace, unit_key
from wakesleep.ttl.model import ModelConfig
from wakesleep.ttl.state import BlockState, FastState, map_state


def replay_layers(c: ModelConfig) -> list[int]:
    """The layers that replay can write: they have fast weights, and a store to fill them from.

    Raises:
        ValueError: there is none, or what is written awake would not be protected.
    """
    if c.fast.write == "always":
        raise ValueError(
            "sleep.rule=replay protects what sleep has written, and this model writes its fast "
            "weights awake, too (fast.write=always)"
        )
    layers = sorted(set(c.fast_layers) & set(c.store_layers))
    if not layers:
        raise ValueError(
            "sleep.rule=replay needs a layer with fast weights and a store, and this model has "
            f"fast_layers {list(c.fast_layers)}, store_layers {list(c.store_layers)}"
        )
    return layers


class ReplayNight(Night):
    """Sleep by replay."""

    def __init__(self, model, state, config, ledger, generator: torch.Generator) -> None:
        """generator: of the cues; on the CPU."""
        super().__init__(model, state, config, ledger)
        self.layers, self.generator = replay_layers(model.config), generator
        self._audits = total(*(audit_cost(self._sizes(layer)) for layer in self.layers))

    @property
    def questions(self) -> Cost:
        """Of the sealed pairs."""
        return self._audits

    @property
    def unit_flops(self) -> int:
        """Of the cheapest unit, its gate included."""
        sizes = self._sizes(self.layers[0])
        return self._unit_cost(self.layers[0], sizes.units[-1]).flops

    @property
    def changed(self) -> bool:
        """Whether pairs were written, places freed, or keys shown that are stored no more."""
        olds = [[s.blocks[i].fast.old for s in (self.start, self.state)] for i in self.layers]
        shown = any(a is not None and not torch.equal(a.open, b.open) for a, b in olds)
        return shown or self.written + self.released > 0

    def work(self, stop: Callable[[], bool]) -> str:
        """Release, then write unit by unit."""
        for layer in self.layers:
            self._release(layer)
        left = list(self.layers)
        for _ in range(self.config.num_passes):
            for layer in list(left):
                if stop():
                    return INTERRUPTED
                unit = self._best_unit(layer)
                if unit is None:
                    return "the budget is spent"
                if not self._unit(layer, unit):
                    left.remove(layer)
            if not left:
                return "nothing more to write"
        return "all passes were made"

    def unharmed(self) -> tuple[Tensor, float | None, str]:
        """All lanes: every unit was judged by itself. Then what the sealed pairs say."""
        counts = [
            audit(self.state.blocks[layer].fast, self._standard(layer)) for layer in self.layers
        ]
        known, num_pairs = (
            sum(int(count.sum()) for count in part) for part in zip(*counts, strict=True)
        )
        lanes = torch.ones_like(self.start.position, dtype=torch.bool)
        return lanes, known / num_pairs if num_pairs else None, ""

    def _best_unit(self, layer: int) -> Unit | None:
        """The dearest unit that can be paid."""
        units = self._sizes(layer).units
        return next((u for u in units if self.affords(self._unit_cost(layer, u))), None)

    def _unit(self, layer: int, unit: Unit) -> bool:
        """Write one unit in one layer; False if there was nothing to write, or nothing passed."""
        block, sizes = self.state.blocks[layer], self._sizes(layer)
        standard = self._standard(layer)
        self.spend("sleep", total(keys_cost(sizes), choose_cost(sizes, unit.pairs)))
        seen, fast = seen_by(self._space(layer), block.store, block.fast)
        pairs = choose(seen, fast, unit.pairs, self.config.worth)
        num_pairs = pairs.chosen.shape[-1]
        steps = unit.steps_for(num_pairs)
        if not num_pairs:
            return False
        heads = int(pairs.chosen.any(-1).sum()) if sizes.hidden else sizes.heads
        write = write_cost(sizes._replace(heads=heads), num_pairs, steps)
        self.spend("sleep", total(write, mark_cost(sizes)))
        self.spend("gate", gate_cost(sizes, num_pairs))
        lam = self.model.config.fast.lam
        fast = without_superseded(fast, pairs)
        full = change(fast, pairs, lam, steps)
        noise = torch.randn(NOISE_CUES, sizes.head_dim, generator=self.generator)
        cues = unit_key(noise.to(fast.s.device))
        with self.judging():
            verdict = judge(fast, full, pairs, cues, standard)
        passed = verdict.step > 0
        new = advance(fast, full, verdict.step)
        known = known_after(new, pairs, standard) & passed[..., None]
        position = take(block.store.position, pairs.place)
        new = keep_keys(unseen(new, block.fast), block.store, pairs, known)
        known &= can_be_asked(new, position)
        new = set_aside(new, pairs, position, known, self.state.lane)
        # heads that did not pass keep their probes and old keys as well, superseded or not
        new = _by_head(passed, mark(seen, new, pairs, standard), block.fast)
        self._put(layer, block._replace(fast=new))
        tried = pairs.chosen.any(-1)
        refused = int((tried & ~passed).sum())
        for number, rule in enumerate(RULES):
            if count := int((tried & ~passed & (verdict.rule == number)).sum()):
                self.rules[rule] = self.rules.get(rule, 0) + count
        self.units += 1
        self.written += int(known.sum())
        self.rejected += refused
        wasted = share(write, refused, heads)
        self.ledger = self.config.bucket.waste(self.ledger, wasted)
        return bool(passed.any())

    def _release(self, layer: int) -> None:
        block, sizes = self.state.blocks[layer], self._sizes(layer)
        marked = (block.fast.asleep >= 0).sum(-1)
        cost = total(keys_cost(sizes), release_cost(sizes, int(marked.max())))
        if not bool(marked.any()) or not self.affords(cost):
            self._put(layer, block._replace(fast=opened(block.fast, block.store)))
            return
        self.spend("sleep", cost)
        seen, _ = seen_by(self._space(layer), block.store, block.fast)
        left, fast = release(seen, block.fast, self._standard(layer), self.generator)
        free = (seen.position >= 0) & (left.position < 0)
        self.released += int(free.sum())
        store = emptied(block.store, free)
        self._put(layer, block._replace(store=store, fast=opened(fast, store)))

    def _space(self, layer: int) -> KeySpace:
        return self.model.blocks[layer].attention.fast.space

    def _standard(self, layer: int) -> Standard:
        return Standard(self.config.tolerance, self._space(layer).noise)

    def _put(self, layer: int, block: BlockState) -> None:
        blocks = list(self.state.blocks)
        blocks[layer] = block
        self.state = self.state._replace(blocks=tuple(blocks))

    def _unit_cost(self, layer: int, unit: Unit) -> Cost:
        """What it may cost at most, its gate included."""
        sizes, lanes = self._sizes(layer), len(self.state.position)
        heads = lanes * int(self._space(layer).answers.sum())  # that an MLP is written in
        steps = unit.steps_for(min(unit.pairs, sizes.places))
        written = sizes._replace(heads=heads) if sizes.hidden else sizes
        chosen = (keys_cost(sizes), choose_cost(sizes, unit.pairs), mark_cost(sizes))
        return total(*chosen, write_cost(written, unit.pairs, steps), gate_cost(sizes, unit.pairs))

    def _sizes(self, layer: int) -> Sizes:
        return sizes_of(self.state.blocks[layer])


def _by_head(heads: Tensor, new: FastState, old: FastState) -> FastState:
    """The heads [B, H] of `new`, of `old` elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(heads.view(*heads.shape, *[1] * (a.dim() - 2)), a, b)

    parts = ("s", "covariance", "asleep", "probes", "old")
    return old._replace(**{n: map_state(pick, getattr(new, n), getattr(old, n)) for n in parts})
