"""One sleep by replay: paid from the budget unit by unit, judged, taken or put back.

    state, ledger, report = replay_sleep(model, state, SleepConfig(...), ledger)

First, places of pairs that an earlier sleep wrote are released, if they are still known. Then the
layers with fast weights take turns writing one unit each, until nothing is left to write, the gate
refuses, or the next unit with all that judges it would cost more than there is. At the end, what
was read last must be predicted as well as before; a lane where it is not is put back, bit for bit,
and what was spent on it is booked as wasted.

Shapes: B lanes, H heads, K head width.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wakesleep.consolidation.budget import Asleep, Cost, Ledger
from wakesleep.consolidation.costs import (
    Sizes,
    audit_cost,
    choose_cost,
    gate_cost,
    mark_cost,
    release_cost,
    write_cost,
)
from wakesleep.consolidation.gate import (
    NOISE_CUES,
    advance,
    audit,
    judge,
    known_after,
    set_aside,
    without_superseded,
)
from wakesleep.consolidation.replay import change, choose, mark, release, take
from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.consolidation.tail import tail_flops, tail_nats
from wakesleep.ttl.fast import unit_key
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import BlockState, FastState, StreamState, map_state, merge

CONFIDENCE = 1.64  # standard errors of a one-sided bound of 95 %


class SleepReport(NamedTuple):
    """What one sleep did; counts are over all lanes, layers and heads."""

    units: int  # that were written and judged
    written: int  # pairs that became known
    rejected: int  # writes of heads that the gate refused
    released: int  # places of the store
    audit: float | None  # share of the sealed pairs that are known; None without any
    tail_before: float | None  # nats per token of the window; None if it was not asked
    tail_after: float | None
    reason: str  # why it ended
    accepted: bool  # False: in no lane did anything change
    seconds: float


def replay_sleep(
    model: TTLModel,
    state: StreamState,
    config: SleepConfig,
    ledger: Ledger,
    generator: torch.Generator,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[StreamState, Ledger, SleepReport]:
    """Sleep once; `state` is not changed, the next one is returned.

    Args:
        ledger: what was spent so far; `config.bucket` says what may be.
        generator: of the cues; on the CPU.
        stop: asked between units; the sleep ends there, and what it did is judged.

    Raises:
        ValueError: the model has no layer with fast weights and a store.
    """
    check_model(model)
    night = _Night(model, state, config, ledger, generator)
    with torch.inference_mode():
        reason = night.run(stop)
        return night.finish(reason)


def check_model(model: TTLModel) -> list[int]:
    """The layers that replay can write: they have fast weights, and a store to fill them from.

    Raises:
        ValueError: there is none, or what is written awake would not be protected.
    """
    c = model.config
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


def least_cost(model: TTLModel, state: StreamState) -> int:
    """FLOPs below which a sleep would not begin."""
    night = _Night(model, state, SleepConfig(), Ledger(), torch.Generator())
    return night.least


def pressure(state: StreamState) -> float:
    """Share of the places of all stores beside fast weights that hold what these do not know."""
    held = places = 0
    for block in state.blocks:
        if block.store is not None and block.fast.asleep.numel():
            waiting = (block.store.position >= 0) & (block.fast.asleep != block.store.position)
            held, places = held + int(waiting.sum()), places + waiting.numel()
    return held / places if places else 0.0


class _Night:
    """One sleep while it goes on: a state that nobody else has seen, and what it cost."""

    def __init__(self, model, state, config, ledger, generator) -> None:
        self.model, self.config, self.generator = model, config, generator
        self.start, self.state = state, state
        self.before, self.ledger = ledger, ledger
        self.layers = check_model(model)
        self.begin = time.monotonic()
        self.units = self.written = self.rejected = self.released = 0
        self.tail: Tensor | None = None
        self.tail_cost = Cost(tail_flops(model, state))
        audits = (audit_cost(self._sizes(layer)) for layer in self.layers)
        self.last_cost = functools.reduce(Cost.plus, audits, self.tail_cost)

    @property
    def least(self) -> int:
        """FLOPs of a look at the window, one unit, and the last look."""
        unit = self._unit_cost(self._sizes(self.layers[0]))
        return self.tail_cost.flops + self.last_cost.flops + unit.flops

    def run(self, stop: Callable[[], bool]) -> str:
        """Release, then write unit by unit; returns why it ended."""
        if self.config.bucket.level(self.ledger) < self.least:
            return "the budget is smaller than one unit"
        self._spend("gate", self.tail_cost)
        self.tail = tail_nats(self.model, self.start)
        for layer in self.layers:
            self._release(layer)
        left = list(self.layers)
        for _ in range(self.config.passes):
            for layer in list(left):
                if stop():
                    return "interrupted"
                if not self._affords(self._unit_cost(self._sizes(layer))):
                    return "the budget is spent"
                if not self._unit(layer):
                    left.remove(layer)
            if not left:
                return "nothing more to write"
        return "all passes were made"

    def finish(self, reason: str) -> tuple[StreamState, Ledger, SleepReport]:
        """Take the lanes that predict their window as well as before, and put the others back."""
        before = after = audited = None
        lanes = torch.ones_like(self.start.position, dtype=torch.bool)
        changed = self.written + self.released > 0
        if changed:
            self._spend("gate", self.last_cost)
            audited = self._audit()
        if changed and self.tail is not None:
            worse = (tail_nats(self.model, self.state) - self.tail).double()
            bound = worse.mean(1) + CONFIDENCE * worse.std(1) / math.sqrt(worse.shape[1])
            lanes = bound <= self.config.tail_loss
            before = float(self.tail.double().mean())
            after = before + float(worse.mean())
        lanes &= changed
        state = merge(lanes, self.state, self.start)
        seconds = time.monotonic() - self.begin
        ledger = self.ledger._replace(sleep=self.ledger.sleep.plus(Cost(seconds=seconds)))
        spent = ledger.sleep.minus(self.before.sleep)
        back = int((~lanes).sum())
        ledger = self.config.bucket.waste(ledger, _share(spent, back, len(lanes)))
        report = SleepReport(
            units=self.units,
            written=self.written,
            rejected=self.rejected,
            released=self.released,
            audit=audited,
            tail_before=before,
            tail_after=after,
            reason=reason if not changed or bool(lanes.any()) else "the window was predicted worse",
            accepted=bool(lanes.any()),
            seconds=seconds,
        )
        return state, ledger, report

    def _unit(self, layer: int) -> bool:
        """Write one unit in one layer; False if there was nothing to write, or nothing passed."""
        block, sizes = self.state.blocks[layer], self._sizes(layer)
        num_pairs, tolerance = sizes.head_dim // 2, self.config.tolerance
        self._spend("sleep", choose_cost(sizes, num_pairs))
        pairs = choose(block.store, block.fast, num_pairs, tolerance)
        self._spend("sleep", mark_cost(sizes))
        if not bool(pairs.chosen.any()):
            fast = mark(block.store, block.fast, tolerance)
            self._put(layer, block._replace(fast=fast))
            return False
        self._spend("sleep", write_cost(sizes, num_pairs))
        self._spend("gate", gate_cost(sizes, num_pairs))
        lam = self.model.config.fast.lam
        fast = block.fast._replace(probes=without_superseded(block.fast.probes, pairs))
        full = change(fast, pairs, lam)
        noise = torch.randn(NOISE_CUES, sizes.head_dim, generator=self.generator)
        cues = unit_key(noise.to(fast.s.device))
        verdict = judge(fast, full, pairs, cues, tolerance)
        passed = verdict.step > 0
        new = advance(fast, full, verdict.step)
        known = known_after(new, pairs, tolerance) & passed[..., None]
        position = take(block.store.position, pairs.place)
        new = new._replace(probes=set_aside(new.probes, pairs, position, known, self.state.lane))
        # heads that did not pass keep their probes as well, superseded or not
        new = _by_head(passed, mark(block.store, new, tolerance), block.fast)
        self._put(layer, block._replace(fast=new))
        tried = pairs.chosen.any(-1)
        refused = int((tried & ~passed).sum())
        self.units += 1
        self.written += int(known.sum())
        self.rejected += refused
        wasted = _share(write_cost(sizes, num_pairs), refused, sizes.heads)
        self.ledger = self.config.bucket.waste(self.ledger, wasted)
        return bool(passed.any())

    def _release(self, layer: int) -> None:
        block, sizes = self.state.blocks[layer], self._sizes(layer)
        marked = (block.fast.asleep >= 0).sum(-1)
        cost = release_cost(sizes, int(marked.max()))
        if not bool(marked.any()) or not self._affords(cost):
            return
        self._spend("sleep", cost)
        store, fast = release(block.store, block.fast, self.config.tolerance, self.generator)
        self.released += int((block.store.position >= 0).sum() - (store.position >= 0).sum())
        self._put(layer, block._replace(store=store, fast=fast))

    def _audit(self) -> float | None:
        counts = [
            audit(self.state.blocks[layer].fast, self.config.tolerance) for layer in self.layers
        ]
        known, num_pairs = (
            sum(int(count.sum()) for count in part) for part in zip(*counts, strict=True)
        )
        return known / num_pairs if num_pairs else None

    def _affords(self, cost: Cost) -> bool:
        """Whether this can be paid, and the last look at window and sealed pairs after it."""
        level = self.config.bucket.level(self.ledger)
        return cost.flops + self.last_cost.flops <= level

    def _spend(self, kind: Asleep, cost: Cost) -> None:
        self.ledger = self.config.bucket.spend(self.ledger, kind, cost)

    def _put(self, layer: int, block: BlockState) -> None:
        blocks = list(self.state.blocks)
        blocks[layer] = block
        self.state = self.state._replace(blocks=tuple(blocks))

    def _sizes(self, layer: int) -> Sizes:
        store = self.state.blocks[layer].store
        B, H, S, K = store.k.shape
        return Sizes(B * H, S, K, store.k.element_size())

    def _unit_cost(self, sizes: Sizes) -> Cost:
        """What a unit may cost at most, its gate included."""
        num_pairs = sizes.head_dim // 2
        parts = (write_cost(sizes, num_pairs), mark_cost(sizes), gate_cost(sizes, num_pairs))
        return functools.reduce(Cost.plus, parts, choose_cost(sizes, num_pairs))


def _share(cost: Cost, part: int, of: int) -> Cost:
    """`part` of `of` equal parts."""
    return Cost(cost.flops * part // of, cost.nbytes * part // of, cost.seconds * part / of)


def _by_head(heads: Tensor, new: FastState, old: FastState) -> FastState:
    """The heads [B, H] of `new`, of `old` elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(heads.view(*heads.shape, *[1] * (a.dim() - 2)), a, b)

    parts = ("s", "covariance", "asleep", "probes")
    return old._replace(**{n: map_state(pick, getattr(new, n), getattr(old, n)) for n in parts})
