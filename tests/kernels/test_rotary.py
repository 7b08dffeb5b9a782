"""Turning backwards by factors against turning each pair of dimensions."""

from __future__ import annotations

import pytest
import torch

from wakesleep.kernels.rotary import backward_factors, rotary_table, rotate, swapped


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [2, 6, 16])
def test_factors_turn_backwards_to_the_same_bits(dtype, dims):
    draw = torch.Generator().manual_seed(dims)
    turns = rotary_table(500, dims, 10_000.0, torch.zeros(0, dtype=dtype))
    x = torch.randn(2, 3, 500, dims, generator=draw, dtype=torch.float64).to(dtype)
    near, across = backward_factors(turns)
    assert torch.equal(x * near + swapped(x) * across, rotate(x, turns, backwards=True))
    assert torch.equal(swapped(swapped(x)), x)
