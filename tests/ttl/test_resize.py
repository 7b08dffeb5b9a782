"""Resized states: nothing moves without need, the best stay, and reading goes on from there."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from wakesleep.kernels.admission import NUM_BINS, bin_span
from wakesleep.kernels.rotary import rotary_table, rotate
from wakesleep.ttl.attention import ROTARY_BASE
from wakesleep.ttl.flops import state_bytes
from wakesleep.ttl.grid import make_grid
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.resize import clear_window, resize_state
from wakesleep.ttl.state import SPAN, SPAN_AFTER, flatten, named_tensors, nbytes
from wakesleep.ttl.store import StoreConfig

VOCAB, B, H, K, C = 37, 3, 2, 8, 4
SCORES = ["learned", "residual", "residual_z", "recency", "reservoir", "mass"]
FIXED = [score for score in SCORES if score != "mass"]  # scores that do not depend on reads


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def build(window: int, capacity: int, layers: int = 1, **store) -> TTLModel:
    """A float64 model with a store in every layer; with one layer, keys depend on tokens alone."""
    everywhere = tuple(range(layers))
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=12,
        num_layers=layers,
        num_heads=H,
        head_dim=K,
        mlp_dim=16,
        window=window,
        chunk=C,
        memory_layers=everywhere,
        store_layers=everywhere,
        memory=MemoryConfig(kind="matrix"),
        store=StoreConfig(capacity=capacity, hidden=8, **store),
    )
    torch.manual_seed(5)
    model = TTLModel(config).double()
    for block in model.blocks:
        block.attention.sink += torch.tensor([0.4, -0.2])
        block.attention.size_gain += torch.tensor([0.2, -0.1])
    return model


def draw(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (B, length), generator=torch.Generator().manual_seed(seed))


def read(model, tokens, state=None, lengths=None):
    state = model.init_state(B) if state is None else state
    return model(tokens, state, None if lengths is None else torch.tensor(lengths))[:2]


def places(store, b: int, h: int) -> dict[int, dict[str, torch.Tensor]]:
    """What head h of lane b has stored, by position."""
    names = ("k", "v", "score", "mass", "span")
    rows = enumerate(store.position[b, h].tolist())
    return {p: {n: getattr(store, n)[b, h, i] for n in names} for i, p in rows if p >= 0}


def same(a: dict, b: dict, names=("k", "v", "score", "mass", "span")) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[p][n], b[p][n]) for p in a for n in names)


def in_window(state, b: int) -> list[int]:
    """Positions of lane b's tokens that the window and the open chunk show."""
    live = state.blocks[0].window.live[b]
    start = int(state.position[b]) // C * C - len(live) + C
    return [start + i for i, there in enumerate(live.tolist()) if there]


@pytest.mark.parametrize("length", [17, 46], ids=["half full", "full"])
@pytest.mark.parametrize("score", SCORES)
def test_growing_the_store_leaves_new_places_empty_and_no_bit_changes(score, length):
    model = build(8, 14, layers=2, score=score)
    _, state = read(model, draw(length))
    grown = resize_state(model, state, capacity=23)
    for old, new in zip(state.blocks, grown.blocks, strict=True):
        for name, t in old.store._asdict().items():
            kept = getattr(new.store, name)
            assert torch.equal(kept if name == "moments" else kept[:, :, :14], t), name
        assert (new.store.position[:, :, 14:] == -1).all()
        assert (new.store.score[:, :, 14:] == -torch.inf).all()
    seen = 2 if length == 46 else 5  # until a boundary at which the larger store takes more
    y, _ = read(model, draw(seen, seed=1), state)
    grown_y, later = read(model, draw(seen, seed=1), grown)
    assert torch.equal(y, grown_y)
    for seed in range(2, 5):
        _, later = read(model, draw(5, seed), later)
    assert (later.blocks[0].store.position[:, :, 14:] >= 0).any()


