"""What is counted as right and as stale is what a model says, whatever the model is."""

import sys

import pytest
import torch

from wakesleep.streams.mqar import MQAR, MQARConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.model_io import save_model


class Oracle:
    """Answers with the first or the last value that stands behind a key."""

    def __init__(self, which):
        self.which = which

    def init_state(self, lanes):
        return None

    def __call__(self, tokens, state):
        logits = torch.zeros(*tokens.shape, 40)
        for lane, row in enumerate(tokens.tolist()):
            for column in range(len(row) - 1):
                before = [i for i in range(column) if row[i] == row[column]]
                if before:
                    logits[lane, column, row[before[self.which] + 1]] = 1.0
        return logits, None, None


@pytest.mark.parametrize("which, right, stale", [(-1, 96, 0), (0, 48, 48)])
def test_right_and_stale_answers_are_told_apart(script, monkeypatch, which, right, stale):
    module = script("mqar_accuracy")
    monkeypatch.setattr(module, "LANES", 4)
    config = MQARConfig(pairs=12, queries=12, overwritten=6, vocab_size=40)
    task = MQAR(config, 64, 0)
    assert module.ask(Oracle(which), task, 8) == (right, 96, stale, 48)


def test_the_state_and_what_is_exact_are_printed(script, monkeypatch, tmp_path, capsys):
    module = script("mqar_accuracy")
    config = ModelConfig(
        vocab_size=64,
        dim=16,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        window=16,
        chunk=8,
        memory_layers=(0,),
        store_layers=(),
    )
    save_model(tmp_path / "m", TTLModel(config), b"{}", "# no text")
    words = ["mqar_accuracy.py", str(tmp_path / "m"), "--pairs", "8", "--length", "40"]
    monkeypatch.setattr(sys, "argv", [*words, "--sequences", "50"])
    module.main()
    out = capsys.readouterr().out
    assert "of 400 answers" in out and "chance  0.1250" in out and "stale" not in out
    assert "memory  mlp, state of a lane" in out and "window 16 + store 0 = 16 tokens of 40" in out
