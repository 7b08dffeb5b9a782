"""Attention over window and store against a token-by-token twin built from lists."""

from __future__ import annotations

import math

import pytest
import torch

from wakesleep.kernels.rotary import rotary_table, rotate
from wakesleep.ttl import attention as attention_module
from wakesleep.ttl import model as model_module
from wakesleep.ttl import pages as pages_module
from wakesleep.ttl.attention import ROTARY_BASE, TAPS, AttentionInput
from wakesleep.ttl.checks import assert_causal
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.grid import make_grid
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import SPAN, SPAN_AFTER, BlockState, StreamState, named_tensors
from wakesleep.ttl.store import StoreConfig

W, C, S, T, VOCAB = 8, 4, 6, 45, 31


def build(**options) -> TTLModel:
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=16,
        num_layers=1,
        num_heads=2,
        head_dim=16,
        mlp_dim=16,
        window=W,
        chunk=C,
        num_persistent=1,
        store_layers=(0,),
        **{"memory_layers": (), "store": StoreConfig(capacity=S, hidden=8), **options},
    )
    model = TTLModel(config).double()
    with torch.no_grad():
        attention = model.blocks[0].attention
        attention.size_gain += torch.tensor([0.3, -0.1])
        attention.sink += torch.tensor([0.5, -0.5])
    return model


@pytest.fixture(scope="module")
def model() -> TTLModel:
    return build()


def taught(model) -> StreamState:
    """A lane that has read nothing, and an MLP that holds 5 keys of one head, 3 of the other."""
    state, draw = model.init_state(1), torch.Generator().manual_seed(8)
    fast = state.blocks[0].fast
    rows = torch.arange(fast.old.k.shape[2])
    position = torch.where(rows < torch.tensor([[[5], [3]]]), rows, -1)
    position[0, 0, 1] = -1  # a row may have gone
    held = position >= 0
    k = torch.randn(fast.old.k.shape, generator=draw).double() * held[..., None]
    held[0, 0, 2] = False  # a pair that is still in the store
    s = torch.randn(fast.s.shape, generator=draw).double()
    fast = fast._replace(s=s, old=fast.old._replace(k=k, position=position, open=held))
    return state._replace(blocks=(state.blocks[0]._replace(fast=fast),))


def far(q, k, turn, scale):
    """Logit of a key outside the window: what its distance adds is half a nat at most."""
    R = 2 * turn.shape[-1]
    turned = rotate(q[:R], turn)
    cosine = turned @ k[:R] / (turned.norm() * k[:R].norm())
    return 0.5 * cosine + scale * (q[R:] @ k[R:])


