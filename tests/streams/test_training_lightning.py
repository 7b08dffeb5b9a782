"""What Lightning's own callbacks see of a module that is trained without our folder."""

import csv
import logging
import warnings

import lightning
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from wakesleep.streams import training
from wakesleep.streams.config import load_config
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training import StreamDataModule, StreamModule, train
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.unroll import unroll


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def recipe(*words: str) -> TrainConfig:
    words = ("train.lanes=2", "train.validation_batches=1", "threads=1", *words)
    return load_config(TrainConfig, find_recipe("tiny.yaml"), words)[0]


def test_losses_can_be_monitored(tmp_path):
    config = recipe("train.validate_every=1")  # any number: Lightning says when
    module, data = StreamModule(config), StreamDataModule(config)
    early = EarlyStopping("val_loss", min_delta=100.0, patience=1)  # nothing is so much better
    best = ModelCheckpoint(tmp_path, "{step}", monitor="loss", every_n_train_steps=1)
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    every = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_steps=8, accelerator="cpu", callbacks=[early, best], **settings, **every
        )
        trainer.fit(module, data)
    assert trainer.global_step == module.cursor == 4
    expected = module.evaluate(data.validation, 1).means["loss"]
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(expected, rel=1e-6)
    assert 0 < float(best.best_model_score) < 5 and best.best_model_path


def test_rows_that_a_validation_skips_are_counted(tmp_path, monkeypatch):
    def skip(model, *args, **keys):
        read = unroll(model, *args, **keys)
        return read if model.training else read._replace(nonfinite=3)

    monkeypatch.setattr(training, "unroll", skip)
    train(recipe("train.steps=2", "train.validate_every=2", "train.log_every=1"), tmp_path / "run")
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        assert [row["val_nonfinite_rows"] for row in csv.DictReader(file)] == ["", "3.0"]
