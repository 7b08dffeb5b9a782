"""The neural memory as a module: cuts, lanes, gates, pages, gradients, costs."""

import math

import pytest
import torch
import torch.nn.functional as F

from wakesleep.kernels.memory_reference import Rule, Tokens, delta_loop, memory_loop
from wakesleep.ttl.grid import make_grid
from wakesleep.ttl.memory import MemoryConfig, NeuralMemory
from wakesleep.ttl.state import flatten, map_state, select

D, H, K, C = 12, 2, 6, 4
KINDS = ["matrix", "mlp", "delta"]
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind, chunk=C, **options):
    """A memory in float64 whose gates differ much from token to token."""
    memory = NeuralMemory(MemoryConfig(kind=kind, **options), D, H, K, chunk).double()
    torch.nn.init.normal_(memory.gates.weight, std=0.5)
    return memory


def stream(batch, num_tokens):
    return torch.randn(batch, num_tokens, D, dtype=torch.float64)


def call(memory, x, state, position, lengths=None, live=None):
    """One forward; returns its result and the next positions."""
    B, T = x.shape[:2]
    lengths = torch.full((B,), T) if lengths is None else torch.tensor(lengths)
    inside = torch.arange(T) < lengths[:, None]
    live = inside if live is None else live & inside
    grid = make_grid(position, lengths, memory.open_slots, T)
    return *memory(x, state, grid, live), position + lengths


def read_all(memory, x, cuts=None, live=None):
    """Read x in calls of the given lengths; outputs, state and stats of the whole."""
    B, T = x.shape[:2]
    state, position = memory.init_state(B), torch.zeros(B, dtype=torch.int64)
    live = torch.ones(B, T, dtype=torch.bool) if live is None else live
    ys, per_head, written, at = [], [], [], 0
    for length in [T] if cuts is None else cuts:
        now = slice(at, at + length)
        y, state, stats, position = call(memory, x[:, now], state, position, live=live[:, now])
        ys.append(y), per_head.append(stats.per_head), written.append(stats.written)
        at += length
    return torch.cat(ys, 1), state, torch.cat(per_head, 2), torch.cat(written, 1)


@pytest.mark.parametrize(("kind", "least"), [("delta", 12), ("matrix", 9), ("mlp", 5)])
def test_a_fresh_memory_gives_back_what_came_behind_a_token(kind, least):
    """An MLP with a random answer of its own to every key found none of 12."""
    right = 0
    for seed in range(12):
        torch.manual_seed(seed)
        options = MemoryConfig(kind=kind, max_step=1.0, momentum=False)
        memory = NeuralMemory(options, 64, 1, 64, 8)
        said = F.normalize(torch.randn(24, 64), dim=1) * 8
        x = torch.cat([said, said[seed, None]])[None]
        y, *_ = call(memory, x, memory.init_state(1), torch.zeros(1, dtype=torch.int64))
        right += int(F.cosine_similarity(y[0, -1, None], said).argmax()) == seed + 1
    assert right >= least


def test_an_mlp_starts_by_giving_back_the_key_alone():
    memory = build("mlp")
    q = memory._unit(torch.randn(H, 3, K)).double()
    y = memory._memory(1).apply(tuple(memory.initial), q)
    torch.testing.assert_close(y, q, rtol=0, atol=0.02)


@kinds
@pytest.mark.parametrize("taps, page", [(4, None), (1, None), (3, 2 * C)])
def test_a_head_starts_by_comparing_one_token_more_than_the_one_before(kind, taps, page):
    torch.manual_seed(0)
    memory = NeuralMemory(MemoryConfig(kind=kind, taps=taps, page=page), D, 4, K, C)
    *queries, keys, values = (part.unflatten(0, (4, K)) for part in memory.taps.split(4 * K))
    for head in range(4):
        count = max(1, min(head + 1, taps - 1 if queries else 1))
        before = 0 if taps == 1 else 1
        for part, first in [(keys, before), *((part, 0) for part in queries)]:
            found = (part[head] > 0.5 * count**-0.5).all(0).nonzero()[:, 0]
            assert found.tolist() == [taps - 1 - first - n for n in reversed(range(count))]
        assert (values[head, :, -1] > 0.5).all()


