"""FLOP and byte formulas against torch's own counter and against the tensors of a state."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wakesleep.ttl import memory_scan
from wakesleep.ttl.fast import OLD_KEYS, FastConfig
from wakesleep.ttl.flops import CALL, flop_table, pass_flops, segment_flops, state_bytes, wake_flops
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import nbytes
from wakesleep.ttl.store import StoreConfig

VOCAB, C = 61, 4


def make(memory=None, store=None, **options) -> ModelConfig:
    """Two layers: a memory in the second, a store in both; none where None."""
    fixed = {"dim": 20, "num_layers": 2, "num_heads": 2, "head_dim": 16, "mlp_dim": 28}
    return ModelConfig(
        vocab_size=VOCAB,
        window=8,
        chunk=C,
        memory_layers=() if memory is None else (1,),
        store_layers=() if store is None else (0, 1),
        memory=MemoryConfig(**(memory or {})),
        store=StoreConfig(**{"capacity": 12, "hidden": 6, **(store or {})}),
        **(fixed | options),
    )


HELD = 5  # keys of an MLP
CONFIGS = {
    "window only": make(),
    "persistent, odd rotary share": make(num_persistent=3, head_dim=20),
    "matrix": make({"kind": "matrix"}),
    "matrix without momentum": make({"kind": "matrix", "momentum": False}),
    "mlp": make({"kind": "mlp", "expansion": 3}),
    "mlp without momentum": make({"kind": "mlp", "momentum": False}),
    "delta": make({"kind": "delta"}),
    "store learned": make(store={"score": "learned"}),
    "store recency with quota": make(store={"score": "recency", "quota": True, "capacity": 16}),
    "store mass": make(store={"score": "mass"}, num_persistent=1),
    "fast weights": make(fast_layers=(0, 1)),
    "fast weights, an mlp": make(fast_layers=(1,), fast=FastConfig(kind="mlp", expansion=3)),
    "fast weights written awake": make(
        fast_layers=(0, 1), fast=FastConfig(write="always"), recent=8
    ),
    "mag": make({}, {}),
    "mal": make({}, {}, combine="mal"),
    "mac mlp, fast weights": make({"page": 12}, {}, combine="mac", fast_layers=(1,)),
    "mac delta": make({"kind": "delta", "page": 8}, {}, combine="mac"),
    "mac matrix": make({"kind": "matrix", "page": 4}, combine="mac", num_persistent=2),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def draw(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length))


def counted(model, position, num_tokens, batch=1, *, head=True, **sizes) -> FlopCounterMode:
    """A counter that saw one call at `position`; what was read before was not counted."""
    state = model.init_state(batch, **sizes)
    if position:
        _, state, _ = model(draw(batch, position), state)
    if held(model.config):  # as if sleep had written something
        for block in state.blocks:
            if block.fast.old:
                block.fast.old.open[:, :, :HELD] = True
    with FlopCounterMode(display=False) as counter:
        model(draw(batch, num_tokens), state, head=head)
    return counter


def held(config) -> list[int]:
    return [HELD] * len(config.fast_layers) if config.fast.kind == "mlp" else []


def matmul(costs) -> int:
    return sum(cost.matmul for cost in costs)


# (position, tokens, lanes): on and off the grid, inside one chunk, empty and full store, no tokens
CALLS = [(0, 9, 1), (3, 2, 3), (8, 3 * C, 1), (29, 10, 3), (33, 0, 1), (40, C, 1)]


@configs
def test_formula_equals_what_torch_counts(config):
    model = TTLModel(config)
    for position, num_tokens, batch in CALLS:
        rows = held(config)
        expected = matmul(segment_flops(config, position, num_tokens, batch=batch, held=rows))
        # a store with gradients is read in pieces, which is not what the wake budget pays for
        for grad in (False,) if config.store_layers else (False, True):
            with torch.set_grad_enabled(grad):
                counter = counted(model, position, num_tokens, batch)
            assert counter.get_total_flops() == expected, (position, num_tokens, batch, grad)


@configs
@torch.inference_mode()
def test_each_part_equals_what_torch_counts_in_its_module(config):
    model, position, num_tokens = TTLModel(config), 30, 11
    counter = counted(model, position, num_tokens, 2)
    modules = counter.get_flop_counts()
    parts = segment_flops(config, position, num_tokens, batch=2, held=held(config))
    costs = {(c.part, c.layer): c for c in parts}

    def inside(name: str) -> int:
        return sum(modules.get(f"TTLModel.{name}", {}).values())

    total = counter.get_total_flops()
    assert costs.pop(("head", None)).matmul == total - inside("blocks.0") - inside("blocks.1")
    for layer in (0, 1):
        block = f"blocks.{layer}"
        here = {part: cost.matmul for (part, at), cost in costs.items() if at == layer}
        ends = inside(f"{block}.attention.qkv") + inside(f"{block}.attention.out")
        scores = inside(f"{block}.attention.store.head")
        reads = inside(f"{block}.attention") - ends - scores
        feed_forward = inside(f"{block}.mlp_in") + inside(f"{block}.mlp_out")
        rest = inside(block) - inside(f"{block}.attention") - feed_forward
        assert here.pop("projections") == ends
        assert here.pop("admission", 0) == scores
        assert sum(here.pop(part, 0) for part in ("window", "store", "fast weights")) == reads
        assert here.pop("feed-forward") == feed_forward
        assert here.pop("memory", 0) == rest
        assert not here


@torch.no_grad()
@pytest.mark.parametrize(("window", "capacity"), [(4, 30), (16, 3), (12, 12)])
def test_sizes_of_the_state_win_over_those_of_the_config(window, capacity):
    config, sizes = make({}, {}), {"window": window, "capacity": capacity}
    for position in (0, 17, 60):
        counter = counted(TTLModel(config), position, 10, **sizes)
        assert matmul(segment_flops(config, position, 10, **sizes)) == counter.get_total_flops()


@torch.no_grad()
def test_hidden_states_cost_a_head_less():
    config = make({}, {})
    without = matmul(segment_flops(config, 7, 10, batch=3, head=False))
    assert without == counted(TTLModel(config), 7, 10, 3, head=False).get_total_flops()
    assert matmul(segment_flops(config, 7, 10, batch=3)) - without == 2 * 3 * 10 * 20 * VOCAB


@torch.no_grad()
@pytest.mark.parametrize("threshold", [1.1, float("inf")])
@pytest.mark.parametrize("kind", ["matrix", "mlp", "delta"])
@pytest.mark.parametrize("page", [None, 8])
def test_with_a_surprise_gate_the_written_tokens_count(monkeypatch, kind, threshold, page):
    combine = "mag" if page is None else "mac"
    gate = {"kind": kind, "gate_threshold": threshold, "page": page}
    config, written, pack = make(gate, combine=combine), [], memory_scan._pack

    def spy(memory, chunk, errors, chosen):
        written.append(int(chosen.sum()))
        return pack(memory, chunk, errors, chosen)

    model = TTLModel(config)
    monkeypatch.setattr(memory_scan, "_pack", spy)
    for position, num_tokens in [(0, 24), (13, 22)]:
        counter = counted(model, position, num_tokens)
        chunks = -(-(position + num_tokens) // C) - position // C
        if page is not None:
            chunks = ((position + num_tokens) // page - position // page) * page // C
        seen = written[-chunks:]
        costs = segment_flops(config, position, num_tokens, written=seen)
        assert matmul(costs) == counter.get_total_flops()
        assert matmul(segment_flops(config, position, num_tokens)) >= matmul(costs)
    assert min(written) < C and (max(written) > 0) == (threshold < float("inf"))


@pytest.mark.parametrize("options", [{}, {"combine": "mac"}], ids=["mag", "mac"])
def test_solves_count_their_cube_and_the_total_holds_both(monkeypatch, options):
    page = 8 if options else None
    config, solved = make({"kind": "delta", "page": page}, **options), []
    solve = torch.linalg.solve_triangular

    def spy(a, b, **flags):
        solved.append(a.shape[0] * a.shape[-1] ** 2 * b.shape[-1])
        return solve(a, b, **flags)

    monkeypatch.setattr(torch.linalg, "solve_triangular", spy)
    model = TTLModel(config)
    with torch.no_grad():
        model(draw(3, 22), model.init_state(3))
    costs = segment_flops(config, 0, 22, batch=3)
    assert sum(cost.linalg for cost in costs) == sum(solved) > 0
    assert wake_flops(config, 0, 22, batch=3) == matmul(costs) + sum(solved)


@torch.no_grad()
@configs
def test_bytes_equal_those_of_the_state(config):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = TTLModel(config).to(dtype)
        for sizes in ({}, {"window": 20, "capacity": 5}):
            state = model.init_state(2, **sizes)
            _, later, _ = model(draw(2, 31), state)
            parts = state_bytes(config, batch=2, dtype=dtype, **sizes)
            assert sum(part.nbytes for part in parts) == nbytes(state) == nbytes(later)
            told = {(part.part, part.layer): part.nbytes for part in parts}
            counters = nbytes(state._replace(blocks=(), recent=None))
            assert told.pop(("ids and counters", None)) == counters
            assert told.pop(("recent", None), 0) == nbytes(state.recent)
            for layer, block in enumerate(state.blocks):
                assert told.pop(("window", layer)) == nbytes(block.window)
                assert told.pop(("store", layer), 0) == nbytes(block.store)
                assert told.pop(("memory", layer), 0) == nbytes((block.memory, block.page))
                assert told.pop(("fast weights", layer), 0) == nbytes(block.fast)
            assert not told


@configs
def test_table_is_what_a_token_costs_once_the_store_is_full(config):
    lines = flop_table(config).splitlines()
    rows = {line[:14].strip(): line[14:].split() for line in lines[1:]}
    period = (config.combine == "mac" and config.memory.page) or config.chunk
    full, tokens = 24 * 100, -(-CALL // period) * period
    sizes = {"held": [OLD_KEYS * config.head_dim for _ in held(config)]}
    costs = segment_flops(config, full, tokens, **sizes)
    for part, (number, share, *_) in rows.items():
        found = [c for c in costs if part in ("all", c.part)]
        exact = sum(c.matmul + c.linalg for c in found) / tokens / 1e6
        assert float(number) == pytest.approx(exact, abs=6e-4)
        whole = wake_flops(config, full, tokens, **sizes) / tokens / 1e6
        assert float(share.rstrip("%")) == pytest.approx(100 * exact / whole, abs=0.06)
    assert list(rows)[-2:] == ["head", "all"] and {c.part for c in costs} == set(rows) - {"all"}
    stored = "store of" in lines[0]
    assert stored == bool(config.store_layers) and ("store" in rows) == stored


@torch.inference_mode()
def test_a_pass_of_sleep_costs_what_torch_counts():
    layers = {"fast_layers": (0, 1), "fast": FastConfig(write="always"), "recent": 8}
    for config in (
        make(**layers),
        make({"kind": "mlp"}, {}, **layers),
        make({}, {"score": "mass"}, num_persistent=2, **layers),
    ):
        model = TTLModel(config)
        _, state, _ = model(draw(2, 40), model.init_state(2))
        stored = state.blocks[1].store
        used = 0 if stored is None else stored.position.shape[-1]
        with FlopCounterMode(display=False) as counter:
            model.sleep_pass(state)
        solves = sum(c.linalg for c in segment_flops(config, 0, 8, batch=2, window=8))
        told = pass_flops(config, 8, used, batch=2) - solves
        assert counter.get_total_flops() == told, config
