"""`wakesleep stream`: read a document into a session, or go on reading."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wakesleep.streams.console import Console, shortened, typed
from wakesleep.streams.errors import Refused
from wakesleep.streams.quantities import count, size
from wakesleep.streams.stopping import Stopped

if TYPE_CHECKING:
    from wakesleep.streams.session import Prepared, Session

SUMMARY = "read a document once and learn from it; goes on where it stopped"
FLAGS = (
    "--session",
    "--config",
    "--again",
    "--json",
    "--quiet",
    "--debug",
    "--print-config",
    "--dry-run",
)


def help_text() -> str:
    return """\
wakesleep stream [DOC] [--session DIR] [key=value ...]

  wakesleep stream                       the bundled document, 10M tokens
  wakesleep stream book.txt              into runs/book; again: goes on or shows
  wakesleep stream notes/ window=128     a folder, as one stream
  wakesleep stream two.txt --session runs/book      append another document
  wakesleep stream --session runs/book              finish what is unfinished

DOC: UTF-8 .txt .md .gz .xz .bz2, .npy of token ids, a folder, or - (stdin).

  --session DIR  where the session lives         --again    read DOC once more
  --config YAML  keys from a file                --dry-run  check, do nothing
  --json         summary as an object on stdout  --quiet    no progress
  --print-config keys, values and their origin   --debug    tracebacks

