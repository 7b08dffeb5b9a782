"""Gated delta rule, exact (every token sees the error that the one before it left), in chunks.

    S_t = keep_t S_{t-1} + step_t k_t (v_t - k_t^T keep_t S_{t-1})^T           y_t = q_t S_t

Within a chunk the corrections u_t = step_t (v_t - k_t^T keep_t S_{t-1}) depend on one another
through a unit lower triangle, whose inverse (the WY form) is free of S: it is made for all chunks
at once. Given u, the chunk is that of a matrix memory without momentum.

For steps in [0, 1] and keys of norm at most 1 every token contracts, so no step bound is needed.

Shapes: X any batch (chunk, lane, head), C chunk, n tokens to be written, K head width.
Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464, section 3.3.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from wakesleep.kernels.memory_chunk import MatrixMemory, Plan, Stacks, Weights, plan_chunk


def delta_inverse(k: Tensor, plan: Plan) -> Tensor:
    """Inverse of 1 + the strict lower triangle of diag(step) (K K^T * products of keep)."""
    triangle = torch.bmm(k, k.mT) * plan.mix * plan.gate[..., None]
    eye = torch.eye(k.shape[1], dtype=k.dtype, device=k.device).expand_as(triangle)
    # The solver reads below the diagonal only and takes the diagonal as ones.
    return torch.linalg.solve_triangular(triangle, eye, upper=False, unitriangular=True)


class DeltaErrors(NamedTuple):
    """The memory at the chunk's start, applied to the keys, and what it should have given."""

    given: Tensor  # [X, n, K] k S
    wanted: Tensor  # [X, n, K] v


class DeltaMemory(NamedTuple):
    """The methods of a `MatrixMemory` that forgets towards zero, with the delta rule's steps."""

    base: Weights = ()

    plan = staticmethod(partial(plan_chunk, products=delta_inverse))

    def weights(self, stacks: Stacks) -> Weights:
        """The weights are the stacks: no base, no momentum."""
        return stacks

    def errors(self, weights: Weights, k: Tensor, v: Tensor) -> tuple[DeltaErrors, Tensor]:
        """What the memory gives at the chunk's start, and the norms [X, n] of its errors."""
        given = torch.bmm(k, weights[0])
        return DeltaErrors(given, v), torch.linalg.vector_norm(given - v, dim=-1)

    def steps(self, weights: Weights, plan: Plan, errors: DeltaErrors) -> tuple[Tensor]:
        """u for all tokens [X, n, K]."""
        decayed = errors.given * plan.decay[..., None]
        return (torch.bmm(plan.products, (errors.wanted - decayed) * plan.gate[..., None]),)

    read = MatrixMemory.read
    write = MatrixMemory.write
    apply = MatrixMemory.apply
