"""Every way to end a run early leaves a checkpoint, and the run goes on from it bit for bit."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess

import numpy as np
import pytest
import torch

from wakesleep.streams import cli
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
            action(self)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(StreamModule, "training_step", step)


def test_a_signal_to_the_whole_group_is_the_trainers_to_obey(tmp_path, monkeypatch):
    """`timeout` and schedulers send it to the processes that make batches as well."""

    def end_all(_):
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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_lightning_ends_is_saved_behind_its_step(tmp_path, monkeypatch, accumulate):
    words = [f"trainer.accumulate_grad_batches={accumulate}"]
    middle = 3 * accumulate - accumulate  # the first batch of the third step

    def stop(module):
        module.trainer.should_stop = True

    with monkeypatch.context() as patch:
        at_step(patch, middle, stop)
        assert train(recipe(*words), tmp_path / "cut")["steps"] == 3
    assert [row["step"] for row in rows(tmp_path / "cut")] == ["2", "3"]
    assert "for 3 steps" in (tmp_path / "cut" / "last" / "README.md").read_text()
    train(recipe(*words), tmp_path / "cut", resume=True)
    train(recipe(*words), tmp_path / "whole")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["resumed_at"] == [3]


def test_a_limit_of_lightning_keeps_what_was_trained_and_says_how_to_go_on(tmp_path, capsys):
    words = ["train", "tiny.yaml", *WORDS, "--output", str(tmp_path / "run")]
    assert cli.main([*words, "trainer.max_epochs=1", "trainer.limit_train_batches=3"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("3 steps trained") and "trainer.* ended it before step 6; raise" in err
    assert err.splitlines()[-1].endswith("--resume")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert cli.main([*words, "trainer.limit_train_batches=3", "--resume"]) == 0
    train(recipe(), tmp_path / "whole")
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_tokens_are_those_that_were_read(tmp_path):
    """The last step of an epoch of three batches accumulates one."""
    words = ["trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=3"]
    train(recipe(*words), tmp_path / "run")
    assert [int(row["tokens"]) for row in rows(tmp_path / "run")] == [3 * 128, 6 * 128, 9 * 128]


def test_documents_under_bf16_with_accumulation_go_on_with_the_same_bits(tmp_path, monkeypatch):
    for number, length in enumerate((300, 400, 250)):
        ids = np.random.default_rng(number).integers(0, 64, length)
        np.save(tmp_path / f"{number}.npy", ids)
    words = [
        *("data.kind=text", f"data.paths=[{tmp_path}]", "admission.keep_all_share=0"),
        *("train.bf16=true", "trainer.accumulate_grad_batches=2", "train.segments_per_step=2"),
    ]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_step(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        train(recipe(*words), tmp_path / "cut")
    train(recipe(*words), tmp_path / "cut", resume=True)
    train(recipe(*words), tmp_path / "whole")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
