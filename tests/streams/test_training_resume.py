"""Every way to end a run early leaves a checkpoint, and the run goes on from it bit for bit."""

import csv
import multiprocessing
import os
import subprocess

import pytest
import torch

from wakesleep.streams.config import load_config
from wakesleep.streams.stopping import Stopped
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training import StreamModule, train
from wakesleep.streams.training_config import TrainConfig

CLOCKS = {"seconds", "tokens_per_second", "flops_per_second"}
WORDS = [
    "train.steps=6",
    "train.lanes=2",
    "train.log_every=2",
    "train.save_every=100",
    "train.validate_every=0",
    "threads=1",
]


def recipe(*words: str) -> TrainConfig:
    return load_config(TrainConfig, find_recipe("tiny.yaml"), [*WORDS, *words])[0]


def rows(folder) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]


def weights(folder) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_end(a, b):
    (mine, theirs) = weights(a), weights(b)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert rows(a) == rows(b)


def at_step(monkeypatch, number, action):
    """Do something in the middle of the step with batch `number`."""
    original = StreamModule.training_step

    def step(self, batch, batch_idx):
        if batch.cursor == number:
            action()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(StreamModule, "training_step", step)


def test_a_signal_to_the_whole_group_is_the_trainers_to_obey(tmp_path, monkeypatch):
    """`timeout` and schedulers send it to the processes that make batches as well."""

    def end_all():
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        pids = [str(pid) for pid in (*(worker.pid for worker in workers), os.getpid())]
        subprocess.run(["kill", "-TERM", *pids], check=True)  # by somebody else

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_step(patch, 2, end_all)
        train(recipe("data.workers=2"), tmp_path / "cut")
    train(recipe(), tmp_path / "cut", resume=True)
    train(recipe(), tmp_path / "whole")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