def assert_same(a, b, tolerance=1e-10):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def module_twin(memory, x):
    """Outputs [T, D] of one lane's x [T, D]: projections, gates and rule, token by token."""
    c, R = memory.config, memory.config.taps
    raw = memory.qkv(x)
    padded = torch.cat([raw.new_zeros(R - 1, raw.shape[1]), raw])
    conv = sum(padded[j : j + len(x)] * memory.taps[:, j] for j in range(R))
    q, k, v = conv.view(-1, 3, H, K).unbind(1)
    q, k = (F.rms_norm(t, (K,), eps=1e-6) / math.sqrt(K) for t in (q, k))
    gates = torch.sigmoid(memory.gates(x)).view(len(x), -1, H)  # output, keep, step, momentum
    heads = []
    for h in range(H):
        eta = gates[:, 3, h] * c.max_momentum if c.levels == 2 else None
        every = torch.ones(len(x), dtype=torch.bool)
        values = F.silu(v[:, h])
        tokens = Tokens(q[:, h], k[:, h], values, gates[:, 1, h], eta, gates[:, 2, h], every)
        first = tuple(w[h] for w in memory.initial)
        if c.kind == "delta":
            y, _ = delta_loop(first[0], tokens)
        else:
            scale = (memory.gamma[h], memory.bias[h]) if c.kind == "mlp" else ()
            rule = Rule(memory.chunk, c.max_step, c.huber * math.sqrt(K), first, *scale)
            nothing = tuple(map(torch.zeros_like, first))
            y, _, _ = memory_loop(rule, nothing, nothing, tokens)
        heads.append(F.rms_norm(y, (K,), eps=1e-6) * memory.gain[h] * gates[:, 0, h, None])
    return memory.out(torch.cat(heads, -1))


@kinds
@pytest.mark.parametrize("momentum", [True, False])
def test_the_module_equals_a_token_by_token_twin(kind, momentum):
    torch.manual_seed(11)
    memory = build(kind, momentum=momentum)
    with torch.no_grad():
        memory.gain.mul_(torch.rand(H, K) + 0.5)
        memory.taps.add_(torch.randn_like(memory.taps) * 0.3)
    x = stream(1, 3 * C + 2)
    y = read_all(memory, x, cuts=[5, 1, 3 * C - 4])[0]
    assert (y[0] - module_twin(memory, x[0])).abs().max() < 1e-12


def live_part(state):
    """The state without the slots that hold nothing."""
    hold = state.live[..., None, None]
    k, v, gates = (t.where(hold, 0) for t in (state.k, state.v, state.gates))
    return state._replace(k=k, v=v, gates=gates)


@kinds
@pytest.mark.parametrize("gate", [0.0, 0.9, math.inf])
@pytest.mark.parametrize(
    "cuts", [[1] * 19, [0, 19, 0], [C - 1, C + 1, 1, C, 0, C, 3], [2 * C, C, 7]]
)
def test_any_split_equals_one_call(kind, gate, cuts):
    memory, x = build(kind, gate_threshold=gate), stream(2, 19)
    y, state, surprise, written = read_all(memory, x)
    cut_y, cut_state, cut_surprise, cut_written = read_all(memory, x, cuts)
    assert_same([y, surprise], [cut_y, cut_surprise])
    assert torch.equal(written, cut_written)
    both = (flatten(live_part(s)).values() for s in (state, cut_state))
    assert_same(*both)


@kinds
def test_ragged_lanes_equal_each_lane_alone(kind):
    """Lanes at different phases, with lengths from nothing to the whole call."""
    memory, x = build(kind, gate_threshold=0.9), stream(4, 24)
    state, position = memory.init_state(4), torch.zeros(4, dtype=torch.int64)
    got = [[] for _ in range(4)]
    for lengths in ([3, 0, 5, 1], [0, 0, 9, 4], [6, 1, 0, 9], [7, 8, 2, 1]):
        starts = position.tolist()
        columns = torch.stack([x[b, starts[b] : starts[b] + 9] for b in range(4)])
        y, state, _, position = call(memory, columns, state, position, lengths)
        for b in range(4):
            got[b].append(y[b, : lengths[b]])
    for b in range(4):
        alone, lane, *_ = read_all(memory, x[b : b + 1, : int(position[b])])
        assert_same([torch.cat(got[b])], [alone[0]])
        mine = select(live_part(state), torch.tensor([b]))
        assert_same(flatten(mine).values(), flatten(live_part(lane)).values())


