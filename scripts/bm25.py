"""BM25 over passages of token ids: exact, and in memory that does not grow with the archive.

Passages of 128 tokens begin every 64. `recall_conditions.py` puts it beside a model: a search over
everything that was read, with unbounded storage. Nothing in it is tuned.

Shapes: N ids, P passages, U distinct terms of all queries, Q queries.
Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009),
section 3; 1 is added inside the logarithm of the term weight, so that no weight is negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

STRIDE = 64  # tokens from one passage to the next
PASSAGE = 2 * STRIDE  # tokens; the last passage may be shorter
K1, B = 1.2, 0.75
PIECE = 4096  # passages that are counted at a time


class Found(NamedTuple):
    """The best passages of every query, best first."""

    start: np.ndarray  # [Q, count] first token of the passage
    score: np.ndarray  # [Q, count] float32


def search(ids: np.ndarray, queries: Sequence[Sequence[int]], count: int) -> Found:
    """Find the `count` best passages of `ids` [N] for every query, fewer if there are fewer.

    A term that a query has twice counts twice. `ids` is read in pieces, so it may be mapped.

    Raises:
        ValueError: there are no ids or no queries.
    """
    if not len(ids) or not len(queries):
        raise ValueError(f"search needs ids and queries, got {len(ids)} and {len(queries)}")
    terms = np.unique(np.concatenate([np.asarray(query, dtype=np.int64) for query in queries]))
    weight = np.stack([_occurrences(query, terms) for query in queries], 1)  # [U, Q]
    num_passages = max(1, -(-len(ids) // STRIDE) - 1)
    with_term = np.zeros(len(terms))
    total_len = 0
    for _, frequency, length in _pieces(ids, terms, num_passages):
        with_term += (frequency > 0).sum(0)
        total_len += length.sum()
    idf = np.log1p((num_passages - with_term + 0.5) / (with_term + 0.5))
    weight = (idf[:, None] * weight).astype(np.float32)

    best = np.zeros((len(queries), 0), dtype=np.float32)
    where = np.zeros((len(queries), 0), dtype=np.int64)
    for first, frequency, length in _pieces(ids, terms, num_passages):
        norm = K1 * (1 - B + B * length * num_passages / total_len)
        saturated = frequency * (K1 + 1) / (frequency + norm[:, None].astype(np.float32))
        score = (saturated @ weight).T  # [Q, passages of the piece]
        here = np.broadcast_to(np.arange(first, first + len(frequency)), score.shape)
        best, where = _best(np.hstack([best, score]), np.hstack([where, here]), count)
    return Found(where * STRIDE, best)


def _occurrences(query: Sequence[int], terms: np.ndarray) -> np.ndarray:
    """How often each of `terms` [U], ascending, is in a query that has no others."""
    return np.bincount(np.searchsorted(terms, query), minlength=len(terms))


def _pieces(
    ids: np.ndarray, terms: np.ndarray, num_passages: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first passage, how often it has each term [P, U] float32, its tokens [P])."""
    for first in range(0, num_passages, PIECE):
        size = min(PIECE, num_passages - first)
        part = np.asarray(ids[first * STRIDE : (first + size + 1) * STRIDE], dtype=np.int64)
        column = np.searchsorted(terms, part).clip(max=len(terms) - 1)
        stretch = np.arange(len(part)) // STRIDE  # a passage is two of them
        known = terms[column] == part
        cell = stretch[known] * len(terms) + column[known]
        counts = np.bincount(cell, minlength=(size + 1) * len(terms)).astype(np.float32)
        counts = counts.reshape(size + 1, len(terms))
        length = np.bincount(stretch, minlength=size + 1)
        yield first, counts[:-1] + counts[1:], length[:-1] + length[1:]


def _best(score: np.ndarray, where: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` highest scores of every row, best first, and what they are the scores of."""
    count = min(count, score.shape[1])
    top = np.argpartition(-score, count - 1, axis=1)[:, :count]
    kept = np.take_along_axis(score, top, 1)
    order = np.argsort(-kept, axis=1, kind="stable")
    top = np.take_along_axis(top, order, 1)
    return np.take_along_axis(score, top, 1), np.take_along_axis(where, top, 1)
