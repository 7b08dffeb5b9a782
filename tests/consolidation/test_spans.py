"""Spans of the store against the text that was read, and a slow reader of all places."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
import torch

from wakesleep.consolidation.spans import BEFORE, stored_spans
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import StreamState
from wakesleep.ttl.store import StoreConfig

VOCAB, B, C = 97, 3, 4


def read(lengths=(400, 37, 210), **store):
    torch.manual_seed(5)
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=16,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        mlp_dim=16,
        window=8,
        chunk=C,
        memory_layers=(),
        store_layers=(0, 1),
        store=StoreConfig(**{"capacity": 12, "hidden": 4, **store}),
    )
    model = TTLModel(config).eval()
    tokens = torch.randint(VOCAB, (B, max(lengths)))
    with torch.no_grad():
        return tokens, model(tokens, model.init_state(B), torch.tensor(lengths))[1]


def rows_of(state: StreamState, limit: int, lane: int) -> list[dict[int, int]]:
    """Rows of one lane, each {position: id}, empty ones left out."""
    rows = []
    for ids, positions in zip(*stored_spans(state, limit, C), strict=True):
        assert ids.shape == positions.shape and ids.shape[1] % C == 0
        assert torch.equal(ids[lane] >= 0, positions[lane] >= 0)
        here = positions[lane] >= 0
        assert not bool((here[:-1] & ~here[1:]).any())  # what is empty comes first
        pairs = zip(positions[lane][here].tolist(), ids[lane][here].tolist(), strict=True)
        rows.append(dict(pairs))
    return [row for row in rows if row]


def wanted(state: StreamState, limit: int, lane: int) -> set[int]:
    """Positions that should be passed over, found place by place."""
    sums, spans = defaultdict(float), {}
    for block in state.blocks:
        for head in range(2):
            score = block.store.score[lane, head].tolist()
            low = min((s for s in score if s > -float("inf")), default=0.0)
            for place, position in enumerate(block.store.position[lane, head].tolist()):
                if position >= 0:
                    sums[position] += score[place] - low
                    spans[position] = block.store.span[lane, head, place].tolist()
                    assert spans[position][BEFORE] >= 0
    found: set[int] = set()
    for position in sorted(sums, key=lambda p: (-sums[p], -p)):
        if len(found) >= limit:
            break
        found |= {position - BEFORE + i for i, token in enumerate(spans[position]) if token >= 0}
    return found


@pytest.mark.parametrize("score", ["learned", "recency", "reservoir"])
@pytest.mark.parametrize("limit", [1, 40, 120, 10_000])
def test_rows_are_the_text_around_the_best_pairs(score, limit):
    tokens, state = read(score=score)
    for lane in range(B):
        rows = rows_of(state, limit, lane)
        held = {at for row in rows for at in row}
        assert len(held) == sum(map(len, rows))  # no token twice
        for row in rows:
            assert list(row) == list(range(min(row), max(row) + 1))
            assert all(tokens[lane, at] == token for at, token in row.items())
        ends = [(min(row), max(row)) for row in rows]
        assert all(a[1] + 1 < b[0] for a, b in pairwise(ends))
        assert held == wanted(state, limit, lane)
        if limit < 200:
            assert len(held) < limit + 32


def test_what_many_heads_keep_comes_first():
    _, state = read(score="recency")
    blocks = []
    for layer, block in enumerate(state.blocks):
        score = torch.rand_like(block.store.score)
        shared = block.store.position == block.store.position[:, :1, -1:]
        score = torch.where(shared, 0.9 + 0.01 * layer, 0.5 * score)
        blocks.append(block._replace(store=block.store._replace(score=score)))
    shared = state.blocks[0].store.position[0, 0, -1].item()
    rows = rows_of(state._replace(blocks=tuple(blocks)), 1, 0)
    assert len(rows) == 1 and shared in rows[0] and len(rows[0]) <= 32


def test_an_empty_store_has_no_rows():
    _, state = read(lengths=(5, 3, 0))
    assert stored_spans(state, 100, C) == ([], [])
