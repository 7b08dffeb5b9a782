"""`wakesleep train` from outside; the training itself is replaced by what it may do."""

import json
import os
import sys
import types
from functools import partial
from pathlib import Path

import pytest

from wakesleep.streams import cli, doctor_command
from wakesleep.streams.config import load_config
from wakesleep.streams.errors import Refused, TrainingFailed
from wakesleep.streams.stopping import Stopped
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training_config import TrainConfig
from wakesleep.ttl.flops import flop_table


@pytest.fixture(autouse=True)
def _inside_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def training(monkeypatch):
    """Put a function in the place of `Run.carry_out`, and one in that of the checks before it."""

    def replace(train, check=lambda: None, rank=0):
        def prepare(config, output, *, resume, quiet):
            check()
            trainer = types.SimpleNamespace(is_global_zero=rank == 0)
            run = partial(train, config, output, resume=resume)
            return types.SimpleNamespace(carry_out=run, trainer=trainer)

        module = types.SimpleNamespace(prepare=prepare)
        monkeypatch.setitem(sys.modules, "wakesleep.streams.training", module)

    return replace


def test_a_recipe_is_a_path_or_one_that_is_installed():
    installed = find_recipe("configs/mqar.yaml")
    assert installed.is_file() and find_recipe("mqar.yaml") == installed
    Path("mqar.yaml").write_text("seed: 1\n")
    assert find_recipe("mqar.yaml") == Path("mqar.yaml")
    for name in ("elsewhere/mqar.yaml", "mqra.yaml"):
        with pytest.raises(Refused, match=r"did you mean configs/mqar\.yaml"):
            find_recipe(name)


def test_train_hands_over_the_merged_settings(training, capsys):
    calls = []

    def train(config, output, *, resume):
        calls.append((config.optim.lr, config.trainer, output, resume))
        return {"output": str(output), "steps": 3000, "reads_text": True, "resumed_at": []}

    training(train)
    words = ["mqar.yaml", "optim.lr=1e-4", "trainer.max_steps=3k", "--output", "out", "--json"]
    assert cli.main(["train", *words]) == 0
    assert calls == [(1e-4, {"max_steps": 3000}, Path("out"), False)]
    out, err = capsys.readouterr()
    assert json.loads(out)["steps"] == 3000
    assert err.startswith("3,000 steps of ") and "model=out/last" in err
    assert cli.main(["train", *words, "--resume"]) == 0 and calls[-1][-1] is True


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--print-config", "seed: 3 "), ("--dry-run", "1,000 steps of 8.19k tokens")],
)
def test_looking_at_the_settings_trains_nothing(training, capsys, flag, words):
    training(lambda *_, **__: pytest.fail("it trained"))
    assert cli.main(["train", "mqar.yaml", "seed=3", "--output", "out", flag]) == 0
    assert words in capsys.readouterr().out
    assert os.listdir() == []


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--quiet"]], ids=str)
def test_what_a_token_costs_is_said_before_training(training, capsys, flags):
    said = []

    def train(config, output, *, resume):
        said.append(capsys.readouterr().err)
        return {"output": str(output), "steps": 1, "reads_text": False, "resumed_at": []}

    training(train)
    words = ["mqar.yaml", "model.dim=64", "--output", "out"]
    assert cli.main(["train", *words, *flags]) == 0
    table = flop_table(
        load_config(TrainConfig, find_recipe("mqar.yaml"), ["model.dim=64"])[0].model
    )
    before = said[0] if said else capsys.readouterr().err
    assert (table in before) == (flags != ["--quiet"]) and bool(said) == (flags != ["--dry-run"])
    assert "head" in table and "memory" in table


def test_whatever_cannot_be_is_refused_in_three_lines(capsys, monkeypatch):
    monkeypatch.delattr("torch.optim.Muon")
    for words in (
        ["trainer.max_stps=3"],
        ["trainer.max_steps=abc"],
        ["trainer.devices=3"],
        ["optim.rule=muon"],  # torch has none here
        ["train.start=nowhere"],
        ["data.kind=text", f"data.paths=[{__file__}]", "admission.keep_all_share=0"],
        ["data.kind=mixture", "data.mixture.corpus=nowhere.npy"],
    ):
        for flags in ([], ["--dry-run"]):
            assert cli.main(["train", "tiny.yaml", *words, "--output", "out", *flags]) == 2
            out, err = capsys.readouterr()
            assert out == "" and len(err.splitlines()) <= 3 and os.listdir() == []
            assert "pickle" not in err


