"""The chunk form of the neural memory against the token loop, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from wakesleep.kernels import memory_reference as reference
from wakesleep.kernels.memory_chunk import (
    MatrixMemory,
    MLPMemory,
    Plan,
    key_overlaps,
    plan_chunk,
    read_rows,
    step_bound,
    take_rows,
)
from wakesleep.kernels.memory_reference import Rule, Tokens, memory_loop

C, K, HIDDEN, CHUNKS = 5, 4, 6, 3
T = C * CHUNKS
CASES = [(kind, momentum, limit) for kind in ("matrix", "mlp") for momentum in (True, False)
         for limit in (math.inf, 2.0)]  # fmt: skip
cases = pytest.mark.parametrize(("kind", "momentum", "limit"), CASES)


def double(*shape, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).requires_grad_()


def make(kind, momentum, limit, chunk=C, num_tokens=T):
    """A rule, its start (learned weights, momentum) and tokens, all leaves that take gradients."""
    shapes = [(K, K)] if kind == "matrix" else [(K, HIDDEN), (HIDDEN, K)]
    base, learned, speed = (tuple(double(*s, scale=a) for s in shapes) for a in (1.0, 0.3, 0.1))
    norm = () if kind == "matrix" else (double(K), double(K, scale=0.1))
    q, k = (F.normalize(double(num_tokens, K), dim=-1).detach().requires_grad_() for _ in range(2))
    gates = [torch.rand(num_tokens, dtype=torch.float64).requires_grad_() for _ in range(3)]
    tokens = Tokens(q, k, double(num_tokens, K), gates[0], gates[1] if momentum else None,
                    gates[2], torch.ones(num_tokens, dtype=torch.bool))  # fmt: skip
    return Rule(chunk, 0.5, limit, base, *norm), (learned, speed), tokens


def chunk_memory(rule):
    """The rule for a batch of one chunk."""
    base = tuple(w[None] for w in rule.base)
    if rule.gamma is None:
        return MatrixMemory(rule.chunk, rule.max_step, rule.limit, base)
    norm = rule.gamma[None, None], rule.bias[None, None]
    return MLPMemory(rule.chunk, rule.max_step, rule.limit, base, *norm)


def by_chunks(rule, start, tokens):
    """The same as `memory_loop`, one chunk after another."""
    memory, momentum = chunk_memory(rule), tokens.eta is not None
    parts = zip(*start, strict=True)
    stacks = tuple(torch.cat(p if momentum else p[:1])[None] for p in parts)
    y = []
    for at in range(0, len(tokens.k), rule.chunk):
        piece = Tokens(*(None if t is None else t[None, at : at + rule.chunk] for t in tokens))
        plan = memory.plan(piece.k, piece.keep, piece.eta, piece.step, piece.written)
        weights = memory.weights(stacks)
        errors, _ = memory.errors(weights, piece.k, piece.v)
        steps = memory.steps(weights, plan, errors)
        y.append(memory.read(stacks, piece.q, piece.k, plan, errors, steps)[0])
        stacks = memory.write(stacks, plan, errors, steps)
    halves = [s[0].tensor_split(2 if momentum else 1) for s in stacks]
    speed = tuple(h[1] for h in halves) if momentum else start[1]
    return torch.cat(y), tuple(h[0] for h in halves), speed


def assert_same(a, b, tolerance=1e-10):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def flat(result):
    y, learned, speed = result
    return [y, *learned, *speed]


@cases
def test_reads_weights_and_momentum_equal_the_token_loop(kind, momentum, limit):
    inputs = make(kind, momentum, limit)
    assert_same(flat(by_chunks(*inputs)), flat(memory_loop(inputs[0], *inputs[1], inputs[2])))


@cases
def test_outer_gradients_equal_those_of_the_token_loop(kind, momentum, limit):
    rule, start, tokens = make(kind, momentum, limit)
    leaves = [*rule.base, *rule[4:], *start[0], *(start[1] if momentum else ()), *tokens[:6]]
    leaves = [leaf for leaf in leaves if leaf is not None]

    def gradients(result):
        probes = torch.Generator().manual_seed(1)
        weighted = [(x * torch.randn(x.shape, generator=probes).double()).sum() for x in result]
        return torch.autograd.grad(sum(weighted), leaves)

    fast = gradients(flat(by_chunks(rule, start, tokens)))
    assert_same(fast, gradients(flat(memory_loop(rule, *start, tokens))))
    assert all(g.abs().max() > 1e-6 for g in fast)


@cases
def test_a_token_that_is_not_written_is_deleted(kind, momentum, limit):
    """Only reads see that it is there, and they see the weights of the last written token."""
    rule, start, tokens = make(kind, momentum, limit, num_tokens=C)
    skipped = tokens._replace(written=torch.tensor([False, True, False, True, False]))
    y, *after = by_chunks(rule, start, skipped)
    assert_same(flat((y, *after)), flat(memory_loop(rule, *start, skipped)))
    there = skipped.written
    short = Tokens(*(None if t is None else t[there] for t in tokens))
    short_y, *short_after = by_chunks(rule, start, short)
    assert_same(flat((y[there], *after)), flat((short_y, *short_after)))
    first = chunk_memory(rule)
    stand = tuple((b + w)[None] for b, w in zip(rule.base, start[0], strict=True))
    torch.testing.assert_close(y[:1], first.apply(stand, tokens.q[None, :1])[0])


@cases
def test_packing_the_written_tokens_changes_nothing(kind, momentum, limit):
    rule, start, tokens = make(kind, momentum, limit, num_tokens=C)
    written = torch.tensor([False, True, True, False, True])
    y, *_ = by_chunks(rule, start, tokens._replace(written=written))
    memory, index = chunk_memory(rule), written.nonzero().view(1, -1)
    parts = zip(*start, strict=True)
    stacks = tuple(torch.cat(p if momentum else p[:1])[None] for p in parts)
    gates = [None if t is None else t[None][:, index[0]] for t in tokens[3:6]]
    k, v = (take_rows(t[None], index) for t in (tokens.k, tokens.v))
    plan = memory.plan(k, *gates, torch.ones_like(index, dtype=torch.bool))
    plan = read_rows(plan, written.cumsum(0)[None])
    weights = memory.weights(stacks)
    errors, _ = memory.errors(weights, k, v)
    steps = memory.steps(weights, plan, errors)
    packed = memory.read(stacks, tokens.q[None], k, plan, errors, steps)[0]
    torch.testing.assert_close(packed, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["matrix", "mlp"])
@pytest.mark.parametrize(
    ("keep", "eta", "step"), [(0, 0, 1), (1, 1, 1), (1, 0, 0), (0, 1, 1), (1, 0.9, 1), (0.5, 0, 1)]
)
def test_gates_may_be_exactly_zero_or_one(kind, keep, eta, step):
    """Alone, and mixed with ordinary gates; the logarithm of 0 must not show."""
    rule, start, tokens = make(kind, True, math.inf)
    some = torch.rand(T) < 0.5
    for mask in (torch.ones(T, dtype=torch.bool), some):
        ends = [torch.where(mask, float(g), old.detach()) for g, old in
                zip((keep, eta, step), tokens[3:6], strict=True)]  # fmt: skip
        exact = Tokens(*tokens[:3], *ends, tokens.written)
        assert_same(flat(by_chunks(rule, start, exact)), flat(memory_loop(rule, *start, exact)))


@pytest.mark.parametrize("limit", [math.inf, 1.0])
def test_inner_gradient_equals_autograd(limit):
    """One written token with a known step: what the write adds is that step times the gradient."""
    rule, start, tokens = make("mlp", False, limit, chunk=1, num_tokens=1)
    ones = tokens.keep.detach() * 0 + 1
    tokens = tokens._replace(keep=ones, step=ones)
    _, after, _ = by_chunks(rule, start, tokens)
    weights = tuple((b + w).detach() for b, w in zip(rule.base, start[0], strict=True))
    gradient = reference.inner_gradient(rule, weights, tokens.k[0], tokens.v[0])
    own = reference.overlap(rule, weights, tokens.k[0], tokens.k[0])
    theta = min(rule.max_step / max(1.0, own), 1 / own)
    moved = [old - new for old, new in zip(start[0], after, strict=True)]
    assert_same(moved, [theta * g for g in gradient])


@cases
def test_a_later_token_changes_nothing_before_it(kind, momentum, limit):
    rule, start, tokens = make(kind, momentum, limit, num_tokens=C)
    strong = rule._replace(base=tuple(20 * w for w in rule.base))
    y, *_ = by_chunks(strong, start, tokens)
    for t in range(1, C):
        other = Tokens(*(None if x is None else x.detach().clone() for x in tokens))
        for x in (other.q, other.k, other.v):
            x[t:] = torch.randn_like(x[t:])
        for x in other[3:6]:
            if x is not None:
                x[t:] = torch.rand_like(x[t:])
        other.written[t:] = False
        changed, *_ = by_chunks(strong, start, other)
        torch.testing.assert_close(changed[:t], y[:t], rtol=0, atol=0)
        assert not torch.equal(changed[t], y[t])


def worst_growth(k, chunk):
    """Largest eigenvalue of diag(theta)^1/2 K K^T diag(theta)^1/2 with the bound's own steps."""
    overlaps = (k @ k.mT).abs().tril()
    theta = step_bound(overlaps.diagonal(0, 1, 2), overlaps.sum(-1), chunk, 1.0)
    root = theta.sqrt()
    return torch.linalg.eigvalsh(root[:, :, None] * (k @ k.mT) * root[:, None, :])[:, -1]


