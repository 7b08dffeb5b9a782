"""What the capacity script counts."""

import torch


def test_a_few_pairs_are_recalled_and_too_many_not_even_by_the_ridge_fit(
    script, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["x", "--width", "16", "--pairs", "8,32", "--tolerances", ".6"])
    script("sleep_capacity").main()
    head, _, few, many = capsys.readouterr().out.splitlines()
    assert head == "| pairs | tolerance 0.6 | ridge |"
    assert few == "| 8 | 1.00 | 1.00 |"
    found, ceiling = map(float, many.strip("| ").split(" | ")[1:])
    assert found < ceiling - 0.1


def test_recall_counts_the_pairs_whose_own_value_is_nearest(script):
    module = script("sleep_capacity")
    store = module.make_store(6, 16, torch.Generator().manual_seed(0))
    s = torch.linalg.pinv(store.k) @ store.v
    assert module.recall(s, store) == 1.0
    turned = store._replace(v=store.v.roll(1, 2))
    assert module.recall(s, turned) == 0.0
