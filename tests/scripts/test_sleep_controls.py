"""The controls of sleep: what each of them changes, and that the table has a row for each."""

import pytest
import torch

from wakesleep.consolidation import replay_sleep
from wakesleep.consolidation.replay import Pairs
from wakesleep.ttl.fast import answer, no_fast_weights
from wakesleep.ttl.flops import wake_flops
from wakesleep.ttl.key_space import unit_key
from wakesleep.ttl.model_io import load_model

B, H, K, N = 1, 2, 16, 8


def draw() -> Pairs:
    k, v = torch.randn(2, B, H, N, K, generator=torch.Generator().manual_seed(0))
    chosen = torch.ones(B, H, N, dtype=torch.bool)
    return Pairs(torch.arange(N).expand(B, H, -1), chosen, unit_key(k), v, ~chosen)


def test_each_control_writes_something_else_of_the_same_length(script):
    module = script("sleep_controls")
    pairs, fast = draw(), no_fast_weights(torch.zeros(1), B, H, K, hidden=4 * K)
    right = replay_sleep.change(fast, pairs, 0.05, 300)
    assert torch.cosine_similarity(answer(right.s, pairs.k), pairs.v, dim=-1).min() > 0.9
    wrong = {
        name: module.spoilt(name, replay_sleep.change)(fast, pairs, 0.05, 300).s
        for name in module.SPOILT
    }
    told = {name: answer(s, pairs.k) for name, s in wrong.items()}
    torch.testing.assert_close(told["noise"].norm(dim=-1), pairs.v.norm(dim=-1), rtol=0.2, atol=0)
    near = {n: torch.cosine_similarity(t, pairs.v, dim=-1).mean() for n, t in told.items()}
    assert all(cosine < 0.4 for cosine in near.values())
    other = torch.cosine_similarity(told["shuffled"], pairs.v.roll(1, 2), dim=-1)
    assert other.min() > 0.9
    torch.testing.assert_close(wrong["flipped"] - fast.s, fast.s - right.s)


def test_a_control_lasts_as_long_as_it_is_asked_for(script):
    module = script("sleep_controls")
    before = replay_sleep.change, replay_sleep.judge
    with module.control("noise ungated"):
        assert replay_sleep.change is not before[0] and replay_sleep.judge is module.taken
    with module.control("asleep"):
        assert (replay_sleep.change, replay_sleep.judge) == before
    assert (replay_sleep.change, replay_sleep.judge) == before


@pytest.mark.parametrize(
    "only, why", [("awake,sleep", "the rows are"), ("wider window,asleep", "before it")]
)
def test_rows_that_cannot_be_are_refused(script, monkeypatch, capsys, only, why):
    monkeypatch.setattr("sys.argv", ["x", "--only", only])
    with pytest.raises(SystemExit):
        script("sleep_controls").main()
    assert why in capsys.readouterr().err


def test_sizes_of_equal_cost_cost_as_much_and_no_more(script, make_model):
    c = load_model(make_model(fast_layers=(1,))).config
    sizes = script("sleep_controls").sizes_of(
        c, 32, 4096, 1.3 * wake_flops(c, 0, 4096) / 4096, torch.bfloat16
    )
    most = 1.3 * wake_flops(c, 0, 4096)
    large = sizes["equal compute"]["store.capacity"]
    wide = sizes["wider window"]["window"]
    assert (
        wake_flops(c, 0, 4096, capacity=large) <= most < wake_flops(c, 0, 4096, capacity=large + 16)
    )
    assert wake_flops(c, 0, 4096, window=wide, capacity=32) <= most
    assert wake_flops(c, 0, 4096, window=wide + 16, capacity=32) > most
    assert sizes["equal bytes"]["store.capacity"] > 32


def test_a_table_has_a_row_for_each_that_was_asked_for(
    script, make_model, text, monkeypatch, capsys
):
    only = ["awake", "asleep", "flipped", "flipped ungated", "equal compute"]
    options = "store.capacity=16 limit_tokens=1500 facts.count=4 threads=1 segment_len=128"
    options += " sleep.worth=-9e9 sleep.every=128 sleep.tail_loss=9 sleep.tolerance=0.1"
    words = [f"model={make_model(fast_layers=(1,))}", *options.split()]
    words += ["--document", str(text), "--seeds", "3", "--only", ",".join(only)]
    monkeypatch.setattr("sys.argv", ["x", *words])
    script("sleep_controls").main()
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = {line[0].strip("| "): line for line in lines[2:]}
    assert list(rows) == only and len(lines[0]) == 8
    assert rows["awake"][1] == "16, 64" and rows["asleep"][5] > rows["awake"][5]
    assert float(rows["awake"][6]) == 0 < float(rows["asleep"][6])
    refused = {name: int(row[7].split(",")[0]) for name, row in rows.items() if row[7][0].isdigit()}
    assert refused["flipped"] > refused["flipped ungated"] == 0
    assert rows["flipped ungated"][7].rstrip("| ") == "0, 0"
    assert int(rows["equal compute"][1].split(",")[0]) >= 16
    assert float(rows["equal compute"][5]) == pytest.approx(float(rows["asleep"][5]), rel=0.2)
