"""Triton's attention against PyTorch's, interpreted; run by tests/kernels/test_*_triton.py."""

import pytest
import torch

from wakesleep.kernels import softmax_read_triton as kernel_module
from wakesleep.kernels.dispatch import interpreting
from wakesleep.kernels.softmax_read import softmax_read
from wakesleep.kernels.softmax_read_triton import softmax_read_triton
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.store import StoreConfig

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3}
B, H = 2, 3
FAR = 2**30  # elements; twice that is the first number beyond 31 bits
SIZES = [  # C, causal_at, places of the store, K, R
    (1, 1, 0, 16, 4),  # nothing but itself and the sink
    (1, 6, 1, 16, 4),
    (5, 60, 7, 16, 4),
    (16, 17, 64, 32, 8),
    (17, 47, 65, 16, 16),
    (31, 33, 63, 16, 2),
    (64, 257, 100, 64, 16),  # as shipped
    (65, 66, 33, 16, 4),  # one query in a tile of its own
]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def make(size, dtype=torch.float32, bias=None):
    """q, keys, pieces of values, sink, causal_at, bias."""
    C, causal_at, places, K, R = size
    near, L = causal_at + C, causal_at + C + places
    q, keys = torch.randn(B, H, C, K + R) * 0.5, torch.randn(B, H, L, K + R)
    v = torch.randn(B, H, L, K)
    v[:, :, 0] = 0  # of the sink
    shapes = {"place": (B, 1, 1, L), "head": (B, H, 1, L), "query": (B, 1, C, L)}
    if bias is not None:
        bias = torch.randn(shapes[bias]).masked_fill(torch.rand(shapes[bias]) < 0.3, -torch.inf)
        bias = bias.to(dtype)
    q, keys, v = (x.to(dtype) for x in (q, keys, v))
    return q, keys, [v[:, :, :near], v[:, :, near:]], torch.randn(H).to(dtype), causal_at, bias


def exact(q, keys, values, sink, causal_at, bias):
    """The PyTorch form in float64."""
    q, keys, sink = q.double(), keys.double(), sink.double()
    values = [v.double() for v in values]
    return softmax_read(q @ keys.mT, values, sink, causal_at, bias)[0]


