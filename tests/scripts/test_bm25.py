"""The search gives the scores of the formula, whatever the pieces it works in."""

import math

import numpy as np
import pytest


def scores_by_hand(ids, query, k1=1.2, b=0.75):
    """BM25 of every passage of 128 tokens, one term at a time."""
    starts = range(0, max(1, len(ids) - 64), 64)
    passages = [list(ids[start : start + 128]) for start in starts]
    average = sum(map(len, passages)) / len(passages)
    scores = []
    for passage in passages:
        score = 0.0
        for term in query:
            having = sum(term in other for other in passages)
            idf = math.log(1 + (len(passages) - having + 0.5) / (having + 0.5))
            frequency = passage.count(term)
            norm = k1 * (1 - b + b * len(passage) / average)
            score += idf * frequency * (k1 + 1) / (frequency + norm)
        scores.append(score)
    return np.array(scores)


@pytest.mark.parametrize("length", [1, 64, 65, 128, 129, 1000, 1024])
@pytest.mark.parametrize("piece", [1, 3, 4096])
def test_the_best_passages_are_those_of_the_formula(script, monkeypatch, length, piece):
    bm25 = script("bm25")
    monkeypatch.setattr(bm25, "PIECE", piece)
    draw = np.random.default_rng(length)
    ids = draw.zipf(1.3, length).clip(max=500).astype(np.uint16)
    queries = [draw.zipf(1.3, size).clip(max=700).tolist() for size in (1, 5, 12)]
    found = bm25.search(ids, queries, 4)
    for query, start, score in zip(queries, found.start, found.score, strict=True):
        expected = scores_by_hand(ids, query)
        assert len(set(start)) == len(start) == min(4, len(expected))
        np.testing.assert_allclose(score, np.sort(expected)[::-1][:4], rtol=1e-5)
        np.testing.assert_allclose(score, expected[start // 64], rtol=1e-5)


def test_nothing_to_search_is_refused(script):
    for ids, queries in ((np.zeros(0, np.uint16), [[1]]), (np.ones(9, np.uint16), [])):
        with pytest.raises(ValueError, match="needs ids and queries"):
            script("bm25").search(ids, queries, 1)
