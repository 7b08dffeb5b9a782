"""What is timed is a whole training step, of models that differ in their parts alone."""

import sys

import numpy as np
import pytest
import torch

from wakesleep.streams.training import StreamModule


@pytest.fixture(scope="module")
def compare(script):
    return script("compare_training")


@pytest.fixture
def small(compare, monkeypatch):
    """Steps of 2 lanes and 64 tokens."""
    for name, value in (("LANES", 2), ("LENGTH", 64), ("SEGMENTS", 2)):
        monkeypatch.setattr(compare, name, value)
    return compare.recipes("configs/tiny.yaml", threads=1)


def test_warm_up_rounds_do_not_count_and_all_take_turns(compare):
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timed = compare.in_turn(steps, warmup=2, repeats=3)
    assert calls == ["a", "b"] * 5
    assert [(row.name, len(row.seconds)) for row in timed] == [("a", 3), ("b", 3)]


def test_models_differ_in_their_parts_alone(small):
    layers = {
        name: (config.model.memory_layers, config.model.store_layers)
        for name, config in small.items()
    }
    assert layers == {
        "full": ((0,), (1,)),
        "no store": ((0,), ()),
        "no memory": ((), (1,)),
        "window only": ((), ()),
    }
    assert len({config.model.mlp_dim for config in small.values()}) == 1


def test_a_step_of_a_model_moves_all_its_weights_and_carries_its_state(compare, small, monkeypatch):
    modules = []
    original = StreamModule.training_step

    def watched(self, batch, number):
        modules.append(self)
        return original(self, batch, number)

    monkeypatch.setattr(StreamModule, "training_step", watched)
    step = compare.model_step(small["full"], np.arange(640) % 64)
    step()
    before = {name: p.clone() for name, p in modules[0].model.named_parameters()}
    step()
    moved = [name for name, p in modules[0].model.named_parameters() if not p.equal(before[name])]
    taught = [name for name in before if ".store.head." in name]  # by answers alone
    assert set(moved) == set(before) - set(taught)
    assert modules[0].state.position.tolist() == [128, 128]


@pytest.mark.parametrize("name", ["ours", "ours, recompute"])
def test_a_step_of_our_layer_has_a_gradient_for_every_weight(compare, monkeypatch, name):
    layers = []
    original = compare.our_memory
    monkeypatch.setattr(compare, "our_memory", lambda *a: layers.append(original(*a)) or layers[-1])
    compare.layer_step(name, (2, 8), 96)()
    assert all(p.grad is not None and p.grad.any() for p in layers[0].parameters())


def test_a_layer_is_measured_in_a_process_of_its_own(compare):
    """What this process holds does not count."""
    held = torch.ones(10**8)
    seconds, peak = compare.measure_layer("ours", (1, 16), 1024, 1, 0, 2)
    assert len(seconds) == 2 and min(seconds) > 0 and 1e5 < peak < held.nbytes


def test_models_are_compared_without_the_other_package(compare, small, monkeypatch, capsys):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    words = ["compare_training.py", "--recipe", "configs/tiny.yaml", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--repeats", "1", "--warmup", "1"])
    threads = torch.get_num_threads()
    assert compare.main() == 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "is not installed" in out and "| window only |" in out and "| 1.00 |" in out
