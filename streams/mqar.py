"""Multi-query associative recall: pairs first, then questions for them in random order.

    k1 v1 k2 v2 ... kP vP . . kj vj . ki vi . . .

The first 2 P tokens are pairs of distinct keys with random values. Behind them the keys come back
once each, at random places among filler tokens, and the token after a key must be its value. The
lower half of the vocabulary holds keys, the upper half values; id 0 is the filler.

Stages may begin with fewer pairs: as many short tasks one behind the other, all keys distinct.

With `overwritten` keys that many are said a second time, with another value and in random order
among all pairs, and the later value counts ("forgetting").
Source: Zoology (arXiv 2312.04927, section 4), with uniform instead of power-law gaps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class MQARConfig:
    pairs: int = 64  # P
    queries: int = 64  # of the pairs, asked once each
    overwritten: int = 0  # of the pairs, said again with another value
    vocab_size: int = 1024  # filler, keys and values together
    stage_tokens: tuple[float, ...] = ()  # tokens read when stage 2, 3, ... begins
    easy_pairs: tuple[int, ...] = ()  # P in the stages before the last one

    def __post_init__(self) -> None:
        if list(self.stage_tokens) != sorted(self.stage_tokens):
            raise ValueError(f"stage_tokens must increase, not {self.stage_tokens}")
        if len(self.easy_pairs) != len(self.stage_tokens):
            raise ValueError(
                f"easy_pairs must have one number for each of the {len(self.stage_tokens)} stages "
                f"before the last, got {self.easy_pairs}"
            )
        if any(not 1 <= pairs <= self.pairs for pairs in self.easy_pairs):
            raise ValueError(
                f"easy_pairs must be from 1 to pairs={self.pairs}, got {self.easy_pairs}"
            )
        if not 1 <= self.queries <= self.pairs:
            raise ValueError(f"queries must be between 1 and pairs={self.pairs}: {self.queries}")
        if not 0 <= self.overwritten <= self.pairs:
            raise ValueError(
                f"overwritten must be between 0 and pairs={self.pairs}: {self.overwritten}"
            )
        if self.vocab_size < 2 * self.pairs + 2:
            raise ValueError(
                f"vocab_size must be at least 2 * pairs + 2 = {2 * self.pairs + 2}, "
                f"got {self.vocab_size}"
            )

    def stage(self, tokens: float) -> MQARConfig:
        """The task of the stage that has begun after `tokens`: fewer pairs, and as much less."""
        number = bisect_right(self.stage_tokens, tokens)
        pairs = (*self.easy_pairs, self.pairs)[number]
        queries = max(1, self.queries * pairs // self.pairs)
        overwritten = self.overwritten * pairs // self.pairs
        sizes = {"pairs": pairs, "queries": queries, "overwritten": overwritten}
        return replace(self, **sizes, stage_tokens=(), easy_pairs=())


class MQAR:
    """Batches of the task; batch number and seed decide everything.

    For validation all is as in the last stage.
    """

    kinds = ("mqar", "overwritten")

    def __init__(
        self, config: MQARConfig, sequence_len: int, seed: int, *, validation: bool = False
    ) -> None:
        need = 2 * (config.pairs + config.overwritten + config.queries)
        if sequence_len < need:
            raise ValueError(
                f"sequence_len must be at least 2 * (pairs + overwritten + queries) = {need}, "
                f"got {sequence_len}"
            )
        self.config = config.stage(math.inf) if validation else config
        self.sequence_len, self.seed = sequence_len, seed

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
        config = self.config.stage(step * lanes * self.sequence_len)
        P, Q = config.pairs, config.queries
        episodes = self.config.pairs // P  # of a sequence, one behind the other
        N, T = lanes * episodes, self.sequence_len // episodes
        half = config.vocab_size // 2
        keys = 1 + rng.random((lanes, half - 1)).argpartition(episodes * P, axis=1)
        keys = rng.permuted(keys[:, : episodes * P], axis=1).reshape(N, P)
        values = rng.integers(half, config.vocab_size, (N, P))
        asked = rng.random((N, P)).argsort(axis=1)[:, :Q]
        # Q slots of two tokens out of what is left, in order: gaps of any length between them
        said = P + config.overwritten
        spare = T - 2 * said - Q
        slots = np.sort(rng.random((N, spare)).argsort(axis=1)[:, :Q], axis=1)
        column = 2 * said + slots + np.arange(Q)
        row = np.arange(N)[:, None]
        pair, last, latest = _order(rng, config, values)
        tokens = np.zeros((N, T), np.int64)
        counts = last[row, pair] == np.arange(said)
        tokens[:, 0 : 2 * said : 2] = keys[row, pair]
        tokens[:, 1 : 2 * said : 2] = np.where(counts, latest[row, pair], values[row, pair])
        tokens[row, column] = keys[row, asked]
        tokens[row, column + 1] = latest[row, asked]
        weight = np.zeros((N, T), np.float32)
        weight[row, column + 1] = 1.0
        fact, value = np.zeros((2, N, T), bool)
        fact[:, 1 : 2 * said : 2], value[:, 1 : 2 * said : 2] = counts, True
        lane, episode = np.divmod(np.arange(N), episodes)
        start = (column + 1 + T * episode[:, None]).ravel()
        overwritten = (latest != values)[row, asked].ravel()
        parts = {"tokens": tokens, "weight": weight, "fact": fact, "value": value}
        return {
            **{name: self._joined(part, lanes) for name, part in parts.items()},
            "answer_lane": np.repeat(lane, Q),
            "answer_start": start,
            "answer_stop": start + 1,
            "answer_age": (column - 2 * last[row, asked]).ravel(),
            "answer_kind": overwritten.astype(np.int64),
            "answer_stale": np.where(overwritten, values[row, asked].ravel(), -1),
        }

    def _joined(self, part: np.ndarray, lanes: int) -> np.ndarray:
        """The episodes of every lane in a row; what their lengths leave over is filler."""
        row = part.reshape(lanes, -1)
        return np.pad(row, ((0, 0), (0, self.sequence_len - row.shape[1])))


def _order(rng: np.random.Generator, config: MQARConfig, values: np.ndarray):
    """What is said when: the pair of each of the N places [B, N], and of each pair its last
    place [B, P] and the value that counts in the end [B, P]."""
    lanes, P = values.shape
    R, half = config.overwritten, config.vocab_size // 2
    if not R:
        order = np.broadcast_to(np.arange(P), (lanes, P))
        return order, order, values
    lane = np.arange(lanes)[:, None]
    again = rng.random((lanes, P)).argsort(axis=1)[:, :R]
    latest = values.copy()
    others = config.vocab_size - half
    shift = rng.integers(1, others, (lanes, R))  # never the same value again
    latest[lane, again] = half + (values[lane, again] - half + shift) % others
    pair = np.concatenate([np.broadcast_to(np.arange(P), (lanes, P)), again], axis=1)
    pair = rng.permuted(pair, axis=1)
    last = np.zeros((lanes, P), np.int64)
    for place in range(P + R):
        last[lane[:, 0], pair[:, place]] = place
    return pair, last, latest
