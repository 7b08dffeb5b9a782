"""A run that stops anywhere goes on as if nothing had happened, and truncation truncates."""

import csv
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import lightning
import numpy as np
import pytest
import torch

from wakesleep.streams import training as training_module
from wakesleep.streams.config import load_config, to_yaml
from wakesleep.streams.distractors import Pool
from wakesleep.streams.errors import Refused
from wakesleep.streams.mqar import MQAR
from wakesleep.streams.stopping import Stopped
from wakesleep.streams.training import StreamModule, TrainingFailed, train
from wakesleep.streams.training_config import AdmissionConfig, TrainConfig
from wakesleep.streams.training_data import StreamDataModule, open_source
from wakesleep.streams.training_draws import draw_blind, never
from wakesleep.streams.training_run import RunFolder
from wakesleep.streams.unroll import unroll
from wakesleep.ttl.model_io import load_model
from wakesleep.ttl.state import map_state, named_tensors, select

MODEL = {
    "vocab_size": 32,
    "dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": 8,
    "mlp_dim": 32,
    "window": 16,
    "chunk": 8,
    "memory_layers": [0],
    "store_layers": [1],
    "store": {"capacity": 8, "hidden": 8},
}
TASK = {
    "model": MODEL,
    "data": {"kind": "mqar", "mqar": {"pairs": 4, "queries": 4, "vocab_size": 32}},
    "train": {
        "steps": 6,
        "lanes": 3,
        "sequence_len": 32,
        "segments_per_step": 2,
        "save_every": 1,
        "log_every": 2,
        "validate_every": 3,
        "validation_batches": 1,
    },
    "optim": {"warmup": 2},
    "admission": {
        "capacities": [4, 8],
        "keep_all_share": 0.5,
        "distractor_share": 0.7,
        "distractor_pool": 16,
        "rank_max": 64,
    },
}
DEFAULTS = dataclasses.asdict(AdmissionConfig())
CLOCKS = {"seconds", "tokens_per_second", "flops_per_second"}


class Crash(Exception):
    """What no part of the trainer expects."""


def task(**groups) -> TrainConfig:
    layers = {name: {**TASK.get(name, {}), **keys} for name, keys in groups.items()}
    return load_config(TrainConfig, overrides={**TASK, **layers})[0]


def text(tmp_path, lengths=(50, 21, 90, 40), **train_keys) -> TrainConfig:
    """A config whose lanes read documents of the given lengths."""
    rng = np.random.default_rng(0)
    for number, length in enumerate(lengths):
        np.save(tmp_path / f"{number}.npy", rng.integers(0, 32, length))
    keys = {"steps": 6, "lanes": 2, "sequence_len": 48, "save_every": 1, "log_every": 2}
    layer = {
        "model": MODEL,
        "data": {"kind": "text", "paths": [str(tmp_path)]},
        "train": {**keys, "segments_per_step": 3, **train_keys},
    }
    return load_config(TrainConfig, overrides=layer)[0]


def crash_at(monkeypatch, number, action=None):
    """Let the data of batch `number` end the run, or do something else."""
    original = MQAR.batch

    def batch(self, step, lanes):
        if step == number:
            if action is None:
                raise Crash
            action()
        return original(self, step, lanes)

    monkeypatch.setattr(MQAR, "batch", batch)


def end(folder):
    """Everything of a run that must not depend on how often it was stopped."""
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]
    optimizer = saved["optimizer_states"][0]["state"]
    moments = {f"{i}.{k}": v for i, cell in optimizer.items() for k, v in cell.items()}
    rates = saved["lr_schedulers"][0]["_last_lr"]
    return saved["state_dict"] | moments, (rows, rates, saved["wakesleep"]["cursor"])


