"""`wakesleep train`: train a model from a recipe."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wakesleep.streams.console import Console, typed
from wakesleep.streams.errors import Refused, TrainingFailed
from wakesleep.streams.quantities import count
from wakesleep.streams.stopping import Stopped

SUMMARY = "train a model from a recipe, resumable"
FLAGS = (
    "--output",
    "--resume",
    "--json",
    "--quiet",
    "--debug",
    "--print-config",
    "--dry-run",
)


def help_text() -> str:
    return """\
wakesleep train RECIPE --output DIR [--resume] [key=value ...]

  wakesleep train configs/mqar.yaml --output runs/mqar
  wakesleep train configs/mqar.yaml --output runs/mqar --resume
  wakesleep train configs/default.yaml --output runs/d optim.lr=1e-3 seed=1
  wakesleep train configs/default.yaml --print-config

RECIPE: a YAML of keys; those under configs/ are installed and found anywhere.

  --output DIR     config.yaml, run.json, metrics.csv, checkpoints/last.ckpt,
                   last/ and best/ (models for model=)
  --resume         go on from the last checkpoint in DIR, bit for bit
  --print-config   keys, values and where they come from; nothing is trained
  --dry-run        check everything, train nothing
  --json           the result as one JSON object on stdout
  --quiet, --debug no progress; tracebacks

Keys: model.* data.* train.* optim.* admission.* seed, and trainer.* for
Lightning's Trainer (trainer.max_steps=60). Counts may be 10k, 1M, 1e6."""


def run(arguments: argparse.Namespace) -> int:
    """Train, or say what would be trained."""
    if not arguments.items:
        raise Refused("train needs a recipe", "", "For example: wakesleep train configs/mqar.yaml")
    recipe = find_recipe(arguments.items[0])
    console = Console(json=arguments.json, quiet=arguments.quiet)
    # read when torch is loaded: of several processes it warns where a step uses all weights
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from wakesleep.streams.config import as_dict, load_config, to_yaml
    from wakesleep.streams.training_config import TrainConfig
    from wakesleep.ttl.flops import flop_table

    config, origins = load_config(TrainConfig, recipe, arguments.items[1:])
    if arguments.print_config:
        data = {"config": as_dict(config), "origins": origins}
        console.result(data, to_yaml(config, origins).rstrip())
        return 0
    if arguments.output is None:
        raise Refused("train needs --output DIR", "", f"For example: --output runs/{recipe.stem}")
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise Refused(f"{output} is no folder", "", "choose another --output")
    steps, tokens = config.total_steps, config.train.lanes * config.train.sequence_len
    plan = f"{steps:,} steps of {count(tokens * config.accumulate)} tokens into {output}"
    prepare = _import_prepare()
    prepared = prepare(config, output, resume=arguments.resume, quiet=arguments.quiet)
    if arguments.dry_run:
        console.say(flop_table(config.model))
        console.result({"steps": steps, "tokens_per_step": tokens, "output": str(output)}, plan)
        return 0
    if not prepared.trainer.is_global_zero:  # of several processes the first one speaks
        try:
            prepared.carry_out()
        except (Stopped, TrainingFailed) as error:
            return int(isinstance(error, TrainingFailed))
        return 0
    again = f"Ctrl-C saves and stops; go on with: {_again(arguments)}"
    console.say(f"{plan}\n{again}\n{flop_table(config.model)}")
    try:
        result = prepared.carry_out()
    except Stopped:
        console.warn(f"stopped and saved; go on with: {_again(arguments)}")
        raise
    console.result(result, _ending(result, output))
    if result["steps"] < steps:
        early = f"a limit of trainer.* ended it before step {steps:,}"
        console.warn(f"{early}; raise that and go on with: {_again(arguments)}")
    return 0


def find_recipe(name: str) -> Path:
    """The file that `name` means: a path, or else one of the recipes that are installed.

    Raises:
        Refused: neither; the nearest name is given.
    """
    if Path(name).is_file():
        return Path(name)
    import difflib
    from importlib.resources import files

    folder = Path(str(files("wakesleep.configs")))
    recipes = {path.name: path for path in sorted(folder.glob("*.yaml"))}
    if Path(name).parent in (Path("."), Path("configs")) and Path(name).name in recipes:
        return recipes[Path(name).name]
    near = difflib.get_close_matches(Path(name).name, recipes, n=1)
    hint = f"; did you mean configs/{near[0]}?" if near else ""
    known = ", ".join(f"configs/{recipe}" for recipe in recipes)
    raise Refused(f"{name}: no such file{hint}", "", f"Installed recipes: {known}")


def _import_prepare() -> Callable[..., Any]:
    """Import Lightning, and say so where a stray torchvision keeps it from loading."""
    try:
        from wakesleep.streams.training import prepare
    except RuntimeError as error:
        from wakesleep.streams.doctor_command import torchvision_clash

        if clash := torchvision_clash():
            raise Refused(*clash.split("; ")) from error
        raise
    return prepare


def _ending(result: dict[str, Any], output: Path) -> str:
    models = " and ".join(
        str(output / name) for name in ("last", "best") if (output / name).is_dir()
    )
    following = f"wakesleep stream DOC model={typed(output / 'last')}"
    if not result["reads_text"]:  # ids that stand for no text
        following = f"wakesleep.ttl.load_model({str(output / 'last')!r}) in Python"
    return f"{result['steps']:,} steps trained; model: {models}\nnext: {following}"


def _again(arguments: argparse.Namespace) -> str:
    words = [*arguments.items, "--output", arguments.output, "--resume"]
    return "wakesleep train " + shlex.join(words)
