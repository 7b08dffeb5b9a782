"""Distractors are the loudest pairs of other documents, bounded, and disturb nothing else."""

import pytest
import torch

from wakesleep.streams.distractors import Past, collect, empty_pool, inject, own, remember
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import StoreState, flatten, named_tensors

CONFIG = ModelConfig(
    vocab_size=32,
    dim=16,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    mlp_dim=16,
    window=8,
    chunk=4,
    memory_layers=(0,),
    store_layers=(0, 1),
)
JUMP = 4096  # a multiple of every boundary of the model


@pytest.fixture
def model():
    return TTLModel(CONFIG).double().eval()


def read(model, seed, length=32, capacity=64, lanes=2):
    """The state behind `length` random tokens."""
    tokens = torch.randint(0, 32, (lanes, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(tokens, model.init_state(lanes, capacity=capacity))[1]


def test_the_pool_is_bounded_and_keeps_the_loudest(model):
    pool = empty_pool(model.init_state(1), 32)
    for seed in range(20):
        state = read(model, seed)
        pool = collect(pool, state, [], turn=seed, passed=False)
        assert pool.size == min(32, 2 * (seed + 1))
        for ring, block in zip(pool.rings, state.blocks, strict=True):
            assert ring.k.shape == (2, 32, 8)
            store = StoreState(*(field[seed % 2] for field in block.store))  # lanes take turns
            loudest = store.score.topk(2).indices
            in_order = loudest.gather(1, store.position.gather(1, loudest).argsort(1))
            assert torch.equal(
                ring.score[:, 2 * seed % 32 :][:, :2], store.score.gather(1, in_order)
            )
    again = empty_pool(model.init_state(1), 32)
    for seed in range(20):
        again = collect(again, read(model, seed), [], turn=seed, passed=False)
    for a, b in zip(pool.rings, again.rings, strict=True):
        assert all(map(torch.equal, a, b))


def test_distractors_are_not_collected_again(model):
    pool = collect(empty_pool(model.init_state(1), 32), read(model, 0), [], turn=0, passed=False)
    loud = pool._replace(rings=tuple(r._replace(score=r.score + 100) for r in pool.rings))
    state = inject(model.init_state(2, capacity=64), loud, torch.arange(2).expand(2, 2), JUMP, 8)
    tokens = torch.randint(0, 32, (2, 32))
    with torch.no_grad():
        state = model(tokens, state)[1]
    assert float(collect(pool, state, [], turn=0, passed=False).rings[0].score.max()) > 90
    assert float(collect(pool, state, [(0, JUMP)], turn=0, passed=False).rings[0].score.max()) < 90


def test_a_jump_alone_changes_no_output(model):
    pool = collect(empty_pool(model.init_state(1), 32), read(model, 0), [], turn=0, passed=False)
    tokens = torch.randint(0, 32, (2, 24))
    nobody = torch.full((2, 3), -1)
    for length in (0, 8, 13, 32):
        state = read(model, 1, length)
        jumped = inject(state, pool, nobody, JUMP, CONFIG.window)
        with torch.no_grad():
            before, after = (model(tokens, s)[0] for s in (state, jumped))
        torch.testing.assert_close(before, after, rtol=1e-10, atol=1e-10)


def test_distractors_are_younger_than_the_store_and_older_than_the_window(model):
    pool = collect(empty_pool(model.init_state(1), 32), read(model, 0), [], turn=0, passed=False)
    state = read(model, 1, 20)
    jumped = inject(state, pool, torch.tensor([[1, 0], [0, -1]]), JUMP, CONFIG.window)
    tokens = torch.randint(0, 32, (2, 12))
    with torch.no_grad():
        jumped = model(tokens, jumped)[1]
    store, ring = jumped.blocks[1].store, pool.rings[1]
    mine = own(store.position, [(12, 12 + JUMP)])
    for lane, expected in ((0, [1, 0]), (1, [0])):
        for head in range(2):
            position = store.position[lane, head]
            strange = torch.where(~mine[lane, head] & (position >= 0), position, 1 << 40).sort()
            rows = strange.indices[: len(expected)]
            assert torch.equal(store.k[lane, head, rows], ring.k[head, expected])
            kept = position[mine[lane, head]].sort().values
            assert kept.tolist() == [*range(12), *range(JUMP + 12, JUMP + 24)]


def test_a_lane_goes_on_with_what_the_memory_of_another_one_learned(model):
    pool = empty_pool(model.init_state(1), 32)
    earlier, state = read(model, 0, lanes=3), read(model, 1, lanes=3)
    assert collect(pool, earlier, [], turn=0, passed=False).pasts is None
    same = remember(state, pool, shift=1)  # nothing has passed yet
    assert all(map(torch.equal, flatten(same).values(), flatten(state).values()))
    pool = collect(pool, earlier, [], turn=0, passed=True)
    later = remember(state, pool, shift=1)
    for name, tensor in flatten(later).items():
        learned = any(f".memory.{part}" in name for part in Past._fields)
        expected = flatten(earlier)[name].roll(1, 0) if learned else flatten(state)[name]
        assert torch.equal(tensor, expected), name
    assert any(".memory.weights" in name and t.any() for name, t in flatten(later).items())
    again = collect(pool, state, [], turn=1, passed=False)  # young memories are not handed on
    assert all(map(torch.equal, flatten(again.pasts).values(), flatten(pool.pasts).values()))


def test_distractors_compete_by_their_scores(model):
    pool = collect(empty_pool(model.init_state(1), 32), read(model, 0), [], turn=0, passed=False)
    state = read(model, 1, 32, capacity=6)
    for shift, kept in ((100.0, 2), (-100.0, 0)):
        rings = tuple(ring._replace(score=ring.score + shift) for ring in pool.rings)
        order = torch.arange(2).expand(2, 2)
        after = inject(state, pool._replace(rings=rings), order, JUMP, CONFIG.window)
        for block in after.blocks:
            assert block.store.position.shape[2] == 6
            strange = (block.store.position >= 24) & (block.store.position < 24 + JUMP)
            assert (strange.sum(2) == kept).all()
    assert [n for n, t in named_tensors(state) if not t.isfinite().all() and "score" not in n] == []


def test_more_pairs_than_positions_are_refused(model):
    pool = empty_pool(model.init_state(1), 32)
    with pytest.raises(ValueError, match="jump must be at least 5, the number of pairs, got 4"):
        inject(model.init_state(1), pool, torch.zeros(1, 5, dtype=torch.int64), 4, 8)
