"""Run the chunks of a call through a neural memory, one after another.

A chunk's errors are taken at its start weights, which need the chunk before; all that does not
depend on weights is planned for the whole call at once. With a surprise gate it cannot be: which
tokens are written depends on the weights, so each chunk is planned when its errors are known, for
the written tokens only.

Shapes: N chunks, B lanes, H heads, X = B * H, C chunk, K head width.
"""

from __future__ import annotations

import math
from itertools import repeat
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from wakesleep.kernels.delta_rule import DeltaMemory
from wakesleep.kernels.dispatch import delta_rule_form, mlp_scan_form
from wakesleep.kernels.memory_chunk import (
    Chunks,
    MatrixMemory,
    MLPMemory,
    Plan,
    Stacks,
    Weights,
    plan_chunks,
    read_rows,
    take_rows,
)
from wakesleep.kernels.mlp_chunk import mlp_chunk
from wakesleep.ttl.recompute import recomputed_of_tensors

HORIZON = 4096  # tokens over which the running mean of surprise forgets

Memory = MatrixMemory | MLPMemory | DeltaMemory
Part = TypeVar("Part", bound=tuple)


class Scan(NamedTuple):
    y: Tensor | None  # [N, X, C, K]
    stacks: Stacks  # after the last closed chunk of each lane
    surprise: Tensor  # [N, X, C] step * |error at the chunk's start|, 0 where not live
    written: Tensor  # [N, B, C] bool
    mean: Tensor  # [B, 2] weight and running mean of surprise


def scan(
    memory: Memory,
    stacks: Stacks,
    chunks: Chunks,
    mean: Tensor,
    threshold: float = 0.0,
    recompute: bool = False,
) -> Scan:
    """Read and write all chunks; a chunk that is not closed leaves its lane's stacks alone.

    Args:
        threshold: write a token if its surprise exceeds this many running means of its lane as of
            the chunk's start; 0 = every live token, inf = none.
        mean: [B, 2], see `Scan`; it moves at closed chunks if the threshold needs it.
        recompute: keep the stacks between chunks, and do the rest again in the backward pass.
    """
    if isinstance(memory, DeltaMemory) and (chunks.q is None or chunks.q.shape == chunks.k.shape):
        tokens = [t for t in (chunks.q, chunks.k, chunks.v) if t is not None]
        if delta_rule_form(stacks[0], *tokens, gated=threshold > 0) == "triton":
            return _scan_delta(stacks, chunks, mean)
    if isinstance(memory, MLPMemory):
        tokens = [t for t in (chunks.k, chunks.v, chunks.q) if t is not None]
        if mlp_scan_form(stacks[0], *tokens, gated=threshold > 0) == "triton":
            return _scan_mlp(memory, stacks, chunks, mean)
    N = chunks.k.shape[0]
    plans = (
        [None] * N
        if threshold > 0
        else _apart(plan_chunks(memory.plan, *chunks[1:2], *chunks[3:7]))
    )
    step = recomputed_of_tensors(_step) if recompute else _step
    if _written_out(memory, chunks, threshold):
        step = _mlp_step
    steps = []
    for chunk, plan in zip(_apart(chunks), plans, strict=True):
        plan = None if plan is None else _of_last(plan, chunk.q)
        steps.append(step(_own(memory), stacks, chunk, plan, mean, threshold))
        stacks, mean = steps[-1].stacks, steps[-1].mean.detach()
    y = None if chunks.q is None else torch.stack([step.y for step in steps])
    surprise = torch.stack([step.surprise.detach() for step in steps])
    written = torch.stack([step.written for step in steps])
    return Scan(y, stacks, surprise, written, mean)


def _scan_delta(stacks: Stacks, chunks: Chunks, mean: Tensor) -> Scan:
    """All chunks of a delta rule at once, every live token written."""
    from wakesleep.kernels.delta_rule_triton import delta_rule_triton

    c = chunks
    of = (c.q, c.k, c.v, c.keep, c.step, c.live, c.closed)
    y, end, surprise = delta_rule_triton(stacks[0], *of)
    return Scan(y, (end,), surprise, c.live, mean)


def _scan_mlp(memory: MLPMemory, stacks: Stacks, chunks: Chunks, mean: Tensor) -> Scan:
    """All chunks of an MLP at once, every live token written."""
    from wakesleep.kernels.mlp_autograd_triton import mlp_scan

    y, stacks, surprise = mlp_scan(memory, stacks, chunks)
    return Scan(y, stacks, surprise, chunks.live, mean)


def _apart(parts: Part) -> list[Part]:
    """One tuple for each chunk. The gradient of each `part[n]` would be as large as all of them."""
    columns = [repeat(None) if part is None else part.unbind(0) for part in parts]
    return [type(parts)(*row) for row in zip(*columns, strict=False)]


def _of_last(plan: Plan, q: Tensor | None) -> Plan:
    """The plan for queries q [X, C, K] of the last tokens alone."""
    if q is None or q.shape[1] == plan.read.shape[1]:
        return plan
    return plan._replace(read=plan.read[:, -q.shape[1] :], mix=plan.mix[:, -q.shape[1] :])


def _own(memory: Memory) -> Memory:
    """Views for one chunk, so that its gradients are summed before those of all chunks are.

    So they are when a chunk is recomputed, and a sum in another order would have other last bits.
    """
    if not torch.is_grad_enabled():
        return memory
    return tree_map_only(Tensor, lambda t: t.view_as(t), memory)


