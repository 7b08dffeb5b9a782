"""One chunk of an MLP memory with its gradient written out: only what goes in is kept.

The forward pass is that of `MLPMemory`; autograd through its methods is the readable twin that the
backward pass is tested against. Autograd keeps some twenty tensors of a chunk until it needs them,
and goes through as many small nodes; here they are computed again, and overwritten when they have
served. With d for the gradient of the outer loss, J for the Jacobian of a LayerNorm (symmetric:
J d = scale (d - mean(d) - n mean(d n)) with n the normalised row), hidden = silu(z), and all
products as in `MLPMemory`:

    step on B     g = J(u) (theta gamma error)             u = hidden B,  z = k A
    step on A     (g B^T) silu'(z)
    d of g        enters u as J(gamma d_error - scale (d_g mean(g1 n) + g1 mean(d_g n)))
                  - mean(d_g g) scale n, where g1 = theta gamma error

The bound of theta is a guard, not a function of the outer loss: it has no gradient.

Shapes: X batch (lane, head), C chunk, K head width, h hidden width, s levels of a stack.
Source: Behrouz et al., "Titans", arXiv 2501.00663, section 3.2; the gradient is derived.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wakesleep.kernels.memory_chunk import (
    EPS,
    MLPErrors,
    MLPMemory,
    Plan,
    Stacks,
    read_start,
    spread,
)


def mlp_chunk(
    memory: MLPMemory, stacks: Stacks, q: Tensor, k: Tensor, v: Tensor, plan: Plan
) -> tuple[Tensor, Stacks, Tensor]:
    """Read and write a chunk; a gradient flows through everything but the norms.

    Args:
        stacks: [X, s * K, h] and [X, s * h, K] at the chunk's start.
        q: [X, C, K] of all tokens, or of the last ones alone, as `plan.read` and `plan.mix` are.
        k, v: [X, C, K], all C tokens planned.

    Returns:
        y as q, the stacks at the chunk's end, norms [X, C] of the errors before clipping.
    """
    y, first, second, norm = _MLPChunk.apply(
        (memory.chunk, memory.max_step, memory.limit),
        *memory.base, memory.gamma, memory.bias, *stacks, q, k, v, *plan,
    )  # fmt: skip
    return y, (first, second), norm


class _MLPChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: tuple, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.numbers = numbers
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        memory, stacks, q, k, v, plan = _named(numbers, tensors)
        weights = memory.weights(stacks)
        errors, norm = memory.errors(weights, k, v)
        steps = memory.steps(weights, plan, errors)
        y = memory.read(stacks, q, k, plan, errors, steps)
        ctx.mark_non_differentiable(norm)
        return y, *memory.write(stacks, plan, errors, steps), norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *d_after: Tensor | None) -> tuple:
        parts = _named(ctx.numbers, ctx.saved_tensors)
        with torch.autocast(parts[2].device.type, enabled=False):  # as the forward pass was
            return None, *_backward(*parts, dy, d_after[:2])


def _backward(
    memory: MLPMemory, stacks: Stacks, q: Tensor, k: Tensor, v: Tensor, plan: Plan,
    dy: Tensor | None, d_after: tuple[Tensor | None, ...],
) -> list[Tensor | None]:  # fmt: skip
    weights = memory.weights(stacks)
    again = _again(memory, weights, k, v, plan)
    grads = _Grads()
    if dy is not None:
        _read_back(grads, memory, stacks, q, k, plan, again, dy)
    for layer, d in enumerate(d_after):
        if d is not None:
            _write_back(grads, layer, stacks[layer], plan, again, d)
    _steps_back(grads, memory, weights, k, v, plan, again)
    return grads.in_order()


def _named(numbers: tuple, tensors: tuple[Tensor, ...]):
    """The arguments of `mlp_chunk`."""
    memory = MLPMemory(*numbers, tensors[:2], *tensors[2:4])
    return memory, tensors[4:6], *tensors[6:9], Plan(*tensors[9:])


class _Again(NamedTuple):
    """What of the forward pass the gradient needs."""

    errors: MLPErrors
    sigmoid: Tensor  # [X, C, h] of z
    normed: Tensor  # [X, C, K] n
    bound: Tensor  # [X, C] with a minus, as the steps have it: theta = gate * bound
    outer: Tensor  # [X, C, K] g1
    back: Tensor  # [X, C, h] g B^T
    steps: tuple[Tensor, Tensor]


def _again(memory: MLPMemory, weights: Stacks, k: Tensor, v: Tensor, plan: Plan) -> _Again:
    errors, _ = memory.errors(weights, k, v)
    normed = (errors.before - errors.mean).mul_(errors.scale)
    bound = memory.bound(weights[1], plan, errors).neg_()
    outer = errors.error * (memory.gamma * (plan.gate * bound)[..., None])
    step = _through_norm(outer, errors.before, errors.mean, errors.scale)
    back = torch.bmm(step, weights[1].mT)
    steps = back * errors.slope, step
    return _Again(errors, errors.z.sigmoid(), normed, bound, outer, back, steps)


class _Grads:
    """Sums of gradients, by the names of what they belong to."""

    ORDER = ("A", "B", "gamma", "bias", "stack0", "stack1", "q", "k", "v", *Plan._fields)

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a tensor that nobody else holds."""
        if name in self.sums:
            self.sums[name].add_(value)
        else:
            self.sums[name] = value

    def add_product(self, name: str, a: Tensor, b: Tensor) -> None:
        """Add a @ b."""
        if name in self.sums:
            self.sums[name].baddbmm_(a, b)
        else:
            self.sums[name] = torch.bmm(a, b)

    def take(self, name: str) -> Tensor | None:
        return self.sums.pop(name, None)

    def in_order(self) -> list[Tensor | None]:
        return [self.sums.get(name) for name in self.ORDER]


