"""Replay on stores that were made up: what is chosen, written, marked and released."""

from __future__ import annotations

import math

import pytest
import torch

from wakesleep.consolidation.replay import (
    Standard,
    change,
    choose,
    keep_keys,
    likeness,
    mark,
    opened,
    release,
    take,
)
from wakesleep.kernels.protected_write import joint_ridge
from wakesleep.ttl.fast import held_keys, no_fast_weights
from wakesleep.ttl.key_space import unit_key
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import SPAN, KeyState, ProbeState, StoreState
from wakesleep.ttl.store import StoreConfig

B, H, S, K = 2, 3, 40, 16
LAM, TOLERANCE = 0.05, 0.9
EXACT = Standard(TOLERANCE, torch.zeros(H))  # queries are keys
STANDARD = Standard(TOLERANCE, torch.full((H,), 0.2))


def make_store(num_pairs: int = S, seed: int = 0) -> StoreState:
    """`num_pairs` pairs with keys of any length, in places that are not in order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(B, H, S, *shape, generator=generator)

    k, v, score = draw(K), draw(K), draw()
    position = draw().argsort(-1) * 7
    empty = torch.arange(S) >= num_pairs
    return StoreState(
        k=k,
        v=v,
        score=score.masked_fill(empty, -torch.inf),
        mass=score.abs(),
        position=position.masked_fill(empty, -1),
        span=torch.zeros(B, H, S, SPAN, dtype=torch.int32),
        moments=torch.zeros(B, H, 3),
    )


def awake(store: StoreState):
    return no_fast_weights(store.k, B, H, K, store.position.shape[-1])


def sleep(store, fast, num_pairs=8):
    """Choose, write at full step and mark."""
    pairs = choose(store, fast, num_pairs, -math.inf)
    return pairs, mark(store, change(fast, pairs, LAM), pairs, EXACT)


def test_what_is_written_is_the_ridge_fit_to_the_chosen_pairs_unit_after_unit():
    store, fast = make_store(), awake(make_store())
    chosen = []
    for _ in range(3):
        pairs, fast = sleep(store, fast, num_pairs=3)
        assert pairs.chosen.all() and not pairs.replaces.any()
        chosen.append(pairs.place)
    place = torch.cat(chosen, -1)
    assert all(len(set(row.tolist())) == 9 for row in place.flatten(0, 1))
    k, v = take(unit_key(store.k), place), take(store.v, place)
    torch.testing.assert_close(fast.s, joint_ridge(k, v, LAM), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.covariance, k.mT @ k)
    assert torch.equal((fast.asleep >= 0).sum(-1), torch.full((B, H), 9))
    assert torch.equal(take(fast.asleep, place), take(store.position, place))


def test_the_pairs_of_the_best_scores_come_first_and_what_is_known_never():
    store = make_store()
    pairs, fast = sleep(store, awake(store), num_pairs=4)
    best = store.score.topk(4, -1).indices
    assert torch.equal(pairs.place.sort(-1).values, best.sort(-1).values)
    again, _ = sleep(store, fast, num_pairs=4)
    both = torch.cat([pairs.place, again.place], -1).sort(-1).values
    assert (both[..., 1:] != both[..., :-1]).all()


def test_a_value_that_is_no_longer_true_is_never_written():
    store = make_store()
    k, score = store.k.clone(), store.score.clone()
    order = store.position.argsort(-1)
    older, newer = order[..., :1], order[..., -1:]
    index = newer[..., None].expand(-1, -1, -1, K)
    k.scatter_(2, index, 3 * take(k, older) + 1e-3)  # the same key, said again later
    score.scatter_(-1, older, 9.0)  # and the old one is needed most
    store = store._replace(k=k, score=score)
    fast = awake(store)
    for _ in range(10):
        pairs, fast = sleep(store, fast)
        assert not ((pairs.place == older) & pairs.chosen).any()
    assert (take(fast.asleep, older) == -1).all()


def test_pairs_that_are_not_finite_empty_places_and_probes_are_left_out():
    store = make_store(num_pairs=30)
    k, v = store.k.clone(), store.v.clone()
    k[:, :, 0, 3], v[:, :, 1, 0], k[:, :, 2] = torch.nan, torch.inf, 0
    store, fast = store._replace(k=k, v=v), awake(store)
    fast.probes.position[:, :, 7] = store.position[:, :, 5]
    pairs, fast = sleep(store, fast, num_pairs=S)
    taken = [
        set(p[c].tolist())
        for p, c in zip(pairs.place.flatten(0, 1), pairs.chosen.flatten(0, 1), strict=True)
    ]
    assert taken == [set(range(3, 30)) - {5}] * (B * H)
    assert fast.s.isfinite().all() and fast.covariance.isfinite().all()


def test_an_empty_store_has_nothing_to_write():
    store = make_store(num_pairs=0)
    before = awake(store)
    pairs, fast = sleep(store, before)
    assert not pairs.chosen.any()
    assert all(torch.equal(a, b) for a, b in zip(fast[:3], before[:3], strict=True))
    kept, fast = release(store, fast, STANDARD, torch.Generator().manual_seed(0))
    assert torch.equal(kept.position, store.position)


def test_of_two_equal_pairs_one_is_written_and_both_leave():
    store = make_store()
    k, v = store.k.clone(), store.v.clone()
    k[:, :, 1], v[:, :, 1] = k[:, :, 0], v[:, :, 0]
    store = store._replace(k=k, v=v, score=torch.where(torch.arange(S) < 2, 9.0, store.score))
    pairs, fast = sleep(store, awake(store))
    twice = pairs.chosen & (pairs.place < 2)
    assert (twice.sum(-1) == 1).all()
    assert ((fast.asleep[..., :2] == store.position[..., :2]).sum(-1) == 1).all()
    left, _ = release(store, fast, STANDARD, torch.Generator().manual_seed(0))
    assert (left.position[..., :2] == -1).all()


def test_what_is_not_worth_it_is_never_written_however_much_is_free():
    store = make_store()
    pairs = choose(store, awake(store), S, 0.5)
    assert torch.equal(pairs.chosen.sum(-1), (store.score >= 0.5).sum(-1))
    assert (store.score.gather(-1, pairs.place)[pairs.chosen] >= 0.5).all()


def test_only_what_was_written_is_marked_however_well_others_are_given_back():
    """Another key with the same value, near enough to be answered with it."""
    store = make_store()
    k, v, score = store.k.clone(), store.v.clone(), store.score.clone()
    k[:, :, 1] = unit_key(k[:, :, 0]) + 0.3 * unit_key(k[:, :, 1])
    v[:, :, 1], score[:, :, 0], score[:, :, 1] = v[:, :, 0], 9.0, -9.0
    store = store._replace(k=k, v=v, score=score)
    pairs, fast = sleep(store, awake(store), num_pairs=1)
    told = unit_key(store.k) @ fast.s
    assert (torch.cosine_similarity(told, store.v, dim=-1)[:, :, 1] > TOLERANCE).all()
    assert (pairs.place == 0).all() and (fast.asleep[:, :, 0] >= 0).all()
    assert ((fast.asleep >= 0).sum(-1) == 1).all()
    _, again = sleep(store, fast, num_pairs=1)  # marks of earlier units stay
    assert ((again.asleep >= 0).sum(-1) == 2).all() and (again.asleep[:, :, 0] >= 0).all()


def test_an_mlp_rehearses_as_many_old_keys_as_it_has():
    store = make_store()
    fast = no_fast_weights(store.k, B, H, K, S, hidden=2 * K)
    assert held_keys(fast) == 0 == held_keys(awake(store))
    fast.old.position[1, 2, 4] = 7
    assert held_keys(fast) == 5


def test_a_new_value_of_a_key_that_was_written_replaces_the_old_one():
    store = make_store()
    pairs, fast = sleep(store, awake(store))
    probes = fast.probes
    k, position = probes.k.clone(), probes.position.clone()
    k[:, :, :8], position[:, :, :8] = pairs.k, take(store.position, pairs.place)
    fast = fast._replace(probes=ProbeState(k, probes.v, position))
    news = make_store(num_pairs=8, seed=1)
    told = torch.cat([pairs.k, torch.zeros(B, H, S - 8, K)], 2)
    news = news._replace(
        k=told, position=torch.where(news.position >= 0, news.position + 10_000, -1)
    )
    again, fast = sleep(news, fast)
    assert again.replaces.all()
    answer = again.k @ fast.s
    assert torch.cosine_similarity(answer, again.v, dim=-1).min() > TOLERANCE
    old = torch.cosine_similarity(pairs.k @ fast.s, pairs.v, dim=-1)
    assert old.mean() < 0.3


def test_an_old_key_of_an_mlp_says_that_it_had_another_value():
    store = make_store()
    fast = no_fast_weights(store.k, B, H, K, S, hidden=2 * K)
    first = choose(store, fast, 8, -math.inf)
    assert not first.replaces.any()
    k, position = fast.old.k.clone(), fast.old.position.clone()
    k[:, :, 3], position[:, :, 3] = first.k[:, :, 5], 1
    fast = fast._replace(old=fast.old._replace(k=k, position=position))
    again = choose(store, fast, 8, -math.inf)
    assert torch.equal(again.place, first.place)
    assert torch.equal(again.replaces, (torch.arange(8) == 5).expand(B, H, -1))


def test_keys_of_the_best_scores_stay_however_they_were_offered():
    stores = [make_store(seed=seed) for seed in range(3)]
    stores = [s._replace(position=s.position + 1000 * i) for i, s in enumerate(stores)]
    fast = no_fast_weights(stores[0].k, B, H, K, S, hidden=2 * K)
    fast = fast._replace(old=KeyState(*(t[:, :, :40] for t in fast.old)))
    probes = fast.probes._replace(position=fast.probes.position.clone())
    probes.position[..., 0] = stores[0].position[..., 0]
    fast = fast._replace(probes=probes)
    everything = [choose(s, fast, S, -math.inf) for s in stores]
    for store, pairs in zip(stores, everything, strict=True):
        assert pairs.chosen.sum() > 0.7 * B * H * S
        fast = keep_keys(fast, store, pairs, pairs.chosen)
        assert (fast.old.score.diff() <= 0).all()
        again = choose(store, fast, S, -math.inf)
        enters = store.score.gather(-1, again.place) > fast.old.score[..., -1:]
        assert enters[again.chosen].all()
    scores = []
    for store, pairs in zip(stores, everything, strict=True):
        score = store.score.gather(-1, pairs.place)
        scores.append(torch.where(pairs.chosen, score, -torch.inf))
    score = torch.cat(scores, -1)
    assert torch.equal(fast.old.score, score.topk(40, -1).values)
    for store in stores:  # keys as they were in the store
        same = fast.old.position[..., None] == store.position[..., None, :]
        row, place = same.any(-1), same.to(torch.uint8).argmax(-1)
        torch.testing.assert_close(fast.old.k[row], take(store.k, place)[row])
    held = (fast.old.position == probes.position[..., :1]).any(-1)
    assert torch.equal(fast.probes.position[..., 0] >= 0, held) and not held.all()


def test_what_an_mlp_cannot_be_asked_for_stays_in_the_store():
    store = make_store()
    fast = no_fast_weights(store.k, B, H, K, S, hidden=8 * K)
    pairs = choose(store, fast, 8, -math.inf)
    written = change(fast, pairs, LAM)
    marked = mark(store, written, pairs, EXACT)
    assert (marked.asleep >= 0).sum() > 0.9 * pairs.chosen.sum()
    some = pairs.chosen & (torch.arange(8) < 5)
    for known, most in ((pairs.chosen, 8), (some, 5), (some & False, 0)):
        asked = keep_keys(marked, store, pairs, known)
        left, _ = release(store, asked, STANDARD, torch.Generator().manual_seed(0))
        assert not opened(asked, store).old.open.any()
        gone = ((store.position >= 0) & (left.position < 0)).sum(-1)
        assert torch.equal(opened(asked, left).old.open.sum(-1), gone)
        assert (gone <= most).all() and gone.sum() >= 0.7 * most * B * H


def test_a_place_is_free_once_a_disturbed_cue_has_found_its_value_and_not_before():
    store = make_store()
    _, fast = sleep(store, awake(store))
    generator = torch.Generator().manual_seed(0)
    left, after = release(store, fast, STANDARD, generator)
    free = left.position != store.position
    assert torch.equal(free, fast.asleep >= 0) and (free.sum(-1) == 8).all()
    assert (after.asleep == -1).all() and torch.equal(after.s, fast.s)
    for name, empty in [
        ("k", 0),
        ("v", 0),
        ("score", -torch.inf),
        ("mass", 0),
        ("position", -1),
        ("span", -1),
    ]:
        assert (getattr(left, name)[free] == empty).all(), name
        assert torch.equal(getattr(left, name)[~free], getattr(store, name)[~free]), name
    weak = fast._replace(s=torch.randn(fast.s.shape, generator=generator))
    kept, after = release(store, weak, STANDARD, generator)
    assert torch.equal(kept.position, store.position) and (after.asleep == -1).all()


def test_heads_whose_queries_are_noisier_release_less():
    store = make_store()
    _, fast = sleep(store, awake(store))
    noise = torch.tensor([0.0, 0.5, 2.0])
    left, _ = release(store, fast, Standard(TOLERANCE, noise), torch.Generator().manual_seed(0))
    free = (left.position != store.position).sum((0, 2)).tolist()
    assert free[0] == 8 * B and free[2] == 0


@pytest.mark.parametrize("pairs", [4, 16])
def test_likeness_is_the_cosine_with_what_noisy_queries_get(pairs):
    generator = torch.Generator().manual_seed(2)
    store, noise = make_store(pairs), torch.tensor([0.0, 0.5, 1.5])
    _, fast = sleep(store, awake(store), num_pairs=pairs)
    k, v = unit_key(store.k[:, :, :pairs]), store.v[:, :, :pairs]
    beside = unit_key(torch.randn(4000, *k.shape, generator=generator))
    told = (k + noise[:, None, None] * beside) @ fast.s
    length = told.square().sum(-1).mean(0).sqrt() * v.norm(dim=-1)
    slow = ((told * v).sum(-1)).mean(0) / length
    found = likeness(fast.s, k, v, noise)
    torch.testing.assert_close(found, slow, atol=0.02, rtol=0)
    assert (found[:, 1:] < found[:, :1].mean()).all()  # what is beside the key costs


def test_a_released_pair_takes_the_older_ones_of_its_key_along():
    store = make_store()
    k = store.k.clone()
    newest, oldest = (
        store.position.argmax(-1, keepdim=True),
        store.position.argmin(-1, keepdim=True),
    )
    k.scatter_(2, oldest[..., None].expand(-1, -1, -1, K), take(k, newest))
    store = store._replace(k=k, score=store.score.scatter(-1, newest, 9.0))
    _, fast = sleep(store, awake(store))
    left, _ = release(store, fast, STANDARD, torch.Generator().manual_seed(0))
    assert (take(left.position, newest) == -1).all() and (take(left.position, oldest) == -1).all()
    assert ((left.position == -1).sum(-1) == 9).all()


def test_a_value_that_another_one_is_nearer_to_is_not_found():
    store = make_store()
    _, fast = sleep(store, awake(store), num_pairs=1)
    place = (fast.asleep >= 0).to(torch.uint8).argmax(-1, keepdim=True)
    other = (place + 1) % S
    told = take(unit_key(store.k), place) @ fast.s
    blurred = told + 0.3 * told.norm(dim=-1, keepdim=True) * unit_key(torch.randn(told.shape))
    index = place[..., None].expand(-1, -1, -1, K)
    v = store.v.scatter(2, index, blurred)  # near enough to what is given back,
    v = v.scatter(2, other[..., None].expand(-1, -1, -1, K), told)  # but this one is it
    left, _ = release(store._replace(v=v), fast, STANDARD, torch.Generator().manual_seed(0))
    assert torch.equal(left.position, store.position)


def read_with_holes(model, state, free, tokens):
    """What reading gives from `state` without the pairs in the places `free`, by layer."""
    blocks = []
    for block, gone in zip(state.blocks, free, strict=True):
        store, position = block.store, torch.where(gone, -1, block.store.position)
        score = torch.where(gone, -torch.inf, store.score)
        blocks.append(block._replace(store=store._replace(position=position, score=score)))
    return model(tokens, state._replace(blocks=tuple(blocks)))


@pytest.fixture
def model():
    config = ModelConfig(
        vocab_size=41,
        dim=24,
        num_layers=2,
        num_heads=H,
        head_dim=K,
        mlp_dim=16,
        window=8,
        chunk=4,
        memory_layers=(),
        store_layers=(0, 1),
        store=StoreConfig(capacity=12, hidden=8),
    )
    torch.manual_seed(2)
    model = TTLModel(config).double()
    for block in model.blocks:
        block.attention.size_gain.data.copy_(torch.tensor([0.4, -0.2, 0.1]))
    return model


@pytest.mark.parametrize("gradients", [False, True])
def test_reading_goes_on_from_a_store_with_holes_as_from_one_without(model, gradients):
    tokens = torch.randint(41, (2, 120))
    state = model(tokens[:, :70], model.init_state(2))[1]
    free = [torch.rand(block.store.position.shape) < 0.4 for block in state.blocks]
    packed, closed = [], []
    for block, gone in zip(state.blocks, free, strict=True):
        order = gone.to(torch.uint8).argsort(dim=-1, stable=True)
        fields = {name: t for name, t in block.store._asdict().items() if name != "moments"}
        fields = {name: take(t, order) for name, t in fields.items()}
        packed.append(block._replace(store=block.store._replace(**fields)))
        closed.append(gone.gather(-1, order))
    with torch.set_grad_enabled(gradients):
        y, after, _ = read_with_holes(model, state, free, tokens[:, 70:])
        z, other, _ = read_with_holes(
            model, state._replace(blocks=tuple(packed)), closed, tokens[:, 70:]
        )
    torch.testing.assert_close(y, z, rtol=0, atol=1e-10)
    for a, b in zip(after.blocks, other.blocks, strict=True):
        assert torch.equal(a.store.position.sort(-1).values, b.store.position.sort(-1).values)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_head_without_pairs_reads_as_if_no_head_had_any(model, gradients):
    """What a head sees decides how sharply it reads; what other heads see does not."""
    tokens, values = torch.randint(41, (2, 72)), []
    state = model(tokens[:, :68], model.init_state(2))[1]
    model.blocks[0].attention.out.register_forward_pre_hook(lambda _m, a: values.append(a[0]))
    one, every = (torch.zeros(2, H, 12, dtype=torch.bool) for _ in range(2))
    one[:, 1], every[:] = True, True
    with torch.set_grad_enabled(gradients):
        for gone in (one, every):
            read_with_holes(model, state, [gone, every], tokens[:, 68:])
    alone, none = (v.unflatten(-1, (H, K)) for v in values)
    torch.testing.assert_close(alone[:, :, 1], none[:, :, 1], rtol=0, atol=1e-12)
    assert (alone[:, :, 0] - none[:, :, 0]).abs().max() > 1e-3
