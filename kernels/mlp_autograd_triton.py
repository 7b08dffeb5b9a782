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

from wakesleep.kernels.memory_chunk import Chunks, MLPMemory, Stacks, plan_chunk, plan_chunks
from wakesleep.kernels.mlp_backward_triton import TokenGradients, mlp_backward_triton
from wakesleep.kernels.mlp_scan_triton import mlp_scan_triton


def mlp_scan(
    memory: MLPMemory, stacks: Stacks, chunks: Chunks
) -> tuple[Tensor | None, Stacks, Tensor]:
    """As `mlp_scan_triton`; a gradient flows through everything but the surprise."""
    gates = (None if gate is None else gate.float() for gate in chunks[3:6])
    chunks = Chunks(*chunks[:3], *gates, *chunks[6:])
    if not torch.is_grad_enabled():
        return mlp_scan_triton(memory, stacks, chunks)
    numbers = (memory.chunk, memory.max_step, memory.limit)
    slow = (*memory.base, memory.gamma, memory.bias)
    y, first, second, surprise = _MLPScan.apply(numbers, *slow, *stacks, *chunks)
    return y, (first, second), surprise


class _MLPScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: tuple, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        memory, stacks, chunks = _named(numbers, tensors)
        starts = tuple(s.new_empty(len(chunks.k), *s.shape) for s in stacks)
        y, end, surprise = mlp_scan_triton(memory, stacks, chunks, starts=starts)
        ctx.numbers = numbers
        ctx.save_for_backward(*tensors[:4], *starts, *chunks)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(surprise)
        return y, *end, surprise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *d_after: Tensor | None) -> tuple:
        memory, starts, chunks = _named(ctx.numbers, ctx.saved_tensors)
        with torch.autocast(chunks.k.device.type, enabled=False):  # as the forward pass was
            return None, *_backward(memory, starts, chunks, dy, list(d_after[:2]))


def _named(numbers: tuple, tensors: tuple) -> tuple[MLPMemory, Stacks, Chunks]:
    """The memory, stacks or those of all chunks, and the tokens."""
    return MLPMemory(*numbers, tensors[:2], *tensors[2:4]), tensors[4:6], Chunks(*tensors[6:])


def _backward(
    memory: MLPMemory, starts: Stacks, chunks: Chunks, dy: Tensor | None, d_after: list
) -> list[Tensor | None]:
    """Gradients of base, gamma, bias, stacks and tokens."""
    places = tuple(
        torch.zeros_like(s[0]) if d is None else d.clone(memory_format=torch.contiguous_format)
        for s, d in zip(starts, d_after, strict=True)
    )
    found = mlp_backward_triton(memory, starts, places, dy, chunks)
    gates = _gates_back(found, chunks)
    slow = found.slow.sum(0)[..., None, :].unbind(1)
    dq, dk, dv = (None if d is None else d.to(chunks.k.dtype) for d in found[:3])
    return [*found.base, *slow, *places, dq, dk, dv, *gates, None, None]


def _gates_back(found: TokenGradients, chunks: Chunks) -> list[Tensor | None]:
    """Gradients of keep, eta and step, through plans of all chunks that are made again."""
    C, levels, shares = chunks.k.shape[2], 1 if chunks.eta is None else 2, found.shares
    with torch.enable_grad():
        gates = [None if t is None else t.detach().requires_grad_() for t in chunks[3:6]]
        plan = plan_chunks(_plan, chunks.k.float(), *gates, chunks.live)
        pairs = [
            (plan.write, shares[:, :, :levels, :C].mT),
            (plan.gate, shares[:, :, 2, :C]),
            (plan.carry[:, :, 0], shares[:, :, 3, :levels]),
        ]
        if levels == 2:
            pairs.append((plan.carry[:, :, 1, 1], shares[:, :, 3, 2]))
        if found.q is not None:
            R = found.q.shape[2]
            pairs.append((plan.read[:, :, C - R :], shares[:, :, 4 : 4 + levels, :R].mT))
            pairs.append((plan.mix[:, :, C - R :], found.mix[:, :, :R, :C]))
    fields, grads = zip(*pairs, strict=True)
    leaves = iter(torch.autograd.grad(fields, [t for t in gates if t is not None], grads))
    return [None if t is None else next(leaves) for t in gates]


_plan = partial(plan_chunk, products=lambda k, plan: plan.past)  # nothing here asks for products
