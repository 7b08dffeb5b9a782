"""Triton's delta rule against PyTorch's, interpreted; run by tests/kernels/test_*_triton.py."""

import pytest
import torch
import torch.nn.functional as F

from wakesleep.kernels import delta_rule_triton as kernel_module
from wakesleep.kernels.delta_rule import DeltaMemory
from wakesleep.kernels.delta_rule_triton import delta_rule_triton
from wakesleep.kernels.memory_chunk import Chunks
from wakesleep.kernels.memory_reference import Tokens, delta_loop
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.memory_scan import scan
from wakesleep.ttl.model import ModelConfig, TTLModel

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3}
FAR = 2**30  # elements; twice that is the first number beyond 31 bits
SIZES = [(1, 1, 1, 1, 16), (2, 2, 1, 15, 16), (1, 1, 3, 16, 32), (3, 1, 2, 17, 16),
         (2, 1, 2, 33, 16), (1, 2, 1, 63, 64), (2, 1, 1, 64, 64)]  # fmt: skip
sizes = pytest.mark.parametrize("size", SIZES, ids=str)  # N, B, H, C, K


def make(size, dtype=torch.float32, live=0.7):
    """The state and the other arguments; the last chunk of every other lane is open."""
    N, B, H, C, K = size
    X = B * H
    q, k = (F.normalize(torch.randn(N, X, C, K), dim=-1).to(dtype) for _ in range(2))
    keep, step = torch.rand(2, N, X, C) ** torch.tensor([0.1, 1.0]).view(2, 1, 1, 1)
    closed = torch.ones(N, B, dtype=torch.bool)
    closed[-1, 1::2] = False
    written = torch.rand(N, B, C) < live
    return [torch.randn(X, K, K), q, k, torch.randn(N, X, C, K).to(dtype), keep, step,
            written, closed]  # fmt: skip


def exact(state, q, k, v, keep, step, live, closed):
    """The PyTorch form in float64: y, the state, surprise."""
    state, k, v, keep, step = (x.double() for x in (state, k, v, keep, step))
    q = None if q is None else q.double()
    chunks = Chunks(q, k, v, keep, None, step, live, closed)
    with torch.no_grad():
        run = scan(DeltaMemory(), (state,), chunks, state.new_zeros(live.shape[1], 2))
    return run.y, run.stacks[0], run.surprise


def assert_same(found, expected, dtype=torch.float32):
    for x, y in zip(found, expected, strict=True):
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@sizes
def test_results_are_right_and_nothing_outside_is_read_or_written(size, dtype, guarded):
    inputs = make(size, dtype)
    expected, (N, B, H, C, K) = exact(*inputs), size
    y, end = guarded.output(N, B * H, C * K, dtype=dtype).view(N, B * H, C, K), None
    end = torch.full((B * H + 2, K, K), torch.nan)
    tokens = [guarded.copy(x.flatten(2)).view(N, B * H, C, K) for x in inputs[1:4]]
    gates = [guarded.copy(x) for x in inputs[4:6]]
    found = delta_rule_triton(inputs[0], *tokens, *gates, *inputs[6:], out=(y, end[1:-1]))
    assert found[0] is y
    assert_same(found, expected, dtype)
    guarded.check()
    assert bool(end[[0, -1]].isnan().all())


def test_the_state_equals_that_of_the_token_loop():
    state, q, k, v, keep, step, live, _ = make((3, 1, 1, 17, 16))
    closed = torch.ones(3, 1, dtype=torch.bool)
    y, end, _ = delta_rule_triton(state, q, k, v, keep, step, live, closed)
    flat = [x[:, 0].flatten(0, 1).double() for x in (q, k, v, keep, step)]
    tokens = Tokens(*flat[:4], None, flat[4], live[:, 0].flatten())
    expected = delta_loop(state[0].double(), tokens)
    assert_same((y[:, 0].flatten(0, 1), end[0]), expected)


def test_nobody_needs_to_read():
    inputs = make((2, 2, 1, 5, 16))
    expected = delta_rule_triton(*inputs)
    inputs[1] = None
    y, *rest = delta_rule_triton(*inputs)
    assert y is None and all(map(torch.equal, rest, expected[1:]))


def test_tensors_may_lie_in_memory_in_any_order():
    *tokens, closed = make((2, 2, 1, 5, 16))
    expected = delta_rule_triton(*tokens, closed)
    found = delta_rule_triton(*(x.mT.contiguous().mT for x in tokens), closed)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("keep", "step"), [(0, 1), (1, 1), (1, 0), (0, 0)])
def test_gates_may_be_exactly_zero_or_one(keep, step):
    inputs = make((2, 1, 1, 16, 16), live=1.0)
    some = torch.rand(2, 1, 16) < 0.5
    inputs[4:6] = torch.where(some, keep, inputs[4]), torch.where(some, step, inputs[5])
    assert_same(delta_rule_triton(*inputs), exact(*inputs))


