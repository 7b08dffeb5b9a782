"""An MLP memory over all chunks of a call, as a Triton kernel, with its gradient.

Of the forward pass the stacks at the start of each chunk are kept. The backward pass goes through
the chunks from the last to the first and computes each of them again (`mlp_chunk_backward`); what
only gates and keys decide is planned again for all at once, and differentiated by autograd.

Shapes: N chunks, X = lanes * heads, B lanes, C chunk, R tokens that read, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wakesleep.kernels.memory_chunk import MLPMemory, Plan, Stacks, plan_chunks
from wakesleep.kernels.mlp_chunk import mlp_chunk_backward
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
    inputs = (q, k, v, keep, eta, step, live, closed)
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
    q, k, v, *gates, live, closed = inputs
    leaves, plan = _planned(memory, q, k, *gates, live)
    slow, of_chunks = [0.0] * 4, []
    heads = k.shape[1] // closed.shape[1]
    for n in reversed(range(len(k))):
        lanes = closed[n].repeat_interleave(heads)[:, None, None]
        grads = mlp_chunk_backward(
            memory, (starts[0][n], starts[1][n]), None if q is None else q[n], k[n], v[n],
            Plan(*(p[n].detach() for p in plan)), None if dy is None else dy[n],
            tuple(None if d is None else d.where(lanes, 0) for d in d_after),
        )  # fmt: skip
        slow = [total + d for total, d in zip(slow, grads[:4], strict=True)]
        d_after = [
            d if later is None else d + later.where(~lanes, 0)
            for d, later in zip(grads[4:6], d_after, strict=True)
        ]
        of_chunks.append(grads[6:])
    dq, dk, dv, *d_plan = map(_stacked, zip(*reversed(of_chunks), strict=True))
    fields, d_plan = zip(*(x for x in zip(plan, d_plan, strict=True) if x[1] is not None),
                         strict=True)  # fmt: skip
    d_leaves = iter(torch.autograd.grad(fields, leaves, d_plan))
    dk = dk + next(d_leaves)
    d_gates = [None if gate is None else next(d_leaves) for gate in gates]
    return [*slow, *d_after, dq, dk, dv, *d_gates, None, None]


def _planned(
    memory: MLPMemory, q: Tensor | None, k: Tensor, keep: Tensor, eta: Tensor | None,
    step: Tensor, live: Tensor,
) -> tuple[list[Tensor], Plan]:  # fmt: skip
    """Plans of all chunks, and what of k, keep, eta and step they depend on."""
    with torch.enable_grad():
        k, keep, eta, step = (
            None if t is None else t.detach().requires_grad_() for t in (k, keep, eta, step)
        )
        plan = plan_chunks(memory.plan, k, keep, eta, step, live)
        if q is not None:
            first = k.shape[2] - q.shape[2]
            plan = plan._replace(read=plan.read[:, :, first:], mix=plan.mix[:, :, first:])
    return [t for t in (k, keep, eta, step) if t is not None], plan


def _stacked(grads: tuple[Tensor | None, ...]) -> Tensor | None:
    """Those of all chunks; 0 where a chunk has none, None if no chunk has any."""
    known = [g for g in grads if g is not None]
    if not known:
        return None
    return torch.stack([torch.zeros_like(known[0]) if g is None else g for g in grads])
