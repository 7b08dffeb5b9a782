"""A scan that takes written-out gradients gives those of the scan that leaves them to autograd."""

from __future__ import annotations

import pytest
import torch

from wakesleep.ttl import memory_scan
from wakesleep.ttl.grid import make_grid
from wakesleep.ttl.memory import MemoryConfig, NeuralMemory

CHUNK, DIM, HEADS = 4, 12, 2


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("lengths", [(11, 11), (11, 6), (3, 9)])
def test_gradients_of_ragged_lanes_are_those_of_autograd(momentum, lengths, monkeypatch):
    memory = NeuralMemory(MemoryConfig(momentum=momentum), DIM, HEADS, 6, CHUNK).double()
    x = torch.randn(2, 11, DIM, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor(lengths)
    live = torch.arange(11) < lengths[:, None]
    taken, original = [], memory_scan.mlp_chunk
    monkeypatch.setattr(memory_scan, "mlp_chunk", lambda *a: taken.append(1) or original(*a))

    def gradients():
        grid = make_grid(torch.zeros(2, dtype=torch.int64), lengths, CHUNK, 11)
        y, state, _ = memory(x, memory.init_state(2), grid, live)
        loss = y[live].square().sum() + sum(w.square().sum() for w in state.weights)
        return torch.autograd.grad(loss, [x, *memory.parameters()])

    fast = gradients()
    assert len(taken) == max(lengths) // CHUNK  # every chunk that is complete in some lane
    monkeypatch.setattr(memory_scan, "_written_out", lambda *_: False)
    for a, b in zip(fast, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
