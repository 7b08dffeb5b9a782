"""The whole model: what its state promises beyond the contract table, and its parameters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import SPAN, flatten, map_state, named_tensors, to
from wakesleep.ttl.state_io import load_state, save_state
from wakesleep.ttl.store import StoreConfig

VOCAB, B, W, C = 41, 2, 8, 4


def make(memory=None, store=None, **options) -> ModelConfig:
    """Two layers, a memory in the first and a store in both."""
    fixed = {"dim": 12, "num_layers": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 16}
    fixed |= {"window": W, "chunk": C, "num_persistent": 2}
    fixed |= {"memory_layers": (0,), "store_layers": (0, 1)}
    return ModelConfig(
        vocab_size=VOCAB,
        memory=MemoryConfig(**(memory or {})),
        store=StoreConfig(**{"capacity": 10, "hidden": 8, **(store or {})}),
        **(fixed | options),
    )


CONFIGS = {
    "mag mlp": make(),
    "mag matrix by residual": make(
        {"kind": "matrix", "gate_threshold": 0.9}, {"score": "residual_z"}, store_layers=(0,)
    ),
    "mal delta by mass": make({"kind": "delta"}, {"score": "mass"}, combine="mal"),
    "mac mlp with quota": make({"page": 12}, {"quota": True, "capacity": 32}, combine="mac"),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def draw(length: int, seed: int = 0, batch: int = B) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_equal(a, b):
    for (name, x), (_, y) in zip(named_tensors(a), named_tensors(b), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("num_heads", [1, 4])
@configs
def test_loaded_weights_are_used_and_a_step_moves_every_one_of_them(config, num_heads):
    """Parameters that are views of one tensor (expanded heads, say) would load or step wrongly."""
    config = replace(config, num_heads=num_heads, memory=replace(config.memory, gate_threshold=0))
    torch.manual_seed(1)
    model, other = TTLModel(config), TTLModel(config)
    owners = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(owners) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert 0 not in p.stride() or p.numel() == 1, name
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name
    tokens = draw(30)
    with torch.no_grad():
        for p in other.parameters():  # what starts equal in all heads differs now
            p.add_(torch.randn_like(p) * 0.1)
        expected = other(tokens, other.init_state(B))[0]
        assert not torch.equal(model(tokens, model.init_state(B))[0], expected)
        model.load_state_dict({name: t.clone() for name, t in other.state_dict().items()})
        assert torch.equal(model(tokens, model.init_state(B))[0], expected)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    logits, state, _ = model(tokens, model.init_state(B))
    more, state, _ = model(draw(30, seed=1), state)
    taught = sum(block.store.score.clamp(min=-9).sum() for block in state.blocks if block.store)
    (logits.square().mean() + more.square().mean() + taught).backward()
    optimizer.step()
    for (name, p), (_, before) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert p.isfinite().all() and not torch.equal(p, before), name
        if name.startswith("blocks.0.memory.initial"):
            assert ((p - before).flatten(1).abs().amax(1) > 0).all(), name  # of every head


@configs
@torch.no_grad()
def test_a_state_that_was_saved_within_a_chunk_goes_on_bit_for_bit(config, tmp_path):
    model = TTLModel(config).eval()
    _, state, _ = model(draw(27), model.init_state(B), torch.tensor([27, 18]))
    save_state(tmp_path / "state", state, {})
    like = map_state(lambda t: t.to("meta"), model.init_state(B))
    loaded, _ = load_state(tmp_path / "state", like)
    loaded = to(loaded, "cpu")
    assert_equal(loaded, state)
    y, after, stats = model(draw(21, seed=1), state)
    again_y, again, again_stats = model(draw(21, seed=1), loaded)
    assert torch.equal(y, again_y)
    assert_equal(after, again)
    assert_equal(stats, again_stats)


@configs
@torch.no_grad()
def test_tokens_read_one_by_one_after_a_prompt_equal_one_call(config):
    """Whatever the prompt's length, around chunks, pages and the window."""
    model, tokens = TTLModel(config).double().eval(), draw(40)
    whole = model(tokens, model.init_state(B))[0]
    for prompt in (1, C - 1, C, C + 1, W - 1, W, W + 1, W + C - 1, W + C, W + C + 1, 30):
        y, state, _ = model(tokens[:, :prompt], model.init_state(B))
        steps = [y[:, -1:]]
        for t in range(prompt, prompt + 6):
            y, state, _ = model(tokens[:, t : t + 1], state)
            steps.append(y)
        expected = whole[:, prompt - 1 : prompt + 6]
        assert (torch.cat(steps, 1) - expected).abs().max() < 1e-10


