"""Batches say what is predicted where, and lanes read every document in order."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from wakesleep.streams.config import load_config
from wakesleep.streams.mqar import MQAR, MQARConfig
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_data import LaneLoader, Tasks, open_source
from wakesleep.streams.training_metrics import Means, add_answers, measured
from wakesleep.streams.training_text import TextLanes, open_texts


def documents(folder, lengths):
    """Files of ids; document d holds 1000 d, 1000 d + 1, ..."""
    for number, length in enumerate(lengths):
        np.save(folder / f"{number}.npy", 1000 * number + np.arange(length))
    return (str(folder),)


def text_lanes(folder, lengths):
    texts = [text.ids for text in open_texts(documents(folder, lengths))]
    return TextLanes(texts, lanes=2, segment=8, segments=2, seed=0)


def test_weights_and_answers_stand_where_their_tokens_are_predicted():
    batch = Tasks(MQAR(MQARConfig(pairs=4, queries=4, vocab_size=32), 32, 0), 3, 2).batch(7)
    assert batch.cursor == 7 and batch.lengths.tolist() == [[16, 16]] * 3
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert torch.equal(batch.weight, batch.asked) and int(batch.weight.sum()) == 12
    for lane, start, stop in zip(*batch.answers[:3], strict=True):
        assert stop == start + 1 and batch.weight[lane, start] == 1
        assert batch.targets[lane, start] >= 16 > batch.tokens[lane, start] > 0


def test_answers_are_right_only_if_all_their_tokens_are():
    task = MQAR(MQARConfig(pairs=4, queries=4, vocab_size=32), 32, 0)
    batch = Tasks(task, 2, 1).batch(0)
    answers = batch.answers._replace(
        lane=torch.tensor([0, 0, 1, 1]),
        start=torch.tensor([4, 10, 4, 10]),
        stop=torch.tensor([7, 12, 7, 12]),
        age=torch.tensor([5, 30, 300, -1]),
        kind=torch.tensor([0, 0, 0, 0]),
    )
    right = torch.zeros(2, 32, dtype=torch.bool)
    right[0, 4:7], right[0, 10], right[1, 4:6], right[1, 9:12] = True, True, True, True
    means = Means(measured(MQAR.kinds))
    asked = batch._replace(answers=answers)
    add_answers(means, asked, right, ~right, ("mqar",), 16, keep_all=True)
    found = means.take()
    assert found.pop("answers") == found.pop("kind_mqar") == 0.5
    assert found == {
        "inside": 1.0,
        "outside": 0.0,
        "outside_kept": 0.0,
        "nothing": 1.0,
        "age_1": 1.0,
        "age_10": 0.0,
        "age_100": 0.0,
    }
    assert means.take() == {}


def test_stale_answers_are_a_share_of_the_overwritten_ones():
    config = MQARConfig(pairs=4, queries=4, overwritten=2, vocab_size=32)
    batch = Tasks(MQAR(config, 32, 0), 2, 1).batch(0)
    changed = (batch.stale >= 0).nonzero()
    assert len(changed) == 4
    stale = torch.zeros(2, 32, dtype=torch.bool)
    stale[tuple(changed[0])] = True
    means = Means(measured(MQAR.kinds))
    add_answers(means, batch, ~stale, stale, MQAR.kinds, 16, keep_all=True)
    found = means.take()
    assert found["stale"] == 0.25 and found["kind_overwritten"] == 0.75
    assert found["kind_mqar"] == 1.0


def test_every_lane_reads_whole_documents_in_order(tmp_path):
    lengths = [40, 7, 33, 16, 64]
    lanes = text_lanes(tmp_path, lengths)
    read: list[list[list[int]]] = [[], []]
    for number in range(30):
        batch = lanes.batch(number)
        for lane in range(2):
            for k in range(2):
                n, here = int(batch.lengths[lane, k]), slice(k * 8, k * 8 + 8)
                ids = batch.tokens[lane, here][:n].tolist()
                if batch.reset[lane, k]:
                    read[lane].append([])
                read[lane][-1] += ids
                weight = batch.weight[lane, here]
                assert not weight[n:].any() and weight[: n - 1].all()
                targets = batch.targets[lane, here][weight > 0].tolist()
                assert targets == [i + 1 for i in ids][: len(targets)]
    whole = [document for lane in read for document in lane[:-1]]
    for document in whole:
        number = document[0] // 1000
        assert document == list(range(1000 * number, 1000 * number + lengths[number]))
    first_pass = sorted(d[0] // 1000 for lane in read for d in lane)
    assert set(first_pass) == set(range(5)) and len(whole) > 10
    again = text_lanes(tmp_path, lengths)
    assert torch.equal(again.batch(29).tokens, batch.tokens)  # without the batches before it


def test_the_loader_says_where_it_is():
    source = Tasks(MQAR(MQARConfig(pairs=4, queries=4, vocab_size=32), 32, 0), 1, 1)
    loader = LaneLoader(source, 3)
    batches = iter(loader)
    assert [next(batches).cursor for _ in range(2)] == [3, 4]
    other = LaneLoader(source, 0)
    other.load_state_dict(loader.state_dict())
    assert next(iter(other)).cursor == 5


def test_files_that_are_no_documents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        open_texts((str(tmp_path),))
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"a\.npy: expected a row .* got float64 \(2, 2\)"):
        open_texts((str(tmp_path),))
    with pytest.raises(ValueError, match="no such file"):
        open_texts((str(tmp_path / "b.npy"),))


def test_answers_about_nothing_recall_nothing():
    class Task:
        def batch(self, step, lanes):
            answers = {"lane": [0, 0], "start": [3, 6], "stop": [5, 8], "age": [2, -1]}
            return {
                "tokens": np.zeros((1, 8), np.int64),
                "weight": np.ones((1, 8), np.float32),
                "fact": np.zeros((1, 8), bool),
                "value": np.zeros((1, 8), bool),
                "answer_kind": np.zeros(2, np.int64),
                **{f"answer_{name}": np.array(values) for name, values in answers.items()},
            }

    batch = Tasks(Task(), 1, 1).batch(0)
    assert batch.asked.tolist() == [[0, 0, 1, 1, 0, 1, 1, 0]]
    assert batch.recalled.tolist() == [[0, 0, 1, 1, 0, 0, 0, 0]]


def test_a_corpus_with_an_index_is_read_as_its_documents(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(20))
    parts = [{"name": "x", "start": 0, "tokens": 7}, {"name": "y", "start": 8, "tokens": 11}]
    parts.append({"name": "empty", "start": 19, "tokens": 0})
    (tmp_path / "a.json").write_text(json.dumps({"documents": parts}))
    assert [part.ids.tolist() for part in open_texts((str(tmp_path),))] == [
        list(range(8)),
        list(range(8, 20)),
    ]
    for broken in ({}, {"documents": [{"start": 10, "tokens": 10}]}, {"documents": 3}):
        (tmp_path / "a.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"a\.json is no index of a\.npy"):
            open_texts((str(tmp_path),))


def test_documents_may_be_held_out_by_their_number(tmp_path):
    layer = {
        "data": {"kind": "text", "paths": documents(tmp_path, (40, 50, 60))},
        "train": {"lanes": 1, "sequence_len": 64, "validate_every": 1},
        "model": {"vocab_size": 4096},
    }
    config = load_config(TrainConfig, overrides=layer)[0]
    held = dataclasses.replace(config.data, validation_documents=1)
    config = dataclasses.replace(config, data=held)
    assert [len(ids) for ids in open_source(config).documents] == [40, 50]
    assert [len(ids) for ids in open_source(config, validation=True).documents] == [60]
    none_left = dataclasses.replace(held, validation_documents=3)
    with pytest.raises(ValueError, match="validation_documents=3 leaves nothing to train on"):
        open_source(dataclasses.replace(config, data=none_left))
    with pytest.raises(ValueError, match="give one"):
        dataclasses.replace(held, validation_paths=("a",))
