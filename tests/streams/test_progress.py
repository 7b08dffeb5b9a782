"""What people see while a stream is read, and the table at its end."""

import io
import math
import shlex
import sys
from pathlib import Path

import pytest

from wakesleep.streams.bar import on_terminal
from wakesleep.streams.console import Console
from wakesleep.streams.progress import (
    LINE_EVERY,
    Progress,
    answered,
    figures,
    progressed,
    time_left,
)
from wakesleep.streams.quantities import count, duration, rounded, size
from wakesleep.streams.results import by_decade, decade_name, final_table, next_command

LINE = {
    "tokens": 1_200_000,
    "tokens_per_second": 11_000.0,
    "bits_per_byte": 1.41234,
    "surprise": 0.426,
    "store_fill": 0.78,
}
SUMMARY = {
    "tokens": 10_000_123,
    "seconds": 861.2,
    "tokens_per_second": 11_612.0,
    "bits_per_byte": 1.3123,
    "peak_rss_bytes": 1_210_000_000,
    "state_bytes": 48_000_000,
    "nonfinite_rows": 0,
    "resumed_at": [],
    "facts": [],
}


def fact(age: int, correct: bool = True, **other) -> dict:
    return {
        "kind": "residence",
        "question": "Where does Ann Reed live?",
        "answer": "Rome",
        "predicted": " Rome" if correct else " Oslo",
        "correct": correct,
        "known": True,
        "age_tokens": age,
        **other,
    }


def table(folder, **other) -> list[str]:
    return final_table(folder, SUMMARY | other).splitlines()


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_has_speed_loss_surprise_and_fill():
    assert progressed(1_200_000, 1e7) == "1.20M of 10.0M tokens, 12 %"
    assert figures(LINE) == "11,000 tokens/s  1.412 bits/byte  surprise 0.43  store 78% full"
    assert time_left(LINE, 1e7) == ["13 min 20 s left"]


def test_what_is_not_known_is_left_out():
    assert progressed(940, math.inf) == "940 tokens"
    assert figures(LINE | {"bits_per_byte": None, "store_fill": None}) == (
        "11,000 tokens/s  surprise 0.43"
    )
    assert time_left(LINE, math.inf) == time_left(LINE | {"tokens_per_second": None}, 1e7) == []


def test_without_a_terminal_there_is_a_plain_line_every_ten_seconds(capsys):
    clock = Clock()
    with Progress(Console(), 1e7, clock) as progress:
        for _ in range(25):
            progress.metrics(LINE)
            clock.now += LINE_EVERY / 8
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err and "\r" not in err
    assert (
        err.splitlines() == [f"{progressed(1_200_000, 1e7)}  {figures(LINE)}  13 min 20 s left"] * 4
    )


def test_quiet_shows_nothing(capsys):
    with Progress(Console(quiet=True), 1e7) as progress:
        progress.metrics(LINE)
        progress.answers(100_000, [fact(99_000)])
    assert capsys.readouterr() == ("", "")


def test_facts_are_shown_as_they_are_asked(capsys):
    with Progress(Console(), 1e7) as progress:
        progress.answers(100_000, [fact(96_000), fact(5_000, False), fact(2_000, predicted="")])
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "asked after 100k tokens: 2 of 3 right"
    assert [line.split("?")[1].strip() for line in rest] == [
        "Rome  (right; 96.0k tokens ago)",
        "Oslo  (wrong, it is Rome; 5.00k tokens ago)",
        "no answer  (right; 2.00k tokens ago)",
    ]


def test_text_of_a_document_stays_text():
    assert "\x1b" not in answered(fact(1, question="Where \x1b[2J is [red]it?"))