def _written_out(memory: Memory, chunks: Chunks, threshold: float) -> bool:
    """Whether the gradient of a chunk is that of `mlp_chunk`, which keeps only what goes in."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # see `short_convolution`
        and isinstance(memory, MLPMemory)
        and chunks.q is not None
        and threshold == 0
    )


def _mlp_step(
    memory: MLPMemory, stacks: Stacks, chunk: Chunks, plan: Plan, mean: Tensor, threshold: float
) -> Scan:
    """As `_step`, for an MLP that writes every live token."""
    if not bool(chunk.closed.any()):  # nothing is written yet
        return _step(memory, stacks, chunk, plan, mean, threshold)
    y, after, norm = mlp_chunk(memory, stacks, chunk.q, chunk.k, chunk.v, plan)
    heads = chunk.k.shape[0] // chunk.live.shape[0]
    surprise = (chunk.step * norm).detach() * chunk.live.repeat_interleave(heads, 0)
    return Scan(y, _of_closed(after, stacks, chunk.closed), surprise, chunk.live, mean)


def _step(
    memory: Memory,
    stacks: Stacks,
    chunk: Chunks,
    plan: Plan | None,
    mean: Tensor,
    threshold: float,
) -> Scan:
    """One chunk, its fields without N; its plan, or None if a surprise gate decides."""
    k, written = chunk.k, chunk.live
    weights = memory.weights(stacks)
    errors, norm = memory.errors(weights, k, chunk.v)
    heads = k.shape[0] // written.shape[0]
    surprise = (chunk.step * norm).detach() * written.repeat_interleave(heads, 0)
    if plan is None:
        written = _select(surprise, chunk.live, mean, threshold)
        mean = _update_mean(mean, surprise, chunk.live, chunk.closed)
        k, errors, plan = _pack(memory, chunk, errors, written)
    y, stacks = _chunk(memory, stacks, weights, chunk, k, errors, plan)
    return Scan(y, stacks, surprise, written, mean)


def _chunk(
    memory: Memory,
    stacks: Stacks,
    weights: Weights,
    chunk: Chunks,
    k: Tensor,
    errors: NamedTuple,
    plan: Plan | None,
) -> tuple[Tensor | None, Stacks]:
    """Reads of a chunk and the stacks after it."""
    q = chunk.q
    if plan is None:  # nothing to be written
        return None if q is None else memory.apply(weights, q), stacks
    closed = chunk.closed
    advances = bool(closed.any())
    if q is None and not advances:
        return None, stacks
    steps = memory.steps(weights, plan, errors)
    y = None if q is None else memory.read(stacks, q, k, plan, errors, steps)
    if not advances:
        return y, stacks
    return y, _of_closed(memory.write(stacks, plan, errors, steps), stacks, closed)


def _of_closed(after: Stacks, before: Stacks, closed: Tensor) -> Stacks:
    """Stacks after a chunk that counts for the lanes `closed` [B] alone."""
    if bool(closed.all()):
        return after
    lanes = closed.repeat_interleave(before[0].shape[0] // closed.shape[0])[:, None, None]
    return tuple(torch.where(lanes, *pair) for pair in zip(after, before, strict=True))


def _select(surprise: Tensor, live: Tensor, mean: Tensor, threshold: float) -> Tensor:
    """Which tokens [B, C] are surprising enough to be written."""
    if math.isinf(threshold):
        return torch.zeros_like(live)
    return live & (_over_heads(surprise, live) > threshold * mean[:, 1:])


def _update_mean(mean: Tensor, surprise: Tensor, live: Tensor, closed: Tensor) -> Tensor:
    """Add a closed chunk's live tokens, written or not, to the running mean."""
    count = live.sum(1)
    total = _over_heads(surprise, live).sum(1)
    weight = mean[:, 0].clamp(max=HORIZON) + count
    value = mean[:, 1] + (total - count * mean[:, 1]) / weight.clamp(min=1)
    return torch.where(closed[:, None], torch.stack([weight, value], 1), mean)


def _over_heads(surprise: Tensor, live: Tensor) -> Tensor:
    """[X, C] to [B, C]."""
    return surprise.unflatten(0, (live.shape[0], -1)).mean(1)


def _pack(
    memory: Memory, chunk: Chunks, errors: NamedTuple, written: Tensor
) -> tuple[Tensor, NamedTuple, Plan | None]:
    """Keys, errors and plan of the written tokens alone, in their order; no plan if there are none.

    Lanes that write fewer tokens than the fullest one are filled up with unwritten ones.
    """
    k = chunk.k
    width = int(written.sum(1).max())
    if width == 0:
        return k, errors, None
    heads = k.shape[0] // written.shape[0]
    order = torch.argsort((~written).to(torch.uint8), dim=1, stable=True)[:, :width]
    index = order.repeat_interleave(heads, 0)
    eta = None if chunk.eta is None else take_rows(chunk.eta, index)
    plan = memory.plan(
        take_rows(k, index),
        take_rows(chunk.keep, index),
        eta,
        take_rows(chunk.step, index),
        take_rows(written.repeat_interleave(heads, 0), index),
    )
    plan = _of_last(read_rows(plan, written.cumsum(1).repeat_interleave(heads, 0)), chunk.q)
    return take_rows(k, index), type(errors)(*(take_rows(e, index) for e in errors)), plan
