"""On a terminal a run shows a bar; what it says stays above it, and the cursor comes back."""

import io
import sys

import pytest

from wakesleep.streams.config import load_config
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training import StreamModule, train
from wakesleep.streams.training_config import TrainConfig

SHOW_CURSOR = "\x1b[?25h"
WORDS = ["train.steps=3", "train.lanes=1", "train.log_every=1", "train.validate_every=3"]


class Screen(io.StringIO):
    def isatty(self):
        return True


def open_screen(monkeypatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Screen())
    return sys.stderr


def recipe(*words: str) -> TrainConfig:
    return load_config(TrainConfig, find_recipe("tiny.yaml"), [*WORDS, "threads=1", *words])[0]


def test_a_terminal_shows_steps_loss_and_the_lines_of_a_run(tmp_path, monkeypatch):
    screen = open_screen(monkeypatch)
    train(recipe(), tmp_path / "run")
    shown = screen.getvalue()
    for words in ("step 0 of 3", "step 3 of 3, ", "step 1/3  loss 4.", "step 3/3  loss ", "token"):
        assert words in shown
    assert " tokens/s" in shown and SHOW_CURSOR in shown
    (last,) = {line for line in shown.split("\x1b[2K") if "step 3/3" in line}
    assert last.startswith("step 3/3")  # nothing of the bar is left on a line that stays


def test_the_bar_goes_away_when_a_run_fails(tmp_path, monkeypatch):
    screen = open_screen(monkeypatch)
    monkeypatch.setattr(StreamModule, "on_after_backward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(recipe(), tmp_path / "run")
    assert "step 0 of 3" in screen.getvalue() and SHOW_CURSOR in screen.getvalue()


def test_a_bar_may_be_asked_for_without_a_terminal(tmp_path, capsys):
    train(recipe("trainer.enable_progress_bar=true"), tmp_path / "run")
    shown = capsys.readouterr().err
    assert shown.count("step 1/3  loss ") == 1 and "\x1b" not in shown
