"""A model small enough to read thousands of tokens in a test, a text, and a session of the two."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from wakesleep.streams import language_model as language_models
from wakesleep.streams import reading
from wakesleep.streams.session import Session
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.model_io import TOKENIZER, save_model
from wakesleep.ttl.store import StoreConfig

WORDS = "amber gate river stone north winter letter harbour iron seven open under clerk".split()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A model folder with random weights: two layers, a memory in one and a store in the other."""
    return _save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def sleeper(tmp_path_factory) -> Path:
    """The same with fast weights that are read, in the layer with the store."""
    return _save_model(tmp_path_factory.mktemp("model") / "sleeper", fast_layers=(1,))


@pytest.fixture(scope="session")
def dreamer(tmp_path_factory) -> Path:
    """The same with fast weights that are written awake and by passes of sleep, in both layers."""
    fast = FastConfig(write="always", passes=4)
    layers = {"fast_layers": (0, 1), "fast": fast, "recent": 64}
    return _save_model(tmp_path_factory.mktemp("model") / "dreamer", **layers)


@pytest.fixture(scope="session")
def language_model(model_folder) -> language_models.LanguageModel:
    return language_models.load_language_model(model_folder, device="cpu")


@pytest.fixture
def text(tmp_path) -> Path:
    """A text of about 2,500 tokens."""
    return _write_text(tmp_path / "a.txt")


@pytest.fixture(scope="session")
def shared_text(tmp_path_factory) -> Path:
    """The same text, once for all; not to be written to."""
    return _write_text(tmp_path_factory.mktemp("text") / "a.txt")


@pytest.fixture
def straight(tmp_path, _straight) -> Path:
    """A session that read the same text without a break, with a line of metrics per 300 tokens."""
    return shutil.copytree(_straight, tmp_path / "straight")


@pytest.fixture(scope="session")
def _straight(tmp_path_factory, language_model) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    options = {"segment_len": 128, "save_every": 512, "threads": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "METRICS_EVERY", 300)
        with Session.open(folder / "s", language_model, **options) as session:
            session.read(_write_text(folder / "a.txt"))
    return folder / "s"


def _save_model(folder: Path, **layers) -> Path:
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
            memory_layers=(0,),
            store_layers=(1,),
            store=StoreConfig(capacity=32),
            **layers,
        )
        model = TTLModel(config)
    tokenizer = (language_models.DEFAULT / TOKENIZER).read_bytes()
    save_model(folder, model, tokenizer, "# Random weights", half=False)
    return folder


def _write_text(path: Path) -> Path:
    draw = random.Random(0)
    path.write_text("".join(f"{draw.choice(WORDS)} {draw.randint(0, 99)}.\n" for _ in range(500)))
    return path