def test_the_shipped_model_may_be_the_start(capsys):
    words = ["train", "tiny.yaml", "train.start=default", "--output", "out", "--dry-run"]
    assert cli.main(words) == 2
    assert "model.chunk is 64 there and 8 here" in capsys.readouterr().err


def test_quiet_says_nothing_of_the_steps(capsys):
    words = ["tiny.yaml", "train.steps=3", "train.log_every=1", "train.validate_every=0"]
    assert cli.main(["train", *words, "threads=1", "--output", "out", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "next: wakesleep.ttl.load_model('out/last') in Python" in out  # no text


def test_damaged_files_of_a_run_are_named(capsys):
    words = ["train", "tiny.yaml", "train.steps=3", "threads=1", "--output", "out"]
    Path("victim").write_text("precious")
    Path("out/checkpoints").mkdir(parents=True)
    Path("out/checkpoints/.last.ckpt.new").symlink_to("../../victim")
    assert cli.main(words) == 0
    assert Path("victim").read_text() == "precious"
    Path("out/checkpoints/last.ckpt").write_bytes(b"nothing")
    assert cli.main([*words, "--resume"]) == 2
    assert "last.ckpt is no checkpoint" in capsys.readouterr().err
    Path("out/run.json").write_text("[")
    assert cli.main([*words, "--resume"]) == 2
    assert "run.json is not plain JSON" in capsys.readouterr().err


def test_a_refused_folder_takes_three_lines_in_all(training, capsys):
    def check():
        raise Refused("out holds a run", "with other settings", "choose another --output")

    training(lambda *_, **__: pytest.fail("it trained"), check)
    for flags in ([], ["--dry-run"]):
        assert cli.main(["train", "mqar.yaml", "--output", "out", *flags]) == 2
        out, err = capsys.readouterr()
        assert len((out + err).splitlines()) == 3 and "holds a run" in err
    Path("file").touch()
    assert cli.main(["train", "mqar.yaml", "--output", "file"]) == 2
    assert "file is no folder" in capsys.readouterr().err


def test_a_stopped_run_says_how_to_go_on(training, capsys):
    def train(config, output, *, resume):
        raise Stopped(15)

    training(train)
    assert cli.main(["train", "mqar.yaml", "seed=3", "--output", "a run"]) == 143
    again = "go on with: wakesleep train mqar.yaml seed=3 --output 'a run' --resume"
    assert again in capsys.readouterr().err


def test_of_several_processes_the_first_one_speaks(training, capsys):
    def fail(config, output, *, resume):
        raise TrainingFailed("step 3, batch 2: not finite: the next-token loss")

    for rank, words in ((0, "step 3, batch 2"), (1, "")):
        training(fail, rank=rank)
        assert cli.main(["train", "mqar.yaml", "--output", "out"]) == 1
        err = capsys.readouterr().err
        assert words in err and bool(err) == bool(words)


def test_a_stray_torchvision_is_named_instead_of_its_error(monkeypatch, capsys):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "wakesleep.streams.training", Broken("training"))
    clash = "torchvision 0.28.0 does not match torch 2.13.0; run: pip uninstall torchvision"
    for found, code, words in ((clash, 2, "run: pip uninstall torchvision"), (None, 1, "nms")):
        monkeypatch.setattr(doctor_command, "torchvision_clash", lambda found=found: found)
        assert cli.main(["train", "mqar.yaml", "--output", "out"]) == code
        assert words in capsys.readouterr().err


def test_train_needs_a_folder_for_what_it_leaves(capsys):
    assert cli.main(["train", "mqar.yaml"]) == 2
    assert "--output runs/mqar" in capsys.readouterr().err
