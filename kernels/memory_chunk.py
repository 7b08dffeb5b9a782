"""Neural memory in exact chunk form: no weights per token, only C x C masks and matrix products.

For token t with key k_t, value v_t and gates keep_t, eta_t, and with M_c the memory at the start of
t's chunk, the recurrence is

    S_t = eta_t S_{t-1} - theta_t grad 1/2 |M_c(k_t) - v_t|^2
    M_t = base + keep_t (M_{t-1} - base) + S_t                 y_t = M_t(q_t)

where `base` are slow weights: a memory forgets towards them. (Titans forgets towards zero. There an
MLP dies, for the gradient of a product of two vanishing layers vanishes too.)

A token that is not `written` is deleted from it: no decay, no momentum step, no gradient; it reads
the weights that the last written token left. All weights of a chunk are the base, the start
weights, the start momentum and one step per token, in proportions that the gates alone decide
(`Plan`), so plans are made for many chunks at once and only what depends on the weights runs chunk
by chunk.

Weights act from the right (row vectors: x @ W). What is learned travels in a *stack*
[X, s * in, out]: M - base (s = 1), or M - base on top of its momentum (s = 2).

Shapes: X any batch (chunk, lane, head), C chunk, n planned tokens (C, or fewer when the written
ones were packed), K head width, h hidden width. Of a call, N chunks, B lanes and X = lanes * heads.
Source: Behrouz et al., "Titans", arXiv 2501.00663, section 3.2; the mask form with LayerNorm and
momentum is derived, and tested against `memory_reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
SLOPE_BOUND = 1.1  # of |silu'|; the true maximum is 1.0998

Stacks = tuple[Tensor, ...]  # [X, s * in, out] per layer of the memory
Weights = tuple[Tensor, ...]  # [X, in, out] per layer of the memory


class Chunks(NamedTuple):
    """Tokens of a call on their grid of chunks, or of one chunk as far as it is filled.

    q, k and v are of one dtype, the gates of one.
    """

    q: Tensor | None  # [N, X, R, K], of the last R tokens of each chunk; None = nobody reads
    k: Tensor  # [N, X, C, K]
    v: Tensor  # [N, X, C, K]
    keep: Tensor  # [N, X, C] in [0, 1]
    eta: Tensor | None  # [N, X, C] in [0, 1]; None = no momentum
    step: Tensor  # [N, X, C] in [0, 1]
    live: Tensor  # [N, B, C] bool, may be written
    closed: Tensor  # [N, B] bool, the chunk is complete and counts


class Plan(NamedTuple):
    """What of a chunk does not depend on the weights."""

    read: Tensor  # [X, C, s] share of the start stack in what token t reads
    mix: Tensor  # [X, C, n] share of planned token j's step in what token t reads; 0 for j > t
    write: Tensor  # [X, n, s] share of token j's step in the final stack
    carry: Tensor  # [X, s, s] share of the start stack in the final one
    decay: Tensor  # [X, n] product of keep up to token j
    keys: Tensor  # [X, s * K, n] keys times `write`, ready to multiply the steps
    past: Tensor  # [X, n, n] 1 where i <= j and token i is written
    gate: Tensor  # [X, n] step_j (1 - eta_j), 0 where not written
    products: Tensor  # [X, n, n] of the keys with each other, as the kind of memory needs them


def plan_chunk(
    k: Tensor,
    keep: Tensor,
    eta: Tensor | None,
    step: Tensor,
    written: Tensor,
    products: Callable[[Tensor, Plan], Tensor],
) -> Plan:
    """Turn the gates of a chunk into the shares of all its tokens.

    Gates may be exactly 0 or 1: logarithms are clamped where what remains of the past is below
    rounding (eps**2), and only differences of them, masked first, are exponentiated.

    Args:
        k: [X, n, K] keys.
        keep, eta, step: [X, n] in [0, 1]; eta None = no momentum (s = 1).
        written: [X, n] bool.
        products: what to put in `Plan.products`, from the keys and the rest of the plan.
    """
    one = keep.new_ones(())
    mix, beta = _products(torch.where(written, keep, one))
    shares = beta[..., None]
    if eta is not None:
        eta = torch.where(written, eta, one)
        carried, decay = _products(eta)
        column = torch.cat([decay[..., None], carried], -1) * written[..., None]
        mix, shares = _split(torch.bmm(mix, column), beta)
    last = shares[:, -1:], mix[:, -1]
    write, carry = last[1][..., None], last[0]
    if eta is not None:
        write = torch.stack([mix[:, -1], carried[:, -1]], -1)
        below = torch.stack([torch.zeros_like(decay[:, -1]), decay[:, -1]], -1)
        carry = torch.cat([carry, below[:, None]], 1)
    past = torch.ones_like(mix[0]).tril() * written[:, None, :]
    gate = torch.where(written, step if eta is None else step * (1 - eta), 0 * one)
    plan = Plan(shares, mix, write, carry, beta, spread(k, write).mT, past, gate, past)
    return plan._replace(products=products(k, plan))


def plan_chunks(
    plan: Callable[..., Plan], k: Tensor, keep: Tensor, eta: Tensor | None, step: Tensor,
    live: Tensor,
) -> Plan:  # fmt: skip
    """Plans of all chunks of a call, every live token written; fields [N, X, ...].

    Args:
        plan: of a memory, for one batch of chunks.
        k: [N, X, C, K]; keep, eta, step: [N, X, C]; live: [N, B, C] bool.
    """
    N, X, _, _ = k.shape
    written = live.repeat_interleave(X // live.shape[1], 1)
    flat = [None if t is None else t.flatten(0, 1) for t in (k, keep, eta, step, written)]
    return Plan(*(t.unflatten(0, (N, X)) for t in plan(*flat)))


@torch.no_grad()
def key_overlaps(k: Tensor, plan: Plan) -> Tensor:
    """|k_i . k_j| where i <= j and token i is written."""
    return torch.bmm(k, k.mT).abs_().mul_(plan.past)


def read_rows(plan: Plan, rows: Tensor) -> Plan:
    """Let other tokens read: token t as the n-th planned one does, n = rows[X, t] >= 0 from 1.

    A token with rows 0 stands before all planned ones and reads the start weights.
    """
    start = torch.zeros_like(plan.read[:, :1])
    start[..., 0] = 1
    read = torch.cat([start, plan.read], 1)
    mix = torch.cat([torch.zeros_like(plan.mix[:, :1]), plan.mix], 1)
    return plan._replace(read=take_rows(read, rows), mix=take_rows(mix, rows))


def _products(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Products of gate [X, n] over (i, t] as [X, t, i], 0 for i > t, and over [0, t] as [X, t]."""
    total = gate.clamp(min=torch.finfo(gate.dtype).eps ** 2).log().cumsum(-1)
    gap = total[..., :, None] - total[..., None, :]
    # What lies above the diagonal would overflow. It is set to 0 before exp, for an infinity costs
    # the vector code of a CPU three times as much as a number.
    return gap.clamp(max=0).exp().tril(), total.exp()


