"""`wakesleep tune`: which setting is worth its compute."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from wakesleep.streams.console import Console, typed
from wakesleep.streams.errors import Refused
from wakesleep.streams.stopping import Stopped
from wakesleep.streams.train_command import find_recipe

SUMMARY = "find out which setting is worth its compute, resumable"
FLAGS = ("--output", "--workers", "--json", "--quiet", "--debug", "--print-config", "--dry-run")


def help_text() -> str:
    return """\
wakesleep tune YAML --output DIR [--workers N] [key=value ...]

  wakesleep tune configs/tune.yaml --output runs/tune
  wakesleep tune configs/tune.yaml --output runs/t tokens=100k trials=6
  wakesleep tune my.yaml --output runs/mine --workers 4
  wakesleep stream book.txt --config runs/tune/cheaper.yaml

Reads a part of a document with each setting, asks for what was planted in it,
and says what compute buys. The same command goes on where it stopped; others
with the same DIR, on this machine or another, share the work.

  --output DIR   table.md, compute.png, ratio.png, results.json, and settings:
                 best.yaml (highest goal), cheaper.yaml (least compute as good
                 as the first), better.yaml (best for the first's compute)
  --workers N    processes; threads are shared out among them
  --print-config keys, values, their origin   --dry-run  check, measure nothing
  --json         results as an object         --quiet, --debug

Keys: search.KEY=A,B,C (a key of stream; the first value is compared with)
stream.KEY=VALUE document tokens questions seeds trials goal most_state_bytes
model=PATH device=auto|cpu|cuda|mps dtype=auto|float32|bfloat16 threads=N seed=S"""


def run(arguments: argparse.Namespace) -> int:
    """Measure what is left to measure, and report."""
    if not arguments.items:
        raise Refused("tune needs a YAML", "", "For example: wakesleep tune configs/tune.yaml")
    recipe = find_recipe(arguments.items[0])
    console = Console(json=arguments.json, quiet=arguments.quiet)

    from wakesleep.streams.config import as_dict, load_config, to_yaml
    from wakesleep.streams.tune_config import TuneConfig

    config, origins = load_config(TuneConfig, recipe, _lists(arguments.items[1:]))
    if arguments.print_config:
        data = {"config": as_dict(config), "origins": origins}
        console.result(data, to_yaml(config, origins).rstrip())
        return 0
    if arguments.output is None:
        raise Refused("tune needs --output DIR", "", "For example: --output runs/tune")
    workers, folder = _workers(arguments.workers), Path(arguments.output)
    _need_optuna()

    from wakesleep.streams.tune_progress import Trials
    from wakesleep.streams.tune_report import as_data, conclusions
    from wakesleep.streams.tune_study import Study

    study = Study(folder, config, workers)
    if arguments.dry_run:
        console.result({"settings": study.wanted, "output": str(folder)}, study.plan())
        return 0
    study.begin()
    console.say(study.plan())
    console.say("Ctrl-C saves and stops; the same command goes on")
    try:
        with Trials(console, config.tokens) as trials:
            left = study.carry_out(trials, quiet=console.quiet)
    except Stopped:
        console.warn(f"stopped and saved; go on with: {_again(arguments)}")
        raise
    if left:
        words = f"others are still at {left} of {study.wanted} settings"
        data = {"settings": study.wanted, "measured": len(study.results)}
        console.result(data, f"{words}; once they are done, this reports: {_again(arguments)}")
        return 0
    report, files = study.report()
    pictures = ", ".join(path.name for path in files if path.suffix == ".png")
    words = [*conclusions(config, report), f"table and pictures: {folder / 'table.md'}, {pictures}"]
    words.append(f"next: wakesleep stream DOC --config {typed(folder / 'cheaper.yaml')}")
    console.result(as_data(report), "\n".join(words))
    return 0


def _lists(overrides: list[str]) -> list[str]:
    """The overrides with search.KEY=A,B as the list that it means, search.KEY=[A,B]."""
    texts = []
    for text in overrides:
        key, equals, value = text.partition("=")
        listed = key.startswith("search.") and equals and not value.startswith("[")
        texts.append(f"{key}=[{value}]" if listed else text)
    return texts


def _workers(text: str | None) -> int:
    if text is None:
        return 1
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise Refused(f"--workers {text}: expected a whole number from 1 to 256")
    return int(text)


def _need_optuna() -> None:
    import importlib.util

    if importlib.util.find_spec("optuna") is None:
        raise Refused(
            "tune needs Optuna, which is not installed", "", "pip install 'wakesleep[optuna]'"
        )


def _again(arguments: argparse.Namespace) -> str:
    words = [*arguments.items, "--output", arguments.output]
    words += ["--workers", arguments.workers] if arguments.workers else []
    return "wakesleep tune " + shlex.join(words)
