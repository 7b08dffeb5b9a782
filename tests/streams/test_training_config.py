"""The schedule, what a step draws, and the recipes that ship."""

import dataclasses
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
import torch

from wakesleep.streams.config import load_config
from wakesleep.streams.training_config import OptimConfig, TrainConfig
from wakesleep.streams.training_draws import SPARE, draw_blind, draw_step

FACTS = np.array([0, 4, 8])  # tokens of three lanes
RECIPES = sorted(
    entry.name for entry in files("wakesleep.configs").iterdir() if "tune" not in entry.name
)
RECIPES = [name for name in RECIPES if name.endswith(".yaml")]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_rises_then_falls_to_its_floor(schedule):
    optim = OptimConfig(warmup=10, schedule=schedule, floor=0.1)
    rates = [optim.rate(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0 == max(rates)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.1) == optim.rate(1000, 100)
    assert optim.rate(55, 100) == pytest.approx(0.55)


def test_a_stable_rate_falls_at_the_end_only():
    optim = OptimConfig(warmup=10, schedule="stable", decay=0.25, floor=0.2)
    rates = [optim.rate(step, 110) for step in range(111)]
    assert set(rates[10:86]) == {1.0} and rates[85] == 1.0 > rates[86]
    assert all(a > b for a, b in pairwise(rates[85:]))
    assert rates[110] == pytest.approx(0.2) == optim.rate(1000, 110)
    assert [optim.rate(step, 220) for step in range(86)] == rates[:86]  # a longer run begins alike


def config(**admission) -> TrainConfig:
    layer = {
        "model.vocab_size": 64,
        "data.mqar.pairs": 4,
        "data.mqar.queries": 4,
        "data.mqar.vocab_size": 64,
        "train.lanes": 3,
        "train.sequence_len": 256,
        "train.segments_per_step": 4,
        **{f"admission.{name}": value for name, value in admission.items()},
    }
    return load_config(TrainConfig, overrides=layer)[0]


def test_a_draw_depends_on_seed_and_number_alone():
    drawing = config(capacities=[16, 64], keep_all_share=0.4, distractor_share=0.8, rank_max=512)
    for number in range(20):
        a, b = (draw_step(drawing, number, 100, FACTS) for _ in range(2))
        assert a[:3] == b[:3] and a.jumps == b.jumps
        assert torch.equal(a.rank_table, b.rank_table)
        assert all(
            x is y is None or torch.equal(x, y) for x, y in zip(a.orders, b.orders, strict=True)
        )
    drawn = [draw_step(drawing, number, 100, FACTS) for number in range(400)]
    assert 0.3 < np.mean([d.keep_all for d in drawn]) < 0.5
    assert {d.capacity for d in drawn if not d.keep_all} == {16, 64}
    assert 0.7 < np.mean([any(d.jumps) for d in drawn]) < 0.9


def test_nothing_is_selected_before_begin_tokens():
    late = config(capacities=[16], distractor_share=1.0, full_share=1.0, begin_tokens=2 * 3 * 256)
    draws = [draw_step(late, number, 100, FACTS) for number in range(3)]
    assert [draw.keep_all for draw in draws] == [True, True, False]
    assert [any(draw.jumps) for draw in draws] == [False, False, True]


def test_every_lane_gets_the_same_number_of_different_distractors():
    drawing = config(keep_all_share=1.0, distractor_share=1.0)
    levels = set()
    for number in range(50):
        draw = draw_step(drawing, number, 40, FACTS)
        dealt = [
            [int(i) for order in draw.orders if order is not None for i in order[lane] if i >= 0]
            for lane in range(3)
        ]
        assert all(len(set(lane)) == len(lane) == len(dealt[0]) for lane in dealt)
        assert draw.capacity == 256 + len(dealt[0])
        assert all(i < 40 for lane in dealt for i in lane)
        assert all((b - a) % 40 == 1 for lane in dealt for a, b in pairwise(lane))
        levels.add(len(dealt[0]))
        for order, jump in zip(draw.orders, draw.jumps, strict=True):
            assert jump % 64 == 0 and jump >= (0 if order is None else order.shape[1])
    assert min(levels) < 10 and max(levels) > 30
    assert draw_step(drawing, 0, 0, FACTS).jumps == (0, 0, 0, 0)


def test_a_full_store_leaves_room_for_the_facts_of_each_lane():
    drawing = config(capacities=[64], distractor_share=1.0, full_share=1.0, room=[1.5, 3.0])
    rooms = []
    for number in range(50):
        draw = draw_step(drawing, number, 80, FACTS)
        dealt = sum((order >= 0).sum(1) for order in draw.orders if order is not None)
        rooms.append((64 - dealt).tolist())
    rooms = np.array(rooms)
    assert (rooms[:, 0] == 0).all()
    assert (rooms[:, 1:] >= [6, 12]).all() and (rooms[:, 1:] <= [12, 24]).all()
    assert (rooms[:, 1:].max(0) > [9, 18]).all()


def test_stored_distances_are_spread_without_ties():
    spread = config(capacities=[32], rank_max=512)
    tables = torch.cat([draw_step(spread, number, 0, FACTS).rank_table for number in range(50)])
    assert tables.shape == (150, 32) and (tables.diff(dim=1) > 0).all()
    assert int(tables.min()) >= 0 and 400 < int(tables.max()) < 512
    assert (tables[:, -1] < 64).any()
    assert 0.3 < (tables[:, 0] > 64).float().mean() < 0.6  # others begin near
    full = config(capacities=[1024], rank_max=512)
    assert torch.equal(draw_step(full, 0, 0, FACTS).rank_table[0], torch.arange(1024))


def test_distractors_before_a_sequence_may_be_read_as_newer_than_it():
    drawing = config(
        capacities=[1024], rank_max=2048, keep_all_share=0, distractor_share=1, full_share=0
    )
    newer = []
    for number in range(100):
        draw = draw_step(drawing, number, 1000, FACTS)
        older = [0] * 3 if draw.orders[0] is None else (draw.orders[0] >= 0).sum(1).tolist()
        for row, dealt in zip(draw.rank_table, older, strict=True):
            first = int(row.argmin())  # the wrap, or no wrap at all
            newer.append((1024 - first) % 1024)
            assert newer[-1] <= max(0, dealt - SPARE)
            assert (row.roll(-first).diff() > 0).all()
    assert max(newer) > 150 and min(newer) == 0


def test_blind_tokens_are_single_ones_and_whole_segments():
    assert draw_blind(config(), 0) is None
    single = dataclasses.replace(config().train, blind_share=0.2)
    settings = dataclasses.replace(config(), train=single)
    tokens, judged = draw_blind(settings, 5)
    assert torch.equal(tokens, judged) and 0.15 < judged.float().mean() < 0.25
    assert torch.equal(draw_blind(settings, 5).tokens, tokens)
    assert not torch.equal(draw_blind(settings, 6).tokens, tokens)
    whole = dataclasses.replace(config().train, window_dropout=0.5)
    tokens, judged = draw_blind(dataclasses.replace(config(), train=whole), 5)
    assert not judged.any() and 0 < tokens.float().mean() < 1
    segments = tokens.unflatten(1, (whole.segments_per_step, whole.segment))
    assert torch.equal(segments.all(2), segments.any(2))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_ship_are_valid(name):
    load_config(TrainConfig, str(files("wakesleep.configs") / name))
