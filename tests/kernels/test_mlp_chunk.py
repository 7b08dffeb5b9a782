"""The written-out gradient of an MLP chunk against autograd through its methods, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from wakesleep.kernels.memory_chunk import MLPMemory
from wakesleep.kernels.mlp_chunk import mlp_chunk

X, C, K, HIDDEN = 3, 5, 4, 6
TOLERANCE = 1e-11
cases = pytest.mark.parametrize(
    ("momentum", "limit"), [(m, limit) for m in (True, False) for limit in (math.inf, 2.5)]
)


def leaf(draw, *shape, scale=1.0):
    numbers = torch.randn(*shape, generator=draw, dtype=torch.float64) * scale
    return numbers.requires_grad_()


def make(momentum, limit):
    """A memory, its stacks, tokens and gates (some of them 0 and 1), written flags, all leaves."""
    draw = torch.Generator().manual_seed(0)
    levels = 2 if momentum else 1
    base = leaf(draw, X, K, HIDDEN), leaf(draw, X, HIDDEN, K)
    memory = MLPMemory(C, 0.5, limit, base, leaf(draw, X, 1, K), leaf(draw, X, 1, K, scale=0.1))
    stacks = tuple(leaf(draw, X, levels * w.shape[1], w.shape[2], scale=0.3) for w in base)
    q, k = (F.normalize(leaf(draw, X, C, K), dim=-1).detach().requires_grad_() for _ in range(2))
    v = leaf(draw, X, C, K)
    gates = torch.rand(3, X, C, generator=draw, dtype=torch.float64)
    gates[:, 0, 1], gates[:, 0, 2] = 0.0, 1.0
    keep, step, eta = (gate.clone().requires_grad_() for gate in gates)
    written = torch.rand(X, C, generator=draw) > 0.2
    gates = keep, eta if momentum else None, step, written
    leaves = [*base, memory.gamma, memory.bias, *stacks, q, k, v, keep, step]
    return memory, stacks, (q, k, v), gates, [*leaves, *([eta] if momentum else [])]


def by_methods(memory, stacks, q, k, v, plan):
    weights = memory.weights(stacks)
    errors, norm = memory.errors(weights, k, v)
    steps = memory.steps(weights, plan, errors)
    y = memory.read(stacks, q, k, plan, errors, steps)
    return y, memory.write(stacks, plan, errors, steps), norm


def gradients(function, inputs, wanted=(0, 1, 2), readers=C):
    memory, stacks, (q, k, v), gates, leaves = inputs
    plan = memory.plan(k, *gates)
    plan = plan._replace(read=plan.read[:, -readers:], mix=plan.mix[:, -readers:])
    y, after, norm = function(memory, stacks, q[:, -readers:], k, v, plan)
    probes = torch.Generator().manual_seed(1)
    results = [y, *after]
    weighed = [(r * torch.randn(r.shape, generator=probes).double()).sum() for r in results]
    found = torch.autograd.grad(sum(weighed[i] for i in wanted), leaves, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]
    return [*results, norm], zeros


@cases
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,)])
def test_results_and_gradients_are_those_of_autograd(momentum, limit, wanted):
    inputs = make(momentum, limit)
    there, slow = gradients(by_methods, inputs, wanted)
    here, fast = gradients(mlp_chunk, inputs, wanted)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    if wanted == (0, 1, 2):
        assert all(g.abs().max() > 1e-6 for g in fast)


@cases
def test_so_are_they_where_the_last_tokens_alone_read(momentum, limit):
    inputs = make(momentum, limit)
    there, slow = gradients(by_methods, inputs, readers=2)
    here, fast = gradients(mlp_chunk, inputs, readers=2)
    assert here[0].shape[1] == 2
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@cases
def test_clipping_decides_in_both_directions(momentum, limit):
    """The case with a limit has rows on both sides of it; else it would show nothing."""
    memory, stacks, (_, k, v), _, _ = make(momentum, limit)
    _, norm = memory.errors(memory.weights(stacks), k, v)
    assert math.isinf(limit) or 0 < int((norm > limit).sum()) < norm.numel()


@cases
def test_only_what_goes_in_is_kept(momentum, limit):
    memory, stacks, tokens, gates, _ = make(momentum, limit)
    plan = memory.plan(tokens[1], *gates)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.add(t.data_ptr()), t)[1], lambda t: t
    ):
        mlp_chunk(memory, stacks, *tokens, plan)
    given = (*memory.base, memory.gamma, memory.bias, *stacks, *tokens, *plan)
    assert kept == {t.data_ptr() for t in given}


def test_neither_what_is_kept_nor_the_gradient_given_is_overwritten():
    """The backward pass works in place, in tensors of its own: a second one finds all as it was."""
    memory, stacks, tokens, gates, leaves = make(True, 2.5)
    y, after, _ = mlp_chunk(memory, stacks, *tokens, memory.plan(tokens[1], *gates))
    results = (y, *after)
    given = [torch.ones_like(r) for r in results]
    first, second = (
        torch.autograd.grad(results, leaves, given, retain_graph=True) for _ in range(2)
    )
    assert all(bool((g == 1).all()) for g in given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_backward_pass_under_autocast_is_the_same():
    inputs = make(True, 2.5)
    single = [t.detach().float().requires_grad_() for t in (*inputs[1], *inputs[2])]
    memory = inputs[0]._replace(
        base=tuple(w.float() for w in inputs[0].base),
        gamma=inputs[0].gamma.float(),
        bias=inputs[0].bias.float(),
    )
    gates = [g if g is None or g.dtype == torch.bool else g.float() for g in inputs[3]]

    def run(enabled):
        y, after, _ = mlp_chunk(
            memory, tuple(single[:2]), *single[2:], memory.plan(single[3], *gates)
        )
        loss = y.sum() + sum(a.square().sum() for a in after)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(loss, single)

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))
