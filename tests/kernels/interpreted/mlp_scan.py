"""Triton's MLP memory against PyTorch's, interpreted; run by tests/kernels/test_*_triton.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wakesleep.kernels import mlp_autograd_triton as scan_module
from wakesleep.kernels.memory_chunk import Chunks, MLPMemory
from wakesleep.kernels.memory_reference import Rule, Tokens, memory_loop
from wakesleep.kernels.mlp_autograd_triton import mlp_scan
from wakesleep.kernels.mlp_scan_triton import mlp_scan_triton
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.memory_scan import scan
from wakesleep.ttl.model import ModelConfig, TTLModel

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3}  # of what is read
STACK_TOLERANCE = 2e-4  # of the largest change by steps, which is a small part of a stack
FAR = 2**30  # elements; twice that is the first number beyond 31 bits
SIZES = [  # N, B, H, C, R, K, h, whether there is momentum, limit
    (1, 1, 1, 1, 1, 16, 16, True, math.inf),
    (2, 2, 1, 15, 15, 16, 32, True, 2.5),
    (1, 1, 3, 16, 3, 32, 96, False, 2.5),
    (3, 1, 2, 17, 17, 16, 48, True, 2.5),
    (2, 1, 1, 33, 17, 16, 64, False, math.inf),
    (1, 2, 1, 63, 1, 64, 64, True, 6.0),
    (2, 1, 1, 64, 64, 64, 128, True, 6.0),  # as shipped
]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
SMALL = (2, 2, 1, 5, 5, 16, 32, True, 2.5)


def make(size, dtype=torch.float32, live=0.7):
    """Memory, stacks and chunks, with steps that one sees; every other lane's last one is open."""
    N, B, H, C, R, K, h, momentum, limit = size
    X, levels = B * H, 1 + momentum
    base = torch.randn(X, K, h), torch.randn(X, h, K) / h
    memory = MLPMemory(C, 1.0, limit, base, torch.rand(X, 1, K) + 0.5, torch.randn(X, 1, K) * 0.1)
    stacks = torch.randn(X, levels * K, h) * 0.01, torch.randn(X, levels * h, K) * 0.01 / h
    q, k = (F.normalize(torch.randn(N, X, n, K), dim=-1).to(dtype) for n in (R, C))
    keep, eta, step = (torch.rand(N, X, C) ** power for power in (0.1, 1.0, 0.3))
    closed = torch.ones(N, B, dtype=torch.bool)
    closed[-1, 1::2] = False
    v, live = torch.randn(N, X, C, K).to(dtype), torch.rand(N, B, C) < live
    return memory, stacks, Chunks(q, k, v, keep, eta if momentum else None, step, live, closed)