@kinds
def test_padding_and_other_lanes_change_nothing(kind):
    memory, x = build(kind), stream(2, 9)
    other = x.clone()
    other[1] = torch.randn_like(x[1])  # another lane
    other[0, 7:] = float("inf")  # padding
    runs = []
    for tokens in (x, other):
        y, state, *_ = call(memory, tokens, memory.init_state(2), torch.zeros(2).long(), [7, 9])
        runs.append([y[0, :7], *flatten(select(state, torch.tensor([0]))).values()])
    assert_same(*runs, tolerance=0)


@kinds
@pytest.mark.parametrize("gate", [0.0, 0.9])
def test_a_later_token_changes_nothing_before_it(kind, gate):
    memory, x = build(kind, gate_threshold=gate), stream(1, 11)
    with torch.no_grad():
        for weights in memory.initial:
            weights.mul_(20)
    y, _, surprise, written = read_all(memory, x)
    # how many tokens a chunk writes decides the sizes of its products, and so the last bit
    rounding = 1e-13 if gate else 0
    for t in range(1, 11):
        other = x.clone()
        other[:, t:] = torch.randn_like(x[:, t:])
        now, _, now_surprise, now_written = read_all(memory, other)
        assert_same([now[:, :t]], [y[:, :t]], rounding)
        assert torch.equal(now_surprise[..., :t], surprise[..., :t])
        assert torch.equal(now_written[:, :t], written[:, :t])
        assert not torch.equal(now[:, t], y[:, t])


@kinds
def test_the_gate_at_zero_writes_all_and_at_infinity_nothing(kind):
    x = stream(2, 3 * C + 1)
    torch.manual_seed(1)
    always = build(kind)
    torch.manual_seed(1)
    never = build(kind, gate_threshold=math.inf)
    fresh = never.init_state(2)
    _, state, surprise, written = read_all(never, x)
    assert not written.any() and (surprise > 0).all()
    assert_same(state.weights + state.momentum, fresh.weights + fresh.momentum, 0)
    _, moved, _, all_written = read_all(always, x)
    assert all_written.all()
    assert not torch.equal(moved.weights[0], fresh.weights[0])


@kinds
def test_a_vanishing_threshold_packs_what_no_threshold_masks(kind):
    """The gated path plans, packs and reads chunk by chunk; with all tokens it is the other one."""
    x, live = stream(2, 3 * C + 2), torch.rand(2, 3 * C + 2) < 0.6
    runs = []
    for gate in (0.0, 1e-9):
        torch.manual_seed(1)
        runs.append(read_all(build(kind, gate_threshold=gate), x, live=live))
    masked, packed = runs
    assert_same([masked[0], *masked[1].weights], [packed[0], *packed[1].weights])
    assert torch.equal(masked[3], packed[3]) and torch.equal(masked[3], live)


@kinds
def test_the_gate_compares_with_the_running_mean_of_the_chunk_start(kind):
    memory, x = build(kind, gate_threshold=1.1), stream(2, 6 * C)
    _, state, per_head, written = read_all(memory, x)
    surprise, mean, seen = per_head.mean(1), torch.zeros(2).double(), 0
    for n in range(6):
        at = slice(n * C, (n + 1) * C)
        assert torch.equal(written[:, at], surprise[:, at] > 1.1 * mean[:, None])
        mean = (mean * seen + surprise[:, at].sum(1)) / (seen + C)
        seen += C
    assert_same([state.surprise], [torch.stack([torch.full((2,), seen).double(), mean], 1)])
    assert written[:, :C].all() and not written.all()


@kinds
def test_rows_that_are_not_live_equal_a_stream_of_zeros_that_writes_nothing(kind):
    memory, x = build(kind), stream(1, 2 * C)
    live = torch.ones(1, 2 * C, dtype=torch.bool)
    live[0, 2] = False
    bad, zero = x.clone(), x.clone()
    bad[0, 2], zero[0, 2] = float("nan"), 0
    y, state, surprise, written = read_all(memory, bad, live=live)
    zero_y, zero_state, *_ = read_all(memory, zero, live=live)
    assert y.isfinite().all() and not written[0, 2] and (surprise[:, :, 2] == 0).all()
    assert_same([y, *flatten(state).values()], [zero_y, *flatten(zero_state).values()], 0)


