"""The scripts as modules, a tiny model with random weights, and sessions with planted facts."""

import importlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wakesleep.streams import ask
from wakesleep.streams.language_model import DEFAULT
from wakesleep.streams.session import Session
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.model_io import TOKENIZER, save_model
from wakesleep.ttl.store import StoreConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"
WORDS = "amber gate river stone north winter letter harbour iron seven open under clerk".split()


@pytest.fixture(scope="session")
def script() -> Callable:
    """Import a script by its name; scripts find each other as they do on the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch):
    """Random weights would answer every question at full length."""
    monkeypatch.setattr(ask, "MAX_ANSWER", 2)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory) -> Callable:
    """Save a model of random weights with some parts and return its folder."""

    def make(memory_layers=(0,), store_layers=(1,), fast_layers=()) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = ModelConfig(
                dim=16,
                num_layers=2,
                num_heads=2,
                head_dim=8,
                mlp_dim=32,
                window=64,
                chunk=16,
                memory_layers=memory_layers,
                store_layers=store_layers,
                store=StoreConfig(capacity=32),
                fast_layers=fast_layers,
                fast=FastConfig(kind="mlp"),
            )
            model = TTLModel(config)
        folder = tmp_path_factory.mktemp("model") / "tiny"
        save_model(folder, model, (DEFAULT / TOKENIZER).read_bytes(), "# Random", half=False)
        return folder

    return make


@pytest.fixture(scope="session")
def model_folder(make_model) -> Path:
    """A memory in the first layer and a store in the second."""
    return make_model()


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A text of about 5,000 tokens."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(f"{draw.choice(WORDS)} {draw.randint(0, 99)}.\n" for _ in range(1000)))
    return path


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory, model_folder, text) -> Path:
    """A finished session that was told 10 facts of the test split; not to be written to."""
    folder = tmp_path_factory.mktemp("sessions") / "tiny"
    options = {"facts": {"count": 10}, "threads": 1, "dtype": "float32"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ask, "MAX_ANSWER", 2)
        with Session.open(folder, model_folder, **options) as session:
            session.read(text)
    return folder
