"""`wakesleep train`: train a model from a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from wakesleep.streams.console import Console
from wakesleep.streams.errors import Refused

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

    from wakesleep.streams.config import as_dict, load_config, to_yaml
    from wakesleep.streams.training_config import TrainConfig

    config, origins = load_config(TrainConfig, recipe, arguments.items[1:])
    if arguments.print_config:
        data = {"config": as_dict(config), "origins": origins}
        console.result(data, to_yaml(config, origins).rstrip())
        return 0
    if arguments.output is None:
        raise Refused("train needs --output DIR", "", "For example: --output runs/" + recipe.stem)

    from wakesleep.streams.training import train

    result = train(config, Path(arguments.output), resume=arguments.resume)
    console.result(result, "")
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