@kinds
def test_a_shut_keep_gate_forgets_all_that_was_learned(kind):
    """And what is read then is what a fresh lane reads, but for the delta rule's start state."""
    memory, x = build(kind, taps=1), stream(1, 2 * C)
    _, learned, _, position = call(memory, x, memory.init_state(1), torch.zeros(1).long())
    assert learned.weights[-1].norm() > 0.01
    with torch.no_grad():
        memory.gates.weight[H:] = 0
        memory.gates.bias[H:] = -1e4
    y, state, _, position = call(memory, x[:, :C], learned, position)
    assert_same(state.weights, [torch.zeros_like(w) for w in state.weights])
    if kind != "delta":
        fresh, *_ = call(memory, x[:, :C], memory.init_state(1), torch.zeros(1).long())
        assert_same([y], [fresh])


GATES = {"open": (1e4, 1e4, 1e4), "forgetful": (0.0, 1e4, 1e4), "start": (5.3, 0.0, 0.0)}


@kinds
@pytest.mark.parametrize("gates", list(GATES))
@pytest.mark.parametrize("content", ["constant", "noise", "zeros", "loud"])
def test_ten_thousand_tokens_stay_finite_and_bounded(kind, gates, content):
    """Constant keys with all gates at their maximum are the worst case of the step bound."""
    memory = NeuralMemory(MemoryConfig(kind=kind, max_step=1.0), D, H, K, 64)
    T = 10_048
    x = {
        "constant": torch.randn(1, 1, D).expand(1, T, D),
        "noise": torch.randn(1, T, D),
        "zeros": torch.zeros(1, T, D),
        "loud": torch.randn(1, T, D) * 1e4,
    }[content]
    with torch.inference_mode():
        memory.gates.weight.zero_()
        for row, value in zip(memory.gates.bias.view(-1, H)[1:], GATES[gates], strict=False):
            row.fill_(value)
        y, state, per_head, _ = read_all(memory, x, [T // 2, T // 2])
    assert y.isfinite().all() and all(t.isfinite().all() for t in flatten(state).values())
    norms = [w.norm() for w in state.weights]
    loudness = max(1.0, float(x.abs().max()))
    assert max(norms) < 200 * loudness
    early, late = per_head[..., :64].mean(), per_head[..., -64:].mean()
    assert late <= 2 * early + 1e-6
    if content == "constant" and gates == "open" and kind != "mlp":
        assert late < 1e-3 * early


@kinds
@pytest.mark.parametrize("page", [None, 2 * C])
def test_every_parameter_gets_a_gradient(kind, page):
    memory, x = build(kind, page=page), stream(2, 2 * C + 2)
    y, *_ = read_all(memory, x) if page is None else paged(memory, x)
    y.square().sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@kinds
def test_gradient_reaches_back_through_the_state_until_it_is_detached(kind):
    memory = build(kind)
    for cut in (False, True):
        x = stream(1, 3 * C).requires_grad_()
        _, state, _, position = call(memory, x[:, :C], memory.init_state(1), torch.zeros(1).long())
        if cut:
            state = map_state(torch.Tensor.detach, state)
        y, *_ = call(memory, x[:, C:], state, position)
        y.sum().backward()
        assert bool(x.grad[:, :C].any()) is not cut
        assert x.grad[:, C:].any()


def test_an_unwritten_tail_of_padding_gets_no_gradient():
    memory, x = build("mlp"), stream(1, 6).requires_grad_()
    y, *_ = call(memory, x, memory.init_state(1), torch.zeros(1).long(), [4])
    y[:, :4].sum().backward()
    assert not x.grad[:, 4:].any() and x.grad[:, :4].any()


def paged(memory, x, cuts=None):
    """MAC's use: read with the page's start, then append; calls cut at page boundaries."""
    B, T = x.shape[:2]
    page = memory.open_slots
    cuts = cuts or [min(page, T - at) for at in range(0, T, page)]
    state, position = memory.init_state(B), torch.zeros(B, dtype=torch.int64)
    ys, surprises, at = [], [], 0
    for length in cuts:
        now = x[:, at : at + length]
        ys.append(memory.read(now, state))
        grid = make_grid(position, torch.full((B,), length), page, length)
        state, stats = memory.append(now, state, grid, torch.ones(B, length, dtype=torch.bool))
        position, at = position + length, at + length
        surprises.append(stats.surprise)
    return torch.cat(ys, 1), state, torch.cat(surprises, 1)


@kinds
def test_pages_do_not_depend_on_the_cuts_within_them(kind):
    memory, x = build(kind, page=2 * C, gate_threshold=0.9), stream(2, 5 * C)
    y, state, surprise = paged(memory, x)
    cut_y, cut_state, cut_surprise = paged(memory, x, [3, 0, 2 * C - 3, 1, 2 * C - 1, 2, C - 2])
    assert_same([y, surprise], [cut_y, cut_surprise])
    assert_same(*(flatten(live_part(s)).values() for s in (state, cut_state)))


@kinds
def test_a_page_is_written_at_its_end_chunk_by_chunk(kind):
    """Until then weights stand still; then they are those of a memory that wrote every chunk."""
    torch.manual_seed(1)
    memory = build(kind, page=2 * C, taps=1)
    torch.manual_seed(1)
    plain = build(kind, taps=1)
    with torch.no_grad():
        plain.taps.fill_(1)
        memory.taps.fill_(1)
        for name, parameter in memory.named_parameters():
            if name != "taps":
                plain.get_parameter(name).copy_(parameter)
    x = stream(1, 2 * C)
    fresh, (_, almost, _) = memory.init_state(1), paged(memory, x[:, :-1])
    assert_same(almost.weights, fresh.weights, 0)
    _, state, _ = paged(memory, x)
    _, expected, *_ = read_all(plain, x)
    assert_same(state.weights + state.momentum, expected.weights + expected.momentum)


@kinds
def test_state_is_float32_under_bfloat16(kind):
    memory = NeuralMemory(MemoryConfig(kind=kind), D, H, K, C).bfloat16()
    y, state, per_head, _ = read_all(memory, torch.randn(1, 6, D, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and per_head.dtype == torch.float32
    assert {t.dtype for t in flatten(state).values()} == {torch.float32, torch.bool}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state, *_ = read_all(memory.float(), torch.randn(1, 6, D))
    assert {t.dtype for t in flatten(state).values()} == {torch.float32, torch.bool}


def test_two_memories_of_one_config_share_nothing_and_a_call_keeps_nothing():
    config = MemoryConfig()
    one, two = (NeuralMemory(config, D, H, K, C) for _ in range(2))
    before = {name: p.clone() for name, p in two.state_dict().items()}
    x = torch.randn(1, 9, D)
    first = read_all(one, x)[0]
    assert torch.equal(read_all(one, x)[0], first)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1)
    assert all(torch.equal(p, before[name]) for name, p in two.state_dict().items())
    assert config == MemoryConfig()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kind": "tree"}, "kind"),
        ({"expansion": 0}, "expansion"),
        ({"max_step": 0.0}, "max_step"),
        ({"max_momentum": 1.0}, "max_momentum"),
        ({"keep_init": 1.0}, "keep_init"),
        ({"huber": 0.0}, "huber"),
        ({"taps": 0}, "taps"),
        ({"gate_threshold": -1.0}, "gate_threshold"),
        ({"gate_threshold": math.nan}, "gate_threshold"),
        ({"page": 0}, "page"),
    ],
)
def test_a_config_that_cannot_work_is_refused(options, word):
    with pytest.raises(ValueError, match=word):
        MemoryConfig(**options)


def test_a_call_that_does_not_fit_is_refused():
    memory, x = build("matrix"), stream(2, 3)
    with pytest.raises(ValueError, match=r"init_state\(2\)"):
        call(memory, x, memory.init_state(1), torch.zeros(2).long())
    with pytest.raises(ValueError, match="multiple of chunk"):
        build("matrix", page=C + 1)
    book = build("matrix", page=2 * C)
    with pytest.raises(ValueError, match="read and append"):
        call(book, x, book.init_state(2), torch.zeros(2).long())
    grid = make_grid(torch.zeros(2).long(), torch.tensor([9, 9]), 2 * C, 9)
    with pytest.raises(ValueError, match="page boundaries"):
        book.append(stream(2, 9), book.init_state(2), grid, torch.ones(2, 9, dtype=torch.bool))
