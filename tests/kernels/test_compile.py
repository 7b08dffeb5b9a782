"""Kernels have no control flow that depends on data: each is one graph, compiled once."""

from __future__ import annotations

import pytest
import torch

from wakesleep.kernels.admission import admit_fast, admit_reference
from wakesleep.kernels.convolution import short_convolution
from wakesleep.kernels.delta_rule import DeltaMemory
from wakesleep.kernels.memory_chunk import MatrixMemory, MLPMemory
from wakesleep.kernels.rotary import rotate
from wakesleep.kernels.softmax_read import softmax_read

X, C, K, HIDDEN, S = 3, 4, 6, 12, 8


def memory_chunk(memory, levels, shapes):
    """A whole chunk of a memory, and its arguments."""

    def run(stacks, q, k, v, keep, eta, step, written):
        plan = memory.plan(k, keep, eta, step, written)
        weights = memory.weights(stacks)
        errors, norm = memory.errors(weights, k, v)
        steps = memory.steps(weights, plan, errors)
        read = memory.read(stacks, q, k, plan, errors, steps)
        return read, norm, *memory.write(stacks, plan, errors, steps)

    def draw():
        stacks = tuple(torch.randn(X, levels * i, o) for i, o in shapes)
        q, k, v = torch.randn(3, X, C, K)
        keep, eta, step = torch.rand(3, X, C)
        return stacks, q, k, v, keep, eta if levels == 2 else None, step, torch.rand(X, C) < 0.7

    return run, draw


def admission(admit, *span):
    def draw():
        place = torch.rand(2, 2, S).argsort(-1)  # ranks or positions
        new = (torch.randn(2, 2, C),)
        if admit is admit_reference:
            new += ((S + torch.arange(C)).expand(2, 2, C),)
        return torch.randn(2, 2, S), place, *new

    return lambda *args: admit(*args, *span), draw


def kernels():
    matrix = MatrixMemory(C, 0.1, 1.0, (torch.randn(X, K, K),))
    base = torch.randn(X, K, HIDDEN), torch.randn(X, HIDDEN, K)
    mlp = MLPMemory(C, 0.1, 1.0, base, torch.ones(X, 1, K), torch.zeros(X, 1, K))
    return {
        "matrix": memory_chunk(matrix, 2, [(K, K)]),
        "mlp": memory_chunk(mlp, 2, [(K, HIDDEN), (HIDDEN, K)]),
        "delta": memory_chunk(DeltaMemory(), 1, [(K, K)]),
        "softmax_read": (
            lambda logits, v, sink, bias: softmax_read(
                logits.clone(), [v[:, :, :7], v[:, :, 7:]], sink, 3, bias
            ),
            lambda: [
                torch.randn(shape) for shape in ((2, 2, C, 12), (2, 2, 12, K), (2,), (2, 1, 1, 12))
            ],
        ),
        "short_convolution": (
            short_convolution,
            lambda: (
                torch.randn(2, 5, K),
                torch.randn(K, 4),
                torch.randn(2, 3, K),
                torch.randint(6, (2,)),
            ),
        ),
        "rotate": (rotate, lambda: (torch.randn(2, 5, K), torch.randn(5, 2, K // 2))),
        "admit_fast": admission(admit_fast),
        "admit_reference": admission(admit_reference, None),
        "admit with a quota": admission(admit_reference, torch.tensor([C, 2 * C])),
    }


@pytest.mark.parametrize("name", kernels())
def test_a_kernel_is_one_graph_for_all_numbers(name):
    torch._dynamo.reset()
    graphs, (kernel, draw) = [], kernels()[name]

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(kernel, fullgraph=True, backend=backend)
    for _ in range(20):
        args = draw()
        for a, b in zip(compiled(*args), kernel(*args), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == 1
