"""What each step of sleep costs, by closed formulas: known before it runs.

FLOPs are those of matrix products (as torch counts them, 2 per multiply-add) and of linear algebra
(K^3 / 3 per Cholesky factor, n^2 m per triangular solve). Bytes are those of the tensors that a
step reads and writes, each once.

Shapes: X lanes times heads, S store places, n pairs of a unit, M marked pairs, P probes, N cues of
noise, K head width, M hidden width of an MLP.
"""

from __future__ import annotations

from typing import NamedTuple

from wakesleep.consolidation.budget import Cost
from wakesleep.consolidation.gate import NOISE_CUES
from wakesleep.consolidation.gate import STEPS as STEPS_TRIED
from wakesleep.kernels.rehearsed_write import STEPS
from wakesleep.ttl.fast import OLD_KEYS, PROBES, held_keys, is_linear
from wakesleep.ttl.state import BlockState

# Units of an MLP, the best first: at equal cost many pairs at once are remembered better than a few
# at a time, and every step goes over the old keys as well.
MLP_UNITS = ((8, 4 * STEPS), (8, 2 * STEPS), (4, STEPS), (2, STEPS))  # pairs in head widths, steps
ENOUGH = 1.5  # steps per pair: more gain nothing


class Unit(NamedTuple):
    """How much one unit writes at most."""

    pairs: int  # per head
    steps: int = 0  # of Adam; 0: in closed form

    def steps_for(self, num_pairs: int) -> int:
        """Steps of a unit that found so many pairs."""
        return min(self.steps, max(STEPS, int(ENOUGH * num_pairs)))


class Sizes(NamedTuple):
    """Of one layer's fast weights and store."""

    heads: int  # X
    places: int  # S
    head_dim: int  # K
    itemsize: int  # bytes of a number in the store
    hidden: int = 0  # M of an MLP, 0 of a matrix
    held: int = 0  # keys that an MLP holds, and rehearses

    @property
    def adds(self) -> int:
        """Multiply-adds of one answer."""
        return self.head_dim * (2 * self.hidden or self.head_dim)

    @property
    def old_keys(self) -> int:
        """That an MLP can hold."""
        return OLD_KEYS * self.head_dim if self.hidden else 0

    @property
    def units(self) -> tuple[Unit, ...]:
        """From the dearest to the cheapest; of a matrix half of what it can tell apart."""
        if not self.hidden:
            return (Unit(self.head_dim // 2),)
        return tuple(Unit(widths * self.head_dim, steps) for widths, steps in MLP_UNITS)


def sizes_of(block: BlockState) -> Sizes:
    """Sizes of a layer that has both."""
    B, H, S, K = block.store.k.shape
    s, itemsize = block.fast.s, block.store.k.element_size()
    hidden = 0 if is_linear(s) else s.shape[-1] // 2
    return Sizes(B * H, S, K, itemsize, hidden, held_keys(block.fast))


def keys_cost(sizes: Sizes) -> Cost:
    """Of making the keys of all places, and of an MLP, such as fast weights see them."""
    X, S, K, itemsize, *_ = sizes
    rows = S + sizes.old_keys
    return Cost(2 * X * rows * K * K, X * rows * K * (itemsize + 4))


def choose_cost(sizes: Sizes, num_pairs: int) -> Cost:
    """Of finding the pairs of a unit: gains of all places, superseded ones, keys of probes."""
    X, S, K, *_ = sizes
    n = min(num_pairs, S)
    looked_at = min(2 * num_pairs, S)
    adds = S * sizes.adds + looked_at * S * K + n * (PROBES + sizes.old_keys) * K
    known = _probes(sizes) + _old(sizes)
    return Cost(2 * X * adds, _store(sizes) + _weights(sizes) + known)


def write_cost(sizes: Sizes, num_pairs: int, steps: int = 0) -> Cost:
    """Of a write of num_pairs: the protected one of a matrix in float64, the steps of an MLP."""
    X, S, K, _, M, held = sizes
    n = min(num_pairs, S)
    if M:
        adds = held * sizes.adds + steps * 5 * (n + held) * K * M
        rows = X * (n + held) * 2 * K * 4
        return Cost(2 * X * adds, steps * (4 * _weights(sizes) + rows))
    linalg = -(-(K**3) // 3) + 2 * K**3
    return Cost(X * (2 * 4 * n * K * K + linalg), 2 * (2 * _weights(sizes) + X * 2 * n * K * 4))


def mark_cost(sizes: Sizes) -> Cost:
    """Of telling which stored pairs are given back."""
    X, S = sizes[:2]
    return Cost(2 * X * S * sizes.adds, _store(sizes) + _weights(sizes) + 2 * X * S * 8)


def release_cost(sizes: Sizes, num_marked: int) -> Cost:
    """Of asking for M marked pairs again, the most of any head, and freeing what is found."""
    X, S, K, *_ = sizes
    M, ways = num_marked, 1 if sizes.hidden else 2  # a matrix is asked with keys, too
    adds = M * ways * sizes.adds + 2 * M * S * K
    return Cost(2 * X * adds, 2 * _store(sizes) + ways * _weights(sizes))


def gate_cost(sizes: Sizes, num_pairs: int) -> Cost:
    """Of judging a unit: old and new pairs, noise, and dropping what is no longer true."""
    X, S, K, *_ = sizes
    n = min(num_pairs, S)
    asked = 1 + (len(STEPS_TRIED) if sizes.hidden else 2)  # times each row; a matrix is linear
    noise = 0 if sizes.hidden else NOISE_CUES
    rows = asked * (PROBES // 2 + noise) + (asked + 1) * n
    adds = rows * sizes.adds + (PROBES + sizes.old_keys) * n * K
    return Cost(2 * X * adds, 2 * (_weights(sizes) + _probes(sizes) + _old(sizes)))


def audit_cost(sizes: Sizes) -> Cost:
    """Of asking for the sealed half of the probes."""
    return Cost(2 * sizes.heads * (PROBES // 2) * sizes.adds, _weights(sizes) + _probes(sizes) // 2)


def keep_cost(sizes: Sizes) -> Cost:
    """Of asking for all stored pairs, and for noise, before passes of sleep and after them."""
    X, S, K, *_ = sizes
    return Cost(2 * X * 2 * (S + NOISE_CUES) * K * K, _store(sizes) + 2 * _weights(sizes))


def _store(sizes: Sizes) -> int:
    return sizes.heads * sizes.places * (2 * sizes.head_dim * sizes.itemsize + 4 + 8)


def _weights(sizes: Sizes) -> int:
    covariance = 0 if sizes.hidden else sizes.head_dim**2
    return sizes.heads * (covariance + sizes.adds) * 4


def _probes(sizes: Sizes) -> int:
    return sizes.heads * PROBES * (2 * sizes.head_dim * sizes.itemsize + 8)


def _old(sizes: Sizes) -> int:
    return sizes.heads * sizes.old_keys * (sizes.head_dim * sizes.itemsize + 4 + 8 + 1)
