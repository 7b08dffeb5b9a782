"""Segments on an absolute grid, every token scored, totals that go on, memory that is flat."""

import gc
import itertools
import json
import math
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from wakesleep.consolidation.budget import Cost, Ledger
from wakesleep.consolidation.triggers import TriggerState
from wakesleep.streams import reading
from wakesleep.streams.documents import open_document
from wakesleep.streams.meters import Histogram, Meters, Span
from wakesleep.streams.runner import StreamRunner
from wakesleep.streams.segments import Insert, Segment, SegmentReader
from wakesleep.streams.session import Session
from wakesleep.streams.token_reader import open_tokens
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.flops import wake_flops
from wakesleep.ttl.state import flatten

INSERTS = [Insert(0, [0]), Insert(37, [900] * 5), Insert(60, [901] * 40), Insert(61, [902] * 3)]


@pytest.fixture
def ids(tmp_path):
    """A document of 500 token ids, none of them special."""
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(8, 800, 500, dtype=np.int32))
    return path


def reader_of(ids, language_model, segment_len, cursor=None, **place):
    tokens = open_tokens(open_document(ids), language_model.tokenizer, cursor)
    return SegmentReader(tokens, INSERTS, segment_len, **place)


def expected(ids):
    """The document with everything inserted, as one row."""
    row = np.load(ids).tolist()
    for insert in INSERTS:
        row[insert.position : insert.position] = insert.ids
    # The third and the fourth overlap: what is due is read whole before the next.
    third = row.index(901)
    del row[third + 1 : third + 4]
    row[third + 40 : third + 40] = [902] * 3
    return row


@pytest.mark.parametrize("segment_len", [1, 7, 64, 1000])
def test_segments_hold_the_document_and_what_is_inserted(ids, language_model, segment_len):
    reader = reader_of(ids, language_model, segment_len)
    segments = []
    while segment := reader.read():
        segments.append(segment)
        assert reader.tokens % segment_len == 0 or reader.ended
    row = np.concatenate([segment.ids for segment in segments]).tolist()
    assert row == expected(ids)
    own = np.concatenate([segment.text for segment in segments])
    assert np.concatenate([s.ids for s in segments])[own].tolist() == np.load(ids).tolist()
    assert reader.ended and reader.inserted == sum(len(i.ids) for i in INSERTS)


@pytest.mark.parametrize("seed", range(5))
def test_segments_are_the_same_from_any_place_on(ids, language_model, seed):
    """A limit may stop anywhere, in the middle of what is inserted too; a resume goes on there."""
    draw = random.Random(seed)
    place, cursor, row, ends = {"tokens": 0, "inserted": 0}, None, [], []
    limits = [*sorted(draw.sample(range(1, 540), 4)), math.inf]
    for limit in limits:
        reader = reader_of(ids, language_model, 32, cursor, limit=limit, **place)
        while segment := reader.read():
            row += segment.ids.tolist()
            ends.append(reader.tokens)
        place = {"tokens": reader.tokens, "inserted": reader.inserted}
        cursor = json.loads(json.dumps(reader.cursor))
    assert row == expected(ids)
    assert {end for end in ends if end % 32} <= {*limits, len(row)}


def segments_of(ids: torch.Tensor, cuts: list[int]) -> list[Segment]:
    parts = np.split(ids.numpy(), cuts)
    return [Segment(part, np.ones(len(part), bool)) for part in parts if len(part)]


@pytest.fixture
def exact(language_model):
    """The tiny model in float64."""
    model = type(language_model.model)(language_model.model.config)
    model.load_state_dict(language_model.model.state_dict())
    return language_model._replace(model=model.double().eval())