def twin(attention, x, context=None, blind=(), fast=None):
    """Attention values [T, H * K] of one lane's x [T, D], one query at a time, from lists.

    context: [T, D] what a memory gave back for each token (MAC); blind: queries without a window;
    fast: state of fast weights that are an MLP.
    """
    H, K, R = attention.num_heads, attention.head_dim, attention.rotary_dims
    raw = attention.qkv(x)
    padded = torch.cat([raw.new_zeros(TAPS - 1, raw.shape[1]), raw])
    qkv = sum(padded[j : j + len(x)] * attention.taps[:, j] for j in range(TAPS))
    q, k, v = qkv.view(-1, 3, H, K).unbind(1)
    q = torch.nn.functional.rms_norm(q, (K,), eps=1e-6) * attention.q_gain
    k = torch.nn.functional.rms_norm(k, (K,), eps=1e-6) * attention.k_gain
    score = attention.store.head(x).float()
    if context is not None:
        page_k, page_v = (context @ attention.qkv.weight[H * K :].T).view(-1, 2, H, K).unbind(1)
        page_k = torch.nn.functional.rms_norm(page_k, (K,), eps=1e-6) * attention.k_gain
    turns = rotary_table(W + C + S, R, ROTARY_BASE, q)
    store = [[] for _ in range(H)]  # positions kept by each head
    out = []
    for t in range(len(x)):
        chunk = t // C
        if t % C == 0 and chunk > W // C:  # a boundary was crossed: the oldest chunk competes
            leaving = range(t - W - C, t - W)
            for h in range(H):
                pool = sorted([*store[h], *leaving])
                pool.sort(key=lambda p, h=h: -score[p, h].item())
                store[h] = sorted(pool[:S])
        window = range(t if t in blind else max(0, chunk * C - W), t + 1)
        for h in range(H):
            page = range(t // attention.page * attention.page, t + 1) if attention.page else ()
            told = fast.old.k[0, h][fast.old.open[0, h]] if fast else ()
            seen = 1 + len(told) + len(page) + len(window) + len(store[h])
            scale = (1 + attention.size_gain[h] * math.log(seen)) / math.sqrt(K)
            logits, values = [attention.sink[h]], [v.new_zeros(K)]
            logits.append(far(q[t, h], attention.persistent[0, h, 0], turns[0], scale))
            values.append(attention.persistent[1, h, 0])
            for j in page:
                logit = far(q[t, h], page_k[j, h], turns[0], scale)
                logits.append(logit + attention.page_bias[h])
                values.append(page_v[j, h])
            newest_first = sorted(store[h], reverse=True)
            for p in window:
                turned = rotate(q[t, h, :R], turns[t - p])
                logits.append(scale * (turned @ k[p, h, :R] + q[t, h, R:] @ k[p, h, R:]))
                values.append(v[p, h])
            for rank, p in enumerate(newest_first):
                logits.append(far(q[t, h], k[p, h], turns[W + C + rank], scale))
                values.append(v[p, h])
            for key in told:
                logits.append(far(q[t, h], key, turns[W + C + S - 1], scale))
                unit = attention.fast.space.keys(key.expand(1, H, 1, K))[0, h, 0]
                a, b = fast.s[0, h].chunk(2, -1)
                values.append(torch.nn.functional.silu(unit @ a) @ b.T)
            p = torch.softmax(torch.stack(logits), 0)
            out.append(p @ torch.stack(values))
    return torch.stack(out).view(len(x), H * K)


def read_and_caught(model, state=None, **given):
    """What the attention of the first block was given, [T, D], and the values that it read."""
    x = torch.randint(VOCAB, (1, T), generator=torch.Generator().manual_seed(5))
    seen = []
    attention = model.blocks[0].attention
    hooks = [
        attention.register_forward_pre_hook(lambda _m, a: seen.append(a[0])),
        attention.out.register_forward_pre_hook(lambda _m, a: seen.append(a[0])),
    ]
    model(x, state or model.init_state(1), **given)
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1][0]


@torch.no_grad()
def test_values_equal_those_of_a_token_by_token_twin(model):
    given, values = read_and_caught(model)
    assert (twin(model.blocks[0].attention, given[0]) - values).abs().max() < 1e-12


@pytest.mark.parametrize("asleep", [False, True])
def test_values_and_gradients_equal_those_of_the_twin(model, asleep):
    fast, state = None, None
    if asleep:  # an MLP was written, and its keys are in the softmax
        model = build(fast_layers=(0,), fast=FastConfig(kind="mlp", expansion=2))
        state = taught(model)
        fast = state.blocks[0].fast
        with torch.no_grad():
            model.blocks[0].attention.fast.space.key_map.normal_()
            assert (read_and_caught(model, state)[1] - read_and_caught(model)[1]).abs().max() > 0.1
    attention = model.blocks[0].attention
    given, values = read_and_caught(model, state)
    with torch.no_grad():  # another form of the store's reading
        assert (read_and_caught(model, state)[1] - values).abs().max() < 1e-12
    expected = twin(attention, given[0], fast=fast)
    assert (expected - values).abs().max() < 1e-12
    probe = torch.randn(values.shape, generator=torch.Generator().manual_seed(6)).double()
    names = ["qkv.weight", "taps", "q_gain", "k_gain", "sink", "size_gain", "persistent"]
    inputs = [given, *(attention.get_parameter(name) for name in names)]
    found, wanted = (
        torch.autograd.grad((y * probe).sum(), inputs, retain_graph=True)
        for y in (values, expected)
    )
    for name, one, other in zip(["x", *names], found, wanted, strict=True):
        assert other.abs().max() > 1e-3, name
        assert (one - other).abs().max() < 1e-12 * (1 + other.abs().max()), name