def _split(product: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Take the column of the start momentum off: mix [X, n, n], shares [X, n, 2]."""
    return product[..., 1:], torch.stack([beta, product[..., 0]], -1)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [X, m] of x [X, n, ...]."""
    rows = rows.view(*rows.shape, *[1] * (x.dim() - 2))
    return x.gather(1, rows.expand(-1, -1, *x.shape[2:]))


def spread(x: Tensor, shares: Tensor) -> Tensor:
    """x [X, n, K] once per level of the stack, times its share [X, n, s]: [X, n, s * K]."""
    if shares.shape[-1] == 1:
        return x * shares
    return (shares[..., None] * x[..., None, :]).flatten(-2)


def _advance(stack: Tensor, plan: Plan, inputs: Tensor, steps: Tensor) -> Tensor:
    """The stack at the end of the chunk: carry * stack + inputs @ steps."""
    if plan.carry.shape[-1] == 1:
        return torch.baddbmm(stack * plan.carry, inputs, steps)
    carried = torch.bmm(plan.carry, stack.unflatten(1, (2, -1)).flatten(2))
    return torch.baddbmm(carried.view_as(stack), inputs, steps)


def read_start(base: Weights, stacks: Stacks, layer: int, x: Tensor, plan: Plan) -> Tensor:
    """What x [X, C, in] reads of the base and of what was there at the chunk's start."""
    if not base:
        return torch.bmm(spread(x, plan.read), stacks[layer])
    return torch.baddbmm(torch.bmm(x, base[layer]), spread(x, plan.read), stacks[layer])


def clip_errors(error: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Shorten errors [X, n, K] to norm `limit` (the gradient of Huber's loss); also their norms."""
    norm = torch.linalg.vector_norm(error, dim=-1)
    if math.isinf(limit):
        return error, norm
    return error * (limit / norm.clamp(min=limit))[..., None], norm


def step_bound(own: Tensor, total: Tensor, chunk: int, max_step: float) -> Tensor:
    """Largest safe step of each token, from the tokens up to it alone.

    With error e_i of token i and f_i the features that a step multiplies, one frozen chunk maps
    the errors by 1 - F F^T diag(theta), stable while the largest eigenvalue of
    diag(theta)^1/2 F F^T diag(theta)^1/2 is below 2. With theta_j = 1 / (L sum_{i <= j} |f_i.f_j|)
    constant features are the worst case known: they give the harmonic sum H_C / L, and an ascent
    over all features found none above it. L = 1 + ln C >= H_C keeps it at 1, half the edge. A sum
    over the prefix only is what keeps a step free of later tokens. Momentum gives a step
    1 / (1 - eta) times its weight in the end, so the gate is multiplied by 1 - eta (`Plan.gate`).

    Args:
        own: [X, n] |f_j|^2.
        total: [X, n] sum over written i <= j of |f_i . f_j|.
        max_step: part of its own error that one token may correct at most.
    """
    return 1 / torch.maximum(own.clamp(min=1) / max_step, (1 + math.log(chunk)) * total)


class MatrixErrors(NamedTuple):
    """First half of a write: the memory at the chunk's start, applied to the keys."""

    error: Tensor  # [X, n, K] clipped


class MLPErrors(NamedTuple):
    """First half of a write: the memory at the chunk's start, applied to the keys."""

    error: Tensor  # [X, n, K] clipped
    z: Tensor  # [X, n, h] k A
    hidden: Tensor  # [X, n, h] silu(z)
    slope: Tensor  # [X, n, h] silu'(z)
    before: Tensor  # [X, n, K] hidden B, what is normalised
    mean: Tensor  # [X, n, 1]
    scale: Tensor  # [X, n, 1] 1 / standard deviation


class MatrixMemory(NamedTuple):
    """M(x) = x W. All methods work on one batch of chunks."""

    chunk: int  # C, sets the step bound
    max_step: float  # part of its own error that a token corrects at most
    limit: float  # norm at which errors are clipped; inf = plain squares
    base: Weights  # slow weights [X, K, K]

    plan = staticmethod(partial(plan_chunk, products=key_overlaps))

    def weights(self, stacks: Stacks) -> Weights:
        """The weights M that stacks stand for."""
        return tuple(b + s[:, : b.shape[1]] for b, s in zip(self.base, stacks, strict=True))

    def errors(self, weights: Weights, k: Tensor, v: Tensor) -> tuple[MatrixErrors, Tensor]:
        """Errors of the memory at the chunk's start, and their norms [X, n] before clipping."""
        error, norm = clip_errors(torch.baddbmm(v, k, weights[0], beta=-1), self.limit)
        return MatrixErrors(error), norm

    def steps(self, weights: Weights, plan: Plan, errors: MatrixErrors) -> tuple[Tensor]:
        """Gradients times -theta, what is added; the step bound's features are the keys.

        The sign is here, not in the products that add the steps: a product with a factor costs its
        backward pass a copy of each input's gradient.
        """
        own, total = plan.products.diagonal(0, 1, 2), plan.products.sum(-1)
        theta = plan.gate * step_bound(own, total, self.chunk, self.max_step)
        return (errors.error * -theta[..., None],)

    def read(
        self,
        stacks: Stacks,
        q: Tensor,
        k: Tensor,
        plan: Plan,
        errors: MatrixErrors,
        steps: tuple[Tensor],
    ) -> Tensor:
        """y_t = M_t(q_t) for all tokens of the chunk: [X, C, K]."""
        y = read_start(self.base, stacks, 0, q, plan)
        return torch.baddbmm(y, torch.bmm(q, k.mT) * plan.mix, steps[0])

    def write(
        self, stacks: Stacks, plan: Plan, errors: MatrixErrors, steps: tuple[Tensor]
    ) -> Stacks:
        """The stack at the end of the chunk."""
        return (_advance(stacks[0], plan, plan.keys, steps[0]),)

    def apply(self, weights: Weights, q: Tensor) -> Tensor:
        """M(q) with weights that stand still: [X, C, K]."""
        return torch.bmm(q, weights[0])


class MLPMemory(NamedTuple):
    """M(x) = x + gamma * LN(silu(x A) B) + bias, with A [K, h] and B [h, K].

    gamma and bias are slow parameters; the outer loss alone moves them.
    """

    chunk: int
    max_step: float
    limit: float
    base: Weights  # slow A and B
    gamma: Tensor  # [X, 1, K]
    bias: Tensor  # [X, 1, K]

    plan = staticmethod(partial(plan_chunk, products=key_overlaps))
    weights = MatrixMemory.weights

    def errors(self, weights: Weights, k: Tensor, v: Tensor) -> tuple[MLPErrors, Tensor]:
        """First half of a write, and the norms [X, n] of the errors before clipping."""
        z = torch.bmm(k, weights[0])
        sigmoid = z.sigmoid()
        hidden = z * sigmoid
        slope = torch.addcmul(sigmoid + hidden, sigmoid, hidden, value=-1)
        before = torch.bmm(hidden, weights[1])
        normed, mean, scale = torch.native_layer_norm(before, before.shape[-1:], None, None, EPS)
        error, norm = clip_errors(torch.addcmul(k - v + self.bias, normed, self.gamma), self.limit)
        return MLPErrors(error, z, hidden, slope, before, mean, scale), norm

    def steps(self, weights: Weights, plan: Plan, errors: MLPErrors) -> tuple[Tensor, Tensor]:
        """Second half: gradients in front of A [X, n, h] and of B [X, n, K], times -theta.

        The bound of theta is not differentiated: the outer loss moves the gates, not the guard.
        """
        with torch.no_grad():
            bound = self.bound(weights[1], plan, errors)
        gradient = errors.error * (self.gamma * (plan.gate * -bound)[..., None])
        gradient = torch.ops.aten.native_layer_norm_backward(
            gradient,
            errors.before,
            gradient.shape[-1:],
            errors.mean,
            errors.scale,
            None,
            None,
            [True, False, False],
        )[0]
        return torch.bmm(gradient, weights[1].mT) * errors.slope, gradient

    def bound(self, second: Tensor, plan: Plan, errors: MLPErrors) -> Tensor:
        """Step bound [X, n] from what tokens do to each other's outputs through both layers.

        A step on token j moves the output of token i through B by at most |h_i . h_j| and through
        A by at most |k_i . k_j| |B|^2 max(silu')^2, both times max(gamma)^2 / (s_i s_j), because
        the Jacobian of gamma * LN is at most max(gamma) / s, with s the deviation that it divides
        by. |B|^2 = |B^T B| is bounded by the Frobenius norm of that small matrix.
        """
        square = torch.linalg.matrix_norm(torch.bmm(second.mT, second))[:, None, None]
        kernel = torch.bmm(errors.hidden, errors.hidden.mT).abs_().mul_(plan.past)
        kernel.addcmul_(plan.products, SLOPE_BOUND**2 * square)
        scale = errors.scale[..., 0] * self.gamma.abs().amax(-1)  # [X, n]
        own = kernel.diagonal(0, 1, 2) * scale.square()
        total = (kernel * scale[:, None]).sum(-1) * scale
        return step_bound(own, total, self.chunk, self.max_step)

    def read(
        self,
        stacks: Stacks,
        q: Tensor,
        k: Tensor,
        plan: Plan,
        errors: MLPErrors,
        steps: tuple[Tensor, Tensor],
    ) -> Tensor:
        """y_t = M_t(q_t) for all tokens of the chunk: [X, C, K]."""
        z = read_start(self.base, stacks, 0, q, plan)
        z = torch.baddbmm(z, torch.bmm(q, k.mT) * plan.mix, steps[0])
        x = F.silu(z)
        u = read_start(self.base, stacks, 1, x, plan)
        u = torch.baddbmm(u, torch.bmm(x, errors.hidden.mT) * plan.mix, steps[1])
        return self._residual(q, u)

    def write(
        self, stacks: Stacks, plan: Plan, errors: MLPErrors, steps: tuple[Tensor, Tensor]
    ) -> Stacks:
        """Both stacks at the end of the chunk."""
        inputs = plan.keys, spread(errors.hidden, plan.write).mT
        return tuple(
            _advance(*row) for row in zip(stacks, (plan, plan), inputs, steps, strict=True)
        )

    def apply(self, weights: Weights, q: Tensor) -> Tensor:
        """M(q) with weights that stand still: [X, C, K]."""
        x = F.silu(torch.bmm(q, weights[0]))
        return self._residual(q, torch.bmm(x, weights[1]))

    def _residual(self, q: Tensor, u: Tensor) -> Tensor:
        return torch.addcmul(q + self.bias, F.layer_norm(u, u.shape[-1:], eps=EPS), self.gamma)
