"""The `wakesleep` command: which command, which flags, and what the exit code means.

    0 done    1 failed while running    2 refused, nothing changed    130 Ctrl-C    143 SIGTERM

Only the standard library is imported here and at the top of the command modules: `--help` is
there at once, torch is loaded by the command that needs it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from wakesleep.streams import (
    ask_command,
    bench_command,
    doctor_command,
    sleep_command,
    stream_command,
    train_command,
    tune_command,
)
from wakesleep.streams.allocator import restart_with_tuned_malloc
from wakesleep.streams.console import shortened, use_any_encoding
from wakesleep.streams.errors import Refused
from wakesleep.streams.stopping import Stopped, leave_at_signals

COMMANDS = {
    "stream": stream_command,
    "ask": ask_command,
    "sleep": sleep_command,
    "train": train_command,
    "tune": tune_command,
    "bench": bench_command,
    "doctor": doctor_command,
}
HEAVY = {"stream", "ask", "sleep", "train", "tune", "bench"}  # they gain from another allocator
FLAGS = {
    "--session": {"metavar": "DIR"},
    "--output": {"metavar": "DIR"},
    "--config": {"metavar": "YAML"},
    "--workers": {"metavar": "N"},
    "--resume": {"action": "store_true"},
    "--again": {"action": "store_true"},
    "--json": {"action": "store_true"},
    "--quiet": {"action": "store_true"},
    "--debug": {"action": "store_true"},
    "--print-config": {"action": "store_true"},
    "--dry-run": {"action": "store_true"},
    "--quick": {"action": "store_true"},
}
LEADS = ("wakesleep: ", "  ", "  ")  # of the lines of a message: there are no more
LINE_WIDTH = 300  # a path or a message of somebody else's may be endless


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; without `argv`, that of the process."""
    use_any_encoding()
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    if name in ("", "-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"wakesleep {_version()}")
        return 0
    try:
        arguments = parse(words)
        if arguments is None:
            return 0
        if argv is None:
            leave_at_signals()
            if name in HEAVY:
                restart_with_tuned_malloc()
        return COMMANDS[name].run(arguments)
    except BaseException as error:
        return _report(error, debug="--debug" in words)


def overview() -> str:
    """Examples, and the commands with a line each."""
    lines = [f"  {name:<8}{module.SUMMARY}" for name, module in COMMANDS.items()]
    return "\n".join(
        [
            "wakesleep COMMAND [DOC or DIR] [--flag] [key=value ...]",
            "",
            "  wakesleep stream                 the bundled document, ten million tokens",
            "  wakesleep stream limit_tokens=500k --session runs/short    a part of it",
            "  wakesleep stream book.txt        your own text, into runs/book",
            '  wakesleep ask runs/book "Where does Ann Reed live?"',
            "",
            "A language model that keeps learning while it reads, in bounded memory.",
            "",
            *lines,
            "",
            "Examples, flags and keys of a command:  wakesleep COMMAND --help",
        ]
    )


def parse(words: Sequence[str]) -> argparse.Namespace | None:
    """Parse a command line; print the help where it asks for that and return None.

    Raises:
        Refused: no such command or flag.
    """
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise Refused(f"{name}: no such command{hint}", remedy="Commands: wakesleep --help")
    parser = _Parser(prog=f"wakesleep {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("items", nargs="*")
    for flag in COMMANDS[name].FLAGS:
        parser.add_argument(flag, **FLAGS[flag])
    arguments = parser.parse_intermixed_args(rest)
    if arguments.help:
        print(COMMANDS[name].help_text())
        return None
    return arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse in our three lines; say where an unknown flag belongs or which one is meant."""
        command = self.prog.rpartition(" ")[2]
        head, _, unknown = message.partition("unrecognized arguments: ")
        flag = unknown.split(" ")[0].partition("=")[0]
        if head or not flag:
            raise Refused(message, remedy=f"See {self.prog} --help")
        owners = [name for name, module in COMMANDS.items() if flag in module.FLAGS]
        near = difflib.get_close_matches(flag, COMMANDS[command].FLAGS, n=1)
        hint = f", which is for {', '.join(owners)}" if owners else ""
        hint = hint or (f"; did you mean {near[0]}?" if near else "")
        raise Refused(
            f"{command} has no flag {flag}{hint}", remedy=f"Flags and keys: {self.prog} --help"
        )


def _report(error: BaseException, debug: bool) -> int:
    """Say on stderr how the command ended, in at most three lines, and return the exit code."""
    if isinstance(error, Stopped):
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if debug:
        traceback.print_exception(error)
    refused = isinstance(error, ValueError)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if not refused:
        lines = [f"failed: {_in_words(error)}", *lines[1:]]
        lines.append("--debug shows where.")
    for lead, line in zip(LEADS, lines, strict=False):
        print(lead + shortened(line, LINE_WIDTH), file=sys.stderr)
    return 2 if refused else 1


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, RuntimeError) and first:
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _version() -> str:
    from importlib.metadata import version

    return version("wakesleep")
