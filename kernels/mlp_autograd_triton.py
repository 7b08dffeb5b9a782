"""An MLP memory over all chunks of a call, as a Triton kernel, with its gradient.

Of the forward pass the stacks at the start of each chunk are kept. The backward pass goes through
the chunks from the last to the first and computes each of them again (`mlp_backward_triton`); what
gates decide is planned again for all at once, and differentiated by autograd.

Shapes: N chunks, X = lanes * heads, B lanes, C chunk, R tokens that read, K head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wakesleep.kernels.memory_chunk import MLPMemory, Stacks, plan_chunk, plan_chunks
from wakesleep.kernels.mlp_backward_triton import TokenGradients, mlp_backward_triton
from wakesleep.kernels.mlp_scan_triton import mlp_scan_triton


def mlp_scan(
    memory: MLPMemory,
    stacks: Stacks,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    eta: Tensor | None,
    step: Tensor,
    live: Tensor,
    closed: Tensor,
) -> tuple[Tensor | None, Stacks, Tensor]:
    """As `mlp_scan_triton`; a gradient flows through everything but the surprise."""
    gates = (None if gate is None else gate.float() for gate in (keep, eta, step))
    inputs = (q, k, v, *gates, live, closed)
    if not torch.is_grad_enabled():
        return mlp_scan_triton(memory, stacks, *inputs)
    numbers = (memory.chunk, memory.max_step, memory.limit)
    slow = (*memory.base, memory.gamma, memory.bias)
    y, first, second, surprise = _MLPScan.apply(numbers, *slow, *stacks, *inputs)
    return y, (first, second), surprise


class _MLPScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: tuple, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        memory, stacks, inputs = _named(numbers, tensors)
        starts = tuple(s.new_empty(len(inputs[1]), *s.shape) for s in stacks)
        y, end, surprise = mlp_scan_triton(memory, stacks, *inputs, starts=starts)
        ctx.numbers = numbers
        ctx.save_for_backward(*tensors[:4], *starts, *inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(surprise)
        return y, *end, surprise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *d_after: Tensor | None) -> tuple:
        parts = _named(ctx.numbers, ctx.saved_tensors)
        with torch.autocast(parts[2][1].device.type, enabled=False):  # as the forward pass was
            return None, *_backward(*parts, dy, list(d_after[:2]))


def _named(numbers: tuple, tensors: tuple) -> tuple[MLPMemory, Stacks, tuple]:
    """The memory, stacks or those of all chunks, and the other arguments of `mlp_scan`."""
    return MLPMemory(*numbers, tensors[:2], *tensors[2:4]), tensors[4:6], tensors[6:]


def _backward(
    memory: MLPMemory, starts: Stacks, inputs: tuple, dy: Tensor | None, d_after: list
) -> list[Tensor | None]:
    """Gradients of base, gamma, bias, stacks and the other arguments of `mlp_scan`."""
    q, k, _, keep, eta, step, live, _ = inputs
    places = tuple(
        torch.zeros_like(s[0]) if d is None else d.clone(memory_format=torch.contiguous_format)
        for s, d in zip(starts, d_after, strict=True)
    )
    q = None if dy is None else q
    found = mlp_backward_triton(memory, starts, places, dy, *inputs)
    gates = _gates_back(found, q, k, keep, eta, step, live)
    slow = found.slow.sum(0)[..., None, :].unbind(1)
    dq, dk, dv = (None if d is None else d.to(k.dtype) for d in found[:3])
    return [*found.base, *slow, *places, dq, dk, dv, *gates, None, None]


def _gates_back(
    found: TokenGradients, q: Tensor | None, k: Tensor, keep: Tensor, eta: Tensor | None,
    step: Tensor, live: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of keep, eta and step, through plans of all chunks that are made again."""
    C, levels, shares = k.shape[2], 1 if eta is None else 2, found.shares
    with torch.enable_grad():
        gates = [None if t is None else t.detach().requires_grad_() for t in (keep, eta, step)]
        plan = plan_chunks(_plan, k.float(), *gates, live)
        pairs = [
            (plan.write, shares[:, :, :levels, :C].mT),
            (plan.gate, shares[:, :, 2, :C]),
            (plan.carry[:, :, 0], shares[:, :, 3, :levels]),
        ]
        if levels == 2:
            pairs.append((plan.carry[:, :, 1, 1], shares[:, :, 3, 2]))
        if q is not None:
            R = q.shape[2]
            pairs.append((plan.read[:, :, C - R :], shares[:, :, 4 : 4 + levels, :R].mT))
            pairs.append((plan.mix[:, :, C - R :], found.mix[:, :, :R, :C]))
    fields, grads = zip(*pairs, strict=True)
    leaves = iter(torch.autograd.grad(fields, [t for t in gates if t is not None], grads))
    return [None if t is None else next(leaves) for t in gates]


_plan = partial(plan_chunk, products=lambda k, plan: plan.past)  # nothing here asks for products
