"""Passes of sleep over the last tokens: ordinary ones on hidden states; nothing else moves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import named_tensors
from wakesleep.ttl.store import StoreConfig

VOCAB, B, L, C = 41, 3, 16, 4
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    dim=24,
    num_layers=3,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    window=L,
    chunk=C,
    memory_layers=(1,),
    store_layers=(2,),
    fast_layers=(0, 2),
    recent=L,
    memory=MemoryConfig(kind="mlp"),
    store=StoreConfig(capacity=12, hidden=8),
    fast=FastConfig(write="always"),
)


def build(**options) -> TTLModel:
    torch.manual_seed(3)
    return TTLModel(replace(CONFIG, **options)).double()


def draw(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (B, length), generator=torch.Generator().manual_seed(seed))


def read(model, length=40, seed=0, state=None, lengths=None):
    state = model.init_state(B) if state is None else state
    return model(draw(length, seed), state, lengths, head=False)


def changed(a, b) -> set[str]:
    pairs = zip(named_tensors(a), named_tensors(b), strict=True)
    return {name for (name, x), (_, y) in pairs if not torch.equal(x, y)}


@torch.no_grad()
def test_the_last_tokens_are_kept_with_their_final_hidden_states():
    model = build()
    lengths = [(40, 3, 16), (0, 5, 9), (7, 7, 7)]
    state, seen = model.init_state(B), [[] for _ in range(B)]
    for turn, given in enumerate(lengths):
        y, state, _ = read(model, max(given), turn, state, torch.tensor(given))
        for b, n in enumerate(given):
            ids = draw(max(given), turn)[b, :n].tolist()
            seen[b] += list(zip(ids, y[b, :n], strict=True))
    told = model.norm(state.recent.hidden)
    for b in range(B):
        count = min(L, len(seen[b]))
        ids, hidden = zip(*seen[b][-count:], strict=True)
        assert state.recent.ids[b].tolist() == [-1] * (L - count) + list(ids)
        first = len(seen[b]) - count
        assert state.recent.position[b, L - count :].tolist() == list(range(first, first + count))
        torch.testing.assert_close(told[b, L - count :], torch.stack(hidden))


@torch.no_grad()
def test_a_pass_is_an_ordinary_one_on_hidden_states_that_changes_fast_weights_alone():
    model = build(memory_layers=())
    state = read(model)[1]
    after = model.sleep_pass(state, keep_power=1.0)
    wrote = {f"blocks.{layer}.fast.s" for layer in (0, 2)}
    assert changed(state, after) == {*wrote, "recent.hidden"}
    fresh = model.init_state(B)
    blocks = tuple(
        part._replace(window=empty.window)
        for part, empty in zip(state.blocks, fresh.blocks, strict=True)
    )
    begin = fresh._replace(blocks=blocks, position=state.position - L, lane=state.lane)
    given = state.recent.hidden / CONFIG.dim**0.5
    hook = model.embedding.register_forward_hook(lambda *_: given)
    y, ordinary, _ = model(state.recent.ids, begin, head=False)
    hook.remove()
    for layer in (0, 2):
        one, other = after.blocks[layer].fast.s, ordinary.blocks[layer].fast.s
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.norm(after.recent.hidden), y, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["matrix", "mlp", "delta"])
def test_memory_is_read_and_neither_it_nor_store_nor_window_moves(kind):
    model = build(memory=MemoryConfig(kind=kind))
    state = read(model)[1]
    after = model.sleep_pass(state)
    assert all(".fast.s" in name or name == "recent.hidden" for name in changed(state, after))
    never = build(memory=MemoryConfig(kind=kind, gate_threshold=math.inf)).sleep_pass(state)
    torch.testing.assert_close(after.recent.hidden, never.recent.hidden, rtol=0, atol=1e-10)
    block = state.blocks[1]
    other = block._replace(
        memory=block.memory._replace(weights=tuple(w + 0.3 for w in block.memory.weights))
    )
    moved = state._replace(blocks=(state.blocks[0], other, state.blocks[2]))
    assert not torch.allclose(model.sleep_pass(moved).recent.hidden, after.recent.hidden)


@torch.no_grad()
def test_what_was_there_decays_in_no_pass_or_in_each_as_it_is_told():
    """With steps of nearly zero, only decay is left."""
    model = build(memory_layers=(), store_layers=(), fast_layers=(0,))
    gates = model.blocks[0].attention.fast.gates
    gates.weight.zero_()
    gates.bias[2:] = torch.tensor([0.9, 1e-9]).logit().repeat_interleave(2)
    state = read(model)[1]
    block = state.blocks[0]
    start = torch.randn_like(block.fast.s)
    fast = block.fast._replace(s=start)
    state = state._replace(blocks=(block._replace(fast=fast), *state.blocks[1:]))
    for power in (0.0, 0.5, 1.0):
        s = model.sleep_pass(state, keep_power=power).blocks[0].fast.s
        torch.testing.assert_close(s, start * 0.9 ** (power * L), rtol=1e-5, atol=1e-6)


def test_gradient_goes_through_passes_to_every_weight_that_writes():
    model = build(memory_layers=(), store_layers=())
    state = read(model, length=16)[1]
    for _ in range(2):
        state = model.sleep_pass(state)
    y, _, _ = model(draw(4, seed=9), state)
    y.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_lanes_do_not_see_each_other_and_short_ones_sleep_over_what_they_have():
    model = build()
    short = read(model, 40, 0, lengths=torch.tensor([8, 40, 40]))[1]
    after = model.sleep_pass(short)
    tokens = draw(40)
    alone = model.init_state(1)
    alone = model(tokens[:1, :8], alone)[1]
    alone = model.sleep_pass(alone)
    for layer in (0, 2):
        one = alone.blocks[layer].fast.s[0]
        torch.testing.assert_close(after.blocks[layer].fast.s[0], one, rtol=0, atol=1e-10)
    assert all(t.isfinite().all() for name, t in named_tensors(after) if name.endswith(".s"))


@pytest.mark.parametrize(
    ("options", "length", "why"),
    [
        ({"recent": 0}, 16, r"recent=0"),
        ({"fast": FastConfig()}, 16, r"fast.write=asleep"),
        ({"fast_layers": ()}, 16, r"fast_layers \[\]"),
        (
            {"combine": "mac", "memory": MemoryConfig(kind="mlp", page=8)},
            16,
            r"combine=mac",
        ),
    ],
)
def test_states_that_cannot_sleep_are_refused(options, length, why):
    model = build(**options)
    with torch.no_grad():
        state = read(model, length)[1]
    with pytest.raises(ValueError, match=why):
        model.sleep_pass(state)


@pytest.mark.parametrize("recent", [-4, 6, 20])
def test_lengths_that_cannot_be_kept_are_refused(recent):
    with pytest.raises(ValueError, match="recent"):
        replace(CONFIG, recent=recent)
