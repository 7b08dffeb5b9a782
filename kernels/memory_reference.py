"""Neural memory token by token: the definition that the chunk forms are tested against.

Every token has weights of its own, and inner gradients come from autograd of the inner loss. Slow
on purpose; one lane and one head at a time.

Shapes: T tokens, C chunk, K head width.
Source: Behrouz et al., "Titans", arXiv 2501.00663, section 3.1; step bound: `memory_chunk`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wakesleep.kernels.memory_chunk import EPS, SLOPE_BOUND

Weights = tuple[Tensor, ...]


class Rule(NamedTuple):
    """What a memory is, besides what it has learned."""

    chunk: int
    max_step: float
    limit: float  # of the error's norm
    base: Weights  # (W,) of a matrix, (A, B) of an MLP
    gamma: Tensor | None = None  # [K], of an MLP
    bias: Tensor | None = None  # [K], of an MLP


class Tokens(NamedTuple):
    q: Tensor  # [T, K]
    k: Tensor  # [T, K]
    v: Tensor  # [T, K]
    keep: Tensor  # [T]
    eta: Tensor | None  # [T]
    step: Tensor  # [T]
    written: Tensor  # [T] bool


def predict(rule: Rule, weights: Weights, x: Tensor) -> Tensor:
    """M(x) for x [K]."""
    if rule.gamma is None:
        return x @ weights[0]
    u = F.silu(x @ weights[0]) @ weights[1]
    return x + rule.gamma * F.layer_norm(u, u.shape, eps=EPS) + rule.bias


def inner_gradient(rule: Rule, weights: Weights, k: Tensor, v: Tensor) -> Weights:
    """Gradient of Huber's loss of M(k) against v, itself differentiable."""
    tracked = [w if w.requires_grad else w.clone().requires_grad_() for w in weights]
    error = predict(rule, tracked, k) - v
    if error.norm() <= rule.limit:
        loss = error.square().sum() / 2
    else:
        loss = rule.limit * (error.norm() - rule.limit / 2)
    return torch.autograd.grad(loss, tracked, create_graph=True)


def overlap(rule: Rule, weights: Weights, a: Tensor, b: Tensor) -> float:
    """How much a unit step on the key b can move the memory's error at the key a, at most."""
    keys = (a @ b).abs()
    if rule.gamma is None:
        return keys.item()
    hidden = [F.silu(x @ weights[0]) for x in (a, b)]
    spread = [(h @ weights[1]).var(correction=0).add(EPS).sqrt() for h in hidden]
    layers = torch.linalg.matrix_norm(weights[1].mT @ weights[1])
    both = (hidden[0] @ hidden[1]).abs() + SLOPE_BOUND**2 * layers * keys
    return (both * rule.gamma.abs().max() ** 2 / (spread[0] * spread[1])).item()


def memory_loop(
    rule: Rule, learned: Weights, momentum: Weights, tokens: Tokens
) -> tuple[Tensor, Weights, Weights]:
    """Read and write T tokens, the first of which starts a chunk.

    Args:
        learned: weights less `rule.base`, before the first token.
        momentum: same shapes; without eta it stays as it is, and counts for nothing.

    Returns:
        y [T, K], learned, momentum.
    """
    y = []
    for t in range(len(tokens.k)):
        if t % rule.chunk == 0:
            start = tuple(b + w for b, w in zip(rule.base, learned, strict=True))
            seen = []
        if tokens.written[t]:
            seen.append(tokens.k[t])
            eta = 0 if tokens.eta is None else tokens.eta[t]
            with torch.no_grad():
                total = sum(overlap(rule, start, k, seen[-1]) for k in seen)
                own = max(1.0, overlap(rule, start, seen[-1], seen[-1]))
            bound = min(rule.max_step / own, 1 / max(1e-300, (1 + math.log(rule.chunk)) * total))
            theta = tokens.step[t] * (1 - eta) * bound
            gradient = inner_gradient(rule, start, tokens.k[t], tokens.v[t])
            surprise = tuple(eta * s - theta * g for s, g in zip(momentum, gradient, strict=True))
            momentum = momentum if tokens.eta is None else surprise
            pairs = zip(learned, surprise, strict=True)
            learned = tuple(tokens.keep[t] * w + s for w, s in pairs)
        weights = tuple(b + w for b, w in zip(rule.base, learned, strict=True))
        y.append(predict(rule, weights, tokens.q[t]))
    return torch.stack(y), learned, momentum


def delta_loop(state: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The gated delta rule over T tokens from `state` [K, K]; returns y [T, K] and the state."""
    y = []
    for q, k, v, keep, _, step, written in zip(*tokens[:4], tokens.keep, *tokens[5:], strict=True):
        if written:
            state = keep * state
            state = state + step * torch.outer(k, v - k @ state)
        y.append(q @ state)
    return torch.stack(y), state