@pytest.mark.parametrize("gradients", [True, False])
def test_blind_queries_see_the_store_and_of_the_window_themselves(model, gradients):
    blind = torch.rand(1, T, generator=torch.Generator().manual_seed(7)) < 0.4
    with torch.set_grad_enabled(gradients):
        given, values = read_and_caught(model, blind=blind)
        expected = twin(
            model.blocks[0].attention, given[0], blind=set(blind[0].nonzero()[:, 0].tolist())
        )
        assert (expected - values).abs().max() < 1e-12
        assert (twin(model.blocks[0].attention, given[0]) - values).abs().max() > 1e-3


@torch.no_grad()
def test_pages_are_read_with_the_memory_of_their_start_and_written_at_their_end():
    torch.manual_seed(4)
    P = 12
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=16,
        num_layers=1,
        num_heads=2,
        head_dim=16,
        mlp_dim=16,
        window=W,
        chunk=C,
        num_persistent=1,
        combine="mac",
        memory_layers=(0,),
        store_layers=(0,),
        memory=MemoryConfig(page=P),
        store=StoreConfig(capacity=S, hidden=8),
    )
    block = TTLModel(config).double().blocks[0]
    block.memory.out.weight.mul_(50)  # so that it matters what the memory has learned
    block.attention.page_bias += torch.tensor([0.4, -0.3])
    x = torch.randn(1, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    memory, h = block.memory.init_state(1), block.norm(x)
    context, added = [], []
    for start in range(0, T, P):
        part = h[:, start : start + P]
        context.append(block.memory.read(part, memory))
        values = twin(block.attention, h[0, : start + P], torch.cat(context, 1)[0])
        y = block.attention.out(values[start:])[None]
        added.append(y * 2 * block.memory.read(y, memory).sigmoid())
        length = torch.tensor([y.shape[1]])
        grid = make_grid(torch.tensor([start]), length, P, y.shape[1])
        memory, _ = block.memory.append(y, memory, grid, torch.ones(1, y.shape[1]) > 0)
    fresh = [block.attention.init_state(1, W, S), block.memory.init_state(1)]
    state = BlockState(*fresh[0], fresh[1], None, x.new_zeros(1, P, 2, 2, 16))
    grid = make_grid(torch.tensor([0]), torch.tensor([T]), C, T)
    ids = torch.zeros(1, SPAN + W + grid.num_chunks * C, dtype=torch.int64)
    given = AttentionInput(torch.ones(1, T) > 0, ids, torch.zeros(1).long(), None, None)
    mixed, state, *_ = block._mix(x, state, grid, given)
    assert (mixed - x - torch.cat(added, 1)).abs().max() < 1e-12
    for a, b in zip(state.memory.weights, memory.weights, strict=True):
        assert (a - b).abs().max() < 1e-12 and a.abs().max() > 1e-4


MAC = {"combine": "mac", "memory": MemoryConfig(page=2 * C), "memory_layers": (0,)}
BY_MASS = {"store": StoreConfig(capacity=S, score="mass"), "memory_layers": ()}
MLP = {"memory": MemoryConfig(kind="mlp", max_step=1.0), "memory_layers": (0,)}
GATED = {"memory": MemoryConfig(kind="matrix", gate_threshold=1.0), "memory_layers": (0,)}
AWAKE = {"fast": FastConfig(write="always"), "fast_layers": (0,)}
DELTA = {"memory": MemoryConfig(kind="delta"), "memory_layers": (0,), "combine": "mal", **AWAKE}
ALONE = {"mac": MAC, "mag by mass": BY_MASS, "mlp": MLP, "gated": GATED, "delta": DELTA}


@torch.no_grad()
@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE.keys())
def test_a_call_within_one_chunk_asks_for_its_own_tokens_alone(monkeypatch, options):
    """It gives what it gives when all slots of the chunk ask, as they do where lanes differ."""
    model, draw = build(**options), torch.Generator().manual_seed(9)
    original, asked = attention_module.scale_query, []
    ours, slots = model.init_state(2), model.init_state(2)

    def any_lanes(*args):
        return make_grid(*args)._replace(start=None, stop=None, aligned=False)

    def spy(q, *args):
        asked.append(q.shape[2])
        return original(q, *args)

    monkeypatch.setattr(attention_module, "scale_query", spy)
    for length in (W + C + 2, 1, 1, 3, 4, 2, C + 1, *[1] * 9):
        x = torch.randint(VOCAB, (2, length), generator=draw)
        told = {"blind": torch.rand(x.shape, generator=draw) < 0.3}
        told["read_weight"] = torch.rand(x.shape, generator=draw)
        within = int(ours.position[0]) % C + length <= C
        y, ours, _ = model(x, ours, **told)
        assert asked.pop() == length or not within
        with monkeypatch.context() as patch:
            for module in (model_module, pages_module):
                patch.setattr(module, "make_grid", any_lanes)
            expected, slots, _ = model(x, slots, **told)
        assert asked.pop() == C
        assert (y - expected).abs().max() < 1e-12
        for (name, a), (_, b) in zip(named_tensors(ours), named_tensors(slots), strict=True):
            assert torch.allclose(a.double(), b.double(), atol=1e-6), name
    assert float(ours.blocks[0].store.mass.max()) > 0.1


