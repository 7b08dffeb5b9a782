"""Multi-query associative recall: pairs first, then questions for them in random order.

    k1 v1 k2 v2 ... kP vP . . kj vj . ki vi . . .

The first 2 P tokens are pairs of distinct keys with random values; with a `gap` there are so many
filler tokens behind each, on average. Behind them all the keys come back once each, at random
places among filler tokens, and the token after a key must be its value. The lower half of the
vocabulary holds keys, the upper half values; id 0 is the filler.

With `overwritten` keys that many are said a second time, with another value and in random order
among all pairs, and the later value counts ("forgetting").
Source: Zoology (arXiv 2312.04927, section 4), with uniform instead of power-law gaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class MQARConfig:
    pairs: int = 64  # P
    queries: int = 64  # of the pairs, asked once each
    overwritten: int = 0  # of the pairs, said again with another value
    vocab_size: int = 1024  # filler, keys and values together
    gap: int = 0  # tokens of filler behind a pair, on average

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= self.pairs:
            raise ValueError(f"queries must be between 1 and pairs={self.pairs}: {self.queries}")
        if not 0 <= self.overwritten <= self.pairs:
            raise ValueError(
                f"overwritten must be between 0 and pairs={self.pairs}: {self.overwritten}"
            )
        if self.gap < 0:
            raise ValueError(f"gap must be at least 0, got {self.gap}")
        if self.vocab_size < 2 * self.pairs + 2:
            raise ValueError(
                f"vocab_size must be at least 2 * pairs + 2 = {2 * self.pairs + 2}, "
                f"got {self.vocab_size}"
            )


class MQAR:
    """Batches of the task; batch number and seed decide everything."""

    kinds = ("mqar", "overwritten")

    def __init__(self, config: MQARConfig, sequence_len: int, seed: int) -> None:
        said = config.pairs + config.overwritten
        need = (2 + config.gap) * said + 2 * config.queries
        if sequence_len < need:
            raise ValueError(
                "sequence_len must be at least (2 + gap) * (pairs + overwritten) + 2 * queries = "
                f"{need}, got {sequence_len}"
            )
        self.config, self.sequence_len, self.seed = config, sequence_len, seed

    def batch(self, step: int, lanes: int) -> dict[str, np.ndarray]:
        """One sequence per lane.

        Returns:
            tokens [B, T] int64; weight [B, T] float32, 1 where the token is an answer; fact [B, T]
            bool, the values in their pairs; value [B, T], these and the overwritten ones; and of
            each of the N answers int64 [N]: answer_lane, answer_start, answer_stop (the columns of
            its tokens), answer_age (tokens since the pair), answer_kind, and answer_stale (the
            value that was overwritten, -1 if none was).
        """
        rng = np.random.default_rng((self.seed, step))
        P, Q, T = self.config.pairs, self.config.queries, self.sequence_len
        half = self.config.vocab_size // 2
        keys = 1 + rng.random((lanes, half - 1)).argpartition(P, axis=1)[:, :P]
        keys = rng.permuted(keys, axis=1)
        values = rng.integers(half, self.config.vocab_size, (lanes, P))
        asked = rng.random((lanes, P)).argsort(axis=1)[:, :Q]
        # Q slots of two tokens out of what is left, in order: gaps of any length between them
        said = P + self.config.overwritten
        first = said * (2 + self.config.gap)
        slots = np.sort(rng.random((lanes, T - first - Q)).argsort(axis=1)[:, :Q], axis=1)
        column = first + slots + np.arange(Q)
        lane = np.arange(lanes)[:, None]
        pair, last, latest = self._order(rng, values)
        at = 2 * np.arange(said)  # of each pair's key
        if self.config.gap:
            at = at + np.sort(rng.integers(0, first - 2 * said + 1, (lanes, said)), axis=1)
        at = np.broadcast_to(at, (lanes, said))
        tokens = np.zeros((lanes, T), np.int64)
        counts = last[lane, pair] == np.arange(said)
        tokens[lane, at] = keys[lane, pair]
        tokens[lane, at + 1] = np.where(counts, latest[lane, pair], values[lane, pair])
        tokens[lane, column] = keys[lane, asked]
        tokens[lane, column + 1] = latest[lane, asked]
        weight = np.zeros((lanes, T), np.float32)
        weight[lane, column + 1] = 1.0
        fact, value = np.zeros((2, lanes, T), bool)
        fact[lane, at + 1], value[lane, at + 1] = counts, True
        start = (column + 1).ravel()
        overwritten = (latest != values)[lane, asked].ravel()
        return {
            "tokens": tokens,
            "weight": weight,
            "fact": fact,
            "value": value,
            "answer_lane": np.repeat(np.arange(lanes), Q),
            "answer_start": start,
            "answer_stop": start + 1,
            "answer_age": (column - at[lane, last[lane, asked]]).ravel(),
            "answer_kind": overwritten.astype(np.int64),
            "answer_stale": np.where(overwritten, values[lane, asked].ravel(), -1),
        }

    def _order(self, rng: np.random.Generator, values: np.ndarray):
        """What is said when: the pair of each of the N places [B, N], and of each pair its last
        place [B, P] and the value that counts in the end [B, P]."""
        lanes, P = values.shape
        R, half = self.config.overwritten, self.config.vocab_size // 2
        if not R:
            order = np.broadcast_to(np.arange(P), (lanes, P))
            return order, order, values
        lane = np.arange(lanes)[:, None]
        again = rng.random((lanes, P)).argsort(axis=1)[:, :R]
        latest = values.copy()
        others = self.config.vocab_size - half
        shift = rng.integers(1, others, (lanes, R))  # never the same value again
        latest[lane, again] = half + (values[lane, again] - half + shift) % others
        pair = np.concatenate([np.broadcast_to(np.arange(P), (lanes, P)), again], axis=1)
        pair = rng.permuted(pair, axis=1)
        last = np.zeros((lanes, P), np.int64)
        for place in range(P + R):
            last[lane[:, 0], pair[:, place]] = place
        return pair, last, latest
