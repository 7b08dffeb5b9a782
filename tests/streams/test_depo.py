"""Depo against a reader that follows the edges, and training through sleep on it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from wakesleep.streams import unroll
from wakesleep.streams.depo import Depo, DepoConfig
from wakesleep.streams.training import StreamModule
from wakesleep.streams.training_config import DataConfig, OptimConfig, StepConfig, TrainConfig
from wakesleep.streams.training_data import open_source
from wakesleep.streams.training_draws import draw_step
from wakesleep.streams.training_sleep import sleep_through
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.model import ModelConfig
from wakesleep.ttl.state import map_state

DEPO = DepoConfig(nodes=8, hops=4, queries=5, context=18, names=20)
L = 6
CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=32,
        dim=16,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        window=L,
        chunk=L,
        memory_layers=(),
        store_layers=(),
        fast_layers=(0, 1),
        fast=FastConfig(write="always", passes=4),
        recent=L,
    ),
    data=DataConfig(kind="depo", depo=DEPO),
    train=StepConfig(lanes=4, sequence_len=42, segments_per_step=7, passes=(1, 2, 4), evict="hard"),
)


def answers(tokens: np.ndarray) -> list[int]:
    """What a reader finds who follows the edges one by one."""
    name, mark = 2 + DEPO.hops, 1 + DEPO.hops
    said = [t for t in tokens[: DEPO.context].tolist() if t]
    after = dict(zip(said[0::2], said[1::2], strict=True))
    assert sorted(after) == sorted(after.values()) and min(after) >= name
    found = []
    for at in range(DEPO.context, DEPO.context + 4 * DEPO.queries, 4):
        hop, node, sign, _ = tokens[at : at + 4].tolist()
        assert 1 <= hop <= DEPO.hops and sign == mark
        for _ in range(hop):
            node = after[node]
        found.append(node)
    return found


@pytest.mark.parametrize("longest", [False, True])
def test_a_reader_who_follows_the_edges_finds_every_answer(longest):
    task, sizes, hops = Depo(DEPO, 42, 3, longest=longest), set(), set()
    for step in range(40):
        rows = task.batch(step, 4)
        for lane in range(4):
            tokens = rows["tokens"][lane]
            asked = np.flatnonzero(rows["weight"][lane])
            assert tokens[asked].tolist() == answers(tokens)
            assert len(set(tokens[asked - 2].tolist())) >= min(5, (tokens[:18] > 0).sum() // 2)
            sizes.add(int((tokens[: DEPO.context] > 0).sum()) // 2)
            hops |= set(tokens[asked - 3].tolist())
            assert not tokens[DEPO.context + 4 * DEPO.queries :].any()
        mine = rows["answer_lane"]
        edge_end = rows["answer_start"] - rows["answer_age"] + 1
        one_hop = rows["answer_kind"] == 0
        told = rows["tokens"][mine, edge_end][one_hop]
        assert (told == rows["tokens"][mine, rows["answer_start"]][one_hop]).all()
        assert rows["fact"][mine, edge_end].all()
    assert sizes == ({8} if longest else set(range(3, 9)))
    assert hops == ({1, 2, 4} if longest else {1, 2, 3, 4})


def test_the_same_batch_comes_again_and_others_differ():
    task = Depo(DEPO, 42, 3)
    assert np.array_equal(task.batch(5, 4)["tokens"], task.batch(5, 4)["tokens"])
    assert not np.array_equal(task.batch(5, 4)["tokens"], task.batch(6, 4)["tokens"])


def test_questions_get_harder_batch_by_batch():
    task = Depo(dataclasses.replace(DEPO, hop_batches=10), 42, 0)
    for step, most in [(0, 1), (9, 1), (10, 2), (20, 4), (500, 4)]:
        rows = task.batch(step, 64)
        hops = rows["tokens"][rows["answer_lane"], rows["answer_start"] - 3]
        assert hops.max() == most


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"nodes": 2}, "nodes must be from 3"),
        ({"context": 15}, "context must be at least 2"),
        ({"hops": 0}, "hops must be"),
        ({"queries": 0}, "queries must be"),
    ],
)
def test_tasks_that_cannot_be_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        dataclasses.replace(DEPO, **options)


def module_of(config=CONFIG) -> StreamModule:
    torch.manual_seed(0)
    return StreamModule(config)


def tensors(tree) -> list[torch.Tensor]:
    found = []
    map_state(lambda t: found.append(t) or t, tree)
    return [t for t in found if t.dim()]


def loss_of(module, batch, passes, evict="hard"):
    draw = draw_step(module.config, 0, 0, batch.fact.sum(1).numpy())
    module._draw = lambda *_: draw._replace(num_passes=passes, evict=evict)
    module.cursor = batch.cursor
    return module.training_step(batch, 0)


def test_one_pass_that_keeps_the_window_is_no_sleep_and_more_change_the_loss():
    batch = open_source(CONFIG).batch(0)
    awake = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, passes=()))
    plain = module_of(awake).training_step(batch, 0)
    assert torch.equal(loss_of(module_of(), batch, 1, "keep"), plain)
    losses = [float(loss_of(module_of(), batch, n).detach()) for n in (1, 2, 4)]
    assert len({*losses, float(plain.detach())}) == 4


def test_gradient_goes_through_all_passes_of_all_segments_to_every_weight():
    module, batch = module_of(), open_source(CONFIG).batch(0)
    loss_of(module, batch, 4).backward()
    for name, parameter in module.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_behind_a_hard_eviction_only_fast_weights_know_what_was_read():
    model = module_of().model
    tokens = torch.randint(6, 32, (2, 3 * L))
    other = tokens.clone()
    other[:, :L] = torch.randint(6, 32, (2, L))
    for logit, evict, same in [(-1e4, "hard", True), (0.0, "hard", False), (-1e4, "keep", False)]:
        with torch.no_grad():
            for block in model.blocks:
                block.attention.fast.gates.bias[:2] = logit
            ends = []
            for read in (tokens, other):
                state = model(read[:, :L], model.init_state(2))[1]
                state = sleep_through(model, state, 2, evict)
                ends.append(model(tokens[:, L : 2 * L], state)[0])
        assert torch.equal(*ends) == same, (logit, evict)


def test_a_lane_sleeps_where_nothing_was_asked_whatever_others_do():
    model, tokens = module_of().model.double(), torch.randint(6, 32, (3, L))
    draw = draw_step(CONFIG, 0, 0, np.full(3, 8))._replace(num_passes=2, evict="hard")
    with torch.no_grad():
        state = model(tokens, model.init_state(3))[1]
        slept = sleep_through(model, state, 2, "hard")
        assert unroll.rest(model, state, draw, torch.zeros(3, dtype=torch.bool)) is state
        mixed = unroll.rest(model, state, draw, torch.tensor([True, False, True]))
    for lane, expected in enumerate((slept, state, slept)):
        parts = zip(tensors(mixed), tensors(expected), strict=True)
        assert all(torch.equal(a[lane], b[lane]) for a, b in parts)


def test_a_question_in_one_lane_wakes_no_other():
    """As in half a batch: whoever trains on two processes trains the same."""
    module, batch = module_of(), open_source(CONFIG).batch(0)
    draw = draw_step(CONFIG, 0, 0, batch.fact.sum(1).numpy())._replace(num_passes=2, evict="hard")
    asked = batch.weight.clone()
    asked[1, :L] = 1.0  # in the first window, where no lane was asked anything
    read = []
    with torch.no_grad():
        for weight in (batch.weight, asked):
            start = module.model.init_state(len(weight))
            given = batch._replace(weight=weight), start, draw, module.pool
            read.append(unroll.unroll(module.model, *given).hidden)
    same = [bool(torch.equal(a, b)) for a, b in zip(*read, strict=True)]
    assert same == [lane != 1 for lane in range(len(same))]


def test_every_number_of_passes_is_drawn():
    facts = np.full(4, 8)
    drawn = [draw_step(CONFIG, n, 0, facts).num_passes for n in range(60)]
    assert set(drawn) == {1, 2, 4} and draw_step(CONFIG, 7, 0, facts).evict == "hard"


@pytest.mark.parametrize(
    "options",
    [{"fast_layers": ()}, {"fast": FastConfig()}, {"recent": 0}],
)
def test_a_model_that_cannot_sleep_by_recurrence_is_refused(options):
    with pytest.raises(ValueError, match=r"train.passes needs model.fast_layers"):
        dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **options))


def test_distractors_and_hard_eviction_are_refused_together():
    admission = dataclasses.replace(CONFIG.admission, distractor_share=0.5)
    with pytest.raises(ValueError, match=r"evict=hard needs admission\.distractor_share=0"):
        dataclasses.replace(CONFIG, admission=admission)


def test_depo_is_learned_a_little_in_a_few_steps():
    optim = OptimConfig(lr=5e-3, lr_rest=1e-2, warmup=5)
    config = dataclasses.replace(CONFIG, optim=optim)
    module, source = module_of(config), open_source(config)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for number in range(60):
        optimizer.zero_grad()
        loss = module.training_step(source.batch(number), number)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
