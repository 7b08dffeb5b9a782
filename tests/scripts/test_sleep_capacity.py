"""What the capacity script counts."""

import pytest
import torch

from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.flops import state_bytes
from wakesleep.ttl.model import ModelConfig


def test_a_few_pairs_are_recalled_and_too_many_not_even_by_the_ridge_fit(
    script, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["x", "--width", "16", "--pairs", "8,32", "--tolerances", ".6"])
    script("sleep_capacity").main()
    head, _, few, many, _, told = capsys.readouterr().out.splitlines()
    assert head == "| pairs | tolerance 0.6 | ridge |"
    assert few == "| 8 | 1.00 | 1.00 |"
    found, ceiling = map(float, many.strip("| ").split(" | ")[1:])
    assert found < ceiling - 0.1
    assert told.endswith("20.5 kB per head, 98 store places")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_those_of_a_state(script, dtype):
    shape = {"vocab_size": 50, "dim": 16, "num_layers": 1, "num_heads": 1, "head_dim": 16}
    shape |= {"mlp_dim": 16, "memory_layers": (), "store_layers": (0,)}
    fast, place = script("sleep_capacity").bytes_per_head(16, 4, 64, dtype)
    sizes = []
    for capacity, layers in ((64, ()), (65, ()), (64, (0,))):
        config = ModelConfig(**shape, fast_layers=layers, fast=FastConfig(kind="mlp", expansion=4))
        parts = state_bytes(config, capacity=capacity, dtype=dtype)
        sizes.append(sum(part.nbytes for part in parts))
    assert sizes[1] - sizes[0] == place
    assert sizes[2] - sizes[0] == fast


def test_recall_counts_the_pairs_whose_own_value_is_nearest(script):
    module = script("sleep_capacity")
    store = module.make_store(6, 16, torch.Generator().manual_seed(0))
    s = torch.linalg.pinv(store.k) @ store.v
    assert module.recall(s, store) == 1.0
    turned = store._replace(v=store.v.roll(1, 2))
    assert module.recall(s, turned) == 0.0
