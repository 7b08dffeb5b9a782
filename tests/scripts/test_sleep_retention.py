"""A hundred sleeps in small: the order of the items, and what the table counts."""

from __future__ import annotations

import pytest
import torch

from wakesleep.streams.session import Session


@pytest.fixture
def retention(script):
    return script("sleep_retention")


@pytest.mark.parametrize("expansion", [0, 8])
def test_every_sleep_writes_its_items_and_the_table_tells_what_is_left(
    retention, session_folder, monkeypatch, capsys, expansion
):
    words = ["--sleeps", "10", "--items", "1", "--tolerance", "0.5"]
    words += ["--expansion", str(expansion)]
    monkeypatch.setattr("sys.argv", ["x", str(session_folder), *words])
    retention.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[2:12]]
    assert [row[0] for row in rows] == [f"{n} to {n}" for n in range(1, 11)]
    then, last = ([float(row[i].split()[0]) for row in rows] for i in (1, 2))
    assert {row[4] for row in rows} == {rows[0][4]} and int(rows[0][4]) > 0
    assert then[0] == 1.0 and all(0 <= x <= 1 for x in [*then, *last])
    assert sum(last) >= 1 and lines[-1].startswith("refused: ")


def test_sleeps_that_have_no_tenths_are_refused(retention, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "nowhere", "--sleeps", "25"])
    with pytest.raises(SystemExit):
        retention.main()
    assert "multiple of 10" in capsys.readouterr().err


def test_items_are_pairs_in_the_order_of_the_stream(retention, session_folder):
    model, state, layer = retention.arrange(Session.load(session_folder), 0)
    store = state.blocks[layer].store
    place = retention.items_of(store, 8)
    position = store.position.gather(-1, place)
    assert (position >= 0).all() and (position.diff(dim=-1) > 0).all()
    assert model.config.fast_layers == (layer,)
    with pytest.raises(SystemExit, match="are wanted"):
        retention.items_of(store, 10_000)


def test_each_sleep_sees_its_own_items_alone(retention, session_folder):
    model, state, layer = retention.arrange(Session.load(session_folder), 0)
    store = state.blocks[layer].store
    place = retention.items_of(store, 6)
    nights = list(retention.carry_out(model, state, layer, place, 2, 0.5))
    assert len(nights) == 3
    heads = store.position.shape[0] * store.position.shape[1]
    assert all(0 < report.written + report.rejected <= 2 * heads for _, report in nights)
    k = torch.nn.functional.normalize(store.k.float(), dim=-1)
    first = k.gather(2, place[..., :2, None].expand(-1, -1, -1, k.shape[-1]))
    told = first @ nights[0][0].s
    assert (told.norm(dim=-1) > 0).any()
