"""Nothing is timed that computes something else, and what was not finite is told."""

import importlib.metadata
import sys
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module")
def compare(script):
    return script("compare_memory")


@pytest.fixture
def memory(compare):
    """Two heads of 6 in chunks of 6 tokens, with gates that differ from token to token."""
    memory = compare.our_memory(2, 6, 6)
    torch.nn.init.normal_(memory.gates.weight, std=0.5)
    return memory


def test_ours_equals_the_reference(compare, memory):
    assert compare.check_ours(memory, seed=1) < 1e-12


@pytest.mark.parametrize("part", ["keys", "momentum", "chunk"])
def test_a_memory_that_computes_something_else_is_not_timed(compare, memory, monkeypatch, part):
    loop = compare.memory_loop

    def other(rule, learned, momentum, tokens):
        if part == "keys":
            tokens = tokens._replace(k=tokens.k.roll(1, 0))
        elif part == "momentum":
            tokens = tokens._replace(eta=tokens.eta * 0.99)
        else:
            rule = rule._replace(chunk=rule.chunk - 1)
        return loop(rule, learned, momentum, tokens)

    monkeypatch.setattr(compare, "memory_loop", other)
    with pytest.raises(ValueError, match="nothing is timed"):
        compare.check_ours(memory, seed=1)


class Accumulator:
    """Reads the mean of what came before, as a peer would; its weights move if it is online."""

    def __init__(self, online, learns=True):
        self.online, self.learns = online, learns
        self.memory = SimpleNamespace(memory_model_parameters=[torch.zeros(1, 3)])

    def __call__(self, x, carried):
        learned = x.cumsum(1) if self.learns else x
        weights = learned[:, -1] if self.online else torch.zeros(1, 3)
        return learned, SimpleNamespace(weights={"w": weights})


def test_a_peer_whose_weights_stand_still_is_not_timed(compare):
    x = torch.randn(1, 8, 3)
    compare.check_online(Accumulator(online=True), x, 4)
    with pytest.raises(ValueError, match="not online"):
        compare.check_online(Accumulator(online=False), x, 4)
    with pytest.raises(ValueError, match="does not reach the next"):
        compare.check_online(Accumulator(online=True, learns=False), x, 4)


def test_a_ratio_is_that_to_the_fastest_call_of_its_setting_and_nan_is_told(compare):
    def timing(name, changes, rates, finite=True):
        return compare.Timing(compare.Reader(name, changes, 10, 4, None), rates, finite)

    timings = [
        timing("ours", "every token", [30.0, 50.0, 40.0]),
        timing("theirs", "every 4 tokens", [20.0, 10.0, 30.0]),
        timing("theirs", "every 4 tokens", [5.0], finite=False),
        timing("theirs", "every token", [4.0]),
    ]
    assert compare.ratio(timings, per_token=False) == 2
    assert compare.ratio(timings, per_token=True) == 10
    ours, first, second, _ = compare.rows((1, 256), timings)
    assert "| 40 | 30 to 50 |" in ours and first.endswith("| 2.00 |")
    assert "not finite" in second and "not finite" not in first


def test_every_reader_carries_its_own_state_from_call_to_call(compare):
    seen = []

    def step(x, carried):
        seen.append((x.shape[1], carried))
        return x / (2 - (carried or 0)), (carried or 0) + 1  # the third call divides by zero

    readers = [compare.Reader("ours", "", 10, length, step) for length in (4, 6)]
    timings = compare.measure(readers, 3, 1, 2)
    assert seen == [(4, None), (6, None), (4, 1), (6, 1), (4, 2), (6, 2)]
    assert [len(timing.rates) for timing in timings] == [2, 2]
    assert not any(timing.finite for timing in timings)


def test_without_the_peer_it_says_how_to_get_it(compare, monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compare.importlib.metadata, "version", missing)
    monkeypatch.setattr(sys, "argv", ["compare_memory.py", "--threads", "1"])
    assert compare.main() == 1
    assert "pip install titans-pytorch" in capsys.readouterr().out
