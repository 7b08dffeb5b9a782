"""Ask finished sessions what they still know, in several conditions, and write tables of recall.

    python scripts/recall_table.py runs/full runs/window --output runs/recall
    python scripts/recall_table.py runs/valid --output runs/known --threshold MODEL/known.json

A session has to hold planted facts (`wakesleep stream facts.count=256 ...`); it is only read. All
its facts are asked, and as many questions about things of which nothing was said. OUTPUT gets
`recall.md`, the same numbers in `recall.json` with 95 % Wilson intervals, and `answers/` with every
answer, a file per session and condition: a call that was stopped goes on behind the last of them.
What the conditions mean is in `recall_conditions.py` and in the table.

With `--threshold`, sessions of `validation_session.py` are asked as they are, and FILE gets the
confidence from which on an answer of their model counts as known: the one with the best balanced
accuracy, where right answers should be known, and wrong ones and all about nothing should not.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bm25 import PASSAGE
from recall_conditions import AS_READ, MEANING, conditions_of, given_for
from recall_rows import GROUPS, markdown, rows_of

from wakesleep.streams.errors import Refused
from wakesleep.streams.facts import Fact, make_facts, make_unplanted, parse_kinds
from wakesleep.streams.manifest import Manifest, PlantedFact
from wakesleep.streams.planting import ask_facts
from wakesleep.streams.prompts import statement_ids
from wakesleep.streams.quantities import count, duration
from wakesleep.streams.runner import capacity_of
from wakesleep.streams.session import Session
from wakesleep.ttl.files import write_atomically

FIRST_NOTE, NOTE_EVERY = 2.0, 10.0  # seconds until progress is told, and told again


def questions_of(manifest: Manifest) -> tuple[list[PlantedFact], str]:
    """All facts that a session was told, then as many questions about nothing; and their split.

    Questions about nothing have no statements, and the right answer to them is none.

    Raises:
        Refused: the session has no facts or is not finished, or they cannot be drawn again.
    """
    if not manifest.facts:
        raise Refused("the session has no planted facts", "", "stream with facts.count=N")
    if not all(record.finished for record in manifest.documents):
        raise Refused("the session is not finished", "", "wakesleep stream --session DIR")
    facts, split = _drawn_again(manifest)
    options = manifest.config.facts
    unplanted = make_unplanted(facts, options.seed, parse_kinds(options.kinds), split)
    told = [f for f in manifest.facts if f.positions[-1] < manifest.tokens]
    now = (manifest.tokens,)  # for the age, 0, of what was never said
    nothing = [
        PlantedFact(kind=f.kind, statements=(), positions=now, question=f.question, answer="")
        for f in unplanted
    ]
    return told + nothing, split


def _drawn_again(manifest: Manifest) -> tuple[list[Fact], str]:
    """The facts of a session with what they are about, and the split that they are of."""
    options = manifest.config.facts
    for split in ("test", "validation"):
        facts = make_facts(options.count, options.seed, parse_kinds(options.kinds), split)
        if [f.statements for f in facts] == [f.statements for f in manifest.facts]:
            return facts, split
    raise Refused("another version has drawn the session's facts", "", "stream it again")


def ask_all(
    session: Session, condition: str, questions: Sequence[PlantedFact], name: str
) -> list[dict[str, Any]]:
    """Ask everything in one condition: rows of `ask_facts`, with `planted` and, of bm25, `found`.

    A fact is found if a passage has all of its last statement.
    """
    given = given_for(condition, session, [fact.question for fact in questions])
    tokenizer = session.language_model.tokenizer
    answers = []
    for fact in tracked(questions, f"{name}, {condition}"):
        language_model, state, starts = next(given)
        row = ask_facts(language_model, state, [fact], session.tokens)[0]
        row["planted"] = bool(fact.statements)
        if starts is not None and fact.statements:
            first = fact.positions[-1]
            end = first + len(statement_ids(tokenizer, fact.statements[-1]))
            row["found"] = any(start <= first and end <= start + PASSAGE for start in starts)
        answers.append(row)
    return answers


def tracked(items: Sequence[Any], what: str) -> Iterator[Any]:
    """Yield all items, and tell people how far it is if it takes its time."""
    begin = time.monotonic()
    due = begin + FIRST_NOTE
    for index, item in enumerate(items):
        now = time.monotonic()
        if now >= due:
            left = duration((now - begin) / max(1, index) * (len(items) - index))
            text = f"{what}: {index} of {len(items)} questions, {left} left"
            print(text, file=sys.stderr, flush=True)
            due = now + NOTE_EVERY
        yield item


def remembered(path: Path, made_of: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The answers that an earlier call wrote, None if there are none for this very session."""
    if not path.exists():
        return None
    saved = json.loads(path.read_text("utf-8"))
    return saved["answers"] if saved["made_of"] == made_of else None