def assert_same_end(a, b):
    (tensors, rest), (tensors_b, rest_b) = end(a), end(b)
    assert tensors.keys() == tensors_b.keys()
    assert [k for k in tensors if not torch.equal(tensors[k], tensors_b[k])] == []
    assert rest == rest_b
    weights = [(f / "last" / "model.safetensors").read_bytes() for f in (a, b)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("accumulate", "rule"), [(1, "adamw"), (2, "adamw"), (1, "muon")])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(tmp_path, monkeypatch, accumulate, rule):
    also = {"blind_share": 0.1, "window_dropout": 0.1, "sleep_drop": 0.7, "sleep_pairs": 4}
    keys = {"train": also, "model": {**MODEL, "fast_layers": [1]}} if rule == "muon" else {}
    trainer = {"accumulate_grad_batches": accumulate}
    config = task(trainer=trainer, optim={"rule": rule}, **keys)
    train(config, tmp_path / "whole")
    for step in (1, 3, 5):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_at(patch, step * accumulate + accumulate - 1)
            train(config, tmp_path / "cut", resume=True)
    train(config, tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["resumed_at"] == [1, 3, 5]


def test_lanes_in_the_middle_of_documents_go_on_with_the_same_bits(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    config = text(tmp_path / "texts", lengths=(400, 300, 20, 500))
    assert [open_source(config).batch(n).reset[:, 0].any() for n in (1, 4)] == [False, False]
    original, fatal = StreamModule.training_step, set()

    def step(self, batch, batch_idx):
        if batch.cursor in fatal:
            raise Crash
        noise = float(torch.rand(())) + np.random.random() + random.random()  # noqa: NPY002
        return original(self, batch, batch_idx) * (1 + noise)

    monkeypatch.setattr(StreamModule, "training_step", step)
    train(config, tmp_path / "whole")
    for number in (1, 4):
        fatal.add(number)
        with pytest.raises(Crash):
            train(config, tmp_path / "cut", resume=True)
        fatal.clear()
    train(config, tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_kill_and_resume_ends_with_the_same_bits(tmp_path):
    config = dataclasses.replace(task(train={"steps": 12}), threads=1)  # in both processes
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    program = (
        "import sys; from pathlib import Path\n"
        "from wakesleep.streams.config import load_config\n"
        "from wakesleep.streams.training import train\n"
        "from wakesleep.streams.training_config import TrainConfig\n"
        "train(load_config(TrainConfig, sys.argv[1])[0], Path(sys.argv[2]))\n"
    )
    cut = tmp_path / "cut"
    arguments = [sys.executable, "-c", program, str(tmp_path / "recipe.yaml"), str(cut)]
    child = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (cut / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        assert child.poll() is None
    child.kill()
    child.wait()
    train(config, cut, resume=True)
    train(config, tmp_path / "whole")
    assert_same_end(tmp_path / "whole", cut)


def test_without_a_number_of_steps_a_run_is_saved_every_five_minutes(tmp_path, monkeypatch):
    clock, saved, save = [0.0], [], RunFolder._save
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(RunFolder, "_save", lambda f, *a: (saved.append(f._step), save(f, *a)))
    original = StreamModule.training_step

    def step(module, batch, batch_idx):
        clock[0] += 110
        return original(module, batch, batch_idx)

    monkeypatch.setattr(StreamModule, "training_step", step)
    train(task(train={"save_every": None, "steps": 8}), tmp_path / "run")
    assert saved == [3, 6, 8]


@pytest.mark.parametrize("kind", ["mqar", "text"])
def test_a_run_resumed_with_other_workers_ends_with_the_same_bits(tmp_path, monkeypatch, kind):
    (tmp_path / "texts").mkdir()
    config = task() if kind == "mqar" else text(tmp_path / "texts")
    busy = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2))
    train(config, tmp_path / "whole")
    original = StreamModule.training_step

    def step(module, batch, batch_idx):
        if batch.cursor == 3:
            raise Crash
        return original(module, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(StreamModule, "training_step", step)
        train(busy, tmp_path / "cut")
    train(config, tmp_path / "cut", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    train(busy, tmp_path / "busy")
    assert_same_end(tmp_path / "whole", tmp_path / "busy")


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path):
    config = task(train={"steps": 1, "validate_every": 0})
    train(config, tmp_path / "run", resume=True)  # nothing to resume: it starts
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(Refused, match="holds a run"):
        train(config, tmp_path / "run")
    with pytest.raises(Refused, match=r"optim\.lr is 0\.002 in the run and 0\.1 now"):
        train(
            task(train={"steps": 1, "validate_every": 0}, optim={"lr": 0.1}),
            tmp_path / "run",
            resume=True,
        )
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, monkeypatch, capsys, number):
    config = task(train={"save_every": 100}, trainer={"accumulate_grad_batches": 2})
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        crash_at(patch, 4, lambda: os.kill(os.getpid(), number))
        train(config, tmp_path / "run")
    assert stopped.value.number == number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert end(tmp_path / "run")[1][2] == 6  # the step that was being accumulated was finished
    capsys.readouterr()
    train(config, tmp_path / "run", resume=True)
    assert f"{tmp_path / 'run'}: going on at step 3 of 6" in capsys.readouterr().err
    train(config, tmp_path / "whole")
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_place(tmp_path, monkeypatch):
    config = task()
    original = StreamModule.training_step

    def step(self, batch, batch_idx):
        if batch.cursor == 3:
            with torch.no_grad():
                self.model.blocks[1].mlp_out.weight[0, 0] = torch.nan
        return original(self, batch, batch_idx)

    monkeypatch.setattr(StreamModule, "training_step", step)
    with pytest.raises(TrainingFailed, match=r"step 4, batch 3: .*blocks\.1\.mlp_out\.weight"):
        train(config, tmp_path / "run")
    assert end(tmp_path / "run")[1][2] == 3


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_its_weight(tmp_path, monkeypatch):
    original = StreamModule.training_step

    def step(self, batch, batch_idx):
        if batch.cursor == 2:
            self.model.blocks[1].mlp_in.weight.register_hook(lambda gradient: gradient * torch.inf)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(StreamModule, "training_step", step)
    with pytest.raises(TrainingFailed, match=r"step 3, .*gradient of blocks\.1\.mlp_in"):
        train(task(), tmp_path / "run")
    assert end(tmp_path / "run")[1][2] == 2


def test_lightning_alone_trains_the_module():
    config = task()
    module, data = StreamModule(config), StreamDataModule(config)
    before = [p.detach().clone() for p in module.parameters()]
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(max_steps=3, accelerator="cpu", **settings)
        trainer.fit(module, data)
    assert module.cursor == trainer.global_step == 3
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path):
    for groups, message in (
        ({"train": {"sequence_len": 24}}, "a segment .* 12 tokens. must be a multiple of model.ch"),
        ({"train": {"recompute": "token"}}, "recompute"),
        ({"data": {"kind": "text"}}, "admission.* draws a new store"),
        ({"data": {"kind": "text"}, "admission": DEFAULTS}, "needs data.paths"),
        ({"model": {"vocab_size": 16}}, "vocab_size=16 is less than the data's 32"),
        ({"trainer": {"nonsense": 1}}, "unexpected keyword argument 'nonsense'"),
        ({"trainer": {"devices": 2}}, "lanes=3 cannot be dealt to 2 processes"),
        (
            {"trainer": {"devices": 3, "strategy": "ddp_spawn"}},
            "strategy=ddp_spawn does not work here",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(task(**groups), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_what_a_run_leaves_behind(tmp_path):
    result = train(task(), tmp_path / "run")
    assert result["steps"] == 6 and result["resumed_at"] == []
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 3, 4, 6]
    assert [bool(row["val_loss"]) for row in rows] == [False, True, False, True]
    assert [int(row["tokens"]) for row in rows] == [192, 288, 384, 576]
    best = min(range(4), key=lambda i: float(rows[i]["val_loss"] or "inf"))
    assert (
        f"for {rows[best]['step']} steps" in (tmp_path / "run" / "best" / "README.md").read_text()
    )
    model = load_model(tmp_path / "run" / "last")
    saved = end(tmp_path / "run")[0]
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, saved[f"model.{name}"], rtol=1e-3, atol=1e-6)


def test_the_best_model_is_that_of_the_lowest_validation_loss(tmp_path, monkeypatch):
    losses = iter([float("nan"), 2.0, 2.5, 2.2])
    monkeypatch.setattr(StreamModule, "evaluate", lambda *_: ({"loss": next(losses)}, None))
    config = task(train={"steps": 8, "validate_every": 2, "save_every": 4})
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, 5)
        train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert "for 4 steps" in (tmp_path / "run" / "best" / "README.md").read_text()
    assert "for 8 steps" in (tmp_path / "run" / "last" / "README.md").read_text()


def test_the_gradient_ends_where_the_state_was_detached(tmp_path):
    config = text(tmp_path, lengths=(200, 200))
    module, source = StreamModule(config), open_source(config)
    seen = []

    def remember(layer, inputs, output):
        output.retain_grad()
        seen.append(output)

    module.model.embedding.register_forward_hook(remember)
    for number in range(2):
        batch = source.batch(number)
        weight = batch.weight.clone()
        weight[:, :32] = 0  # only the last of the three segments has a loss
        loss = module.training_step(batch._replace(weight=weight), number)
    loss.backward()
    assert len(seen) == 6
    assert all(float(x.grad.abs().sum()) > 0 for x in seen[3:])
    assert all(x.grad is None for x in seen[:3])


def test_segments_of_one_step_equal_steps_of_one_segment(tmp_path):
    long, short = text(tmp_path), text(tmp_path, sequence_len=16, segments_per_step=1)
    torch.manual_seed(1)
    model = StreamModule(long).model.double()
    state = model.init_state(2)
    whole = unroll(model, open_source(long).batch(0), state, never(3), Pool((), 0))
    pieces = []
    for number in range(3):
        read = unroll(model, open_source(short).batch(number), state, never(1), Pool((), 0))
        pieces.append(read.hidden)
        state = read.state
    torch.testing.assert_close(torch.cat(pieces, 1), whole.hidden, rtol=1e-10, atol=1e-10)
    for (name, a), (_, b) in zip(named_tensors(state), named_tensors(whole.state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def test_blind_tokens_are_hidden_from_the_window_and_weighed(monkeypatch):
    config = task(train={"blind_share": 0.3, "blind_weight": 0.5, "window_dropout": 0.3})
    plain, given = task(), {}

    def watched(model, batch, *args):
        given["weight"], given["blind"] = batch.weight, args[-2]
        return unroll(model, batch, *args)

    monkeypatch.setattr(training_module, "unroll", watched)
    losses = []
    for settings in (plain, config):
        torch.manual_seed(0)
        module, batch = StreamModule(settings), open_source(settings).batch(0)
        losses.append(module.training_step(batch, 0))
    drawn = draw_blind(config, 0)
    assert torch.equal(given["blind"], drawn.tokens) and not torch.equal(*losses)
    assert torch.equal(given["weight"], torch.where(drawn.judged, batch.weight / 2, batch.weight))
    assert "loss_blind" in module.means.compute()


def test_recomputing_ends_with_the_same_bits(tmp_path):
    for name in ("none", "chunk", "segment"):
        train(task(train={"recompute": name}), tmp_path / name)
    ends = [end(tmp_path / name) for name in ("none", "chunk", "segment")]
    for tensors, rest in ends[1:]:
        assert [k for k in tensors if not torch.equal(tensors[k], ends[0][0][k])] == []
        assert rest == ends[0][1]


def test_a_document_end_resets_its_lane_and_no_other(tmp_path):
    config = text(tmp_path, lengths=(40, 200), sequence_len=64, segments_per_step=4)
    source = open_source(config)
    model = StreamModule(config).model.double()
    batch = source.batch(0)
    lane = int(batch.reset[:, 3].nonzero())  # 40 tokens are three segments, then a document starts
    assert batch.reset[:, 1:3].sum() == 0 and batch.reset[:, 3].sum() == 1
    with torch.no_grad():
        read = unroll(model, batch, model.init_state(2), never(4), Pool((), 0))
        alone = select(model.init_state(2), torch.tensor([lane]))
        fresh, end, _ = model(batch.tokens[[lane], 48:], alone, head=False)
        other, _, _ = model(batch.tokens[[1 - lane]], model.init_state(1), head=False)
    torch.testing.assert_close(read.hidden[[lane], 48:], fresh, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(read.hidden[[1 - lane]], other, rtol=1e-10, atol=1e-10)
    after = select(read.state, torch.tensor([lane]))
    for (name, a), (_, b) in zip(named_tensors(after), named_tensors(end), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def test_the_carried_state_keeps_its_dtypes_under_autocast(tmp_path):
    config = text(tmp_path)
    module, source = StreamModule(config), open_source(config)
    with torch.autocast("cpu", torch.bfloat16):
        module.training_step(source.batch(0), 0)
    fresh = module.model.init_state(2)
    same = map_state(lambda a, b: torch.tensor(a.dtype == b.dtype), module.state, fresh)
    assert [name for name, equal in named_tensors(same) if not equal] == []
    assert not any(t.requires_grad for _, t in named_tensors(module.state))


def test_validation_changes_nothing_of_the_training():
    config = task()
    module, source = StreamModule(config), open_source(config)
    for number in range(3):
        module.training_step(source.batch(number), number)
    before = module.means.sums.clone(), module.pool, torch.get_rng_state()
    first = module.evaluate(open_source(config, validation=True), 2)
    assert first == module.evaluate(open_source(config, validation=True), 2)
    assert before[0].equal(module.means.sums) and before[1] is module.pool
    assert torch.equal(before[2], torch.get_rng_state()) and module.model.training


def test_a_run_may_start_from_a_trained_model(tmp_path):
    train(task(), tmp_path / "first")
    trained = load_model(tmp_path / "first" / "last").state_dict()
    start = {"start": str(tmp_path / "first" / "last"), "steps": 1}
    train(task(train=start, optim=(still := {"lr": 1e-9, "lr_rest": 1e-9})), tmp_path / "second")
    again = load_model(tmp_path / "second" / "last").state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in again.items())
    sizes = {"window": 24, "fast_layers": [0], "store_layers": [0, 1]}
    sizes["store"] = {"capacity": 24, "hidden": 8, "newer": True}
    train(task(train=start, optim=still, model=MODEL | sizes), tmp_path / "other")
    other = load_model(tmp_path / "other" / "last")
    assert other.config.store.capacity == 24 and other.config.fast_layers == (0,)
    assert other.config.store_layers == (0, 1) != tuple(MODEL["store_layers"])
    assert all(torch.equal(other.state_dict()[n], weight) for n, weight in trained.items())
    with pytest.raises(Refused, match=r"model.mlp_dim is 32 there and 48 here"):
        train(task(train=start, model={"mlp_dim": 48}), tmp_path / "third")
    start["start"], sizes["store"] = str(tmp_path / "other" / "last"), {"hidden": 8}
    with pytest.raises(Refused, match=r"model.store.newer is True there and False here"):
        train(task(train=start, model=MODEL | sizes), tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_the_head_and_the_layers_below_are_taught_from_teach_tokens_on():
    batch_tokens = TASK["train"]["lanes"] * TASK["train"]["sequence_len"]
    admission = {"teach_tokens": batch_tokens, "keep_all_share": 1.0}
    grads = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        module = StreamModule(task(admission={**admission, "weight": weight}))
        source = open_source(module.config)
        for number in range(2):
            module.model.zero_grad()
            module.training_step(source.batch(number), number).backward()
            grads[weight, number] = {n: p.grad for n, p in module.model.named_parameters()}
    head = [name for name in grads[1.0, 0] if ".store." in name]
    assert head and all(grads[1.0, 0][name] is None for name in head)
    assert all(grads[1.0, 1][name].abs().sum() > 0 for name in head)
    below = "embedding.weight"
    assert torch.equal(grads[1.0, 0][below], grads[0.0, 0][below])
    assert not torch.equal(grads[1.0, 1][below], grads[0.0, 1][below])