def double(x):
    """A tensor, or all of a tuple, in float64."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return tuple(map(double, x)) if isinstance(x, tuple) else x


def in_pytorch(memory, stacks, chunks):
    """The PyTorch form: y, the stacks, surprise."""
    run = scan(memory, stacks, chunks, torch.zeros(chunks.live.shape[1], 2))
    return run.y, run.stacks, run.surprise


@torch.no_grad()
def exact(memory, stacks, chunks):
    """The same in float64."""
    memory, chunks = MLPMemory(*map(double, memory)), Chunks(*map(double, chunks))
    return in_pytorch(memory, double(stacks), chunks)


def assert_same(found, inputs, dtype=torch.float32, expected=None):
    """Equal to the PyTorch form's, or as expected; of the stacks, what the steps added."""
    expected = exact(*inputs) if expected is None else expected
    rtol = atol = TOLERANCES[dtype]
    if expected[0] is not None:
        torch.testing.assert_close(found[0].double(), expected[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=2e-5, atol=2e-5)
    memory, stacks, chunks = inputs
    left = exact(memory, stacks, chunks._replace(step=torch.zeros_like(chunks.step)))[1]
    for x, y, before in zip(found[1], expected[1], left, strict=True):
        atol = STACK_TOLERANCE * float((y - before).abs().max()) + 1e-6 * float(y.abs().max())
        torch.testing.assert_close(x.double(), y, rtol=0, atol=atol)


def banded(x, fill=torch.nan):
    """x in one piece, with `fill` in front of it and behind."""
    wide = torch.full((len(x) + 2, *x.shape[1:]), fill).to(x.dtype)
    wide[1:-1] = x
    return wide[1:-1]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@sizes
def test_results_are_right_and_nothing_outside_is_read_or_written(size, dtype, guarded):
    memory, stacks, chunks = inputs = make(size, dtype)
    gates = [None if g is None else banded(g) for g in chunks[3:6]]
    slow = [banded(x) for x in (*memory.base, *memory[4:])]
    memory = memory._replace(base=tuple(slow[:2]), gamma=slow[2], bias=slow[3])
    places = [torch.full((len(s) + 2, *s.shape[1:]), torch.nan) for s in stacks]
    tokens = [guarded.copy(x.flatten(2)).view(x.shape) for x in chunks[:3]]
    y = guarded.output(*chunks.q.flatten(2).shape, dtype=dtype).view(chunks.q.shape)
    out = y, tuple(p[1:-1] for p in places)
    found = mlp_scan_triton(memory, stacks, Chunks(*tokens, *gates, *chunks[6:]), out=out)
    assert found[0] is y and found[1] is out[1]
    assert_same(found, inputs, dtype)
    guarded.check()
    assert all(bool(p[[0, -1]].isnan().all()) for p in places)


@pytest.mark.parametrize("momentum", [True, False])
def test_results_equal_those_of_the_token_loop(momentum):
    memory, stacks, chunks = inputs = make((2, 1, 1, 9, 9, 16, 32, momentum, 2.5))
    chunks.closed[:] = True
    flat = (None if x is None else double(x[:, 0].flatten(0, 1)) for x in chunks[:7])
    base = tuple(w[0].double() for w in memory.base)
    rule = Rule(9, 1.0, 2.5, base, memory.gamma[0, 0].double(), memory.bias[0, 0].double())
    start = [s[0].double().split(len(w)) for s, w in zip(stacks, base, strict=True)]
    y, *after = memory_loop(rule, *(tuple(s[i] for s in start) for i in (0, -1)), Tokens(*flat))
    levels = after if momentum else after[:1]
    after = tuple(torch.cat(level).detach()[None] for level in zip(*levels, strict=True))
    found = mlp_scan_triton(*inputs)
    expected = y.detach().view(2, 1, 9, 16), after, found[2].double()
    assert_same(found, inputs, expected=expected)


def test_queries_of_the_last_tokens_get_what_those_get_among_all():
    *start, chunks = make((2, 1, 2, 17, 17, 16, 32, True, 2.5))
    whole = mlp_scan_triton(*start, chunks)
    for R in (1, 5, 16):
        some = mlp_scan_triton(*start, chunks._replace(q=chunks.q[:, :, -R:]))
        torch.testing.assert_close(some[0], whole[0][:, :, -R:], rtol=1e-5, atol=1e-5)
        assert all(map(torch.equal, some[1], whole[1]))


def test_nobody_needs_to_read():
    *start, chunks = make(SMALL)
    expected = mlp_scan_triton(*start, chunks)
    y, end, surprise = mlp_scan_triton(*start, chunks._replace(q=None))
    assert y is None and torch.equal(surprise, expected[2])
    assert all(map(torch.equal, end, expected[1]))


def transposed(x):
    """x with its last two dimensions the other way round in memory."""
    return None if x is None or x.dim() < 3 else x.mT.contiguous().mT


def test_tensors_may_lie_in_memory_in_any_order():
    memory, stacks, chunks = make(SMALL)
    expected = mlp_scan_triton(memory, stacks, chunks)
    turned = Chunks(*map(transposed, chunks[:7]), chunks.closed)
    found = mlp_scan_triton(memory, tuple(map(transposed, stacks)), turned)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("step", [0, 1])
def test_gates_may_be_exactly_zero_or_one(keep, eta, step):
    *start, chunks = make((2, 1, 1, 16, 16, 16, 16, True, 2.5), live=1.0)
    some = torch.rand(3, 2, 1, 16) < 0.5
    gates = map(torch.where, some, (keep, eta, step), chunks[3:6])
    inputs = *start, Chunks(*chunks[:3], *gates, *chunks[6:])
    assert_same(mlp_scan_triton(*inputs), inputs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinite numbers
def test_a_chunk_that_is_open_leaves_the_stacks_as_they_are_whatever_is_in_it():
    memory, stacks, chunks = make(SMALL)
    chunks.closed[:] = False
    chunks.v[:, :, 3] = torch.inf
    _, end, _ = mlp_scan_triton(memory, stacks, chunks)
    assert all(map(torch.equal, end, stacks))


def test_nothing_that_is_not_live_is_written():
    inputs = make(SMALL, live=0.0)
    _, end, surprise = mlp_scan_triton(*inputs)
    assert all(map(torch.equal, end, inputs[1])) and not surprise.any()


def test_a_token_changes_nothing_before_it_and_in_no_other_head():
    inputs = make((2, 1, 2, 17, 17, 16, 32, True, 2.5), live=1.0)
    before = mlp_scan_triton(*inputs)
    inputs[2].v[0, 1, 9] += 1
    y, end, _ = mlp_scan_triton(*inputs)
    changed = (before[0] != y).any(-1)
    assert changed[0, 1, 9:].all() and changed[1, 1].all()
    assert not changed[0, 1, :9].any() and not changed[:, 0].any()
    for a, b in zip(before[1], end, strict=True):
        assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


@pytest.mark.parametrize("far", ["chunk", "head"])
def test_offsets_may_exceed_31_bits(far, tmp_path):
    """Strides of 2^30 elements, in a file without content; 32 bits would wrap to before it."""
    space = torch.from_file(str(tmp_path / "sparse"), True, 3 * FAR, dtype=torch.float16)
    memory, stacks, chunks = inputs = make((3, 1, 3, 2, 2, 16, 16, True, 2.5), torch.float16)
    taken = 0

    def apart(x):
        nonlocal taken
        strides = (FAR, 64, 16, 1) if far == "chunk" else (64, FAR, 16, 1)
        taken += 8192
        return space.as_strided(x.shape, strides, taken - 8192).copy_(x)

    out = apart(torch.zeros_like(chunks.q)), tuple(map(torch.empty_like, stacks))
    chunks = Chunks(*map(apart, chunks[:3]), *chunks[3:])
    y, *rest = mlp_scan_triton(memory, stacks, chunks, out=out)
    assert_same((y.clone(), *rest), inputs, torch.float16)


def test_misuse_is_refused():
    memory, stacks, chunks = good = make(SMALL)
    first, second = stacks
    wrong = {
        r"stacks\[0\] must be \[2, 32, 32\] of torch.float32": (1, (first.half(), second)),
        r"stacks\[1\] must be \[2, 64, 16\]": (1, (first, second[:, 1:])),
        r"base\[0\] must be": (0, memory._replace(base=memory.base[::-1])),
        r"gamma must be \[2, 1, 16\]": (0, memory._replace(gamma=memory.gamma[:1])),
        r"bias must be .* torch.float32": (0, memory._replace(bias=memory.bias.double())),
        r"q must be \[2, 2, 5, 16\]": (2, chunks._replace(q=torch.cat(2 * [chunks.q], 2))),
        "v must be": (2, chunks._replace(v=chunks.v.half())),
        "eta must be": (2, chunks._replace(eta=chunks.eta[:1])),
        "step must be": (2, chunks._replace(step=chunks.step.half())),
        "live must be": (2, chunks._replace(live=chunks.live.float())),
        r"closed must be \[2, 2\]": (2, chunks._replace(closed=chunks.closed[:, :1])),
    }
    for message, (at, value) in wrong.items():
        with pytest.raises(ValueError, match=message):
            mlp_scan_triton(*good[:at], value, *good[at + 1 :])
    for C, K in ((5, 8), (65, 16), (5, 128)):
        with pytest.raises(ValueError, match="K must be 16, 32 or 64 and C at most 64"):
            mlp_scan_triton(*make((1, 1, 1, C, C, K, 2 * K, True, 2.5)))
    with pytest.raises(ValueError, match="hidden width must be a multiple of 16, got 24"):
        mlp_scan_triton(*make((1, 1, 1, 5, 5, 16, 24, True, 2.5)))
    with pytest.raises(ValueError, match="bfloat16 cannot be interpreted"):
        mlp_scan_triton(*make(SMALL, torch.bfloat16))
    for out in ((None, stacks), (chunks.q, (first, second[:1])), (chunks.q.mT, stacks)):
        with pytest.raises(ValueError, match="out"):
            mlp_scan_triton(*good, out=out)


def leaves_of(inputs, dtype):
    """Copies of the arguments, and those of them that a gradient reaches."""
    tensors = []

    def leaf(x):
        if isinstance(x, Tensor) and x.is_floating_point():
            tensors.append(x.detach().to(dtype).requires_grad_())
            return tensors[-1]
        return tuple(map(leaf, x)) if isinstance(x, tuple) else x

    memory, stacks, chunks = inputs
    memory = MLPMemory(*memory[:3], *map(leaf, memory[3:]))
    return (memory, leaf(stacks), Chunks(*map(leaf, chunks))), tensors


def gradients(inputs, dtype, wanted, run):
    """Of a weighed sum of y and both stacks, as far as `wanted`."""
    copies, leaves = leaves_of(inputs, dtype)
    y, end, _ = run(*copies)
    draw = torch.Generator().manual_seed(1)
    probes = [torch.randn(r.shape, generator=draw).to(dtype) for r in (y, *end)]
    sums = [(r * w).sum() for r, w in zip((y, *end), probes, strict=True)]
    found = torch.autograd.grad(sum(sums[i] for i in wanted), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,)], ids=str)
