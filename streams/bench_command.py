"""`wakesleep bench`: how fast it is on this machine, beside what others have."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wakesleep.streams.console import Console, typed
from wakesleep.streams.stopping import Stopped

if TYPE_CHECKING:
    from wakesleep.streams.bench_cases import Group
    from wakesleep.streams.bench_study import Study

SUMMARY = "time and memory on this machine, beside other libraries; resumable"
FLAGS = ("--output", "--quick", "--again", "--json", "--quiet", "--debug", "--print-config")
FOLDER, QUICK_FOLDER = "runs/bench", "runs/bench-quick"
TELL_EVERY = 5.0  # seconds
BUSY = 0.5  # load of other work, in cores, from which on times mean little


def help_text() -> str:
    return """\
wakesleep bench [--quick] [--output DIR] [key=value ...]

  wakesleep bench --quick                     about a minute, with small sizes
  wakesleep bench                             everything, into runs/bench
  wakesleep bench 'operations=[decode,growth]' longest=10M
  pip install 'wakesleep[bench]'              then also against titans-pytorch

Ours and others take turns, after a check and a warm-up; medians, and peak
memory in a process of its own. What fails its check is not timed: exit code 1.
The same command goes on where it stopped.

  --output DIR   bench.md, bench.json, bench.png; runs/bench, runs/bench-quick
  --again        measure what is there anew     --json  an object, with rows
  --print-config keys, values, their origin     --quiet, --debug

equal in a row: of ours, that it gives what a slow form gives in float64; of
others, that they learn online and decode as they read (check says what).
ratio_to: the row it is compared with, and its speed over that one's.

Keys: operations peers model=DIR repeats warmup tokens positions longest dtype
threads seed (all of them, with their values: --print-config)"""


def run(arguments: argparse.Namespace) -> int:
    """Measure what is left to measure, and report."""
    from wakesleep.streams.bench_config import QUICK, BenchConfig
    from wakesleep.streams.config import as_dict, load_config, to_yaml

    quick = QUICK if arguments.quick else ()
    config, origins = load_config(BenchConfig, None, [*quick, *arguments.items])
    console = Console(json=arguments.json, quiet=arguments.quiet)
    if arguments.print_config:
        data = {"config": as_dict(config), "origins": origins}
        console.result(data, to_yaml(config, origins).rstrip())
        return 0

    from wakesleep.streams.bench_study import Study

    folder = Path(arguments.output or (QUICK_FOLDER if arguments.quick else FOLDER))
    study = Study(folder, config, again=arguments.again)
    again = _again(arguments)
    console.say(f"{len(study.left)} of {len(study.groups)} comparisons to make, into {folder}")
    console.say(f"Ctrl-C stops; go on with: {again}")
    if study.left and (load := _load()) > BUSY:
        console.warn(f"other work keeps {load:.1f} cores busy: times will mean little")
    progress = _Progress(console, len(study.groups))
    try:
        study.carry_out(progress.begun, progress.told)
    except Stopped:
        console.warn(f"stopped; what was measured is saved; go on with: {again}")
        raise
    return _report(study, again, console)


class _Progress:
    """A line for every comparison, and how it gets on if it takes long."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._due = console, total, 0.0

    def begun(self, number: int, group: Group) -> None:
        names = ", ".join(dict.fromkeys(entry.implementation for entry in group.entries))
        head = f"{number + 1} of {self._total}  {group.operation} {group.name}"
        self._console.say(f"{head}: {names}")
        self._due = time.monotonic() + TELL_EVERY

    def told(self, text: str) -> None:
        if time.monotonic() >= self._due:
            self._console.say(f"  {text}")
            self._due = time.monotonic() + TELL_EVERY


def _report(study: Study, again: str, console: Console) -> int:
    """Write the page and the picture, print the table, and return the exit code."""
    from wakesleep.streams.bench_plots import draw_bench
    from wakesleep.streams.bench_report import as_markdown, as_text
    from wakesleep.streams.bench_rows import faults_of
    from wakesleep.ttl.files import write_atomically

    data: dict[str, Any] = study.as_data()
    write_atomically(study.folder / "bench.md", as_markdown(data, again).encode())
    draw_bench(study.folder / "bench.png", data["rows"])
    faults = faults_of(data["rows"])
    words = [as_text(data["rows"]), ""]
    words += [f"page, picture, numbers: {typed(study.folder)}/bench.md, bench.png, bench.json"]
    words += [f"measure anew: {again} --again"]
    console.result(data, "\n".join(words))
    for fault in faults:
        console.warn(fault)
    return 1 if faults else 0


def _again(arguments: argparse.Namespace) -> str:
    words = ["--quick"] if arguments.quick else []
    words += ["--output", arguments.output] if arguments.output else []
    return "wakesleep bench " + shlex.join([*words, *arguments.items])


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