def test_step_bound_keeps_a_chunk_contracting():
    """Steps below 2 / eigenvalue contract; the bound stays under 1, also after an ascent on it."""
    n = 32
    seeds = [double(4, 1, 8) + scale * double(4, n, 8) for scale in (0.0, 0.1, 1.0)]
    raw = torch.cat(seeds).detach().requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(60):
        growth = worst_growth(F.normalize(raw, dim=-1), n)
        assert growth.max() <= 1
        optimizer.zero_grad()
        (-growth.sum()).backward()
        optimizer.step()
    assert growth.max() > 0.8  # the bound is not loose by an order of magnitude


def test_plans_of_many_chunks_are_the_plans_of_each():
    gates = [torch.rand(3, C, dtype=torch.float64) for _ in range(3)]
    k, written = double(3, C, K).detach(), torch.rand(3, C) < 0.7
    together = plan_chunk(k, *gates, written, key_overlaps)
    for n in range(3):
        at = slice(n, n + 1)
        alone = plan_chunk(k[at], *(g[at] for g in gates), written[at], key_overlaps)
        assert_same(Plan(*(t[at] for t in together)), alone, 0)


def test_float32_stays_close_to_float64_over_many_chunks():
    rule, start, tokens = make("mlp", True, 2.0, num_tokens=C * 200)

    def cast(part, dtype):
        if isinstance(part, torch.Tensor):
            return part.detach().to(dtype) if part.is_floating_point() else part
        return tuple(cast(x, dtype) for x in part) if isinstance(part, tuple) else part

    def run(dtype):
        inputs = Rule(*cast(rule, dtype)), cast(start, dtype), Tokens(*cast(tokens, dtype))
        return by_chunks(*inputs)[0].double()

    torch.testing.assert_close(run(torch.float32), run(torch.float64), rtol=1e-4, atol=1e-4)
