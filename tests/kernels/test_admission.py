"""Admission against a brute-force list, fast form against reference, ties, quotas."""

from __future__ import annotations

import pytest
import torch

from wakesleep.kernels.admission import (
    NUM_BINS,
    admit_fast,
    admit_reference,
    bin_span,
    order_rank,
    rank_after,
)


def offer(store, new, form, span=None):
    """One boundary: store and new are (score, position); returns the store after it."""
    score, position = store
    if form != "reference":
        most = int((new[0] > score.amin(-1, keepdim=True)).sum(-1).max())
        if form == "fast, few" and not most:
            return store
        few = most if form == "fast, few" else None
        chosen = admit_fast(score, order_rank(position), new[0], few)
        assert form == "fast" or chosen.place.shape[-1] == min(most, score.shape[-1])
    else:
        chosen = admit_reference(score, position, new[0], new[1], span)
    result = []
    for old, fresh in ((score, new[0]), (position, new[1])):
        value = fresh.gather(-1, chosen.candidate)
        value = torch.where(chosen.valid, value, old.gather(-1, chosen.place))
        result.append(old.scatter(-1, chosen.place, value))
    return tuple(result)


def empty(places, lanes=2, heads=3):
    return (
        torch.full((lanes, heads, places), -torch.inf),
        torch.full((lanes, heads, places), -1, dtype=torch.int64),
    )


def stream(seed, chunks, size, lanes=2, heads=3, levels=None):
    generator = torch.Generator().manual_seed(seed)
    for n in range(chunks):
        score = torch.randn(lanes, heads, size, generator=generator)
        if levels:
            score = (score * levels).round() / levels  # many ties
        dead = torch.rand(lanes, heads, size, generator=generator) < 0.2
        score = score.masked_fill(dead, -torch.inf)
        yield score, (n * size + torch.arange(size)).expand(lanes, heads, size)


@pytest.mark.parametrize("form", ["reference", "fast", "fast, few"])
@pytest.mark.parametrize("levels", [None, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("places", [1, 3, 8, 20])
def test_store_holds_the_best_of_everything_offered_and_ties_go_to_the_older(form, levels, places):
    store, offered = empty(places), []
    for new in stream(1, 15, 5, levels=levels):
        store = offer(store, new, form)
        offered.append(new)
        scores = torch.cat([s for s, _ in offered], -1)
        positions = torch.cat([p for _, p in offered], -1)
        for b in range(2):
            for h in range(3):
                pairs = zip(scores[b, h].tolist(), positions[b, h].tolist(), strict=True)
                best = sorted(((-s, p) for s, p in pairs if s > -torch.inf))[:places]
                kept = {p for p in store[1][b, h].tolist() if p >= 0}
                assert kept == {p for _, p in best}


@pytest.mark.parametrize("levels", [None, 1, 3], ids=["distinct", "ties", "some ties"])
@pytest.mark.parametrize("form", ["fast", "fast, few"])
def test_fast_form_agrees_with_the_reference_place_by_place(levels, form):
    slow = fast = empty(8)
    for new in stream(2, 30, 5, levels=levels):
        slow, fast = offer(slow, new, "reference"), offer(fast, new, form)
        assert torch.equal(slow[1], fast[1]) and torch.equal(slow[0], fast[0])


def test_ranks_count_from_the_newest_and_empty_places_come_last():
    position = torch.stack([torch.randperm(50) for _ in range(6)]).view(2, 3, 50)
    position = torch.where(position < 7, -1, position * 10**9)
    rank = order_rank(position)
    for b in range(2):
        for h in range(3):
            row = position[b, h].tolist()
            newest_first = sorted((p for p in row if p >= 0), reverse=True)
            assert [row[i] for i in rank[b, h].argsort().tolist()][: 50 - 7] == newest_first
            assert sorted(rank[b, h].tolist()) == list(range(50))


@pytest.mark.parametrize("places", [1, 3, 8, 20])
@pytest.mark.parametrize("levels", [None, 1], ids=["distinct", "ties"])
def test_ranks_that_are_carried_on_are_those_of_the_positions(places, levels):
    score, position = empty(places)
    rank, exchanged = order_rank(position), 0
    for new_score, new_position in stream(5, 40, 5, levels=levels):
        chosen = admit_fast(score, rank, new_score)
        rank = rank_after(rank, chosen)
        for old, new in ((score, new_score), (position, new_position)):
            value = torch.where(
                chosen.valid, new.gather(-1, chosen.candidate), old.gather(-1, chosen.place)
            )
            old.scatter_(-1, chosen.place, value)
        assert torch.equal(rank, order_rank(position))
        exchanged += int(chosen.valid.sum())
    assert exchanged > 6 * places


def test_places_fill_from_zero_upwards():
    store = empty(9)
    for n, new in enumerate(stream(3, 3, 3)):
        store = offer(store, (new[0].nan_to_num(neginf=0.0), new[1]), "fast")
        assert (store[1][..., : 3 * (n + 1)] >= 0).all()
        assert (store[1][..., 3 * (n + 1) :] == -1).all()


def test_bins_double_so_that_sixteen_cover_the_stream():
    position = torch.arange(1, 200_000, 37)
    span = bin_span(position, 4)
    assert ((position - 1) // span).max() < NUM_BINS
    assert (span % 4 == 0).all() and (span.diff() >= 0).all()
    tight = span > 4
    assert (position[tight] >= NUM_BINS * span[tight] // 2).all()


def test_quota_keeps_a_share_of_every_span_when_one_stretch_is_loud():
    places, size = 32, 4
    store = empty(places, 1, 1)
    plain = empty(places, 1, 1)
    for n, (score, position) in enumerate(stream(4, 128, size, 1, 1)):
        score = score.nan_to_num(neginf=-5.0) + (100.0 if 40 <= n < 60 else 0.0)
        span = bin_span(torch.tensor([(n + 1) * size]), size)
        store = offer(store, (score, position), "reference", span)
        plain = offer(plain, (score, position), "reference")
    loud = range(40 * size, 60 * size)
    assert all(p in loud for p in plain[1].flatten().tolist())
    bins = torch.bincount(
        store[1].flatten() // bin_span(torch.tensor([128 * size]), size), minlength=16
    )
    assert (bins[:16] >= places // NUM_BINS).all()
