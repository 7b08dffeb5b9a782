"""What calls leave ready for the next one: the same bits as without it, and nothing that moves."""

from __future__ import annotations

import pytest
import torch

from wakesleep.ttl import attention as attention_module
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import StreamState, named_tensors
from wakesleep.ttl.store import StoreConfig

W, C, S, VOCAB, BEFORE = 8, 4, 6, 31, 26

CONFIGS = {
    "scored by a head, an MLP asleep": {"fast_layers": (1,), "fast": FastConfig(kind="mlp")},
    "scored by mass, fast weights awake": {
        "store": StoreConfig(capacity=S, score="mass"),
        "fast_layers": (0, 1),
        "fast": FastConfig(write="always"),
    },
    "scored by the memory, with quotas": {
        "store": StoreConfig(capacity=S, score="residual_z", quota=True),
        "store_layers": (0, 1),
        "memory_layers": (0, 1),
        "memory": MemoryConfig(kind="delta"),
        "combine": "mal",
    },
    "pages": {
        "combine": "mac",
        "memory": MemoryConfig(page=2 * C, kind="matrix"),
        "num_persistent": 2,
    },
}
configs = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())


def begun(options, batch: int = 2) -> tuple[TTLModel, StreamState]:
    """A model, and lanes whose window and store are full; an MLP tells two pairs."""
    torch.manual_seed(4)
    given = {
        "memory_layers": (0,),
        "store_layers": (1,),
        "store": StoreConfig(capacity=S, hidden=8),
    }
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "head_dim": 16, "mlp_dim": 16}
    config = ModelConfig(vocab_size=VOCAB, **sizes, window=W, chunk=C, **(given | options))
    model = TTLModel(config)
    with torch.no_grad():
        _, state, _ = model(torch.randint(VOCAB, (batch, BEFORE)), model.init_state(batch))
    for block in state.blocks:
        if block.fast.old:
            block.fast.old.k.normal_()
            block.fast.s.normal_()
            block.fast.old.open[:, :, :2] = True
    return model, state


def assert_same_bits(ours, theirs):
    for (name, a), (_, b) in zip(named_tensors(ours), named_tensors(theirs), strict=True):
        assert torch.equal(a, b), name


@configs
@torch.no_grad()
def test_with_what_is_ready_every_call_gives_the_same_bits(options):
    model, state = begun(options)
    ready, plain = None, state
    for length in (1, 1, 1, 2, 1, 1, 1, 9, 1, 1, 1, 1, 4, 1, 1):
        x = torch.randint(VOCAB, (2, length))
        y, state, stats = model(x, state, ready=ready)
        expected, plain, _ = model(x, plain)
        assert torch.equal(y, expected)
        assert_same_bits(state, plain)
        ready = stats.ready


@configs
@torch.no_grad()
def test_one_state_can_go_on_twice(options):
    """What was left ready stays as it is, whatever is read on from it."""
    model, state = begun(options)
    x = torch.randint(VOCAB, (2, 2, 2 * C))
    _, state, first = model(x[0][:, :1], state)
    for tokens in (x[0], x[1]):
        now, plain, ready = state, state, first.ready
        for token in tokens.split(1, 1):
            y, now, stats = model(token, now, ready=ready)
            expected, plain, _ = model(token, plain)
            assert torch.equal(y, expected)
            ready = stats.ready
        assert_same_bits(now, plain)


@torch.no_grad()
def test_with_another_state_it_counts_for_nothing():
    model, state = begun({})
    x = torch.randint(VOCAB, (2, 1))
    _, state, stats = model(x, state)
    assert stats.ready is not None
    block = state.blocks[1]
    store = block.store._replace(k=block.store.k.flip(2), position=block.store.position.flip(2))
    other = state._replace(blocks=(state.blocks[0], block._replace(store=store)))
    y, after, _ = model(x, other, ready=stats.ready)
    expected, plain, _ = model(x, other)
    assert torch.equal(y, expected) and not torch.equal(y, model(x, state)[0])
    assert_same_bits(after, plain)


@torch.no_grad()
def test_it_spares_the_store_and_lasts_over_a_boundary(monkeypatch):
    model, state = begun({})
    made, ready, original = [], None, attention_module.BufferReader

    def spy(*args):
        made.append(args)
        return original(*args)

    monkeypatch.setattr(attention_module, "BufferReader", spy)
    for token in torch.randint(VOCAB, (2, 2 * C)).split(1, 1):
        _, state, stats = model(token, state, ready=ready)
        ready = stats.ready
    assert len(made) == 1


def test_calls_that_leave_nothing_ready():
    model, state = begun({})
    x = torch.randint(VOCAB, (2, C + 1))
    assert model(x[:, :1], state)[2].ready is None  # with gradients
    with torch.no_grad():
        assert model(x, state)[2].ready is None  # over a boundary
        assert model(x, state, torch.tensor([1, 2]))[2].ready is None  # lanes apart
        table = torch.arange(S).expand(2, -1)
        assert model(x[:, :1], state, rank_table=table)[2].ready is None
