"""The exact store by itself and under a model, against lists of everything it was offered."""

from __future__ import annotations

import math

import pytest
import torch

from wakesleep.kernels.admission import NUM_BINS, bin_span
from wakesleep.kernels.rotary import rotary_table, rotate
from wakesleep.kernels.softmax_read import scale_query, widen_query
from wakesleep.ttl import attention as attention_module
from wakesleep.ttl.attention import ROTARY_BASE
from wakesleep.ttl.grid import carry, gather, make_grid, scatter
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import SPAN, StoreState
from wakesleep.ttl.store import (
    HORIZON,
    AdmissionHead,
    ExactStore,
    StoreConfig,
    candidates,
    hash_uniform,
    z_scores,
)
from wakesleep.ttl.store_reader import BufferReader, PieceReader

VOCAB, B, H, K, W, C = 43, 2, 2, 8, 8, 4


def build(capacity: int, **store) -> TTLModel:
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=12,
        num_layers=1,
        num_heads=H,
        head_dim=K,
        mlp_dim=16,
        window=W,
        chunk=C,
        num_persistent=1,
        memory_layers=(0,),
        store_layers=(0,),
        memory=MemoryConfig(kind="matrix"),
        store=StoreConfig(capacity=capacity, hidden=8, **store),
    )
    return TTLModel(config).double()


