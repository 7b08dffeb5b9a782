"""Depo: a cycle of names, told as shuffled edges, and questions of several hops along it.

    . . . u1 v1 u2 v2 ... un vn | hop u > v   hop u > v   ...

The context is the n edges of one cycle in random order, left-padded to `context` tokens. Each of
the questions behind it names a number of hops k and a node, and the token after the mark must be
the node that is k steps further. What is asked for was said in one place only if k = 1.
Source: Physics of Language Models 4.1 (PhysicsLM4, `depo.py`), with names of one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

QUESTION = 4  # tokens: hop, name, mark, answer


@dataclass(frozen=True, kw_only=True)
class DepoConfig:
    nodes: int = 12  # of the longest cycle; in training also shorter ones, from 3 on
    hops: int = 4  # of the hardest question
    queries: int = 10  # about one cycle, of different nodes
    context: int = 24  # tokens in front of the questions
    names: int = 64  # that nodes may have
    hop_batches: int = 0  # batches after which the hardest question doubles, from 1 hop; 0: at once

    def __post_init__(self) -> None:
        if not 3 <= self.nodes <= self.names:
            raise ValueError(f"nodes must be from 3 to names={self.names}, got {self.nodes}")
        if self.context < 2 * self.nodes:
            raise ValueError(
                f"context must be at least 2 * nodes = {2 * self.nodes}, got {self.context}"
            )
        if not 1 <= self.hops <= 1024:
            raise ValueError(f"hops must be from 1 to 1024, got {self.hops}")
        if self.queries < 1:
            raise ValueError(f"queries must be at least 1, got {self.queries}")
        if self.hop_batches < 0:
            raise ValueError(f"hop_batches must be at least 0, got {self.hop_batches}")

    @property
    def vocab_size(self) -> int:
        """Filler, hops, mark and names."""
        return 2 + self.hops + self.names


class Depo:
    """Batches of the task; batch number and seed decide everything."""

    kinds = ("hop_1", "hops_2", "hops_3_to_4", "hops_5_to_8", "hops_9_and_more")

    def __init__(
        self, config: DepoConfig, sequence_len: int, seed: int, *, longest: bool = False
    ) -> None:
        """longest: cycles of all nodes, and hops that are powers of two, as in a test."""
        need = config.context + QUESTION * config.queries
        if sequence_len < need:
            raise ValueError(
                f"sequence_len must be at least context + {QUESTION} * queries = {need}, "
                f"got {sequence_len}"
            )
        self.config, self.sequence_len, self.seed = config, sequence_len, seed
        self.longest = longest

    def batch(self, step: int, lanes: int) -> dict[str, np.ndarray]:
        """One sequence per lane, in the fields that `MQAR.batch` has; a fact is an edge's end."""
        c = self.config
        rng = np.random.default_rng((self.seed, step))
        sizes = self._sizes(rng, lanes)
        hops = self._hops(rng, step, lanes)
        tokens = np.zeros((lanes, self.sequence_len), np.int64)
        fact = np.zeros(tokens.shape, bool)
        weight = np.zeros(tokens.shape, np.float32)
        column = c.context + QUESTION * np.arange(c.queries)
        ages = np.zeros((lanes, c.queries), np.int64)
        name, mark = 2 + c.hops, 1 + c.hops
        for lane, n in enumerate(sizes):
            cycle = name + rng.permutation(c.names)[:n]
            order = rng.permutation(n)
            first = c.context - 2 * n
            tokens[lane, first : c.context : 2] = cycle[order]
            tokens[lane, first + 1 : c.context : 2] = cycle[(order + 1) % n]
            fact[lane, first + 1 : c.context : 2] = True
            asked = rng.permutation(n)[np.arange(c.queries) % n]
            tokens[lane, column] = hops[lane]
            tokens[lane, column + 1] = cycle[asked]
            tokens[lane, column + 2] = mark
            tokens[lane, column + 3] = cycle[(asked + hops[lane]) % n]
            ages[lane] = column + 3 - (first + 2 * np.argsort(order)[asked])
        weight[:, column + 3] = 1.0
        start = np.tile(column + 3, lanes)
        kind = np.ceil(np.log2(hops)).astype(np.int64).clip(0, len(self.kinds) - 1)
        return {
            "tokens": tokens,
            "weight": weight,
            "fact": fact,
            "value": fact.copy(),
            "answer_lane": np.repeat(np.arange(lanes), c.queries),
            "answer_start": start,
            "answer_stop": start + 1,
            "answer_age": ages.ravel(),
            "answer_kind": kind.ravel(),
        }

    def _sizes(self, rng: np.random.Generator, lanes: int) -> np.ndarray:
        """Nodes of every lane's cycle."""
        nodes = np.arange(3, self.config.nodes + 1)
        if self.longest:
            return np.full(lanes, self.config.nodes)
        weight = 1 / (nodes + np.sqrt(self.config.nodes))
        return rng.choice(nodes, lanes, p=weight / weight.sum())

    def _hops(self, rng: np.random.Generator, step: int, lanes: int) -> np.ndarray:
        c = self.config
        if self.longest:
            powers = 2 ** np.arange(int(np.log2(c.hops)) + 1)
            return rng.choice(powers, (lanes, c.queries))
        most = c.hops
        if c.hop_batches:
            most = min(most, 2 ** min(step // c.hop_batches, 10))
        return rng.integers(1, most + 1, (lanes, c.queries))