@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE.keys())
def test_gradients_of_calls_within_one_chunk_are_those_of_all_slots(monkeypatch, options):
    model = build(**options)
    x = torch.randint(VOCAB, (1, W + 11), generator=torch.Generator().manual_seed(10))

    def gradients():
        state, losses = model.init_state(1), []
        for part in x.split([W + 1, 1, 2, C - 1, 1, C - 1], 1):
            y, state, _ = model(part, state)
            losses.append(y.square().sum())
        model.zero_grad()
        sum(losses).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def any_lanes(*args):
        return make_grid(*args)._replace(start=None, stop=None, aligned=False)

    ours = gradients()
    for module in (model_module, pages_module):
        monkeypatch.setattr(module, "make_grid", any_lanes)
    slots = gradients()
    assert ours.keys() == slots.keys()
    for name, g in ours.items():
        assert (g - slots[name]).abs().max() < 1e-9 * (1 + slots[name].abs().max()), name


@torch.no_grad()
def test_stored_pairs_carry_their_positions_and_the_ids_around_them(model):
    x = torch.randint(VOCAB, (2, T), generator=torch.Generator().manual_seed(6))
    _, state, _ = model(x[:, :17], model.init_state(2))
    _, state, _ = model(x[:, 17:], state)
    store = state.blocks[0].store
    assert (store.position >= 0).all()
    for b, h, s in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(S)).tolist():
        p = int(store.position[b, h, s])
        first = p - (SPAN - SPAN_AFTER - 1)
        boundary = (p // C) * C + W + C  # what had been read when the token left the window
        expected = [int(x[b, i]) if 0 <= i < boundary else -1 for i in range(first, first + SPAN)]
        assert store.span[b, h, s].tolist() == expected


@torch.no_grad()
def test_distances_stay_bounded_however_long_the_stream(model):
    attention, longest = model.blocks[0].attention, []
    original = attention._turns
    attention._turns = lambda *a: longest.append(len(original(*a))) or original(*a)
    state = model.init_state(1)
    for i in range(40):
        x = torch.randint(VOCAB, (1, C), generator=torch.Generator().manual_seed(i))
        _, state, _ = model(x, state)
    del attention._turns
    assert set(longest) == {W + C + S}


@torch.no_grad()
def test_spread_ranks_change_the_read_and_keep_it_causal(model):
    x = torch.randint(VOCAB, (2, 2, T), generator=torch.Generator().manual_seed(8))
    table = torch.tensor([[0, 3, 4, 9, 20, 31], [1, 2, 3, 5, 8, 13]])
    state = model.init_state(2)
    step = lambda tokens, state: model(tokens, state, rank_table=table)  # noqa: E731
    assert_causal(step, state, x[0], x[1], [5, 30], atol=1e-12)
    plain = model(x[0], state, rank_table=torch.arange(S).expand(2, S))[0]
    assert torch.equal(plain, model(x[0], state)[0])
    spread = step(x[0], state)[0]
    assert (plain - spread).abs().max() > 1e-6
    with torch.enable_grad():  # the other form
        torch.testing.assert_close(step(x[0], state)[0].detach(), spread, rtol=0, atol=1e-10)


@torch.no_grad()
def test_read_mass_of_a_lane_is_booked_on_the_pairs_that_were_read(model):
    x = torch.randint(VOCAB, (2, T), generator=torch.Generator().manual_seed(9))
    weight = torch.zeros(2, T)
    _, silent, _ = model(x, model.init_state(2), read_weight=weight)
    assert (silent.blocks[0].store.mass == 0).all()
    weight[0, -1] = 1.0
    _, state, _ = model(x, model.init_state(2), read_weight=weight)
    mass = state.blocks[0].store.mass
    assert (mass[1] == 0).all() and (mass[0] > 0).all() and (mass[0].sum(-1) < 1).all()


@torch.no_grad()
def test_reads_below_the_floor_are_not_booked(model):
    x = torch.randint(VOCAB, (1, T), generator=torch.Generator().manual_seed(9))
    shares = []
    for t in range(T):  # what each query alone read
        one = torch.zeros(1, T)
        one[0, t] = 1.0
        _, state, _ = model(x, model.init_state(1), read_weight=one)
        shares.append(state.blocks[0].store.mass)
    shares = torch.stack(shares)
    floor = float(shares[shares > 0].median())
    _, state, _ = model(x, model.init_state(1), read_weight=torch.ones(1, T), read_floor=floor)
    booked = torch.where(shares > floor, shares, 0.0).sum(0)
    assert (state.blocks[0].store.mass - booked).abs().max() < 1e-6
    assert (booked < shares.sum(0)).any()


BAD = ["batch", "id", "float", "shape", "lengths", "bool lengths", "read_weight", "rank_table"]


@pytest.mark.parametrize("bad", BAD)
def test_input_that_does_not_fit_is_refused_with_a_reason(model, bad):
    tokens, lengths, more = torch.zeros(2, 5, dtype=torch.int64), None, {}
    match bad:
        case "batch":
            tokens, word = tokens[:1], "batch 1"
        case "id":
            tokens, word = tokens + VOCAB, f"0 to {VOCAB - 1}"
        case "float":
            tokens, word = tokens.float(), "int64"
        case "shape":
            tokens, word = tokens[0], r"\[B, T\]"
        case "lengths":
            lengths, word = torch.tensor([6, 0]), "from 0 to 5"
        case "bool lengths":
            lengths, word = torch.tensor([True, False]), "int64"
        case "read_weight":
            more, word = {"read_weight": torch.ones(1, 5)}, r"read_weight must be \[2, 5\]"
        case "rank_table":
            more, word = {"rank_table": torch.zeros(2, 5).long()}, rf"rank_table must be \[2, {S}\]"
    with pytest.raises(ValueError, match=word):
        model(tokens, model.init_state(2), lengths, **more)
