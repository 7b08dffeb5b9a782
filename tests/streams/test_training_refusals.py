"""What cannot work is refused before anything is written, by the name of its key."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from wakesleep.streams.config import load_config
from wakesleep.streams.errors import Refused
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training import prepare, train
from wakesleep.streams.training_config import TrainConfig

WORDS = ["train.steps=2", "train.lanes=2", "train.validate_every=0", "threads=1"]


def recipe(*words: str) -> TrainConfig:
    return load_config(TrainConfig, find_recipe("tiny.yaml"), [*WORDS, *words])[0]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.validation_batches=0", r"train\.validation_batches must be above 0, got 0"),
        ("seed=-1", "seed must be from 0 to 4294967295, got -1"),
        ("threads=0", "threads must be above 0, got 0"),
        ("optim.betas=[0.9,1]", r"optim\.betas must be at least 0, below 1"),
        ("optim.lr=inf", r"optim\.lr must be a number above 0"),
        ("optim.weight_decay=inf", r"optim\.weight_decay must be a number"),
        ("train.blind_weight=inf", r"train\.blind_weight must be a number"),
        ("admission.weight=inf", r"admission\.weight must be a finite number"),
        ("admission.positive_weight=inf", r"admission\.positive_weight must be a number"),
        ("trainer.max_epochs=abc", r"trainer\.max_epochs must be a whole number, .* got abc"),
        ("trainer.max_steps=true", r"trainer\.max_steps must be a whole number above 0, got True"),
    ],
)
def test_settings_out_of_bounds_are_refused(word, message):
    with pytest.raises(Refused, match=message):
        recipe(word)


@pytest.mark.parametrize(
    "word",
    [
        "trainer.precision=bf16-true",
        "trainer.precision=64-true",
        "trainer.precision=transformer-engine",
        "trainer.strategy=ddp_spawn",
        "trainer.strategy=fsdp",
        "trainer.gradient_clip_algorithm=value",
    ],
)
def test_flags_that_were_never_tried_are_refused_on_one_device_too(tmp_path, word):
    with pytest.raises(Refused, match=rf"{word} does not work here\nUse one of ") as refusal:
        train(recipe(word), tmp_path / "run")
    assert not (tmp_path / "run").exists() and len(str(refusal.value)) < 200


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match=r"file/run: .*file is no folder\nChoose another --output"):
        prepare(recipe(), tmp_path / "file" / "run")
    with monkeypatch.context() as patch, pytest.raises(Refused, match="run cannot be written"):
        patch.setattr(os, "access", lambda path, mode: path != tmp_path)
        prepare(recipe(), tmp_path / "run")
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: os.mkdir(tmp_path / "not" / "there"))
    with pytest.raises(Refused, match=r"run cannot be made\n.*\nChoose"):  # such as /proc/run
        train(recipe(), tmp_path / "run")


def test_a_missing_package_of_lightning_is_a_refusal(tmp_path):
    with pytest.raises(Refused, match="does not take these trainer"):
        train(recipe("trainer.accelerator=tpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def _trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(recipe(), folder)
    return folder


@pytest.fixture
def run(tmp_path, _trained):
    return shutil.copytree(_trained, tmp_path / "run")


def files(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(folder, message, *words):
    """Nothing is changed, and it takes three lines at most."""
    before = files(folder)
    with pytest.raises(Refused, match=message) as refusal:
        train(recipe(*words), folder, resume=True)
    assert files(folder) == before
    assert len(str(refusal.value).splitlines()) <= 3 and "ickle" not in str(refusal.value)


def without(*parts):
    """Take a part out of what a checkpoint holds."""

    def change(saved):
        for part in parts[:-1]:
            saved = saved[part]
        del saved[parts[-1]]

    return change


def flip(data: bytes) -> bytes:
    return data[:3000] + bytes([data[3000] ^ 255]) + data[3001:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"hello world\n" * 50,
        flip,
    ],
    ids=["cut off", "empty", "text", "flipped"],
)
def test_a_damaged_checkpoint_is_refused(run, damage):
    path = run / "checkpoints" / "last.ckpt"
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(run, r"last\.ckpt is no checkpoint of this run\nit is damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("wakesleep"), "not written by this version"),
        (without("wakesleep", "version"), "KeyError"),
        (without("state_dict"), "it has no state_dict"),
        (without("optimizer_states"), "it has no optimizer_states"),
        (without("callbacks", "RunFolder"), "KeyError"),
        (lambda s: s["wakesleep"].update(means=[torch.zeros(3)] * 2), "RuntimeError"),
        (lambda s: s["state_dict"].popitem(), "RuntimeError"),
        (lambda s: s["wakesleep"]["model"].update(dim=48), "a model with another config"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused(run, change, message):
    path = run / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    assert_refused(run, rf"last\.ckpt is no checkpoint of this run\n.*{message}")


def test_other_things_in_the_place_of_a_checkpoint_are_refused(run):
    path = run / "checkpoints" / "last.ckpt"
    torch.save([1, 2], path)
    assert_refused(run, "it has no state_dict")
    path.unlink()
    path.mkdir()
    assert_refused(run, "it is damaged")


def test_a_refused_resume_leaves_the_folder_to_the_right_one(run):
    (run / "config.yaml").unlink()
    assert_refused(run, "another config", "model.dim=48")
    assert train(recipe(), run, resume=True)["steps"] == 2


@pytest.mark.parametrize("text", ["garbage\n1,2,3\n", "step,tokens\nabc,1\n", "step,x\n1,\0\n,"])
def test_damaged_metrics_are_refused(run, text):
    (run / "metrics.csv").write_text(text)
    assert_refused(run, r"metrics\.csv is not what this program writes")


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("trainer.accumulate_grad_batches=2", "None in the run and 2 now"),
        ("trainer.precision=bf16-mixed", "None in the run and bf16-mixed now"),
        ("trainer.gradient_clip_val=2", "None in the run and 2 now"),
        ("train.steps=1", "2 in the run and 1 now"),
    ],
)
def test_what_would_make_other_numbers_is_not_changed_on_resume(run, word, values):
    key = word.partition("=")[0]
    assert_refused(run, f"{key} is {values}", word)


def test_a_run_may_be_made_longer(run):
    assert train(recipe("train.steps=3", "trainer.devices=1"), run, resume=True)["steps"] == 3
    assert_refused(run, "train.steps is 3 in the run and 2 now")
