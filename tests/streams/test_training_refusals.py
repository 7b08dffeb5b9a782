"""What cannot work is refused before anything is written, by the name of its key."""

import pytest

from wakesleep.streams.config import load_config
from wakesleep.streams.errors import Refused
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training_config import TrainConfig

WORDS = ["train.steps=2", "train.lanes=2", "train.validate_every=0", "threads=1"]


def recipe(*words: str) -> TrainConfig:
    return load_config(TrainConfig, find_recipe("tiny.yaml"), [*WORDS, *words])[0]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.validation_batches=0", r"train\.validation_batches must be above 0, got 0"),
    ],
)
def test_settings_out_of_bounds_are_refused(word, message):
    with pytest.raises(Refused, match=message):
        recipe(word)