def test_the_bar_shows_answers_as_they_are_written(monkeypatch):
    """Brackets are no mark-up, and NO_COLOR is obeyed."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with Progress(Console(), 1e7) as progress:
        progress.metrics(LINE)
        progress.answers(100_000, [fact(96_000, question="Is it [red]here[/red]?")])
    shown = screen.getvalue()
    assert "Is it [red]here[/red]?" in shown
    assert "1.20M of 10.0M tokens, 12 %, 13 min 20 s left" in shown and "1.412 bits/byte" in shown
    assert "\x1b[3" not in shown and "\x1b[9" not in shown


@pytest.mark.parametrize(("term", "bar"), [("dumb", False), ("xterm", True)])
def test_a_bar_needs_a_terminal_that_can_redraw(monkeypatch, term, bar):
    monkeypatch.setattr(sys, "stderr", Screen())
    monkeypatch.setenv("TERM", term)
    assert on_terminal() is bar
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert on_terminal() is False


def test_quantities_read_well_at_every_size():
    values = [0, 999, 1000, 9_994, 9_996, 99_949, 99_951, 999_499, 999_600, 1.2345e6, 1e10]
    assert [count(value) for value in values] == (
        "0 999 1.00k 9.99k 10.0k 99.9k 100k 999k 1.00M 1.23M 10.0G".split()
    )
    assert [rounded(value) for value in (0, 100, 2_500, 1e6, 1e7)] == "0 100 2.5k 1M 10M".split()
    assert [size(value) for value in (12, 1.21e9)] == ["12 B", "1.21 GB"]
    assert [duration(s) for s in (0.4, 61, 3_599.6, 7_300)] == (
        ["0 s", "1 min 1 s", "1 h 0 min", "2 h 1 min"]
    )
    assert (count(math.inf), duration(math.inf)) == ("inf", "?")


def test_ages_fall_into_their_decades():
    facts = [fact(age, age != 1_000) for age in (3, 999, 1_000, 9_999, 10_000, 999_999, 10**6)]
    assert by_decade(facts) == {2: (2, 2), 3: (1, 2), 4: (1, 1), 5: (1, 1), 6: (1, 1)}
    assert [decade_name(power) for power in (2, 3, 5, 6)] == (
        ["under 1k", "1k to 10k", "100k to 1M", "1M to 10M"]
    )


def test_the_table_tells_speed_memory_loss_recall_and_what_is_next(tmp_path):
    (tmp_path / "store.png").touch()
    facts = [fact(2_000, False), fact(3_000), fact(5_000_000, question="?", known=False)]
    lines = table(tmp_path, facts=facts, resumed_at=[8192])
    assert lines[0] == "10.0M tokens read in 14 min 21 s, resumed 1x"
    for words in ("11,612 tokens per second", "1.21 GB", "1.312", "2 of 3 right, 1 of them sure"):
        assert any(words in line for line in lines)
    rows = [line.split() for line in lines]
    assert ["1k", "to", "10k", "1", "2", "50", "%", "#" * 10] in rows
    assert ["1M", "to", "10M", "1", "1", "100", "%", "#" * 20] in rows
    assert ["session", str(tmp_path)] in rows and ["plots", "store.png"] in rows
    assert lines[-1].endswith(f'wakesleep ask {tmp_path} "Where does Ann Reed live?"')


def test_kinds_that_training_holds_out_are_a_row_of_their_own(tmp_path):
    kinds = [("owner", True), ("cargo", False), ("extension", True)]
    facts = [fact(2_000, right, kind=kind) for kind, right in kinds]
    lines = table(tmp_path, facts=facts)
    rows = [line.split() for line in lines]
    assert any("2 of 3 right" in line for line in lines)
    assert ["1k", "to", "10k", "1", "1", "100", "%", "#" * 20] in rows
    assert ["held", "out", "1", "2", "50", "%", "#" * 10] in rows
    assert any("(cargo, extension)" in line for line in lines)
    alone = "\n".join(table(tmp_path, facts=facts[1:]))
    assert "held out" not in alone and "1k to 10k" in alone


def test_the_table_without_facts_or_measured_loss_is_whole(tmp_path):
    lines = table(tmp_path, bits_per_byte=None)
    assert not any("planted" in line or "age in tokens" in line for line in lines)
    assert lines[-1].endswith(f"wakesleep ask {tmp_path}")
    assert "3 rows" in "".join(table(tmp_path, nonfinite_rows=3))


@pytest.mark.parametrize("text", ['$(rm x) "; rm', "a `b`", "back\\slash", "wow! it's"])
def test_a_question_of_a_stranger_is_quoted(tmp_path, text):
    command = next_command(tmp_path, [fact(5, question=text)])
    assert shlex.split(command) == ["wakesleep", "ask", str(tmp_path), text]


def test_an_estimate_that_was_too_low_is_not_exceeded():
    assert progressed(24_600, 20_000) == "24.6k of 24.6k tokens, 100 %"


def test_the_next_command_can_be_pasted(tmp_path):
    folder = tmp_path / "a book"
    assert next_command(folder, []) == f"wakesleep ask '{folder}'"
    assert next_command(Path("-dash"), []) == "wakesleep ask ./-dash"
    long = Path("runs") / ("a" * 250)
    assert next_command(long, []) == f"wakesleep ask {long}"
