"""`wakesleep ask`: put a question, or several, to what a session has read."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from wakesleep.streams.console import Console, shortened
from wakesleep.streams.errors import Refused
from wakesleep.streams.quantities import count

SUMMARY = "ask what a session has read; without a question, a prompt"
FLAGS = ("--json", "--quiet", "--debug")
PASSAGES = 3  # shown to people; --json has all
PASSAGE_WIDTH = 100  # characters
KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*=\S*")  # a question has spaces, and no such beginning


def help_text() -> str:
    return f"""\
wakesleep ask DIR ["QUESTION"] [--json] [key=value ...]

  wakesleep ask runs/book "What is the pass code of the amber gate?"
  wakesleep ask runs/book "Where does Ann Reed live?" --json
  wakesleep ask runs/book                 a prompt: many questions, one load

Answers come from the session's state alone, with the passages that were read
for them. A stream may go on writing; its last snapshot is asked.

The shipped model can answer questions like
{_kinds()}
To other questions it returns passages only.

  --json   {{question, answer, confidence, known, tokens, passages}} on stdout
  --quiet, --debug   the answer without passages; tracebacks
Keys: device=auto|cpu|cuda|mps threads=N"""


def run(arguments: argparse.Namespace) -> int:
    """Answer one question, or those that are typed until the end of input."""
    folder, question, overrides = _sort(arguments.items)
    console = Console(json=arguments.json, quiet=arguments.quiet)
    if console.json and question is None:
        raise Refused("--json needs a question", "", 'wakesleep ask DIR "question" --json')

    from wakesleep.streams.session import Session

    session = Session.load(folder, overrides)
    if question is not None:
        _answer(session, question, console)
        return 0
    _prompt(session, console)
    return 0


def answer_text(answer: dict[str, Any], with_passages: bool = True) -> str:
    """An answer for people: the text, how sure it is, and where it was read."""
    text, sure = shortened(answer["answer"], 300), f"confidence {answer['confidence']:.2f}"
    if answer["known"]:
        lines = [f"{text}   ({sure})"]
    else:
        guess = f"; a guess: {text}" if text else ""
        lines = [f"not known   ({sure}{guess})"]
    if with_passages:
        for passage in answer["passages"][:PASSAGES]:
            text = shortened(passage["text"].strip(), PASSAGE_WIDTH)
            lines.append(f"  at {count(passage['position']):>6}  {text}")
    return "\n".join(lines)


def _sort(items: list[str]) -> tuple[str, str | None, list[str]]:
    """Tell apart the folder, the question and the keys."""
    if not items:
        raise Refused("ask needs the folder of a session", "", 'wakesleep ask DIR "question"')
    folder, *rest = items
    overrides = [item for item in rest if KEY.fullmatch(item)]
    questions = [item for item in rest if not KEY.fullmatch(item)]
    if len(questions) > 1:
        raise Refused(
            f"{len(questions)} questions at once", "", 'Put the question in quotes: "Where ...?"'
        )
    return folder, questions[0] if questions else None, overrides


def _answer(session: Any, question: str, console: Console) -> None:
    answer = session.ask(question)._asdict()
    console.result(answer, answer_text(answer, with_passages=not console.quiet))


def _prompt(session: Any, console: Console) -> None:
    """Read questions from stdin, a line each; an empty one is passed over."""
    interactive = sys.stdin.isatty()
    if interactive:
        console.say("Ask; an empty line or Ctrl-D ends.")
    while True:
        if interactive:
            print("? ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or (interactive and not line.strip()):
            return
        if not line.strip():
            continue
        try:
            _answer(session, line.strip(), console)
        except Refused as refusal:  # too long a question is no reason to load everything again
            console.warn(str(refusal))


def _kinds() -> str:
    """One question of every kind that the shipped model was trained to answer."""
    from wakesleep.streams.families import FAMILIES, TRAINED_KINDS

    questions = {
        FAMILIES[kind].questions[0].format(e=FAMILIES[kind].entity.upper())
        for kind in TRAINED_KINDS
    }
    return "\n".join(f"  {question}" for question in sorted(questions))