def assert_same(y, expected):
    tolerance = TOLERANCES[y.dtype]
    torch.testing.assert_close(y.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_kernels_are_interpreted_here():
    assert interpreting()
    assert "Interpreted" in type(kernel_module.softmax_read_kernel).__name__


@pytest.mark.parametrize("bias", [None, "place", "head", "query"])
def test_values_equal_those_of_the_pytorch_form(bias):
    inputs = make((17, 47, 65, 16, 16), bias=bias)
    assert_same(softmax_read_triton(*inputs), exact(*inputs))


@dtypes
@sizes
def test_values_are_right_and_nothing_outside_is_read_or_written(size, dtype, guarded):
    q, keys, values, sink, causal_at, bias = make(size, dtype, "head")
    expected = exact(q, keys, values, sink, causal_at, bias)
    keys[:, :, 0] = 7.0  # the sink's is ignored
    inside = [guarded.copy(x) for x in (q, keys, *values, bias)]
    out = guarded.output(B, H, *q.shape[2:3], values[0].shape[3], dtype=dtype)
    y = softmax_read_triton(inside[0], inside[1], inside[2:4], sink, causal_at, inside[4], out=out)
    assert y is out
    assert_same(y, expected)
    guarded.check()


def test_one_piece_of_values_is_enough():
    q, keys, (near, _), sink, causal_at, _ = make((5, 9, 0, 16, 4))
    y = softmax_read_triton(q, keys, [near], sink, causal_at, None)
    assert_same(y, exact(q, keys, [near], sink, causal_at, None))


@pytest.mark.parametrize("order", [1, -1])
def test_the_largest_logit_may_come_first_or_last(order):
    """Up to a thousand: without the running maximum, or without its rescaling, nothing is left."""
    q, keys, *rest = make((5, 90, 130, 16, 4))
    growing = torch.linspace(1, 100, keys.shape[2])[:, None]
    inputs = q, keys * (growing if order == 1 else growing.flip(0)), *rest
    torch.testing.assert_close(softmax_read_triton(*inputs).double(), exact(*inputs),
                               rtol=1e-3, atol=1e-3)  # fmt: skip


def test_a_query_that_may_look_nowhere_reads_the_sink():
    q, keys, values, sink, causal_at, _ = make((5, 9, 70, 16, 4))
    bias = torch.zeros(B, 1, 5, keys.shape[2])
    bias[1, :, 3] = -torch.inf
    y = softmax_read_triton(q, keys, values, sink, causal_at, bias)
    assert bool((y[1, :, 3] == 0).all()) and bool((y[1, :, 2] != 0).all())


def test_a_key_and_a_value_of_other_lanes_heads_and_later_tokens_change_nothing():
    q, keys, values, sink, causal_at, _ = make((5, 9, 70, 16, 4))
    before = softmax_read_triton(q, keys, values, sink, causal_at, None)
    keys[1, 2, causal_at + 3 : causal_at + 5] += 1
    values[0][1, 2, causal_at + 3 : causal_at + 5] += 1
    after = softmax_read_triton(q, keys, values, sink, causal_at, None)
    changed = (before != after).any(-1)
    assert changed[1, 2, 3:].all() and changed.sum() == 2


@pytest.mark.parametrize("far", ["lane", "head", "row"])
def test_offsets_may_exceed_31_bits(far, tmp_path):
    """Strides of 2^30 elements, in a file without content; 32 bits would wrap to before it."""
    space = torch.from_file(str(tmp_path / "sparse"), True, 8 * FAR, dtype=torch.float16)
    places, taken = {"lane": 0, "head": 1, "row": 2}, 0

    def apart(x):
        nonlocal taken
        strides = [2048, 512, 32, 1]
        strides[places[far]] = FAR
        taken += 8192
        return space.as_strided(x.shape, strides, taken - 8192).copy_(x)

    q, keys, values, sink, causal_at, bias = make((3, 1, 3, 16, 4), torch.float16, "head")
    if far == "lane":  # three lanes rather than three heads
        q, keys, bias, *values = (x.transpose(0, 1) for x in (q, keys, bias, *values))
        sink = sink[:2]
    bias = bias.expand(*q.shape[:3], -1)
    out = apart(torch.zeros(*q.shape[:3], 16, dtype=torch.float16))
    y = softmax_read_triton(
        apart(q), apart(keys), [apart(v) for v in values], sink, causal_at, apart(bias), out=out
    )
    assert_same(y.clone(), exact(q, keys, values, sink, causal_at, bias))


def test_misuse_is_refused():
    q, keys, values, sink, *_ = make((5, 9, 70, 16, 4))
    good = {"q": q, "keys": keys, "values": values, "sink": sink, "causal_at": 9, "bias": None}
    wrong = {
        r"keys must be \[2, 3, 84, 20\]": {"keys": keys[:, :, 1:]},
        r"keys must be torch.float32": {"keys": keys.half()},
        r"values\[0\] must be": {"causal_at": 8},
        r"values\[1\] must be": {"values": [values[0], values[1][:1]]},
        "sink must be": {"sink": sink[:2]},
        "bias must be broadcastable": {"bias": torch.zeros(B, 2, 1, 84)},
        "out must be": {"out": torch.zeros(B, H, 4, 16)},
        "causal_at must be at least 1": {"causal_at": 0, "keys": keys[:, :, 9:],
                                         "values": [values[0][:, :, 9:], values[1]]},
        "power of two": {"q": q[..., :-1], "keys": keys[..., :-1],
                         "values": [v[..., :-1] for v in values]},
    }  # fmt: skip
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            softmax_read_triton(**{**good, **change})
    half = {name: x.bfloat16() for name, x in good.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(ValueError, match="bit patterns"):
        softmax_read_triton(**{**good, **half, "values": [v.bfloat16() for v in values]})


MODELS = {
    "store": {},
    "persistent": {"num_persistent": 2},
    "mac": {"combine": "mac", "memory_layers": (0,),
            "memory": MemoryConfig(kind="matrix", page=8)},
    "told": {"fast_layers": (0,), "fast": FastConfig(kind="mlp", expansion=2)},
}  # fmt: skip


@pytest.mark.parametrize("parts", MODELS)
@torch.no_grad()
def test_the_model_reads_the_same_with_ragged_lanes(parts, monkeypatch):
    sizes = {"vocab_size": 31, "dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 16}
    sizes |= {"mlp_dim": 16, "window": 8, "chunk": 4, "store": StoreConfig(capacity=6, hidden=8)}
    sizes |= {"memory_layers": (), "store_layers": (0,)}
    config = ModelConfig(**{**sizes, **MODELS[parts]})
    model, calls = TTLModel(config), []
    model.blocks[0].attention.size_gain += 0.2

    def counted(*args, **options):
        calls.append(args)
        return softmax_read_triton(*args, **options)

    monkeypatch.setattr(kernel_module, "softmax_read_triton", counted)

    def stream(setting):
        monkeypatch.setenv("WAKESLEEP_KERNELS", setting)
        state, logits, draw = model.init_state(3), [], torch.Generator().manual_seed(5)
        if parts == "told":
            fast = state.blocks[0].fast
            open_ = torch.rand(fast.old.open.shape, generator=draw) < 0.02
            open_[:, :, 0] = True
            k = torch.randn(fast.old.k.shape, generator=draw)
            old = fast.old._replace(k=k, open=open_, position=torch.where(open_, 1, -1))
            state = state._replace(blocks=(state.blocks[0]._replace(fast=fast._replace(old=old)),))
        for lengths in ([9, 0, 4], [1, 17, 4], [3, 8, 0]):
            tokens = torch.randint(31, (3, max(lengths)), generator=draw)
            blind = torch.rand(3, max(lengths), generator=draw) < 0.2
            blind = None if parts == "mac" else blind
            y, state, _ = model(tokens, state, torch.tensor(lengths), blind=blind)
            logits += [row[:n] for row, n in zip(y, lengths, strict=True)]
        return torch.cat(logits), state

    expected, state = stream("torch")
    assert not calls and bool((state.blocks[0].store.position >= 0).any())
    y, after = stream("triton")
    assert calls
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(after.blocks[0].store.position, state.blocks[0].store.position)
