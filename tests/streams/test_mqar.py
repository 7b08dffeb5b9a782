"""Every key that is asked for was said once, and its value follows it."""

import numpy as np
import pytest

from wakesleep.streams.mqar import MQAR, MQARConfig


@pytest.mark.parametrize("queries, length", [(6, 24), (6, 40), (3, 19)])
def test_every_answer_is_the_value_of_its_key(queries, length):
    task = MQAR(MQARConfig(pairs=6, queries=queries, vocab_size=40), length, seed=0)
    for step in range(20):
        batch = task.batch(step, lanes=3)
        tokens, weight = batch["tokens"], batch["weight"]
        assert weight.sum() == 3 * queries == len(batch["answer_lane"])
        for lane, start, stop, age in zip(
            *(batch[f"answer_{name}"] for name in ("lane", "start", "stop", "age")), strict=True
        ):
            row = tokens[lane]
            said = row[:12].tolist()
            at = said[::2].index(row[start - 1]) * 2
            assert weight[lane, start] == 1 and stop == start + 1
            assert row[start] == said[at + 1] and age == start - (at + 1)
        for row in tokens:
            keys = row[:12:2]
            asked = row[12:][np.isin(row[12:], keys)]
            assert len(set(keys)) == 6 and len(asked) == len(set(asked)) == queries
            assert (row[1:12:2] >= 20).all() and (keys < 20).all() and (keys > 0).all()


def test_the_latest_value_of_an_overwritten_key_counts():
    config = MQARConfig(pairs=6, queries=6, overwritten=4, vocab_size=40)
    task, orders = MQAR(config, 50, seed=0), set()
    for step in range(20):
        batch = task.batch(step, lanes=3)
        names = ("lane", "start", "age", "kind", "stale")
        for lane, start, age, kind, stale in zip(
            *(batch[f"answer_{name}"] for name in names), strict=True
        ):
            row = batch["tokens"][lane]
            places = [2 * i for i in range(10) if row[2 * i] == row[start - 1]]
            values = [row[place + 1] for place in places]
            assert row[start] == values[-1] and age == start - (places[-1] + 1)
            assert len(places) == 1 + kind and stale == (values[0] if kind else -1)
            assert not kind or values[0] != values[1]
            assert batch["value"][lane, [place + 1 for place in places]].all()
            assert batch["fact"][lane, places[-1] + 1] and batch["fact"][lane].sum() == 6
        assert batch["answer_kind"].sum() == 3 * 4 and batch["value"].sum() == 3 * 10
        orders.add(tuple(batch["answer_age"]))
    assert len(orders) == 20
    with pytest.raises(ValueError, match=r"\(pairs \+ overwritten\) \+ 2 \* queries = 32, got 31"):
        MQAR(config, 31, 0)
    with pytest.raises(ValueError, match="overwritten must be between 0 and pairs=6: 7"):
        MQARConfig(pairs=6, queries=6, overwritten=7, vocab_size=40)


def test_a_gap_is_filler_between_pairs():
    config = MQARConfig(pairs=6, queries=6, overwritten=2, vocab_size=40, gap=3)
    task, spaces = MQAR(config, 60, seed=0), []
    for step in range(20):
        batch = task.batch(step, lanes=3)
        for row, value in zip(batch["tokens"], batch["value"], strict=True):
            at = np.flatnonzero(value)
            assert len(at) == 8 and at[-1] < 40 and (row[at] >= 20).all()
            assert ((row[at - 1] > 0) & (row[at - 1] < 20)).all()
            said = {*at, *(at - 1)}
            assert all(row[i] == 0 for i in range(40) if i not in said)
            spaces += (np.diff(at) - 2).tolist()
        for lane, start, age in zip(
            *(batch[f"answer_{name}"] for name in ("lane", "start", "age")), strict=True
        ):
            row = batch["tokens"][lane]
            assert row[start] == row[start - age] and row[start - 1] == row[start - age - 1]
            assert batch["fact"][lane, start - age]
    assert min(spaces) == 0 and 2 < np.mean(spaces) < 3.5 and max(spaces) > 8
    with pytest.raises(ValueError, match="= 52, got 51"):
        MQAR(config, 51, 0)
    with pytest.raises(ValueError, match="gap must be at least 0"):
        MQARConfig(pairs=6, queries=6, vocab_size=40, gap=-1)


def test_a_batch_depends_on_its_number_and_the_seed_alone():
    config = MQARConfig(pairs=6, queries=6, vocab_size=40)
    same = [MQAR(config, 32, 0).batch(5, 2)["tokens"] for _ in range(2)]
    assert np.array_equal(*same)
    for other in (MQAR(config, 32, 1).batch(5, 2), MQAR(config, 32, 0).batch(6, 2)):
        assert not np.array_equal(same[0], other["tokens"])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sequence_len must be at least .* = 24, got 23"):
        MQAR(MQARConfig(pairs=6, queries=6, vocab_size=40), 23, 0)
    with pytest.raises(ValueError, match=r"vocab_size must be at least 2 \* pairs \+ 2 = 14"):
        MQARConfig(pairs=6, queries=6, vocab_size=13)
    with pytest.raises(ValueError, match="queries must be between 1 and pairs=6"):
        MQARConfig(pairs=6, queries=7, vocab_size=40)