def write_json(path: Path, data: Any) -> None:
    """Replace a file; after a crash it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def answers_of(
    session: Session,
    name: str,
    questions: Sequence[PlantedFact],
    conditions: Sequence[str],
    folder: Path,
) -> dict[str, list[dict[str, Any]]]:
    """Every answer of a session by condition; those that are in `folder` are not asked again."""
    made_of = {
        "state_sha256": session.manifest.state_sha256,
        "model_sha256": session.language_model.model_sha256,
        "known_threshold": session.language_model.known_threshold,
        "window": session.language_model.model.window_of(session.runner.state),
        "capacity": capacity_of(session.runner.state),
    }
    answers = {}
    for condition in conditions:
        path = folder / f"{name}.{condition.replace(' ', '-')}.json"
        found = remembered(path, made_of)
        if found is None:
            found = ask_all(session, condition, questions, name)
            write_json(path, {"made_of": made_of, "answers": found})
        answers[condition] = found
    return answers


def described(session: Session, name: str) -> dict[str, Any]:
    """What a session is, for the head of the tables."""
    model, state = session.language_model.model, session.runner.state
    return {
        "session": name,
        "tokens": session.tokens,
        "facts": len(session.manifest.facts),
        "bits_per_byte": session.manifest.meters.total.bits_per_byte,
        "window": model.window_of(state),
        "store_capacity": capacity_of(state),
        "memory_layers": sum(block.memory is not None for block in state.blocks),
        "known_threshold": session.language_model.known_threshold,
        "model_sha256": session.language_model.model_sha256,
    }


def choose_threshold(answers: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The least confidence of a known answer, and the balanced accuracy that it gives.

    Raises:
        Refused: all answers are right, or none is.
    """
    sure = np.array([row["confidence"] if row["predicted"] else -1.0 for row in answers])
    right = np.array([row["planted"] and row["correct"] for row in answers])
    if right.all() or not right.any():
        raise Refused(f"{right.sum()} of {len(right)} answers are right: nothing to tell apart")
    levels = np.unique(sure[sure >= 0])
    candidates = [0.0, *((levels[:-1] + levels[1:]) / 2), 1.0]
    accuracy = [((sure[right] >= t).mean() + (sure[~right] < t).mean()) / 2 for t in candidates]
    best = max(range(len(candidates)), key=lambda i: (accuracy[i], candidates[i]))
    return float(candidates[best]), float(accuracy[best])


def ask_sessions(
    folders: Sequence[Path], keys: Sequence[str], output: Path, to_choose: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Ask all sessions: their heads, the rows of the tables, and all answers to them as read.

    Args:
        keys: `key=value` texts for `Session.load`.
        to_choose: ask them as they are alone, and only if a threshold may be chosen by them.

    Raises:
        Refused: a session cannot be asked, or a threshold not be chosen by it.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise Refused(f"the sessions need names that differ: {', '.join(names)}")
    heads, rows, as_read = [], [], []
    for folder, name in zip(folders, names, strict=True):
        session = Session.load(folder, keys)
        questions, split = questions_of(session.manifest)
        head = described(session, name) | {"split": split}
        if to_choose and split != "validation":
            raise Refused(f"{name} has facts of the {split} split: nothing may be chosen by them")
        if to_choose and heads and head["model_sha256"] != heads[0]["model_sha256"]:
            raise Refused(f"{names[0]} and {name} are of two models: each has its own threshold")
        conditions = [AS_READ] if to_choose else conditions_of(session)
        answers = answers_of(session, name, questions, conditions, output / "answers")
        for condition, found in answers.items():
            rows += rows_of(name, condition, found, split)
        heads.append(head)
        as_read += answers[AS_READ]
    return heads, rows, as_read


def main() -> None:
    """Read the command line, ask, count and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("items", nargs="+", help="folders of sessions; threads=N device=NAME")
    parser.add_argument("--output", required=True, type=Path, help="folder")
    parser.add_argument("--threshold", type=Path, metavar="FILE", help="known.json to write")
    args = parser.parse_args()
    keys = [item for item in args.items if "=" in item and not Path(item).exists()]
    folders = [Path(item) for item in args.items if item not in keys]
    try:
        heads, rows, as_read = ask_sessions(folders, keys, args.output, bool(args.threshold))
        threshold, accuracy = choose_threshold(as_read) if args.threshold else (None, None)
    except Refused as refusal:
        parser.exit(2, f"{refusal}\n")
    command = shlex.join(["python", "scripts/recall_table.py", *sys.argv[1:]])
    meanings = {name: MEANING[name] for name in dict.fromkeys(row["condition"] for row in rows)}
    data = {"command": command, "sessions": heads, "conditions": meanings, "groups": GROUPS}
    write_json(args.output / "recall.json", data | {"rows": rows})
    text = "\n".join([f"# Recall\n\nMade by `{command}`.\n", *_heads(heads), "", ""])
    write_atomically(args.output / "recall.md", (text + markdown(rows, meanings)).encode())
    print(f"{args.output / 'recall.md'}: {len(heads)} sessions, {len(rows)} rows")
    if threshold is not None:
        write_json(args.threshold, {"known_threshold": threshold})
        print(f"{args.threshold}: {threshold:.4f}, balanced accuracy {accuracy:.3f}")


def _heads(heads: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| session | tokens | facts | bits per byte | window | store | memories | model |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---|")
    for head in heads:
        loss = head["bits_per_byte"]
        loss = "" if loss is None else f"{loss:.3f}"
        cells = [head["session"], count(head["tokens"]), str(head["facts"]), loss]
        cells += [str(head["window"]), str(head["store_capacity"] or "none")]
        cells += [str(head["memory_layers"]), head["model_sha256"][:12]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
