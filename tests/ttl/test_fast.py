"""Fast weights: mute at first, answers to written keys, and silence otherwise."""

import dataclasses

import pytest
import torch

from wakesleep.kernels.memory_reference import Tokens, delta_loop
from wakesleep.kernels.protected_write import protected_write
from wakesleep.ttl.fast import FastConfig, FastWeights, follow, no_fast_weights, read
from wakesleep.ttl.grid import make_grid, scatter
from wakesleep.ttl.key_space import unit_key
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import FastState

SIZES = {"vocab_size": 41, "dim": 24, "num_layers": 2, "num_heads": 2, "head_dim": 16}
CONFIG = ModelConfig(**SIZES, mlp_dim=16, window=8, chunk=4, memory_layers=(), store_layers=(1,))
SHUT = -1e4  # logit of a gate that is closed


def written(k, v) -> FastState:
    """Fast weights that hold the pairs k, v [H, n, K] of one lane."""
    weights = FastWeights(FastConfig(), 8, k.shape[0], k.shape[-1], 4)
    state = weights.init_state(1, 0, k)
    s, covariance = protected_write(state.s, state.covariance, k[None], v[None], lam=0.01)
    return state._replace(s=s, covariance=covariance)


def with_fast(state, fast):
    blocks = (b._replace(fast=f) for b, f in zip(state.blocks, fast, strict=True))
    return state._replace(blocks=tuple(blocks))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["matrix", "mlp"])
def test_fast_weights_say_nothing_until_they_are_written_and_behind_a_closed_gate(kind):
    torch.manual_seed(1)
    without = TTLModel(CONFIG)
    config = dataclasses.replace(CONFIG, fast_layers=(0, 1), fast=FastConfig(kind=kind))
    model = TTLModel(config)
    assert model.load_state_dict(without.state_dict(), strict=False).unexpected_keys == []
    tokens, state = torch.randint(41, (2, 30)), model.init_state(2)
    wanted = without(tokens, without.init_state(2))[0]
    assert torch.equal(model(tokens, state)[0], wanted)
    fast = [b.fast._replace(s=torch.randn_like(b.fast.s)) for b in state.blocks]
    written = with_fast(state, fast)
    if kind == "mlp":  # its keys are in the softmax, with what it gives for them
        assert torch.equal(model(tokens, written)[0], wanted)
        for f in fast:
            f.old.open[0, 1, 2], f.old.k[0, 1, 2] = True, torch.randn(16)
        told = model(tokens, with_fast(state, fast))[0]
        assert not torch.allclose(told[0], wanted[0])
        torch.testing.assert_close(told[1], wanted[1])  # of another lane
        return
    assert not torch.allclose(model(tokens, written)[0], wanted)
    for block in model.blocks:
        block.attention.fast.gates.bias.fill_(SHUT)
    assert torch.equal(model(tokens, written)[0], wanted)


@torch.no_grad()
def test_a_written_key_brings_its_value_and_any_other_one_as_much_of_it_as_it_is_like():
    k, v = unit_key(torch.randn(3, 12, 64)), torch.randn(3, 12, 64)
    state = written(k, v)
    told = read(5 * k.transpose(0, 1)[None], state)[0].transpose(0, 1)
    torch.testing.assert_close(told, v, atol=0.2, rtol=0)
    strange = torch.linalg.qr(k.mT, mode="complete").Q[..., 12:].mT  # at right angles to all keys
    assert read(strange.transpose(0, 1)[None], state).abs().max() < 1e-3
    half = (0.5 * k + 0.75**0.5 * unit_key(strange[:, :12])).transpose(0, 1)[None]
    torch.testing.assert_close(read(half, state)[0].transpose(0, 1), 0.5 * told)


@torch.no_grad()
def test_the_gate_is_a_head_s_and_a_token_s_own():
    weights, D, H, K = FastWeights(FastConfig(), 8, 3, 6, 4), 8, 3, 6
    q, x = torch.randn(2, 5, H, K), torch.randn(2, 5, D)
    state = weights.init_state(2, 0, q)._replace(s=torch.randn(2, H, K, K))
    grid, unused = make_grid(torch.zeros(2, dtype=torch.int64), torch.tensor([5, 5]), 4, 5), [q] * 3
    y = weights(x, q, *unused, state, grid)[0]
    gate = (1 + (x @ weights.gates.weight.T + weights.gates.bias).exp()).log()
    torch.testing.assert_close(y, gate[..., None] * read(q, state))
    torch.testing.assert_close(weights(0 * x, q, *unused, state, grid)[0], read(q, state))


@torch.no_grad()
def test_queries_of_length_zero_and_fast_weights_of_zeros_give_zeros():
    q = torch.randn(1, 3, 2, 8)
    state = no_fast_weights(q, 1, 2, 8)
    assert torch.equal(read(q, state), torch.zeros_like(q))
    full = state._replace(s=torch.randn(1, 2, 8, 8))
    assert torch.equal(read(0 * q, full), torch.zeros_like(q))


