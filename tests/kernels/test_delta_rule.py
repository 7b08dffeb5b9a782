"""The delta rule's chunk form against the token loop, in float64."""

import pytest
import torch
import torch.nn.functional as F

from wakesleep.kernels.delta_rule import DeltaMemory
from wakesleep.kernels.memory_reference import Tokens, delta_loop

C, K, CHUNKS = 6, 4, 3


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def make(num_tokens=C * CHUNKS):
    q, k = (F.normalize(double(num_tokens, K), dim=-1).detach().requires_grad_() for _ in range(2))
    keep, step = (torch.rand(num_tokens, dtype=torch.float64).requires_grad_() for _ in range(2))
    written = torch.ones(num_tokens, dtype=torch.bool)
    return double(K, K), Tokens(q, k, double(num_tokens, K), keep, None, step, written)


def by_chunks(state, tokens):
    memory, stacks, y = DeltaMemory(), (state[None],), []
    for at in range(0, len(tokens.k), C):
        piece = Tokens(*(None if t is None else t[None, at : at + C] for t in tokens))
        plan = memory.plan(piece.k, piece.keep, None, piece.step, piece.written)
        errors, _ = memory.errors(stacks, piece.k, piece.v)
        steps = memory.steps(stacks, plan, errors)
        y.append(memory.read(stacks, piece.q, piece.k, plan, errors, steps)[0])
        stacks = memory.write(stacks, plan, errors, steps)
    return torch.cat(y), stacks[0][0]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_reads_and_state_equal_the_token_loop():
    inputs = make()
    assert_same(by_chunks(*inputs), delta_loop(*inputs))


def test_outer_gradients_equal_those_of_the_token_loop():
    state, tokens = make()
    leaves = [state, *tokens[:4], tokens.step]
    probes = double(C * CHUNKS, K).detach(), double(K, K).detach()

    def gradients(result):
        loss = sum((x * p).sum() for x, p in zip(result, probes, strict=True))
        return torch.autograd.grad(loss, leaves)

    fast = gradients(by_chunks(state, tokens))
    assert_same(fast, gradients(delta_loop(state, tokens)))
    assert all(g.abs().max() > 1e-6 for g in fast)


def test_a_token_that_is_not_written_is_deleted():
    state, tokens = make(C)
    there = torch.tensor([True, False, True, True, False, True])
    y, after = by_chunks(state, tokens._replace(written=there))
    short = Tokens(*(None if t is None else t[there] for t in tokens))
    short_y, short_after = by_chunks(state, short)
    assert_same((y[there], after), (short_y, short_after))
    assert_same((y, after), delta_loop(state, tokens._replace(written=there)))


@pytest.mark.parametrize(("keep", "step"), [(0, 1), (1, 1), (1, 0), (0, 0)])
def test_gates_may_be_exactly_zero_or_one(keep, step):
    state, tokens = make()
    some = torch.rand(C * CHUNKS) < 0.5
    keep, step = (torch.where(some, float(g), old.detach()) for g, old in
                  ((keep, tokens.keep), (step, tokens.step)))  # fmt: skip
    tokens = tokens._replace(keep=keep, step=step)
    assert_same(by_chunks(state, tokens), delta_loop(state, tokens))


def test_a_full_step_on_a_unit_key_is_recalled_exactly():
    state, tokens = make(C)
    ones = torch.ones(C, dtype=torch.float64)
    _, after = by_chunks(state, tokens._replace(keep=ones, step=ones))
    torch.testing.assert_close(tokens.k[-1] @ after, tokens.v[-1], rtol=0, atol=1e-10)
