"""What is logged elsewhere is what metrics.csv has, and a logger that is not there is told."""

import csv
import json

import pytest
from lightning.pytorch.loggers import Logger

from wakesleep.streams import training_loggers, training_trainer
from wakesleep.streams.config import load_config
from wakesleep.streams.errors import Refused
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training import train
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_resume import read_record


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self):
        self.settings, self.rows = {}, {}

    def log_hyperparams(self, params):
        self.settings = dict(params)

    def log_metrics(self, metrics, step):
        self.rows[step] = dict(metrics)


def config(**keys) -> TrainConfig:
    train_keys = {"steps": 4, "log_every": 2, "save_every": 4, "validate_every": 4}
    overrides = {"train": train_keys, "threads": 1, **keys}
    return load_config(TrainConfig, find_recipe("configs/tiny.yaml"), overrides)[0]


def test_a_logger_gets_the_settings_and_the_lines_of_metrics_csv(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(training_trainer, "open_loggers", lambda *_: [recorder])
    train(config(), tmp_path / "run")
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        lines = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert list(recorder.rows.values()) == lines and list(recorder.rows) == [2, 4]
    assert recorder.settings["optim.lr"] == "0.002"


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch, logger):
    monkeypatch.setattr(training_loggers, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=f"{logger} is not installed") as refusal:
        train(config(logger=logger), tmp_path / "run")
    assert f"pip install {logger}" in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_wandb_goes_on_with_the_run_that_it_began(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(training_loggers, "find_spec", lambda name: True)
    monkeypatch.setattr(
        training_loggers, "WandbLogger", lambda **keys: given.append(keys) or Recorder()
    )
    train(config(logger="wandb"), tmp_path / "run")
    longer = {"steps": 5, "log_every": 2, "save_every": 4, "validate_every": 4}
    (tmp_path / "run").rename(tmp_path / "moved")
    train(config(logger="wandb", train=longer), tmp_path / "moved", resume=True)
    train(config(logger="wandb"), tmp_path / "other")
    first, second, other = given
    assert first["id"] == second["id"] != other["id"]
    assert all(keys["resume"] == "allow" and keys["offline"] for keys in given)
    record = json.loads((tmp_path / "moved" / "run.json").read_text())
    assert record == {"run_id": first["id"], "resumed_at": [4]}


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path, monkeypatch):
    recorder, given = Recorder(), []
    monkeypatch.setattr(training_loggers, "find_spec", lambda name: True)

    def open_board(folder, **keys):
        given.append(keys["purge_step"])
        return recorder

    monkeypatch.setattr(training_loggers, "TensorBoardLogger", open_board)
    train(config(logger="tensorboard"), tmp_path / "run")
    longer = {"steps": 5, "log_every": 2, "save_every": 4, "validate_every": 4}
    train(config(logger="tensorboard", train=longer), tmp_path / "run", resume=True)
    assert given == [None, 5] and list(recorder.rows) == [2, 4, 5]


@pytest.mark.parametrize(
    "text",
    [
        '{"run_id": "a/../b", "resumed_at": []}',
        '{"run_id": 3, "resumed_at": []}',
        '{"run_id": "ab"}',
        "[]",
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(Refused, match=r"run\.json has "):
        read_record(path)