Keys (left out on a later call: as the session has them)
  limit_tokens=1M   stop there    window=256        tokens of exact short memory
  facts.count=64    plant facts   store.capacity=2k places of exact long memory
  facts.kinds=all   facts.seed=0  save_every=1M     tokens between snapshots
  model=DIR         device=auto   segment_len=2048  tokens per call of the model
  threads=2 seed=0  dtype=auto keep_ids=true        errors=strict encoding=utf-8"""


def run(arguments: argparse.Namespace) -> int:
    """Read what is to be read, show how it goes, and end with the table of the session."""
    from wakesleep.streams.config import flat, load_config
    from wakesleep.streams.stream_config import StreamConfig

    document, overrides = sort_items(arguments.items)
    config, origins = load_config(StreamConfig, arguments.config, overrides)
    given = {key: value for key, value in flat(config).items() if origins[key] != "default"}
    folder = Path(arguments.session) if arguments.session else default_folder(document)
    console = Console(json=arguments.json, quiet=arguments.quiet)
    if arguments.print_config:
        _print_config(folder, arguments.config, overrides, console)
        return 0

    from wakesleep.streams.session import Session

    with Session.open(folder, **given) as session:
        prepared = session.prepare(document, again=arguments.again)
        for note in session.notes:
            console.warn(shortened(note, 300))
        if arguments.dry_run:
            _show_plan(session, prepared, console)
            return 0
        _read(session, prepared, console)
    return 0


def sort_items(items: list[str]) -> tuple[str | None, list[str]]:
    """Tell the document from keys: what exists is a document, whatever it looks like.

    Raises:
        Refused: two documents, or something that is neither.
    """
    documents = [item for item in items if item == "-" or os.path.lexists(item)]
    overrides = [item for item in items if item not in documents]
    for item in overrides:
        if "=" not in item:
            from wakesleep.streams.config import nearest_file

            near = nearest_file(Path(item))
            hint = f"; did you mean {near}?" if near else ""
            raise Refused(f"{item}: no such file{hint}", "", "See wakesleep stream --help")
    if len(documents) > 1:
        raise Refused(
            f"{len(documents)} documents: {', '.join(documents)}",
            "",
            "Give one at a time, or a folder that holds them all",
        )
    return documents[0] if documents else None, overrides


def default_folder(document: str | None) -> Path:
    """runs/NAME for a document called NAME.txt, NAME.txt.xz and so on."""
    if document == "-":
        return Path("runs") / "stdin"
    if document is None:
        return Path("runs") / _bundled("name")
    from wakesleep.streams.documents import KNOWN_SUFFIXES

    path = Path(os.path.abspath(document))
    name = path.name or "root"
    while not path.is_dir() and (suffix := Path(name).suffix).lower() in KNOWN_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path("runs") / (name if name.strip(".") else "document")


def _bundled(what: str) -> str:
    """What `document.json` says of the bundled document."""
    path = Path(__file__).parent / "data" / "document.json"
    return json.loads(path.read_text(encoding="utf-8"))[what]


def _read(session: Session, prepared: Prepared, console: Console) -> None:
    from wakesleep.streams.progress import Progress
    from wakesleep.streams.results import final_table

    console.say(_beginning(session, prepared))
    try:
        with Progress(console, prepared.total_tokens) as progress:
            summary = session.read(prepared, watch=progress)
    except Stopped:
        console.warn(f"stopped; {count(session.tokens)} tokens are saved in {_name(session)}")
        console.warn(f"go on with: {_again(session, prepared)}")
        raise
    if prepared.plan.tasks or _lacks_plots(session.folder):
        _draw(session.folder, console)
    table = final_table(session.folder, summary, session.unpaid_sleep())
    console.result(summary, table)


def _draw(folder: Path, console: Console) -> None:
    """Draw the plots; what was read is safe already, so their failure is no failure."""
    from wakesleep.streams.plots import draw_plots

    try:
        draw_plots(folder)
    except Exception as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        console.warn(f"the plots could not be made: {shortened(why, 200)}")


def _lacks_plots(folder: Path) -> bool:
    """Whether a call ended between its last snapshot and its plots."""
    plot, snapshot = folder / "reading.png", folder / "session.json"
    return not plot.is_file() or plot.stat().st_mtime_ns < snapshot.stat().st_mtime_ns


def _beginning(session: Session, prepared: Prepared) -> str:
    if not prepared.plan.tasks:
        return "all of it was read before; --again reads it once more"
    names = _names(prepared)
    what = names[0] if len(names) == 1 else f"{len(names)} documents from {names[0]} on"
    verb = "reading" if prepared.plan.tasks[0].index is None else "going on with"
    lines = [f"{verb} {shortened(what, 100)}; the session is {_name(session)}"]
    if session.tokens:
        lines[0] += f" with {count(session.tokens)} tokens"
    if prepared.facts:
        lines.append(f"{len(prepared.facts)} facts are planted, to be asked for later")
    lines.append(f"Ctrl-C saves and stops; go on with: {_again(session, prepared)}")
    return "\n".join(lines)


def _names(prepared: Prepared) -> list[str]:
    from wakesleep.streams.planting import BUNDLED

    documents = [task.document for task in prepared.plan.tasks]
    return [_bundled("title") if d.path == BUNDLED else d.name for d in documents]


def _name(session: Session) -> str:
    return shortened(str(session.folder), 200)


def _again(session: Session, prepared: Prepared) -> str:
    source = "- " if prepared.source is None else ""
    return f"wakesleep stream {source}--session {typed(session.folder)}"


def _show_plan(session: Session, prepared: Prepared, console: Console) -> None:
    total = prepared.total_tokens
    plan: dict[str, Any] = {
        "session": str(session.folder),
        "documents": _names(prepared),
        "tokens": session.tokens,
        "total_tokens": round(total) if math.isfinite(total) else None,
        "facts": len(prepared.facts),
        "state_bytes": session.runner.state_bytes,
    }
    names = ", ".join(plan["documents"][:5]) or "nothing, all of it was read before"
    text = (
        f"session    {_name(session)}\n"
        f"to read    {shortened(names, 200)}\n"
        f"tokens     {count(session.tokens)} now, about {count(total)} at the end\n"
        f"facts      {plan['facts']} to plant\n"
        f"state      {size(plan['state_bytes'])}"
    )
    console.result(plan, text)


def _print_config(folder: Path, yaml: str | None, overrides: list[str], console: Console) -> None:
    """Show all keys as a call would use them, with those that the session remembers."""
    from wakesleep.streams.config import as_dict, load_config, to_yaml
    from wakesleep.streams.snapshot import holds_session, read_manifest
    from wakesleep.streams.stream_config import StreamConfig

    session = as_dict(read_manifest(folder).config) if holds_session(folder) else None
    config, origins = load_config(StreamConfig, yaml, overrides, session)
    data = {"config": as_dict(config), "origins": origins}
    console.result(data, to_yaml(config, origins).rstrip())
