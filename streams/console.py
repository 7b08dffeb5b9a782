"""What a command shows: results on stdout, everything else for people on stderr."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from wakesleep.streams.errors import printable


class Console:
    """Two outlets; with --json, stdout gets one object and people read stderr."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def say(self, text: str = "") -> None:
        """Tell people something on the way; --quiet leaves it out."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Tell people something that --quiet does not leave out."""
        print(text, file=sys.stderr, flush=True)

    def result(self, data: dict[str, Any], text: str) -> None:
        """Give the command's result: `data` to programs, `text` to people."""
        if self.json:
            self.say(text)
            print(json.dumps(data, allow_nan=False), flush=True)  # ASCII: no encoding spoils it
        else:
            print(text, flush=True)


def shortened(text: str, limit: int) -> str:
    """Text of a document on one line of at most `limit` characters, with escapes for controls."""
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def typed(path: Path | str) -> str:
    """A path as it is typed in a command: quoted, and no flag."""
    text = printable(str(path))
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def use_any_encoding() -> None:
    """Print what the terminal's encoding lacks as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