def best(pairs: list[tuple[float, int]], size: int, span: int | None) -> list[tuple[float, int]]:
    """The best pairs of score and position: of every bin its own, then of all; older ones first."""
    order = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
    if span is not None:
        first = []
        for n in range(NUM_BINS):
            first += [pair for pair in order if pair[1] // span == n][: size // NUM_BINS]
        order = first + [pair for pair in order if pair not in first]
    return order[:size]


def kept(store: StoreState, b: int, h: int) -> set[int]:
    return {p for p in store.position[b, h].tolist() if p >= 0}


@torch.no_grad()
@pytest.mark.parametrize("quota", [False, True], ids=["", "quota"])
@pytest.mark.parametrize("score", ["learned", "residual", "residual_z", "recency", "reservoir"])
def test_the_store_always_holds_the_best_that_left_the_window(monkeypatch, score, quota):
    """Token by token; with a quota the best of what it still held."""
    size, T = (36, 200) if quota else (10, 150)
    model, scores = build(size, score=score, quota=quota), [[] for _ in range(B)]
    store = model.blocks[0].attention.store
    original = z_scores if score == "residual_z" else store.score

    def spy(*args):
        found = original(*args)
        for b in range(B):
            if score == "residual_z":  # with the open chunk, once more
                scores[b][int(args[-1].position[b]) :] = found[0][b].tolist()
            else:
                scores[b] += found[b].tolist()
        return found

    if score == "residual_z":
        monkeypatch.setattr(attention_module, "z_scores", spy)
    else:
        monkeypatch.setattr(store, "score", spy)
    tokens, state = torch.randint(VOCAB, (B, T)), model.init_state(B)
    held = [[[] for _ in range(H)] for _ in range(B)]
    for t in range(T):
        _, state, _ = model(tokens[:, t : t + 1], state)
        span = int(bin_span(torch.tensor([t + 1]), C)) if quota else None
        leaving = range(t + 1 - C - W, t + 1 - W) if (t + 1) % C == 0 and t + 1 > W else ()
        for b in range(B):
            for h in range(H):
                pairs = held[b][h] + [(scores[b][p][h], p) for p in leaving]
                held[b][h] = best(pairs, size, span)
                assert kept(state.blocks[0].store, b, h) == {p for _, p in held[b][h]}, t
    assert all(len(held[b][h]) == size for b in range(B) for h in range(H))


@torch.no_grad()
def test_by_mass_the_store_evicts_what_was_read_least(monkeypatch):
    """Token by token: mass is counted in the window, too, and goes on counting in the store."""
    size, T, model, shares = 10, 150, build(10, score="mass"), []
    original = attention_module.softmax_read

    def spy(*args):
        out, p = original(*args)
        shares.append(p)
        return out, p

    monkeypatch.setattr(attention_module, "softmax_read", spy)
    tokens, state = torch.randint(VOCAB, (B, T)), model.init_state(B)
    mass = torch.zeros(B, H, T)
    held = [[[] for _ in range(H)] for _ in range(B)]
    for t in range(T):
        before = state.blocks[0].store.position
        _, state, _ = model(tokens[:, t : t + 1], state)
        p, front, start = shares.pop().float(), 2, t // C * C - W
        for b in range(B):
            for h in range(H):
                row, shown = (
                    p[b, h, 0],
                    W + t % C + 1,
                )  # the call's token alone, and what it may see
                for slot in range(shown):
                    if 0 <= start + slot <= t:
                        mass[b, h, start + slot] += row[front + slot]
                for place, position in enumerate(before[b, h].tolist()):
                    if position >= 0:
                        mass[b, h, position] += row[front + shown + place]
                if (t + 1) % C == 0 and t + 1 > W:
                    held[b][h] += range(t + 1 - C - W, t + 1 - W)
                while len(held[b][h]) > size:
                    held[b][h].remove(min(held[b][h], key=lambda q: (mass[b, h, q].item(), -q)))
                store = state.blocks[0].store
                assert kept(store, b, h) == set(held[b][h]), t
                for place, position in enumerate(store.position[b, h].tolist()):
                    if position >= 0:
                        found = store.score[b, h, place]
                        assert found.item() == pytest.approx(mass[b, h, position].item(), rel=1e-4)


FORMS = {
    BufferReader: lambda *args: BufferReader(*args, 1),
    PieceReader: PieceReader,
}


@torch.no_grad()
@pytest.mark.parametrize("quota", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [3, 17, 40])
def test_what_has_no_score_never_enters(form, size, quota):
    config = StoreConfig(capacity=size, score="recency", quota=quota)
    state = ExactStore(config, 12, H, K).init_state(B, size, torch.zeros(0))
    turns = rotary_table(size, 2, ROTARY_BASE, state.k)
    reader, allowed = FORMS[form](quota, state, turns, None), [set(), set()]
    for n in range(12):
        position = (n * C + torch.arange(C)).expand(B, C)
        enters = torch.rand(B, C) < 0.4
        enters[:, 0] &= n % 3 > 0  # and chunks with nothing at all
        pairs, ids = torch.randn(2, B, C, H, K), torch.zeros(B, C + SPAN - 1).long()
        new = candidates(*pairs, torch.randn(B, C, H), enters & (n % 4 > 0), position, ids)
        reader.admit(new, torch.full((B,), (n + 1) * C), C)
        for b in range(B):
            allowed[b] |= set(position[b][enters[b]].tolist()) if n % 4 else set()
            for h in range(H):
                held = kept(reader.state, b, h)
                assert held <= allowed[b] and len(held) == min(size, len(allowed[b]))
                assert int(reader.count[b, h]) == len(held) == int((~reader.empty[b, h]).sum())
        score, there = reader.state.score, reader.state.position >= 0
        assert torch.equal(score > -torch.inf, there)
        assert reader.full == (not reader.empty.any())
        assert reader.used == reader.empty.shape[-1] == sum(v.shape[2] for v in reader.values)
        assert reader.used <= 2 * size + C  # dropped pairs are not read for ever
    assert max(map(len, allowed)) > 12


@torch.no_grad()
@pytest.mark.parametrize("score", ["learned", "recency", "reservoir", "mass"])
def test_tokens_that_were_not_finite_never_enter(score):
    model = build(9, score=score)
    tokens = torch.randint(VOCAB - 1, (B, 70))
    bad = torch.rand(B, 70) < 0.3
    tokens[bad] = VOCAB - 1
    model.embedding.weight[VOCAB - 1] = torch.inf
    state = model.init_state(B)
    for start in range(0, 70, 7):
        _, state, _ = model(tokens[:, start : start + 7], state, head=False)
    for b in range(B):
        for h in range(H):
            held = kept(state.blocks[0].store, b, h)
            assert len(held) == 9 and not held & set(bad[b].nonzero().flatten().tolist())


@pytest.mark.parametrize("form", FORMS)
def test_an_entry_that_grows_old_loses_no_more_than_a_nat(form):
    """From rank 0 to rank 4,095 the rotary dimensions turn, and their product is bounded."""
    size, R = 4096, 2
    turns = rotary_table(W + C + size, R, ROTARY_BASE, torch.zeros(0).double())
    pair = torch.randn(1, 1, size, K, dtype=torch.float64) * 100
    number, position = torch.zeros(1, 1, size), torch.randperm(size).view(1, 1, size)
    span = torch.zeros(1, 1, size, SPAN, dtype=torch.int32)
    q = torch.randn(K, dtype=torch.float64)
    for entry, rank in ((7, 0), (7, size - 1), (4000, 17)):
        others = torch.where(position == size - 1 - rank, position[0, 0, entry], position)
        others[0, 0, entry] = size - 1 - rank
        store = StoreState(pair, pair, number, number, others, span, number[..., :3])
        far = turns[W + C :]
        assert len(far) == size  # no distance beyond W + C + S - 1 exists
        reader = FORMS[form](False, store, far, None)
        key, turned = pair[0, 0, entry], rotate(q[:R], turns[W + C + rank])
        cosine = turned @ key[:R] / (turned.norm() * key[:R].norm())
        content = q[R:] @ key[R:]
        places = range(W, W + C)  # wherever the query stands in its chunk
        queries = torch.stack([widen_query(q, turns[place]) for place in places])
        queries = scale_query(queries, torch.tensor(7.0), R)
        read = reader.logits(queries[None, None], [pair.new_zeros(1, 1, 1, R + K)])
        expected = (cosine / 2 + 7 * content).item()
        assert read[0, 0, :, 1 + entry].tolist() == pytest.approx([expected] * C, abs=1e-9)
        assert torch.equal(reader.values[0], pair)  # content, to the last bit


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_scores_are_float32_where_products_are_bfloat16(weights):
    head = AdmissionHead(16, 32, H).to(weights)
    x = torch.randn(1, 2000, 16, dtype=weights)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        score = head(x)
    assert score.dtype == torch.float32
    assert all(len(score[..., h].unique()) > 1950 for h in range(H))  # rounded: under 1,000


def splitmix(position: int, lane: int, seed: int) -> float:
    """The hash in integers without end."""
    mask = 2**64 - 1
    z = position * 0x9E3779B97F4A7C15 + lane * 0x2545F4914F6CDD1D + seed * 0x632BE59BD9B4E019
    z &= mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return ((z ^ (z >> 31)) >> 40) / 2**24


def test_the_reservoirs_hash_is_the_same_number_everywhere():
    position = torch.cat([torch.arange(40), 10**7 + torch.arange(9), torch.tensor([2**40, 2**62])])
    for lane in (0, 1, 5000):
        for seed in (0, 1, 2, 7, 2**40, -1):
            found = hash_uniform(position, torch.tensor(lane), seed)
            assert found.dtype == torch.float32
            assert found.tolist() == [splitmix(p, lane, seed) for p in position.tolist()]
            alone = [hash_uniform(p, torch.tensor(lane), seed).item() for p in position]
            assert found.tolist() == alone
    scores = []
    for dtype in (torch.float64, torch.bfloat16):
        store = ExactStore(StoreConfig(score="reservoir", seed=1), 12, H, K).to(dtype)
        x = torch.zeros(B, 51, 12, dtype=dtype)
        scores.append(store.score(x, position.expand(B, -1), torch.tensor([0, 5]), None))
    assert torch.equal(*scores) and not torch.equal(scores[0][0], scores[0][1])


def test_the_reservoirs_hash_is_uniform_and_independent_of_lane_seed_and_neighbour():
    position = torch.arange(30_000)
    u = [hash_uniform(position, torch.tensor(b), s) for b, s in ((0, 0), (1, 0), (0, 1), (7, 2))]
    u.append(u[0].roll(1))
    for a in u:
        counts = torch.histc(a, 50, 0, 1)
        assert ((counts - 600).square() / 600).sum() < 100  # chi squared, 49 degrees of freedom
        assert 0 <= a.min() and a.max() < 1
    assert (torch.corrcoef(torch.stack(u)) - torch.eye(5)).abs().max() < 0.02


def scored(raw, live, lengths_of_calls, moments):
    """z_scores call by call, with the open chunk carried; [B, T, H] and the last moments."""
    position, opened = torch.zeros(B).long(), raw.new_zeros(B, C, H)
    open_live, out, at = torch.zeros(B, C, dtype=torch.bool), [], 0
    for length in lengths_of_calls:
        now = slice(at, at + length)
        grid = make_grid(position, torch.full((B,), length), C, length)
        lives = scatter(grid, live[:, now], open_live)
        slots = scatter(grid, raw[:, now], opened)
        z, moments = z_scores(slots, opened, moments, lives, grid)
        out.append(gather(grid, z, length))
        opened, open_live = (carry(grid, t) for t in (z, lives))
        position, at = position + length, at + length
    return torch.cat(out, 1), moments


@pytest.mark.parametrize("cuts", [[41], [1] * 41, [3, 0, 6, 4, 28]], ids=["one", "ones", "some"])
def test_z_scores_compare_with_all_that_was_live_before_the_chunk(cuts):
    raw = torch.randn(B, 41, H).double().exp()
    raw = raw * torch.tensor([0.01, 30.0]) + torch.tensor([0.2, -5.0])
    live = torch.rand(B, 41) < 0.7
    live[0, 2 * C : 3 * C] = False  # a chunk with nothing
    fresh = torch.tensor([0.0, 0.0, 1.0]).expand(B, H, 3)
    found, moments = scored(raw, live, cuts, fresh)
    for b in range(B):
        for h in range(H):
            for t in range(41):
                mean, variance = moments_of(raw[b, : t // C * C, h][live[b, : t // C * C]])
                z = (raw[b, t, h].item() - mean) / math.sqrt(variance + 1e-6)
                assert found[b, t, h].item() == pytest.approx(z, rel=1e-6)
            expected = [int(live[b, :40].sum()), *moments_of(raw[b, :40, h][live[b, :40]])]
            assert moments[b, h].tolist() == pytest.approx(expected, rel=1e-6)


def moments_of(raw: torch.Tensor) -> tuple[float, float]:
    """Mean and variance; 0 and 1 of nothing."""
    if not len(raw):
        return 0.0, 1.0
    return raw.mean().item(), (raw - raw.mean()).square().mean().item()


def test_moments_forget_what_is_long_past():
    """Beyond the horizon a chunk of n live tokens has the weight n / (HORIZON + n)."""
    mean, variance, count = 3.0, 4.0, 10 * HORIZON
    raw, live = torch.randn(B, C, H) * 5 + 7, torch.tensor([[True] * C, [True, False, True, False]])
    _, moments = scored(raw, live, [C], torch.tensor([count, mean, variance]).expand(B, H, 3))
    for b in range(B):
        for h in range(H):
            chunk = raw[b, live[b], h]
            n, far = len(chunk), chunk.mean() - mean
            share = n / (HORIZON + n)
            spread = (1 - share) * variance + share * chunk.var(correction=0)
            expected = [count + n, mean + share * far, spread + share * (1 - share) * far**2]
            assert moments[b, h].tolist() == pytest.approx([float(e) for e in expected], rel=1e-5)


def test_a_score_of_surprise_without_a_memory_is_refused():
    for score in ("residual", "residual_z"):
        store = ExactStore(StoreConfig(score=score), 12, H, K)
        with pytest.raises(ValueError, match=r"memory_layers.*store\.score=learned"):
            store.score(torch.zeros(1, 1, 12), torch.zeros(1, 1).long(), torch.zeros(1), None)


@pytest.mark.parametrize("options", [{"capacity": 0}, {"capacity": 2**20 + 1}, {"hidden": 0}])
def test_a_store_that_cannot_be_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"store\.{name} must be between 1 and"):
        StoreConfig(**options)
