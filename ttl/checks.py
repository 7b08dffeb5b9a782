"""Promises of a streaming module, as assertions that users can call on modules of their own.

A `step` is any callable `step(x, state) -> (y, state, ...)` with x [B, T, ...], y [B, T, ...] and
a state that is a tree of tensors whose first dimension is the lane. Scale a module's memory weights
up before the causal check (20 times, say): freshly initialised memories are too quiet to leak.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wakesleep.ttl.state import named_tensors

Step = Callable[[Tensor, Any], tuple]


def assert_causal(
    step: Step, state: Any, x: Tensor, other: Tensor, positions: Sequence[int], atol: float = 0.0
) -> None:
    """Outputs before position t do not change when x is replaced by `other` from t on."""
    y = step(x, state)[0]
    for t in positions:
        changed = step(torch.cat([x[:, :t], other[:, t:]], 1), state)[0]
        _assert_equal(f"output before position {t}", y[:, :t], changed[:, :t], atol)
        if torch.equal(y[:, t:], changed[:, t:]):
            raise AssertionError(f"nothing changed from position {t} on: the check sees nothing")


def assert_cut_invariant(
    step: Step, state: Any, x: Tensor, cuts: Sequence[int], atol: float = 0.0
) -> None:
    """One call equals the calls between `cuts` (positions 0..T), in outputs and final state."""
    whole, *after = step(x, state)
    pieces, part = [], state
    edges = [0, *cuts, x.shape[1]]
    for a, b in itertools.pairwise(edges):
        y, part, *_ = step(x[:, a:b], part)
        pieces.append(y)
    _assert_equal("output", whole, torch.cat(pieces, 1), atol)
    for (name, a), (_, b) in zip(named_tensors(after[0]), named_tensors(part), strict=True):
        _assert_equal(f"state {name}", a, b, atol)


def assert_isolated(
    step: Step, state: Any, x: Tensor, other: Tensor, lane: int = 0, atol: float = 0.0
) -> None:
    """Another input in one lane does not change the other lanes' outputs and states.

    atol is for modules whose matrix products change their size with what other lanes hold.
    """
    y, after, *_ = step(x, state)
    x = x.clone()
    x[lane] = other[lane]
    changed, changed_after, *_ = step(x, state)
    rest = [b for b in range(x.shape[0]) if b != lane]
    _assert_equal("output of the other lanes", y[rest], changed[rest], atol)
    for (name, a), (_, b) in zip(named_tensors(after), named_tensors(changed_after), strict=True):
        _assert_equal(f"state {name} of the other lanes", a[rest], b[rest], atol)
    if torch.equal(y[lane], changed[lane]):
        raise AssertionError(f"lane {lane} itself did not change: the check sees nothing")


def assert_truncates(losses: Sequence[Tensor], leaves: Sequence[Tensor], reach: int) -> None:
    """The loss of segment n sends a gradient to the leaf of segment n - reach and none before.

    leaves[n] is a tensor of segment n that requires a gradient (its embeddings, say).
    """
    for n in range(reach + 1, len(losses)):
        grads = torch.autograd.grad(
            losses[n], leaves[: n + 1], retain_graph=True, allow_unused=True
        )
        sizes = [0.0 if g is None else float(g.abs().max()) for g in grads]
        if sizes[n - reach] == 0.0:
            raise AssertionError(f"no gradient from segment {n} to segment {n - reach}: {sizes}")
        if any(sizes[: n - reach]):
            raise AssertionError(f"gradient from segment {n} to before {n - reach}: {sizes}")


def _assert_equal(what: str, a: Tensor, b: Tensor, atol: float) -> None:
    if a.shape != b.shape:
        raise AssertionError(f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if atol == 0.0 or not a.is_floating_point():
        if not torch.equal(a, b):
            raise AssertionError(f"{what} differs")
        return
    same = a == b  # infinities of empty places too
    worst = torch.where(same, 0.0, (a - b).abs()).max().item() if a.numel() else 0.0
    if not worst <= atol:
        raise AssertionError(f"{what} differs by {worst:.3g}, more than {atol:.3g}")
