"""Two processes train what one trains, and each goes on with what the other left."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from wakesleep.streams.config import load_config, to_yaml
from wakesleep.streams.errors import Refused
from wakesleep.streams.ranks import Ranks
from wakesleep.streams.training import StreamModule, prepare, train
from wakesleep.streams.training_config import OptimConfig, TrainConfig
from wakesleep.ttl.model_io import load_model

CLOSE = {"rtol": 0, "atol": 2e-6}  # float32: sums over lanes are taken in another order
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
STEP = {"steps": 6, "lanes": 4, "sequence_len": 64, "segments_per_step": 2, "save_every": 2}
# a stable rate does not depend on how many steps there will be
OPTIM = {"warmup": 2, "schedule": "stable", "decay": 0.0}


def recall(tmp_path) -> dict:
    """Everything that ranks share: distractors, memories of other lanes, taught admission."""
    return {
        "model": MODEL,
        "data": {"kind": "mqar", "mqar": {"pairs": 4, "queries": 4, "vocab_size": 32}},
        "train": {**STEP, "validate_every": 3, "validation_batches": 1, "blind_share": 0.1},
        "optim": OPTIM,
        "admission": {
            "capacities": [4, 8],
            "keep_all_share": 0.5,
            "distractor_share": 0.7,
            "distractor_pool": 16,
            "rank_max": 64,
        },
    }


def text(tmp_path) -> dict:
    """Lanes in the middle of documents."""
    rng = np.random.default_rng(0)
    for number, length in enumerate((50, 21, 90, 40, 200)):
        np.save(tmp_path / f"{number}.npy", rng.integers(0, 32, length))
    data = {"kind": "text", "paths": [str(tmp_path)]}
    return {"model": MODEL, "data": data, "train": STEP, "optim": OPTIM}


def one(layer: dict, folder: Path, *, resume: bool = False) -> None:
    train(load_config(TrainConfig, overrides=layer | {"threads": 1})[0], folder, resume=resume)


def two(layer: dict, folder: Path, *more: str) -> subprocess.CompletedProcess:
    """Train with the command, in two processes."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(to_yaml(load_config(TrainConfig, overrides=layer | {"threads": 1})[0]))
    command = [str(Path(sys.executable).with_name("wakesleep")), "train", str(recipe)]
    arguments = [*command, "--output", str(folder), "trainer.devices=2", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)


def saved(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_close(a: dict, b: dict) -> None:
    """Weights, what the lanes carry and what waits for them."""
    mine, theirs = ({**x["state_dict"], **(x["wakesleep"]["state"] or {})} for x in (a, b))
    pools = [x["wakesleep"]["pool"] for x in (a, b)]
    pasts = [x["wakesleep"]["pasts"] or {} for x in (a, b)]
    torch.testing.assert_close(mine, theirs, **CLOSE)
    torch.testing.assert_close(pools[0], pools[1], **CLOSE)
    torch.testing.assert_close(pasts[0], pasts[1], **CLOSE)
    assert a["wakesleep"]["pool_written"] == b["wakesleep"]["pool_written"]


@pytest.mark.parametrize("make", [recall, text])
def test_two_processes_train_what_one_does_and_one_goes_on_with_it(make, tmp_path):
    layer = make(tmp_path)
    run = two(layer, tmp_path / "run", "trainer.max_steps=3")
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 2  # one process speaks
    one({**layer, "trainer": {"max_steps": 3}}, tmp_path / "single")
    assert_close(saved(tmp_path / "run"), saved(tmp_path / "single"))

    one(layer, tmp_path / "run", resume=True)
    one(layer, tmp_path / "whole")
    assert_close(saved(tmp_path / "run"), saved(tmp_path / "whole"))


def test_two_processes_go_on_with_what_one_left(tmp_path):
    """And then with what two have left."""
    layer = text(tmp_path)
    one({**layer, "trainer": {"max_steps": 2}}, tmp_path / "run")
    for steps in (4, 6):
        run = two(layer, tmp_path / "run", "--resume", f"trainer.max_steps={steps}")
        assert run.returncode == 0, run.stderr
    one(layer, tmp_path / "whole")
    assert_close(saved(tmp_path / "run"), saved(tmp_path / "whole"))


def test_a_run_made_longer_goes_on_at_the_rate_of_its_new_length(tmp_path, monkeypatch):
    layer = {**text(tmp_path), "optim": {"warmup": 1}}
    one({**layer, "trainer": {"max_steps": 3}}, tmp_path / "run")
    rates, original = [], StreamModule.training_step

    def step(self, batch, batch_idx):
        rates.append(self.optimizers().param_groups[0]["lr"])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(StreamModule, "training_step", step)
    one(layer, tmp_path / "run", resume=True)
    optim = OptimConfig(warmup=1)
    assert rates == pytest.approx([optim.lr * optim.rate(step, 6) for step in (3, 4, 5)])


def test_a_twin_without_parts_starts_with_the_weights_of_the_rest(tmp_path):
    layer = recall(tmp_path)
    one({**layer, "trainer": {"max_steps": 1}}, tmp_path / "full")
    start = {"train": {**STEP, "start": str(tmp_path / "full" / "last")}}
    bare = {**layer, **start, "model": {**MODEL, "memory_layers": [], "store_layers": []}}
    config = load_config(TrainConfig, overrides={**bare, "admission": {}})[0]
    twin = prepare(config, tmp_path / "twin").module.model.state_dict()
    full = load_model(tmp_path / "full" / "last").state_dict()
    assert len(twin) < len(full)
    for name, weight in twin.items():
        assert weight.equal(full[name])
    both = {**layer, **start, "model": {**MODEL, "memory_layers": [0, 1]}}
    more = load_config(TrainConfig, overrides=both)[0]
    with pytest.raises(Refused, match="memory_layers"):
        prepare(more, tmp_path / "more")


def test_lanes_are_dealt_without_overlap():
    lanes = torch.arange(6)
    dealt = [Ranks(rank, 3).mine(lanes) for rank in range(3)]
    assert torch.cat(dealt).equal(lanes)
    assert {len(part) for part in dealt} == {2}


def test_lanes_that_cannot_be_dealt_evenly_are_refused():
    with pytest.raises(Refused, match="lanes=4 cannot be dealt to 3 processes"):
        Ranks(0, 3).check(4)
    with pytest.raises(Refused, match="lanes=1 cannot be dealt to 2 processes"):
        Ranks(0, 2).check(1)


def test_alone_one_has_the_first_word():
    assert Ranks().first("step 3") == "step 3" and Ranks().first("") == ""
