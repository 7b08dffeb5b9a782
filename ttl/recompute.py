"""Activations that are computed again in the backward pass instead of being kept until then.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the same results and gradients, run twice, of which only inputs are kept.

    It must give the same results when it is called again: no random numbers, and nothing that it
    looks at may have been changed in place since.
    """
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def recomputed_of_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `recomputed`, at less cost, for a function of the tensors in its arguments alone.

    No gradient reaches a tensor that `function` finds elsewhere, and every floating-point output
    counts as depending on every input. Arguments and results are tuples, nested as one likes.
    """

    def call(*args: Any) -> Any:
        leaves, form = tree_flatten(args)
        made: list[Any] = []
        flat = _Again.apply(function, form, made, *leaves)
        return tree_unflatten(flat, made[0])

    return call


class _Again(torch.autograd.Function):
    """Flat arguments to flat results; their form is left in `made`."""

    @staticmethod
    def forward(ctx: Any, function: Any, form: Any, made: list[Any], *leaves: Any) -> tuple:
        flat, result = tree_flatten(function(*tree_unflatten(leaves, form)))
        made.append(result)
        ctx.function, ctx.form = function, form
        ctx.rest = [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in leaves))
        ctx.set_materialize_grads(False)
        device = next(x.device.type for x in leaves if isinstance(x, Tensor))
        ctx.autocast = partial(
            torch.autocast,
            device,
            enabled=torch.is_autocast_enabled(device),
            dtype=torch.get_autocast_dtype(device),
        )
        return tuple(flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        leaves, wanted = list(ctx.rest), []
        for i, t in enumerate(ctx.saved_tensors):
            if t is not None:
                leaves[i] = t.detach().requires_grad_(ctx.needs_input_grad[3 + i])
                if leaves[i].requires_grad:
                    wanted.append(i)
        with torch.enable_grad(), ctx.autocast():
            flat, _ = tree_flatten(ctx.function(*tree_unflatten(leaves, ctx.form)))
        pairs = [
            (y, g)
            for y, g in zip(flat, gradients, strict=True)
            if g is not None and y.requires_grad
        ]
        found: list[Tensor | None] = [None] * len(leaves)
        if pairs:
            inputs = [leaves[i] for i in wanted]
            outputs, given = zip(*pairs, strict=True)
            for i, g in zip(
                wanted, torch.autograd.grad(outputs, inputs, given, allow_unused=True), strict=True
            ):
                found[i] = g
        return None, None, None, *found