@configs
@torch.no_grad()
def test_memory_and_store_change_at_boundaries_and_at_all_of_them(config):
    model, tokens = TTLModel(config).eval(), draw(50)
    page = config.memory.page or C
    state, writes, admissions = model.init_state(B), [], []
    for t in range(50):
        _, after, _ = model(tokens[:, t : t + 1], state)
        old, new = state.blocks[0], after.blocks[0]
        if not torch.equal(old.memory.weights[0], new.memory.weights[0]):
            writes.append(t + 1)
        if not torch.equal(old.store.position, new.store.position):
            admissions.append(t + 1)
        state = after
    assert writes == list(range(page, 51, page))
    boundaries = range(W + C, 51, C)  # from the first token that leaves the window on
    assert set(admissions) <= set(boundaries)
    capacity = config.store.capacity
    assert admissions[: capacity // C] == list(boundaries)[: capacity // C]


@torch.no_grad()
def test_a_call_longer_than_the_window_leaves_exactly_the_last_tokens_in_it():
    model, tokens = TTLModel(make()).double().eval(), draw(75)
    _, long, _ = model(tokens, model.init_state(B))
    state = model.init_state(B)
    for t in range(75):
        _, state, _ = model(tokens[:, t : t + 1], state)
    shown = 75 - (75 // C * C - W)
    for block, other in zip(long.blocks, state.blocks, strict=True):
        assert block.window.live.sum(1).tolist() == [shown] * B
        assert block.window.live[:, :shown].all()
        assert (block.window.k - other.window.k)[:, :shown].abs().max() < 1e-12
        assert (block.window.v - other.window.v)[:, :shown].abs().max() < 1e-12
    assert torch.equal(long.ids[:, SPAN : SPAN + shown], tokens[:, -shown:])


@configs
def test_a_call_keeps_nothing_and_two_models_of_one_config_share_nothing(config):
    one, two = TTLModel(config).eval(), TTLModel(config).eval()
    as_text = repr(config)
    attributes = {name: dict(vars(module)) for name, module in one.named_modules()}
    with torch.no_grad():
        first = one(draw(30), one.init_state(B))
        beside = two(draw(30), two.init_state(B))
        one(draw(41, seed=1, batch=3), one.init_state(3))
        for p in one.parameters():
            p.add_(0)
        assert_equal(one(draw(30), one.init_state(B)), first)
        for p in one.parameters():
            p.mul_(2)
        assert_equal(two(draw(30), two.init_state(B)), beside)
    for name, module in one.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(vars(module)[key] is value for key, value in attributes[name].items()), name
    assert repr(config) == as_text


@pytest.mark.parametrize("kind", ["matrix", "mlp", "delta"])
def test_twenty_thousand_tokens_of_the_worst_kind_stay_finite(kind):
    """Gates at their maximum; lanes of noise, one token, zeros, and noise with NaN in between."""
    T, NAN, ZERO = 20_000, VOCAB - 1, VOCAB - 2
    memory = {"kind": kind, "max_step": 1.0, "max_momentum": 0.99}
    config = make(memory, {"capacity": 100}, window=64, chunk=64, num_layers=1, store_layers=(0,))
    model = TTLModel(config).eval()
    tokens = torch.randint(ZERO, (4, T))
    tokens[1], tokens[2] = 7, ZERO
    bad = torch.rand(T) < 0.05
    tokens[3, bad] = NAN
    with torch.inference_mode():
        model.embedding.weight[NAN], model.embedding.weight[ZERO] = torch.nan, 0.0
        gates = model.blocks[0].memory.gates
        gates.weight.zero_()
        gates.bias[config.num_heads :] = 1e4  # keep, step and momentum
        state = model.init_state(4)
        for part in tokens.split(2048, 1):
            y, state, stats = model(part, state, head=False)
            assert y.isfinite().all() and stats.surprise.isfinite().all()
    assert state.nonfinite.tolist() == [0, 0, 0, int(bad.sum())]
    for name, t in named_tensors(state):
        assert not t.is_floating_point() or t.isfinite().all(), name
    block = state.blocks[0]
    for weights in (*block.memory.weights, *block.memory.momentum):
        assert weights.flatten(2).norm(dim=-1).max() < 200
    assert not any(w[2].any() for w in block.memory.weights) or kind == "delta"
    assert (block.store.position >= 0).all()
    assert not bad[block.store.position[3].flatten()].any()


@pytest.mark.parametrize("kind", ["matrix", "mlp"])
def test_an_error_of_exactly_zero_writes_nothing_and_its_gradients_are_finite(kind):
    """Zeros in give zero keys, values and errors: 0 / 0 in the clipping or the step bound."""
    model = TTLModel(make({"kind": kind}))
    with torch.no_grad():
        model.embedding.weight.zero_()
        if kind == "mlp":
            model.blocks[0].memory.bias.zero_()
    logits, state, stats = model(draw(30), model.init_state(B))
    assert not stats.surprise.any() and stats.written[0].all()
    for weights in (*state.blocks[0].memory.weights, *state.blocks[0].memory.momentum):
        assert not weights.any()
    (logits.square().mean() + sum(w.sum() for w in state.blocks[0].memory.weights)).backward()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


@pytest.mark.parametrize("threshold", [0.0, math.inf])
@pytest.mark.parametrize("page", [None, 8])
@torch.no_grad()
def test_a_gate_that_never_opens_leaves_the_memory_as_it_began(threshold, page):
    combine = "mag" if page is None else "mac"
    config = make({"gate_threshold": threshold, "page": page}, combine=combine)
    model = TTLModel(config)
    _, state, _ = model(draw(50), model.init_state(B))
    before, after = model.init_state(B).blocks[0].memory, state.blocks[0].memory
    pairs = list(zip(before.weights, after.weights, strict=True))
    pairs += zip(before.momentum, after.momentum, strict=True)
    assert all(torch.equal(*pair) == math.isinf(threshold) for pair in pairs)


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"window": 6}, {"window": 0}, {"capacity": 0}], ids=str
)
def test_a_state_that_cannot_be_is_refused(sizes):
    model, ((name, value),) = TTLModel(make()), sizes.items()
    with pytest.raises(ValueError, match=rf"{name}.* must be .*got .*{value}"):
        model.init_state(**{"batch": 1, **sizes})


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"chunk": 8}, "another chunk"),
        ({"num_layers": 3}, "3 layers"),
        ({"memory_layers": ()}, "layer 0 .* another memory"),
        ({"memory_layers": (0, 1)}, "layer 1 .* another memory"),
    ],
    ids=str,
)
def test_a_state_of_another_model_is_refused(other, reason):
    model, stranger = TTLModel(make()), TTLModel(make(**other))
    with pytest.raises(ValueError, match=reason):
        model(draw(5), stranger.init_state(B))