def _read_back(
    grads: _Grads, memory: MLPMemory, stacks: Stacks, q: Tensor, k: Tensor, plan: Plan,
    again: _Again, dy: Tensor,
) -> None:  # fmt: skip
    """Through y = q + gamma LN(u) + bias, back to the steps ("step0", "step1") and "hidden"."""
    hidden, steps = again.errors.hidden, again.steps
    near = torch.bmm(q, k.mT)
    nearby = near * plan.mix
    z = read_start(memory.base, stacks, 0, q, plan).baddbmm_(nearby, steps[0])
    sigmoid = z.sigmoid()
    x = z.mul_(sigmoid)
    like = torch.bmm(x, hidden.mT)
    mixed = like * plan.mix
    u = read_start(memory.base, stacks, 1, x, plan).baddbmm_(mixed, steps[1])
    normed, mean, scale = torch.native_layer_norm(u, u.shape[-1:], None, None, EPS)
    grads.add("bias", dy.sum(1, keepdim=True))
    grads.add("gamma", (dy * normed).sum(1, keepdim=True))
    grads.add("q", dy.clone())
    du = _through_norm(dy * memory.gamma, u, mean, scale)
    grads.add("step1", torch.bmm(mixed.mT, du))
    dx = _layer_back(grads, memory, stacks, 1, x, plan, du)
    d_mixed = torch.bmm(du, steps[1].mT)
    grads.add("mix", d_mixed * like)
    d_mixed.mul_(plan.mix)
    dx.baddbmm_(d_mixed, hidden)
    grads.add("hidden", torch.bmm(d_mixed.mT, x))
    dz = dx.mul_(torch.addcmul(sigmoid + x, sigmoid, x, value=-1))
    grads.add("step0", torch.bmm(nearby.mT, dz))
    grads.add("q", _layer_back(grads, memory, stacks, 0, q, plan, dz))
    d_mixed = torch.bmm(dz, steps[0].mT)
    grads.sums["mix"].addcmul_(d_mixed, near)
    d_mixed.mul_(plan.mix)
    grads.add_product("q", d_mixed, k)
    grads.add_product("k", d_mixed.mT, q)


def _layer_back(
    grads: _Grads, memory: MLPMemory, stacks: Stacks, layer: int, x: Tensor, plan: Plan, d: Tensor
) -> Tensor:
    """Through `read_start`: the gradient of x, what it leaves for the weights and shares."""
    grads.add_product("AB"[layer], x.mT, d)
    grads.add_product(f"stack{layer}", spread(x, plan.read).mT, d)
    dx, d_shares = _spread_back(torch.bmm(d, stacks[layer].mT), x, plan.read)
    grads.add("read", d_shares)
    return dx.baddbmm_(d, memory.base[layer].mT)


