"""A model that doubles pointers, through the code that streams run, equals its oracle."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def doubling(script):
    return script("pointer_doubling")


def test_sleep_over_windows_and_over_the_store_are_what_the_oracle_finds(doubling):
    nodes, window = 19, 5
    for seed in range(2):
        after, order = doubling.draw(nodes, seed)
        model = doubling.build(after, window)
        for rule, size in (("recurrent", window), ("cross", nodes)):
            known = []
            for passes in (1, 2, 3):
                state = doubling.read_and_sleep(model, order, rule, passes)
                found = doubling.recall(state, after)
                assert found == pytest.approx(doubling.oracle(after, order, size, passes))
                known.append(sum(found))
            assert known == sorted(known) and known[0] < known[-1]


def test_the_oracle_is_that_of_the_literature(doubling):
    """Pointer doubling over 75 edges: recall of hop 2^h by passes (means of many draws)."""
    tables = {
        75: {
            1: [1, 0.52, 0.16, 0.01, 0.01],
            2: [1, 1, 0.87, 0.48, 0.12],
            3: [1, 1, 1, 0.97, 0.76],
            4: [1, 1, 1, 1, 1],
        },
        19: {1: [1, 0.52, 0.16, 0.01, 0.01], 2: [1, 0.60, 0.23, 0.03, 0.01]},
    }
    for size, table in tables.items():
        for passes, expected in table.items():
            draws = [doubling.draw(75, seed) for seed in range(40)]
            found = np.array([doubling.oracle(*d, size, passes) for d in draws])
            low, high = found.min(0), found.max(0)
            assert (low - 0.02 <= expected).all() and (expected <= high + 0.02).all(), (
                size,
                passes,
            )
            if size == 19 and passes == 2:  # window-local sleep saturates after two passes
                again = np.array([doubling.oracle(*d, size, 8) for d in draws])
                assert np.allclose(again[:, :2], found[:, :2])


def test_the_table_says_where_model_and_oracle_agree(doubling, monkeypatch, capsys):
    words = ["x", "--nodes", "12", "--windows", "3", "--passes", "1,2", "--draws", "1"]
    monkeypatch.setattr("sys.argv", words)
    doubling.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.endswith("| equal |") for line in lines[2:])