@pytest.mark.parametrize("cuts", [[], [1], [64, 128, 192], [5, 6, 100, 171]], ids=str)
def test_tokens_are_scored_across_segments(exact, cuts):
    """The loss is that of one call over everything; the first token counts as log V."""
    ids = torch.randint(8, 4096, (200,))
    runner = StreamRunner(exact)
    for segment in segments_of(ids, cuts):
        runner.read(segment)
    with torch.no_grad():
        logits, state, stats = exact.model(ids[None], exact.model.init_state(1))
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:], reduction="sum")
    total = runner.meters.total
    assert total.nats == pytest.approx(float(loss) + math.log(4096), rel=1e-12)
    assert total.surprise == pytest.approx(float(stats.surprise.double().sum()), rel=1e-6)
    assert total.text_bytes == exact.tokenizer.num_bytes(ids.numpy())
    for name, tensor in flatten(runner.state).items():
        torch.testing.assert_close(tensor, flatten(state)[name], rtol=1e-9, atol=1e-9, msg=name)
    assert runner.meters.wake_flops == sum(
        wake_flops(exact.model.config, start, stop - start)
        for start, stop in zip([0, *cuts], [*cuts, 200], strict=True)
    )


def test_keys_of_fast_weights_that_are_read_are_paid_for(exact):
    config = replace(exact.model.config, fast_layers=(1,), fast=FastConfig(kind="mlp"))
    runner = StreamRunner(exact._replace(model=type(exact.model)(config)))
    runner.state.blocks[1].fast.old.open[:, :, 3] = True
    runner.read(segments_of(torch.arange(8, 28), [])[0])
    assert runner.meters.wake_flops == wake_flops(config, 0, 20, held=[4])
    assert wake_flops(config, 0, 20, held=[4]) > wake_flops(config, 0, 20)


def test_a_written_pair_that_the_store_lets_go_of_is_read_from_the_next_segment_on(exact):
    config = replace(exact.model.config, fast_layers=(1,), fast=FastConfig(kind="mlp"))
    runner = StreamRunner(exact._replace(model=type(exact.model)(config).double()), capacity=8)
    segments, shown = segments_of(torch.randint(8, 4096, (192,)), [96, 128, 160]), []
    runner.read(segments[0])
    stream = runner.state
    fast, store = stream.blocks[1].fast, stream.blocks[1].store
    fast.old.position[:, :, :8] = store.position
    fast.old.k[:, :, :8] = store.k
    fast.s.normal_()
    for segment in segments[1:]:
        runner.read(segment)
        old, position = runner.state.blocks[1].fast.old, runner.state.blocks[1].store.position
        inside = (old.position[..., None] == position[..., None, :]).any(-1)
        assert torch.equal(old.open, (old.position >= 0) & ~inside)
        shown.append(int(old.open.sum()))
    assert 0 < shown[0] < shown[-1]


def test_what_is_not_text_counts_neither_bits_nor_bytes(exact):
    ids = torch.randint(8, 4096, (20,)).numpy()
    own = np.random.default_rng(0).random(20) < 0.6
    nats = []
    for index in range(20):
        runner = StreamRunner(exact)
        if index:
            runner.read(Segment(ids[:index], np.zeros(index, bool)))
            assert runner.meters.total.nats == runner.meters.total.text_bytes == 0
        runner.read(Segment(ids[index : index + 1], np.ones(1, bool)))
        nats.append(runner.meters.total.nats)
    runner = StreamRunner(exact)
    runner.read(Segment(ids, own))
    assert runner.meters.total.nats == pytest.approx(np.array(nats)[own].sum(), rel=1e-9)
    assert runner.meters.total.text_bytes == exact.tokenizer.num_bytes(ids[own])


def test_a_prediction_that_is_not_finite_is_counted_and_spoils_nothing(exact):
    with torch.no_grad():
        exact.model.embedding.weight[9] = float("nan")
    runner = StreamRunner(exact)
    ids = torch.tensor([10, 9, 11, 12])
    runner.read(Segment(ids.numpy(), np.ones(4, bool)))
    assert runner.meters.nonfinite_rows == int(runner.state.nonfinite.sum()) > 0
    assert math.isfinite(runner.meters.total.nats)
    json.dumps(runner.metrics_line(), allow_nan=False)