def _spread_back(d: Tensor, x: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Through `spread`: gradients of x [X, n, K] and of shares [X, n, s]."""
    parts = d.chunk(shares.shape[-1], -1)
    dx = parts[0] * shares[..., :1]
    for level, part in enumerate(parts[1:], 1):
        dx.addcmul_(part, shares[..., level, None])
    return dx, torch.stack([torch.linalg.vecdot(part, x) for part in parts], -1)


def _write_back(
    grads: _Grads, layer: int, stack: Tensor, plan: Plan, again: _Again, d: Tensor
) -> None:
    """Through the stack of one layer at the chunk's end."""
    levels = plan.carry.shape[-1]
    step = again.steps[layer]
    apart = d.unflatten(1, (levels, -1)).flatten(2)  # [X, s, in * out]
    carried = torch.bmm(plan.carry.mT, apart).view_as(stack)
    grads.add(f"stack{layer}", carried)
    grads.add_product("carry", apart, stack.unflatten(1, (levels, -1)).flatten(2).mT)
    if layer == 0:
        grads.add_product("keys", d, step.mT)
        grads.add_product("step0", plan.keys.mT, d)
        return
    inputs = spread(again.errors.hidden, plan.write)
    d_hidden, d_shares = _spread_back(torch.bmm(step, d.mT), again.errors.hidden, plan.write)
    grads.add("hidden", d_hidden)
    grads.add("write", d_shares)
    grads.add_product("step1", inputs, d)


def _steps_back(
    grads: _Grads, memory: MLPMemory, weights: Stacks, k: Tensor, v: Tensor, plan: Plan,
    again: _Again,
) -> None:  # fmt: skip
    """Through the steps and the errors at the chunk's start."""
    errors, sigmoid, normed, bound, outer, back, (_, step) = again
    nothing = torch.zeros_like
    d_step0 = grads.take("step0")
    d_step0 = nothing(back) if d_step0 is None else d_step0
    dg = grads.take("step1")
    dg = nothing(step) if dg is None else dg
    d_hidden = grads.take("hidden")
    d_hidden = nothing(back) if d_hidden is None else d_hidden

    d_slope = d_step0 * back
    d_back = d_step0.mul_(errors.slope)
    d_second = torch.bmm(d_back.mT, step)
    dg.baddbmm_(d_back, weights[1])

    # J applied to d_g, and what J itself depends on
    d_outer = _through_norm(dg, errors.before, errors.mean, errors.scale)
    d_normed = dg * (outer * normed).mean(-1, keepdim=True)
    d_normed.addcmul_(outer, (dg * normed).mean(-1, keepdim=True)).mul_(-errors.scale)
    d_scale = (dg * step).mean(-1, keepdim=True).mul_(errors.scale)

    d_theta = torch.linalg.vecdot(d_outer, errors.error * memory.gamma)
    grads.add("gate", d_theta * bound)
    theta = (plan.gate * bound)[..., None]
    grads.add("gamma", (d_outer * errors.error).mul_(theta).sum(1, keepdim=True))
    d_error = _through_clip(d_outer.mul_(memory.gamma * theta), memory, k, v, normed)
    grads.add("bias", d_error.sum(1, keepdim=True))
    grads.add("gamma", (d_error * normed).sum(1, keepdim=True))
    grads.add("v", -d_error)
    grads.add("k", d_error)

    d_normed.addcmul_(d_error, memory.gamma)
    d_before = _through_norm(d_normed, errors.before, errors.mean, errors.scale)
    d_before.addcmul_(d_scale, normed, value=-1)
    d_second.baddbmm_(errors.hidden.mT, d_before)
    d_hidden.baddbmm_(d_before, weights[1].mT)
    # silu'' = sigmoid' (2 + z (1 - 2 sigmoid)), and hidden = z sigmoid
    bend = (1 - 2 * sigmoid).mul_(errors.z).add_(2).mul_(sigmoid).mul_(1 - sigmoid)
    dz = d_hidden.mul_(errors.slope).addcmul_(d_slope, bend)
    d_first = torch.bmm(k.mT, dz)
    grads.add_product("k", dz, weights[0].mT)
    for layer, d in enumerate((d_first, d_second)):
        stack = grads.sums.get(f"stack{layer}")
        if stack is None:
            size = plan.carry.shape[-1] * d.shape[1]
            stack = grads.sums[f"stack{layer}"] = d.new_zeros(d.shape[0], size, d.shape[2])
        stack[:, : d.shape[1]].add_(d)
        grads.add("AB"[layer], d)


def _through_norm(d: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """J d for the LayerNorm (without gain) of x."""
    given = (d, x, x.shape[-1:], mean, scale, None, None, [True, False, False])
    return torch.ops.aten.native_layer_norm_backward(*given)[0]


def _through_clip(d: Tensor, memory: MLPMemory, k: Tensor, v: Tensor, normed: Tensor) -> Tensor:
    """Through errors shortened to norm `limit`: of a clipped one only its direction moved."""
    if math.isinf(memory.limit):
        return d
    error = torch.addcmul(k - v + memory.bias, normed, memory.gamma)
    norm = torch.linalg.vector_norm(error, dim=-1, keepdim=True)
    clipped = norm >= memory.limit
    along = (d * error).sum(-1, keepdim=True) / norm.square().clamp(min=torch.finfo(d.dtype).tiny)
    moved = d.addcmul(error, along, value=-1).mul_(memory.limit / norm.clamp(min=memory.limit))
    return torch.where(clipped, moved, d)