def test_equal_keys_with_full_steps_lose_nothing():
    """The inverse is that of a triangle of ones; a power series of it would need 10^17."""
    inputs = make((1, 1, 1, 64, 16), live=1.0)
    inputs[2] = inputs[2][:, :, :1].expand(-1, -1, 64, -1).contiguous()
    inputs[4], inputs[5] = torch.ones(1, 1, 64), torch.ones(1, 1, 64)
    found = delta_rule_triton(*inputs)
    assert_same(found, exact(*inputs))
    torch.testing.assert_close(inputs[2][0, 0, 0] @ found[1][0], inputs[3][0, 0, -1])


def test_a_token_changes_nothing_before_it_and_in_no_other_head():
    inputs = make((2, 1, 2, 17, 16), live=1.0)
    before = delta_rule_triton(*inputs)
    inputs[3][0, 1, 9] += 1
    changed = [(a != b).any(-1) for a, b in zip(before, delta_rule_triton(*inputs), strict=True)]
    assert changed[0][0, 1, 9:].all() and changed[0][1, 1].all()
    assert not changed[0][0, 1, :9].any() and not changed[0][:, 0].any() and not changed[1][0].any()


@pytest.mark.parametrize("far", ["chunk", "head"])
def test_offsets_may_exceed_31_bits(far, tmp_path):
    """Strides of 2^30 elements, in a file without content; 32 bits would wrap to before it."""
    space = torch.from_file(str(tmp_path / "sparse"), True, 3 * FAR, dtype=torch.float16)
    inputs, taken = make((3, 1, 3, 2, 16), torch.float16), 0

    def apart(x):
        nonlocal taken
        strides = (FAR, 64, 16, 1) if far == "chunk" else (64, FAR, 16, 1)
        taken += 8192
        return space.as_strided(x.shape, strides, taken - 8192).copy_(x)

    out = apart(torch.zeros_like(inputs[1])), torch.empty(3, 16, 16)
    tokens = [apart(x) for x in inputs[1:4]]
    y, *rest = delta_rule_triton(inputs[0], *tokens, *inputs[4:], out=out)
    assert_same((y.clone(), *rest), exact(*inputs), torch.float16)


def test_misuse_is_refused():
    good = make((2, 2, 1, 5, 16))
    wrong = {
        r"state must be \[2, 16, 16\] of torch.float32": (0, good[0].half()),
        r"q must be \[2, 2, 5, 16\]": (1, good[1][:, :, 1:]),
        "v must be": (3, good[3].half()),
        "step must be": (5, good[5][:1]),
        "live must be": (6, good[6].float()),
        r"closed must be \[2, 2\]": (7, good[7][:, :1]),
    }
    for message, (at, value) in wrong.items():
        with pytest.raises(ValueError, match=message):
            delta_rule_triton(*good[:at], value, *good[at + 1 :])
    for size in ((1, 1, 1, 5, 8), (1, 1, 1, 65, 16), (1, 1, 1, 5, 128)):
        with pytest.raises(ValueError, match="K must be 16, 32 or 64 and C at most 64"):
            delta_rule_triton(*make(size))
    with pytest.raises(ValueError, match="bfloat16 cannot be interpreted"):
        delta_rule_triton(*make((1, 1, 1, 5, 16), torch.bfloat16))
    with pytest.raises(ValueError, match="out must be"):
        delta_rule_triton(*good, out=(good[1], good[0][:1]))


MODELS = {
    "memory": {"memory_layers": (0,), "memory": MemoryConfig(kind="delta")},
    "gated": {"memory_layers": (0,), "memory": MemoryConfig(kind="delta", gate_threshold=1.0)},
    "fast": {"fast_layers": (0,), "fast": FastConfig(write="always")},
}


@pytest.mark.parametrize("parts", MODELS)
@torch.no_grad()
def test_the_model_reads_and_writes_the_same_with_ragged_lanes(parts, monkeypatch):
    sizes = {"vocab_size": 31, "dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 16}
    sizes |= {"mlp_dim": 16, "window": 8, "chunk": 4, "store_layers": (), "memory_layers": ()}
    model, calls = TTLModel(ModelConfig(**{**sizes, **MODELS[parts]})), []

    def counted(*args):
        calls.append(args)
        return delta_rule_triton(*args)

    monkeypatch.setattr(kernel_module, "delta_rule_triton", counted)

    def stream(setting):
        monkeypatch.setenv("WAKESLEEP_KERNELS", setting)
        state, logits, draw = model.init_state(3), [], torch.Generator().manual_seed(5)
        for lengths in ([9, 0, 4], [1, 7, 4], [3, 8, 0]):
            tokens = torch.randint(31, (3, max(lengths)), generator=draw)
            y, state, _ = model(tokens, state, torch.tensor(lengths))
            logits += [row[:n] for row, n in zip(y, lengths, strict=True)]
        block = state.blocks[0]
        return torch.cat(logits), block.fast.s if parts == "fast" else block.memory.weights[0]

    expected = stream("torch")
    assert not calls
    found = stream("triton")
    assert bool(calls) == (parts != "gated")  # a surprise gate is PyTorch's
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