def test_totals_are_exact_after_json():
    ledger = Ledger(Cost(2**70, 3, 0.1), Cost(5), Cost(0, 1), Cost(seconds=1 / 3), 7, 8)
    meters = Meters(seconds=0.1 + 0.2, ledger=ledger, nonfinite_rows=3, resumed_at=[5])
    meters.triggers = TriggerState(4, True, 0.1, 0.2, 0.3, 2)
    meters.add(Span(7, 6, 30, 1 / 3, 1e-17))
    meters.pauses.add(0.01)
    meters.pauses.add(3.0)
    again = Meters.from_json(json.loads(json.dumps(meters.to_json())))
    assert again == meters
    older = meters.to_json()
    del older["interrupted_flops"]  # was not counted once
    assert Meters.from_json(older) == meters


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("total", "nats"), "1"),
        (("total", "tokens"), 1.5),
        (("seconds",), None),
        (("seconds",), -5),
        (("ledger",), [[1, 2, 3.0]] * 4),
        (("ledger",), [[-1, 2, 3.0]] * 4 + [0, 0]),
        (("ledger",), [[10**400, 2, 3.0]] * 4 + [0, 0]),
        (("triggers",), [0, 1, 0.0, 0.0, 0.0, 0]),
        (("triggers",), [0, True, 0.0, 0.0, 0.0, -1]),
        (("triggers",), [0, False, 0.0]),
        (("sleeps",), True),
        (("interrupted_flops",), -1),
        (("total", "nats"), float("nan")),
        (("pauses", "counts"), {"9999": 1}),
        (("pauses", "counts"), {"-1": 1}),
        (("pauses", "counts"), [1]),
        (("pauses", "counts"), {"a": 1}),
        (("resumed_at",), 3),
        (("unknown",), 1),
    ],
    ids=str,
)
def test_totals_that_nobody_wrote_are_refused(path, value):
    values = Meters().to_json()
    place = values
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValueError):
        Meters.from_json(values)


def test_percentiles_of_pauses_are_exact_to_five_percent():
    draw = random.Random(0)
    durations = sorted(10 ** draw.uniform(-7, 3) for _ in range(5000))
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    for share in (0.5, 0.95):
        right = durations[math.ceil(share * 5000) - 1]
        assert right <= histogram.percentile(share) <= 1.051 * right
    assert histogram.longest == durations[-1] and len(histogram.counts) < 600


def test_memory_does_not_grow_with_the_stream(tmp_path, language_model, monkeypatch):
    """Neither Python's objects nor tensors pile up, whatever is counted on the way."""
    monkeypatch.setattr(reading, "METRICS_EVERY", 1024)
    np.save(tmp_path / "long.npy", np.random.default_rng(0).integers(8, 4096, 15_000))
    seen = []

    class Watch:
        def metrics(self, line):
            if line["tokens"] in (4096, 9216, 14336):
                gc.collect()
                tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
                seen.append((sys.getallocatedblocks(), tensors))

        def answers(self, tokens, facts):
            pass

    options = {"segment_len": 512, "save_every": 2048, "threads": 1}
    with Session.open(tmp_path / "s", language_model, **options) as session:
        session.read(tmp_path / "long.npy", watch=Watch())
    objects, tensors = zip(*seen, strict=True)
    growth = [after - before for before, after in itertools.pairwise(objects)]
    # what grows does so in both halves; caches of Python itself may fill in one of them
    assert len(growth) == 2 and min(growth) < 100 and len(set(tensors)) == 1


def test_the_peak_is_that_of_this_process_not_of_its_parent(tmp_path):
    """Linux keeps the highest value when a process is replaced by another program."""
    small = "from wakesleep.streams.meters import peak_rss_bytes; print(peak_rss_bytes())"
    large = "import os, sys; b = bytes(400 << 20); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", large, sys.executable, "-c", small]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert 5 << 20 < int(run.stdout) < 200 << 20