def best(pairs: list[tuple[float, int]], size: int, span: int | None) -> set[int]:
    """Positions of the best pairs: of every bin its own, then of all; ties go to the older."""
    order = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
    if span is not None:
        first = []
        for n in range(NUM_BINS):
            first += [pair for pair in order if pair[1] // span == n][: size // NUM_BINS]
        order = first + [pair for pair in order if pair not in first]
    return {position for _, position in order[:size]}


@pytest.mark.parametrize("quota", [False, True])
@pytest.mark.parametrize("levels", [None, 2], ids=["distinct", "ties"])
@pytest.mark.parametrize("score", SCORES)
def test_shrinking_keeps_exactly_the_best(score, levels, quota):
    model = build(8, 40, score=score, quota=quota)
    _, state = read(model, draw(90))
    block = state.blocks[0]
    if levels:  # many ties
        rounded = (block.store.score * levels).round() / levels
        block = block._replace(store=block.store._replace(score=rounded))
        state = state._replace(blocks=(block,))
    for size in (33, 16, 3, 1):
        store = resize_state(model, state, capacity=size).blocks[0].store
        span = int(bin_span(torch.tensor([88]), C)) if quota else None
        for b in range(B):
            for h in range(H):
                old = places(block.store, b, h)
                pairs = [(row["score"].item(), position) for position, row in old.items()]
                expected = best(pairs, size, span)
                assert same(places(store, b, h), {p: old[p] for p in expected})


@pytest.mark.parametrize("score", FIXED)
@pytest.mark.parametrize(
    ("before", "after", "refill"),
    [((8, 12), (8, 5), 0), ((16, 9), (4, 9), 0), ((16, 12), (8, 5), 0), ((8, 9), (16, 9), 12)],
    ids=["capacity", "window", "both", "window grows"],
)
def test_a_resized_stream_equals_one_that_always_had_these_sizes(score, before, after, refill):
    """Off the grid, in ragged lanes; a window that grew is filled by `refill` more tokens."""
    changing, always = (build(*sizes, score=score) for sizes in (before, after))
    head, tail, lengths = draw(43), draw(26, seed=1), [43, 38, 24]
    _, state = read(changing, head, lengths=lengths)
    state = resize_state(changing, state, window=after[0], capacity=after[1])
    _, expected = read(always, head, lengths=lengths)
    if refill:
        _, state = read(changing, draw(refill, seed=2), state)
        _, expected = read(always, draw(refill, seed=2), expected)
    y, state = read(changing, tail, state)
    expected_y, expected = read(always, tail, expected)
    assert (y - expected_y).abs().max() < 1e-10
    for b in range(B):
        assert in_window(state, b) == in_window(expected, b)
        for h in range(H):
            ours, theirs = (places(s.blocks[0].store, b, h) for s in (state, expected))
            assert same(ours, theirs, names=("k", "v", "score"))


@pytest.mark.parametrize("score", ["learned", "mass"])
def test_every_token_is_in_one_place_and_none_comes_back(score):
    model = build(8, 10, score=score)
    _, state = read(model, draw(30), lengths=[30, 17, 5])
    sizes = [(16, 10), (4, 10), (4, 4), (12, 7), (8, 30), (4, 2), (8, 2)]
    for seed, (window, capacity) in enumerate(sizes):
        resized = resize_state(model, state, window=window, capacity=capacity)
        for b in range(B):
            near, before = in_window(resized, b), in_window(state, b)
            assert near == before[max(0, len(before) - window - int(state.position[b]) % C) :]
            for h in range(H):
                far = places(resized.blocks[0].store, b, h)
                held = {*before, *places(state.blocks[0].store, b, h)}
                assert not far.keys() & set(near) and far.keys() | set(near) <= held
                dropped = held - far.keys() - set(near)
                assert not dropped or len(far) == capacity
        assert nbytes(resized) == sum(
            part.nbytes
            for part in state_bytes(
                model.config, batch=B, window=window, capacity=capacity, dtype=torch.float64
            )
        )
        _, state = read(model, draw(9, seed), resized, lengths=[9, 4, 0])


def by_hand(model, state, tokens):
    """Attention values [B, H, K] that each lane's next token reads, from the state's own pairs."""
    block, position = state.blocks[0], state.position
    attention, window, store = model.blocks[0].attention, block.window, block.store
    W, R = window.live.shape[1] - C, attention.rotary_dims
    x = model.blocks[0].norm(model.embedding(tokens) * model.config.dim**0.5)
    grid = make_grid(position, torch.ones(B, dtype=torch.int64), C, 1)
    q, k, v, _ = attention._project(x, window.tail, grid)
    turns = rotary_table(W + C + store.position.shape[-1], R, ROTARY_BASE, q)
    values = []
    for b in range(B):
        now = W + int(position[b]) % C  # slot of the token
        for h in range(H):
            kept = sorted(places(store, b, h).items(), reverse=True)
            pairs = [(row["k"], row["v"], W + C + rank) for rank, (_, row) in enumerate(kept)]
            for slot in window.live[b, :now].nonzero().flatten().tolist():
                pairs.append((window.k[b, slot, h], window.v[b, slot, h], now - slot))
            pairs.append((k[b, 0, h], v[b, 0, h], 0))
            scale = (1 + attention.size_gain[h] * math.log(len(pairs))) / math.sqrt(K)
            logits = [attention.sink[h]]
            for n, (key, _, distance) in enumerate(pairs):
                turned = rotate(q[b, 0, h, :R], turns[distance])
                near = scale * turned @ key[:R]
                if n < len(kept):
                    near = turned @ key[:R] / (2 * turned.norm() * key[:R].norm())
                logits.append(near + scale * q[b, 0, h, R:] @ key[R:])
            share = torch.stack(logits).softmax(0)[1:]
            values.append(sum(p * pair[1] for p, pair in zip(share, pairs, strict=True)))
    return torch.stack(values).view(B, H, K)


@pytest.mark.parametrize("sizes", [(16, 10), (16, 20), (4, 10), (8, 3), (4, 3), (12, 4)], ids=str)
def test_reads_of_a_resized_state_equal_those_by_hand(sizes):
    model = build(8, 10)
    _, state = read(model, draw(47), lengths=[47, 30, 6])
    state = resize_state(model, state, window=sizes[0], capacity=sizes[1])
    seen, out = [], model.blocks[0].attention.out
    hook = out.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    for seed in range(6):
        tokens = draw(1, seed)
        expected = by_hand(model, state, tokens)
        _, state = read(model, tokens, state)
        assert (seen.pop().view(B, H, K) - expected).abs().max() < 1e-12
    hook.remove()


def test_ids_around_what_left_a_shrunk_window_are_those_that_were_read_then():
    model, tokens = build(16, 60, score="recency"), draw(46)
    _, state = read(model, tokens)
    state = resize_state(model, state, window=4)
    for b in range(B):
        stored = places(state.blocks[0].store, b, 0)
        assert sorted(stored) == list(range(40))
        for p in range(28, 40):  # what left now, with what was known at the boundary, 44
            first = p - (SPAN - SPAN_AFTER - 1)
            ids = [int(tokens[b, i]) if 0 <= i < 44 else -1 for i in range(first, first + SPAN)]
            assert stored[p]["span"].tolist() == ids
    _, state = read(model, tokens[:, :33], state)
    both = torch.cat([tokens, tokens[:, :33]], 1)  # 79: the window shows 72 to 75, then 76 to 78
    assert torch.equal(state.ids[:, SPAN : SPAN + 7], both[:, 72:])


def test_resizing_what_has_read_nothing_equals_a_fresh_state_and_changes_no_other():
    model = build(8, 10, score="residual_z")
    fresh = model.init_state(B)
    resized = resize_state(model, fresh, window=16, capacity=3)
    for name, t in named_tensors(model.init_state(B, window=16, capacity=3)):
        assert torch.equal(flatten(resized)[name], t), name
    _, state = read(model, draw(40))
    before = {name: t.clone() for name, t in named_tensors(state)}
    resize_state(model, state, window=4, capacity=4)
    resize_state(model, state, window=12, capacity=40)
    for name, t in named_tensors(state):
        assert torch.equal(t, before[name]), name
    unchanged = flatten(resize_state(model, state, window=8, capacity=10))
    for name, t in named_tensors(state):
        assert torch.equal(t, unchanged[name]), name


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"window": 6}, "window must be a positive multiple of chunk 4, got 6"),
        ({"window": 0}, "window must be a positive multiple of chunk 4, got 0"),
        ({"capacity": 0}, "store.capacity must be at least 1, got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, words):
    model = build(8, 10)
    with pytest.raises(ValueError, match=words):
        resize_state(model, model.init_state(B), **sizes)


@pytest.mark.parametrize("capacity", [5, 12, 20])
def test_pairs_that_sleep_has_written_stay_known_wherever_they_are_put(capacity):
    plain = build(window=8, capacity=12, score="reservoir")
    model = TTLModel(replace(plain.config, fast_layers=(0,))).double()
    _, state = read(model, draw(60), lengths=[60, 31, 5])
    block = state.blocks[0]
    odd = torch.where(block.store.position % 2 == 1, block.store.position, -1)
    fast = block.fast._replace(asleep=odd)
    state = state._replace(blocks=(block._replace(fast=fast),))
    block = resize_state(model, state, capacity=capacity).blocks[0]
    asleep, position = block.fast.asleep, block.store.position
    assert torch.equal(asleep, torch.where(position % 2 == 1, position, -1))
    assert (asleep >= 0).any() and asleep.shape[-1] == capacity


def test_an_emptied_window_leaves_its_best_tokens_in_the_store_and_nothing_else():
    model = build(window=8, capacity=12, score="reservoir")
    _, state = read(model, draw(60), lengths=[60, 32, 4])
    after = clear_window(model, state)
    window, store = after.blocks[0].window, after.blocks[0].store
    assert not any(t.any() for t in window)
    assert torch.equal(after.ids, state.ids) and torch.equal(after.position, state.position)
    for b, length in enumerate([60, 32, 4]):
        for h in range(H):
            before = places(state.blocks[0].store, b, h)
            kept = places(store, b, h)
            pool = set(before) | set(range(max(0, length - 8), length))
            assert set(kept) <= pool and len(kept) == min(12, len(pool))
            assert all(same({p: kept[p]}, {p: before[p]}) for p in set(kept) & set(before))
    y, _ = read(model, draw(9, seed=1), after)
    assert y.isfinite().all()


def test_a_window_is_not_emptied_inside_a_chunk():
    model = build(window=8, capacity=12)
    _, state = read(model, draw(9))
    with pytest.raises(ValueError, match=r"boundary of chunks"):
        clear_window(model, state)
