"""The numbers are those of the model and the state, and counting them changes nothing."""

import dataclasses

import pytest
import torch

from wakesleep.streams.config import load_config
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training import StreamModule
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_data import open_source
from wakesleep.streams.training_health import GATES, HEALTH, GateMeans, add_health
from wakesleep.streams.training_metrics import Means
from wakesleep.ttl.model import TTLModel


@pytest.fixture
def config() -> TrainConfig:
    return load_config(TrainConfig, find_recipe("configs/tiny.yaml"))[0]


def test_gates_are_means_of_what_the_memory_uses(config):
    torch.manual_seed(0)
    model = TTLModel(config.model)
    watch, memory, seen = GateMeans(model), model.blocks[0].memory, []
    original = memory._gates
    memory._gates = lambda x: seen.append(original(x)) or seen[-1]
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    _, state, _ = model(tokens, model.init_state(2))
    model(tokens, state)
    means = Means(HEALTH)
    watch.add_to(means)
    wanted = [torch.cat(gates, -1).mean((0, 1, 2)) for gates in seen]
    wanted = torch.stack(wanted).mean(0).detach()
    found = means.take()
    for name, value in zip(GATES, wanted, strict=True):
        assert found[f"gate_{name}"] == pytest.approx(float(value), rel=1e-5)
    watch.start()
    watch.add_to(means)
    assert means.take() == {}


def test_fill_age_and_norms_are_those_of_the_state(config):
    torch.manual_seed(0)
    model = TTLModel(config.model)
    tokens = torch.randint(64, (2, 56), generator=torch.Generator().manual_seed(1))
    _, state, stats = model(tokens, model.init_state(2))
    means = Means(HEALTH)
    add_health(means, state, stats.surprise)
    found, position = means.take(), state.blocks[1].store.position
    assert found["store_fill"] == pytest.approx(float((position >= 0).float().mean()))
    assert found["store_age"] == pytest.approx(float((56 - position[position >= 0]).float().mean()))
    assert found["surprise_p50"] < found["surprise_p95"] <= float(stats.surprise.max())
    norms = [w.detach().flatten(2).norm(dim=2).mean() for w in state.blocks[0].memory.weights]
    assert found["memory_norm"] == pytest.approx(float(sum(norms) / 2))


def test_models_without_parts_have_fewer_numbers(config):
    bare = dataclasses.replace(config.model, memory_layers=(), store_layers=())
    model, means = TTLModel(bare), Means(HEALTH)
    _, state, stats = model(torch.zeros(1, 8, dtype=torch.int64), model.init_state(1))
    GateMeans(model).add_to(means)
    add_health(means, state, stats.surprise)
    assert means.take() == {}


def test_a_step_counts_all_of_them_and_a_validation_none(config):
    module = StreamModule(dataclasses.replace(config, threads=1))
    source = open_source(config)
    module.evaluate(source, 1)
    assert not module.means.update_called
    module.training_step(source.batch(0), 0)
    assert set(HEALTH) <= set(module.means.compute())
    evaluated, untouched = StreamModule(config), StreamModule(config)
    evaluated.model.load_state_dict(untouched.model.state_dict())
    evaluated.evaluate(source, 1)
    sums = []
    for module in (evaluated, untouched):
        module.training_step(source.batch(0), 0)
        sums.append({name: module.means.compute()[name] for name in HEALTH})
    assert sums[0] == sums[1]
