"""What is computed again in the backward pass gives the gradients of what is kept."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from wakesleep.ttl.recompute import recomputed_of_tensors


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


def work(pair: Pair, weight: Tensor, rest: tuple[Tensor, float, None]):
    """Products, an input handed on, a result that is not differentiable, and a missing one."""
    _, factor, _ = rest
    y = torch.mm(pair.first, weight).tanh() * factor
    return Pair(y, None), (pair.second, y > 0), torch.mm(y, weight.mT)


def draw():
    numbers = torch.Generator().manual_seed(3)
    made = [torch.randn(6, 6, generator=numbers, requires_grad=True) for _ in range(4)]
    return Pair(*made[:2]), made[2], (made[3], 0.5, None)


def gradients(function, dtype: torch.dtype | None):
    pair, weight, rest = draw()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        (y, missing), (handed, sign), z = function(pair, weight, rest)
    assert missing is None and not sign.requires_grad
    loss = (y.float() * handed).sum() + (z.float().square() * sign).sum()
    found = torch.autograd.grad(loss, [*pair, weight, rest[0]], allow_unused=True)
    return [loss, *found]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_are_those_of_the_function(dtype):
    plain, again = (gradients(f, dtype) for f in (work, recomputed_of_tensors(work)))
    assert plain[-1] is None and again[-1] is None
    assert all(torch.equal(a, b) for a, b in zip(plain[:-1], again[:-1], strict=True))


def test_only_inputs_are_kept():
    arguments, kept = draw(), []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        recomputed_of_tensors(work)(*arguments)
    pair, weight, rest = arguments
    assert set(kept) == {t.data_ptr() for t in (*pair, weight, rest[0])}


def test_a_result_without_gradient_asks_for_none():
    pair, weight, rest = draw()
    (y, _), _, _ = recomputed_of_tensors(work)(Pair(pair.first.detach(), pair.second), weight, rest)
    assert torch.autograd.grad(y.sum(), weight)[0].abs().sum() > 0
    with torch.no_grad():
        assert not recomputed_of_tensors(work)(*draw())[2].requires_grad
