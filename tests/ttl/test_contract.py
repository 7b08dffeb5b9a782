"""The contract table: every memory, store policy and way to combine keeps the same promises.

A new variant is one more row of ROWS. All rows run in float64 with memory weights scaled up, where
a leak of 1e-10 would show.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from wakesleep.ttl.checks import (
    assert_causal,
    assert_cut_invariant,
    assert_isolated,
    assert_truncates,
)
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import detach, flatten, map_state, named_tensors, nbytes, select
from wakesleep.ttl.store import StoreConfig

VOCAB, B, T, C = 61, 3, 57, 4


def make(memory=None, store=None, **kw) -> ModelConfig:
    parts = {
        "memory_layers": () if memory is None else (1,),
        "store_layers": () if store is None else (1, 2),
    }
    if store is not None and store.get("score", "").startswith("residual"):
        parts["store_layers"] = (1,)
    return ModelConfig(
        vocab_size=VOCAB,
        dim=24,
        num_layers=3,
        num_heads=2,
        head_dim=16,
        mlp_dim=32,
        window=8,
        chunk=C,
        memory=MemoryConfig(**(memory or {})),
        store=StoreConfig(**{"capacity": 12, "hidden": 8, **(store or {})}),
        **parts,
        **kw,
    )


ROWS = {
    "window only": make(),
    "persistent": make(num_persistent=3),
    "memory matrix": make({"kind": "matrix"}),
    "memory mlp": make({"kind": "mlp"}),
    "memory mlp without momentum": make({"kind": "mlp", "momentum": False}),
    "memory delta": make({"kind": "delta"}),
    "memory gated by surprise": make({"kind": "mlp", "gate_threshold": 1.0}),
    "store learned": make(store={"score": "learned"}),
    "store learned with quota": make(store={"score": "learned", "quota": True, "capacity": 32}),
    "store recency": make(store={"score": "recency"}),
    "store reservoir": make(store={"score": "reservoir"}),
    "store mass": make(store={"score": "mass"}),
    "store with newer keys first": make(store={"newer": True}),
    "store, fast weights of an mlp, newer keys first": make(
        store={"newer": True}, fast_layers=(2,), fast=FastConfig(kind="mlp", expansion=2)
    ),
    "store residual": make({"kind": "mlp"}, {"score": "residual"}),
    "store residual_z with quota": make(
        {"kind": "mlp"}, {"score": "residual_z", "quota": True, "capacity": 32}
    ),
    "mag, memory and store": make({"kind": "mlp"}, {}, combine="mag"),
    "mal, memory and store": make({"kind": "mlp"}, {}, combine="mal"),
    "fast weights": make(fast_layers=(0, 2)),
    "mag, memory, store and fast weights": make({"kind": "delta"}, {}, fast_layers=(1, 2)),
    "fast weights, an mlp": make(fast_layers=(0, 2), fast=FastConfig(kind="mlp", expansion=2)),
    "fast weights written awake": make(
        fast_layers=(0, 2), fast=FastConfig(write="always"), recent=8
    ),
    "mag, memory, store and fast weights written awake": make(
        {"kind": "mlp"}, {}, fast_layers=(1,), fast=FastConfig(write="always")
    ),
    "mac, memory": make({"kind": "mlp", "page": 8}, combine="mac"),
    "mac, memory, store, persistent": make(
        {"kind": "matrix", "page": 12}, {}, combine="mac", num_persistent=2
    ),
    "mac, memory and fast weights": make(
        {"kind": "mlp", "page": 8}, combine="mac", fast_layers=(1,)
    ),
    "mac, memory and fast weights written awake": make(
        {"kind": "mlp", "page": 8}, combine="mac", fast_layers=(1,), fast=FastConfig(write="always")
    ),
}


@pytest.fixture(params=ROWS.values(), ids=ROWS.keys())
def config(request) -> ModelConfig:
    return request.param


def build(config: ModelConfig, scale: float = 1.0) -> TTLModel:
    torch.manual_seed(7)
    model = TTLModel(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "memory" in name or "fast.gates" in name:
                parameter.mul_(scale)
            if name.endswith("attention.newer"):  # nothing at the start, or a leak would hide
                parameter.fill_(0.5)
    return model


def begin(model: TTLModel):
    """Lanes that have read nothing, but slept: their fast weights are anything but zero."""
    state, generator = model.init_state(B), torch.Generator().manual_seed(3)

    def wrote(block):
        s = torch.randn(block.fast.s.shape, generator=generator).to(block.fast.s.dtype)
        old = block.fast.old
        if old and len(s[0]):  # an MLP is asked for the keys that it holds
            k = torch.randn(old.k.shape, generator=generator).to(s.dtype)
            held = torch.arange(old.k.shape[2]) < 5
            position = torch.where(held, torch.arange(len(held)), -1).expand(old.position.shape)
            k, held = torch.where(held[:, None], k, 0.0), position >= 0
            old = old._replace(k=k, position=position.clone(), open=held)
        return block._replace(fast=block.fast._replace(s=s, old=old))

    return state._replace(blocks=tuple(map(wrote, state.blocks)))


def draw(seed: int, batch: int = B, length: int = T) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def distance(a, b) -> float:
    """Largest difference of two states, infinities of empty places aside."""
    worst = 0.0
    for (name, x), (_, y) in zip(named_tensors(a), named_tensors(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, name
        if x.numel():
            x, y = x.double(), y.double()
            worst = max(worst, torch.where(x == y, 0.0, (x - y).abs()).max().item())
    return worst


@torch.no_grad()
def test_any_cut_equals_one_call(config):
    model = build(config)
    # scores are float32 whatever the model's dtype, hence the tolerance
    cuts = [0, 1, 1, 4, 9, 20, 23, 24, 47, T]
    assert_cut_invariant(model, begin(model), draw(1), cuts, atol=1e-5)
    whole = model(draw(1), begin(model))[0]
    state, pieces = begin(model), []
    for a, b in itertools.pairwise([0, *cuts, T]):
        y, state, _ = model(draw(1)[:, a:b], state)
        pieces.append(y)
    assert (whole - torch.cat(pieces, 1)).abs().max() < 1e-10


@torch.no_grad()
def test_ragged_lanes_equal_separate_streams(config):
    model, x = build(config), draw(2)
    state, done = begin(model), [0] * B
    pieces = [[] for _ in range(B)]
    lengths_of_calls = [(5, 0, 9), (0, 3, 1), (4, 4, 4), (11, 1, 0), (2, 30, 13), (35, 19, 30)]
    for lengths in lengths_of_calls:
        tokens = draw(99, length=max(lengths))  # padding holds other tokens on purpose
        for b, n in enumerate(lengths):
            tokens[b, :n] = x[b, done[b] : done[b] + n]
        y, state, _ = model(tokens, state, torch.tensor(lengths))
        for b, n in enumerate(lengths):
            pieces[b].append(y[b, :n])
            done[b] += n
    assert done == [T] * B
    for b in range(B):
        fresh = begin(model)
        alone, after, _ = model(x[b : b + 1], select(fresh, torch.tensor([b])))
        assert (torch.cat(pieces[b]) - alone[0]).abs().max() < 1e-10
        assert distance(after, select(state, torch.tensor([b]))) < 1e-5


@torch.no_grad()
def test_no_output_depends_on_later_tokens(config):
    model = build(config, scale=20.0)
    assert_causal(model, begin(model), draw(3), draw(4), [1, 7, 8, 30, T - 1], atol=1e-9)


@torch.no_grad()
def test_lanes_do_not_see_each_other(config):
    model = build(config, scale=20.0)
    # a surprise gate gathers written tokens: as many rows as the fullest lane has
    atol = 1e-12 if config.memory.gate_threshold else 0.0
    for lane in range(B):
        assert_isolated(model, begin(model), draw(5), draw(6), lane, atol)


@torch.no_grad()
def test_reset_lane_equals_a_fresh_one(config):
    model = build(config)
    _, used, _ = model(draw(7), begin(model))
    mixed = model.reset(used, torch.tensor([False, True, False]))
    y, after, _ = model(draw(8), mixed)
    fresh_y, fresh, _ = model(draw(8), model.init_state(B))
    on_y, on, _ = model(draw(8), used)
    one = torch.tensor([1])
    assert (y[1] - fresh_y[1]).abs().max() < 1e-12
    assert distance(select(after, one), select(fresh, one)) < 1e-12
    rest = torch.tensor([0, 2])
    assert (y[rest] - on_y[rest]).abs().max() < 1e-12
    assert distance(select(after, rest), select(on, rest)) < 1e-12


@torch.no_grad()
def test_call_changes_nothing_in_the_state_it_was_given(config):
    model = build(config)
    _, state, _ = model(draw(9), begin(model))
    before = {name: t.clone() for name, t in named_tensors(state)}
    model(draw(10), state)
    for name, t in named_tensors(state):
        assert torch.equal(t, before[name]), name


def test_fast_form_equals_the_reference(config):
    model, x = build(config), draw(11)
    slow, slow_state, _ = model(x, begin(model))  # with gradients: other forms
    with torch.no_grad():
        fast, fast_state, _ = model(x, begin(model))
    assert (slow - fast).abs().max() < 1e-10
    assert distance(detach(slow_state), fast_state) < 1e-5


def test_every_parameter_gets_a_gradient(config):
    model, x = build(config), draw(12)
    y, state, _ = model(x, begin(model))
    taught = [s.score[s.position >= 0].sum() for s in (b.store for b in state.blocks) if s]
    (y.square().mean() + sum(taught)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_what_blind_tokens_predict_comes_from_the_memories_alone(config):
    """A token far behind in the window changes nothing, unless a memory or a page brings it."""
    model, x = build(config), draw(17, length=3 * C)
    other = x.clone()
    other[:, 0] = (other[:, 0] + 1) % VOCAB
    blind = torch.zeros_like(x, dtype=torch.bool)
    blind[0] = True
    a, b = (model(tokens, begin(model), blind=blind)[0] for tokens in (x, other))
    lasts = (a - b).abs().amax(-1)[:, -1]
    brought = config.memory_layers or (config.fast_layers and config.fast.write == "always")
    assert (lasts[0] > 0) == bool(brought) and (lasts[1:] > 0).all()
    pieces, state = [], begin(model)
    for start in range(0, 3 * C, 3):
        here = slice(start, start + 3)
        y, state, _ = model(x[:, here], state, blind=blind[:, here])
        pieces.append(y)
    assert (torch.cat(pieces, 1) - a).abs().max() < 1e-9


def two_calls(config, recompute: bool):
    """Losses, final state and gradients of two calls, and the bytes kept for the backward pass."""
    model, x, kept = build(config), draw(12), {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, state, _ = model(x[:, :30], begin(model), recompute=recompute)
        z, state, _ = model(x[:, 30:], state, recompute=recompute)
    (y.square().mean() + z.square().mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y, "z": z, **dict(named_tensors(detach(state))), **gradients}, sum(kept.values())


def test_what_is_computed_again_is_the_same_and_less_is_kept(config):
    (plain, much), (again, little) = two_calls(config, False), two_calls(config, True)
    assert plain.keys() == again.keys()
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
    assert little < 0.9 * much


def test_carried_state_is_float32_under_bfloat16(config):
    torch.manual_seed(7)
    model = TTLModel(config).to(torch.bfloat16)
    with torch.no_grad():
        y, state, _ = model(draw(13), begin(model))
    assert y.isfinite().all()
    for name, t in named_tensors(state):
        low = name.rsplit(".", 1)[-1] in ("k", "v", "tail", "hidden", "page")
        if t.is_floating_point() and (not low or (".memory." in name and "tail" not in name)):
            assert t.dtype == torch.float32, name
        assert not t.is_floating_point() or t.nan_to_num(neginf=0.0).isfinite().all(), name


@torch.no_grad()
def test_bytes_of_the_state_do_not_grow(config):
    model = build(config)
    state = begin(model)
    sizes = []
    for i, length in enumerate((T, 3, 8 * C - (T + 3) % C, 20 * C)):  # the last one is aligned
        _, state, _ = model(draw(i, length=length), state)
        sizes.append(nbytes(state))
    assert sizes == [nbytes(begin(model))] * 4
    assert all(
        t.untyped_storage().nbytes() <= 2 * t.numel() * t.element_size() + 64
        for t in flatten(map_state(lambda t: t, state)).values()
        if t.numel()
    ), "a state tensor keeps a much larger buffer alive"


@torch.no_grad()
def test_rows_that_are_not_finite_are_masked_and_counted(config):
    model, x = build(config), draw(14) % (VOCAB - 1)
    x[:, 20] = VOCAB - 1
    clean = model(x, begin(model))
    model.embedding.weight[VOCAB - 1] = torch.nan
    broken, state, stats = model(x, begin(model), head=False)
    assert stats.nonfinite.tolist() == [1] * B and state.nonfinite.tolist() == [1] * B
    assert broken.isfinite().all()
    assert (clean[0][:, :20] - broken[:, :20] @ model.embedding.weight.T)[
        ..., : VOCAB - 1
    ].abs().max() < 1e-10
    _, after, stats = model(draw(15) % (VOCAB - 1), state, head=False)
    assert stats.nonfinite.tolist() == [0] * B
    for name, t in named_tensors(after):
        assert not t.is_floating_point() or t.nan_to_num(neginf=0.0).isfinite().all(), name


def test_detaching_the_state_truncates_the_gradient(config):
    model = build(config)
    for detached in (True, False):
        state, losses, leaves = begin(model), [], []
        hook = model.embedding.register_forward_hook(lambda _m, _i, out, to=leaves: to.append(out))
        for n in range(3):
            state = detach(state) if detached else state
            y, state, _ = model(draw(20 + n, length=10), state)
            losses.append(y.square().mean())
        hook.remove()
        if detached:
            assert_truncates(losses, leaves, reach=0)
        else:
            first = torch.autograd.grad(losses[1], leaves[0])[0]
            assert first.abs().max() > 0
