"""A call read by two workers equals its pieces read one by one, and what goes wrong is told."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

from wakesleep.ttl import pipeline
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.pipeline import Pipeline, cuts
from wakesleep.ttl.state import map_state
from wakesleep.ttl.store import StoreConfig

PIECE = 16
CONFIG = ModelConfig(
    vocab_size=50,
    dim=16,
    num_layers=3,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    window=16,
    chunk=8,
    memory_layers=(1,),
    store_layers=(1, 2),
    fast_layers=(2,),
    recent=8,
    memory=MemoryConfig(),
    store=StoreConfig(capacity=12),
    fast=FastConfig(write="always"),
)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """Small pieces, and two threads for the time of a test."""
    before = torch.get_num_threads()
    monkeypatch.setattr(pipeline, "PIECE", PIECE)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


BY_MEMORY = StoreConfig(capacity=32, score="residual_z", quota=True)
KINDS = {
    "fast weights": {},
    "scores by memory": {"store_layers": (1,), "fast_layers": (), "store": BY_MEMORY},
    "mass": {"fast_layers": (), "store": StoreConfig(capacity=12, score="mass")},
    "pages": {"combine": "mac", "memory": MemoryConfig(page=16), "recent": 0},
}


@pytest.fixture(params=["fast weights"])
def model(request):
    torch.manual_seed(0)
    return TTLModel(dataclasses.replace(CONFIG, **KINDS[request.param])).double()


@contextmanager
def one_thread():
    """What is compared with needs no second one, and two beside other tests are slow."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def tensors(tree) -> list[torch.Tensor]:
    found = []
    map_state(lambda t: found.append(t) or t, tree)
    return found


def in_pieces(model, tokens, state, lengths):
    """The same, one piece after the other."""
    logits, surprise, written, nonfinite = [], [], [], 0
    for start, stop in pairwise(cuts(tokens.shape[1])):
        piece, left = tokens[:, start:stop], (lengths - start).clamp(0, stop - start)
        out, state, stats = model(piece, state, left)
        logits.append(out)
        surprise.append(stats.surprise)
        written.append(stats.written)
        nonfinite = nonfinite + stats.nonfinite
    return torch.cat(logits, 1), state, torch.cat(surprise, 1), torch.cat(written, 1), nonfinite


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("lengths", [[100, 100], [100, 37], [5, 0]], ids=str)
@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_a_call_equals_its_pieces_bit_for_bit(model, mode, lengths):
    read = Pipeline(model)
    tokens = torch.randint(0, 50, (2, 220), generator=torch.Generator().manual_seed(1))
    with mode():
        with one_thread():
            _, start, _ = model(tokens[:, :11], model.init_state(2), torch.tensor([11, 6]))
        kept = [t.clone() for t in tensors(start)]
        given = tokens[:, 11:111], start, torch.tensor(lengths)
        for _ in range(3):
            logits, state, stats = read(*given)
            with one_thread():
                expected = in_pieces(model, *given)
            inside = torch.arange(100) < given[2][:, None]
            assert torch.equal(logits[inside], expected[0][inside])
            assert torch.equal(stats.surprise[inside], expected[2][inside])
            assert torch.equal(stats.written[inside], expected[3][inside])
            assert torch.equal(stats.nonfinite, expected[4])
            for ours, theirs in zip(tensors(state), tensors(expected[1]), strict=True):
                assert torch.equal(ours, theirs)
        assert all(torch.equal(*pair) for pair in zip(kept, tensors(start), strict=True))


@pytest.mark.parametrize("length", [17, 24, 25, 40, 100])
def test_pieces_are_all_of_a_call_and_smaller_at_its_ends(length):
    sizes = [stop - start for start, stop in pairwise(cuts(length))]
    assert sum(sizes) == length and sizes[0] == PIECE // 2
    assert set(sizes[1:-1]) <= {PIECE} and 0 < sizes[-1] <= PIECE


def test_it_goes_on_from_its_own_state(model):
    read, tokens = Pipeline(model), torch.randint(0, 50, (1, 96))
    with torch.inference_mode():
        with one_thread():
            whole = model(tokens, model.init_state(1))[0]
        first, state, _ = read(tokens[:, :48], model.init_state(1), torch.tensor([48]))
        second, state, _ = read(tokens[:, 48:], state, torch.tensor([48]))
    assert state.position.tolist() == [96]
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)


def test_workers_are_used_where_they_can_be(model, monkeypatch):
    read, tokens, asked = Pipeline(model), torch.randint(0, 50, (1, 48)), []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: asked.append(1) or forward(*a, **k))
    length = torch.tensor([48])
    with torch.no_grad():
        read(tokens, model.init_state(1), length)
        assert not asked
        read(tokens[:, :PIECE], model.init_state(1), torch.tensor([PIECE]))
        with one_thread():
            read(tokens, model.init_state(1), length)
    logits, _, _ = read(tokens, model.init_state(1), length)
    assert len(asked) == 3 and logits.requires_grad


def test_what_goes_wrong_in_a_worker_is_raised_and_threads_are_as_before(model, monkeypatch):
    read, tokens = Pipeline(model), torch.randint(0, 50, (1, 96))
    given = tokens, model.init_state(1), torch.tensor([96])

    def broken(*_):
        raise RuntimeError("out of memory")

    with torch.no_grad():
        expected = read(*given)[0]
        monkeypatch.setattr(model.blocks[1], "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            read(*given)
        assert torch.get_num_threads() == 2
        monkeypatch.undo()
        monkeypatch.setattr(pipeline, "PIECE", PIECE)
        assert torch.equal(read(*given)[0], expected)


def test_bad_calls_are_refused_as_by_the_model(model):
    with torch.no_grad(), pytest.raises(ValueError, match="token ids must be from 0 to 49"):
        Pipeline(model)(torch.full((1, 48), 50), model.init_state(1), torch.tensor([48]))