@pytest.mark.parametrize("size", [SMALL, (2, 1, 2, 17, 3, 32, 48, False, 5.0)], ids=str)
def test_gradients_equal_those_of_autograd(size, wanted, monkeypatch):
    inputs = make(size)
    monkeypatch.setenv("WAKESLEEP_KERNELS", "torch")
    expected = gradients(inputs, torch.float64, wanted, in_pytorch)
    found = gradients(inputs, torch.float32, wanted, mlp_scan)
    for x, y in zip(found, expected, strict=True):
        atol = 1e-4 * float(y.abs().max())
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=atol)
    assert wanted != (0, 1, 2) or all(bool(y.any()) for y in expected)


MODELS = {
    "momentum": {"memory": MemoryConfig()},
    "plain": {"memory": MemoryConfig(momentum=False, expansion=3, huber=0.5)},
    "pages": {"memory": MemoryConfig(page=8), "combine": "mac", "num_persistent": 2},
    "gated": {"memory": MemoryConfig(gate_threshold=1.0)},
}


def counted_model(parts, monkeypatch):
    """A model with one memory, and the calls of the kernel."""
    sizes = {"vocab_size": 31, "dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 16}
    sizes |= {"mlp_dim": 16, "window": 8, "chunk": 4, "store_layers": (), "memory_layers": (0,)}
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return mlp_scan_triton(*args, **options)

    monkeypatch.setattr(scan_module, "mlp_scan_triton", counted)
    return TTLModel(ModelConfig(**{**sizes, **MODELS[parts]})), calls


@pytest.mark.parametrize("parts", MODELS)
@torch.no_grad()
def test_the_model_reads_and_writes_the_same_with_ragged_lanes(parts, monkeypatch):
    model, calls = counted_model(parts, monkeypatch)

    def stream(setting):
        monkeypatch.setenv("WAKESLEEP_KERNELS", setting)
        state, logits, draw = model.init_state(3), [], torch.Generator().manual_seed(5)
        for lengths in ([9, 0, 4], [1, 7, 2], [1, 1, 1]):
            tokens = torch.randint(31, (3, max(lengths)), generator=draw)
            y, state, _ = model(tokens, state, torch.tensor(lengths))
            logits += [row[:n] for row, n in zip(y, lengths, strict=True)]
        memory = state.blocks[0].memory
        return torch.cat(logits), *memory.weights, *memory.momentum, memory.surprise

    expected = stream("torch")
    assert not calls and all(bool(x.any()) for x in expected[:3])
    found = stream("triton")
    assert bool(calls) == (parts != "gated")  # a surprise gate is PyTorch's
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize(
    ("parts", "recompute"), [("momentum", False), ("momentum", True), ("pages", False)]
)
def test_the_model_learns_the_same(parts, recompute, monkeypatch):
    model, calls = counted_model(parts, monkeypatch)
    tokens = torch.randint(31, (2, 10 if parts == "pages" else 6))  # something is written

    def learn(setting):
        monkeypatch.setenv("WAKESLEEP_KERNELS", setting)
        model.zero_grad()
        logits, _, _ = model(tokens, model.init_state(2), recompute=recompute)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return [p.grad for p in model.parameters()]

    expected = learn("torch")
    assert not calls
    for x, y in zip(learn("triton"), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    assert calls