def test_what_fast_weights_read_from_in_bfloat16_is_float32():
    torch.manual_seed(2)
    weights = FastWeights(FastConfig(), 8, 2, 8, 4).to(torch.bfloat16)
    q, x = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16), torch.zeros(1, 3, 8, dtype=torch.bfloat16)
    state = weights.init_state(1, 4, q)
    assert state.s.dtype == state.covariance.dtype == torch.float32
    assert state.probes.k.dtype == torch.bfloat16
    state = state._replace(s=torch.randn(1, 2, 8, 8))
    grid = make_grid(torch.zeros(1, dtype=torch.int64), torch.tensor([3]), 4, 3)
    told = weights(x, q, q, q, q, state, grid)[0]
    exact = read(q.float(), state)
    assert told.dtype == torch.bfloat16
    torch.testing.assert_close(told.float(), exact, rtol=2**-6, atol=1e-3)


def test_a_state_without_fast_weights_is_refused_by_a_model_that_has_them():
    model = TTLModel(dataclasses.replace(CONFIG, fast_layers=(1,)))
    with pytest.raises(ValueError, match=r"layer 1 .*fast weights"):
        model(torch.zeros(1, 2, dtype=torch.int64), TTLModel(CONFIG).init_state(1))


@pytest.mark.parametrize("lam", [0.0, -1.0, float("inf"), float("nan")])
def test_a_ridge_that_is_none_is_refused(lam):
    with pytest.raises(ValueError, match=r"fast\.lam"):
        FastConfig(lam=lam)


def test_a_written_pair_is_known_by_its_position_wherever_the_store_has_put_it():
    asleep = torch.tensor([[[7, -1, 3, 90], [-1, -1, -1, -1]]])
    position = torch.tensor([[[90, 8, -1, 3, 2], [7, 3, -1, 90, 0]]])
    expected = torch.tensor([[[90, -1, -1, 3, -1], [-1] * 5]])
    assert torch.equal(follow(asleep, position), expected)
    assert torch.equal(follow(asleep[..., :0], position), torch.full_like(position, -1))


@pytest.mark.parametrize("lengths", [(11, 11), (7, 11)])
def test_what_is_written_awake_equals_the_delta_rule_token_by_token(lengths):
    """Reads, fast weights and their gradients; tokens that are not live write nothing."""
    torch.manual_seed(5)
    B, T, D, H, K, C = 2, 11, 8, 2, 6, 4
    weights = FastWeights(FastConfig(write="always"), D, H, K, C).double()
    like = torch.zeros(1, dtype=torch.float64)
    state = weights.init_state(B, 0, like)
    start = torch.randn(B, H, K, K, dtype=torch.float64, requires_grad=True)
    x = torch.randn(B, T, D, dtype=torch.float64)
    q, k, v = (torch.randn(B, T, H, K, dtype=torch.float64, requires_grad=True) for _ in range(3))
    live = torch.rand(B, T) < 0.8
    long = torch.tensor(lengths)
    grid = make_grid(torch.zeros(B, dtype=torch.int64), long, C, T)
    slots = [scatter(grid, t, t.new_zeros(B, C, *t.shape[2:])) for t in (k, v, live)]
    y, after = weights(x, q, *slots, state._replace(s=start), grid)
    opened = torch.nn.functional.softplus(weights.gates(x)[..., :H])
    gates = weights.gates(x)[..., H:].sigmoid().unflatten(-1, (2, H))
    probe, total, expected = torch.randn(B, T, H, K, dtype=torch.float64), 0.0, 0.0
    for b in range(B):
        n = lengths[b]
        total = total + (y[b, :n] * probe[b, :n]).sum()
        for h in range(H):
            here = (slice(0, n), h)
            tokens = Tokens(
                unit_key(q[b][here]),
                unit_key(k[b][here]),
                v[b][here],
                gates[b, :n, 0, h],
                None,
                gates[b, :n, 1, h],
                live[b, :n],
            )
            told, _ = delta_loop(start[b, h], tokens)
            shown = told * opened[b, :n, h, None]
            torch.testing.assert_close(y[b, :n, h], shown, rtol=0, atol=1e-12)
            expected = expected + (shown * probe[b, :n, h]).sum()
            done = Tokens(*(None if t is None else t[: n // C * C] for t in tokens))
            torch.testing.assert_close(after.s[b, h], delta_loop(start[b, h], done)[1])
    leaves = [start, q, k, v, weights.gates.weight, weights.gates.bias]
    found, wanted = (torch.autograd.grad(t, leaves, retain_graph=True) for t in (total, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