@pytest.mark.parametrize("lanes", [torch.tensor([True]), torch.tensor([0, 1])], ids=str)
def test_a_mask_of_lanes_that_does_not_fit_is_refused(lanes):
    model = TTLModel(make())
    with pytest.raises(ValueError, match=rf"lanes must be bool \[{B}\]"):
        model.reset(model.init_state(B), lanes)


@torch.no_grad()
def test_no_tokens_change_nothing():
    for config in CONFIGS.values():
        model = TTLModel(config)
        _, state, _ = model(draw(23), model.init_state(B))
        y, after, stats = model(draw(0), state)
        assert y.shape == (B, 0, VOCAB) and stats.nonfinite.tolist() == [0] * B
        held = flatten(after)
        for name, t in named_tensors(state):
            assert torch.equal(held[name], t), name


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_equals_the_model():
    """Half a minute of tracing. One graph is out of reach: lengths and gates decide what is run."""
    model, compiled_state = TTLModel(make()).double().eval(), None
    compiled = torch.compile(model, backend="eager")
    state = compiled_state = model.init_state(B)
    for seed in range(4):
        y, state, _ = model(draw(2 * C, seed), state)
        compiled_y, compiled_state, _ = compiled(draw(2 * C, seed), compiled_state)
        assert (y - compiled_y).abs().max() < 1e-10
