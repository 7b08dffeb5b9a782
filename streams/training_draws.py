"""What a step draws at random: sizes of store and window, distractors, stored distances.

Everything follows from the seed and the batch's number, so a resumed run draws the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wakesleep.streams.training_config import TrainConfig

SPARE = 256  # distractors before a sequence that its own pairs may push out
KEY = 0x57EB  # keeps these draws apart from those of the data with the same seed and number
BLIND_KEY = 0xB11D  # and those of `draw_blind` from these
SLEEP_KEY = 0x51EE  # and those of sleeps
PASSES_KEY = 0x9A55
FEWER = 8  # the shortest sleep of training writes one of so many pairs of the longest


class Draw(NamedTuple):
    capacity: int | None  # places of every store; None = the model's own
    window: int | None  # tokens W; None = the model's own
    keep_all: bool  # nothing is ever evicted: this step teaches the admission head
    passes: bool  # before each segment, other text passes as in a long stream
    orders: tuple[Tensor | None, ...]  # per segment [B, n] int64 distractors before it; -1 = none
    jumps: tuple[int, ...]  # per segment, positions that the distractors take
    rank_table: Tensor | None  # [B, S] int64 distances of the ranks 0..S-1, see `_spread`
    sleeps: Tensor | None = None  # [K, B] bool: a lane sleeps before a segment
    sleep_pairs: int = 0  # that such a sleep writes at most, per head
    sleep_seed: int = 0  # of which pairs are offered
    num_passes: int = 0  # over a segment in which nothing is asked, the first one counted; 0: none
    evict: str = "keep"  # what becomes of the window then

    def to(self, device: torch.device) -> Draw:
        """The draw with its tensors on a device."""
        orders = tuple(order if order is None else order.to(device) for order in self.orders)
        ranks = self.rank_table if self.rank_table is None else self.rank_table.to(device)
        sleeps = self.sleeps if self.sleeps is None else self.sleeps.to(device)
        return self._replace(orders=orders, rank_table=ranks, sleeps=sleeps)

    def part(self, lanes: slice) -> Draw:
        """What some of the lanes are dealt."""
        orders = tuple(order if order is None else order[lanes] for order in self.orders)
        ranks = self.rank_table if self.rank_table is None else self.rank_table[lanes]
        sleeps = self.sleeps if self.sleeps is None else self.sleeps[:, lanes]
        return self._replace(orders=orders, rank_table=ranks, sleeps=sleeps)


def draw_step(config: TrainConfig, number: int, waiting: int, facts: np.ndarray) -> Draw:
    """The draws of batch `number`.

    Args:
        waiting: distractors in the pool.
        facts: [B] int64 tokens of each lane that a store should keep.
    """
    admission, step = config.admission, config.train
    rng = np.random.default_rng((config.seed, number, KEY))
    begun = config.tokens_before(number) >= admission.begin_tokens
    keep_all = bool(rng.random() < admission.keep_all_share) or not begun
    window = int(rng.choice(admission.windows)) if admission.windows else None
    drawn = int(rng.choice(admission.capacities)) if admission.capacities else None
    places = drawn or config.model.store.capacity
    levels = np.zeros(step.lanes, np.int64)
    passes = begun and bool(rng.random() < admission.distractor_share)
    if waiting and passes:
        if not keep_all and rng.random() < admission.full_share:
            room = facts * np.exp(rng.uniform(*np.log(admission.room), step.lanes))
            levels = np.clip(places - room.astype(np.int64), 0, waiting)
        else:
            most = waiting if keep_all else min(waiting, places)
            levels += rng.integers(1, most + 1)
    orders, jumps = _distractors(rng, config, levels, waiting)
    capacity = step.sequence_len + int(levels.max()) if keep_all else drawn
    ranks = None
    if admission.rank_max:
        older = 0 if orders[0] is None else (orders[0] >= 0).sum(1).numpy()
        spare = np.maximum(0, older - SPARE) + np.zeros(step.lanes, np.int64)
        ranks = _spread(rng, spare, capacity or places, admission.rank_max)
    drawn = Draw(capacity, window, keep_all, passes, orders, jumps, ranks)
    if step.passes:
        drawn = drawn._replace(num_passes=_draw_passes(config, number), evict=step.evict)
    return drawn if keep_all or not step.sleep_drop else _with_sleep(drawn, config, number)


def _draw_passes(config: TrainConfig, number: int) -> int:
    """How often batch `number` passes over a segment before it goes on."""
    rng = np.random.default_rng((config.seed, number, PASSES_KEY))
    return int(rng.choice(config.train.passes))


def _with_sleep(draw: Draw, config: TrainConfig, number: int) -> Draw:
    """The same with sleeps before segments, of as many pairs as a real one may have written."""
    step, most = config.train, config.train.sleep_pairs
    rng = np.random.default_rng((config.seed, number, SLEEP_KEY))
    sleeps = rng.random((step.segments_per_step, step.lanes)) < step.sleep_drop
    num_pairs = round(most / FEWER ** float(rng.random()))
    seed = int(rng.integers(2**62))
    return draw._replace(sleeps=torch.from_numpy(sleeps), sleep_pairs=num_pairs, sleep_seed=seed)


class Blind(NamedTuple):
    """Tokens that see no others in the window."""

    tokens: Tensor  # [B, T] bool
    judged: Tensor  # [B, T] bool: those whose prediction is the auxiliary loss


def draw_blind(config: TrainConfig, number: int) -> Blind | None:
    """Single tokens (train.blind_share), and whole segments of a lane (train.window_dropout)."""
    step = config.train
    if not step.blind_share and not step.window_dropout:
        return None
    rng = np.random.default_rng((config.seed, number, BLIND_KEY))
    judged = rng.random((step.lanes, step.sequence_len)) < step.blind_share
    dropped = rng.random((step.lanes, step.segments_per_step)) < step.window_dropout
    tokens = judged | dropped.repeat(step.segment, axis=1)
    return Blind(torch.from_numpy(tokens), torch.from_numpy(judged))


def never(segments: int) -> Draw:
    """The draw of a step that takes the store as the model has it."""
    return Draw(
        capacity=None,
        window=None,
        keep_all=False,
        passes=False,
        orders=(None,) * segments,
        jumps=(0,) * segments,
        rank_table=None,
    )


def boundary(config: TrainConfig) -> int:
    """Tokens after which all clocks of the model stand as before: a jump must be a multiple."""
    model = config.model
    return math.lcm(model.chunk, model.memory.page or model.chunk)


def _distractors(rng, config: TrainConfig, levels: np.ndarray, waiting: int):
    """Deal each lane a run of `levels` [B] waiting pairs, cut at random among the segments."""
    lanes, segments = config.train.lanes, config.train.segments_per_step
    most = int(levels.max())
    if not most:
        return (None,) * segments, (0,) * segments
    column = np.arange(most)
    chosen = (rng.integers(waiting, size=(lanes, 1)) + column) % waiting
    shares = rng.dirichlet(np.ones(segments), size=lanes)
    done = (column + 0.5) / levels.clip(1)[:, None]
    segment = (done[..., None] > shares.cumsum(1)[:, None, :-1]).sum(2)
    segment[column >= levels[:, None]] = segments  # none
    orders, jumps = [], []
    clock = boundary(config)
    for k in range(segments):
        here = segment == k
        front = np.argsort(~here, axis=1, kind="stable")[:, : here.sum(1).max()]
        order = np.take_along_axis(np.where(here, chosen, -1), front, axis=1)
        orders.append(torch.from_numpy(order) if order.size else None)
        jumps.append(math.ceil(order.shape[1] / clock) * clock)
    return tuple(orders), tuple(jumps)


def _spread(rng, spare: np.ndarray, places: int, rank_max: int) -> Tensor:
    """Distances [B, S] below rank_max, without ties, over a random range in each lane.

    They increase, but a random part of the `spare` [B] oldest, distractors that nobody asks for,
    come before all others, as if they were newer. The stores of a training step are mostly empty,
    and what a step reads is what it has just stored; half of the ranges begin at a random distance,
    too. Otherwise the far distances would hardly ever be read, and which of two far pairs is the
    later one would never be asked.
    """
    table = np.tile(np.arange(places), (len(spare), 1))
    for row, most in zip(table, spare, strict=True):
        if places < rank_max:
            span = int(places * (rank_max / places) ** rng.random())
            first = int(rng.integers(rank_max - span + 1)) * int(rng.integers(2))
            row[:] = first + np.sort(rng.permutation(span)[:places])
        row[:] = np.roll(row, -int(rng.integers(most + 1)))
    return torch.from_numpy(table)
