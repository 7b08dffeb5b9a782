"""`wakesleep sleep` as it is typed: what it prints, changes, and refuses."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from wakesleep.streams import session as sessions
from wakesleep.streams import summary as summaries
from wakesleep.streams.cli import main
from wakesleep.streams.progress import Progress
from wakesleep.streams.session import Session
from wakesleep.streams.stopping import StopSignals


@pytest.fixture
def read(tmp_path, sleeper, text) -> str:
    """A session that was read and has never slept."""
    with Session.open(tmp_path / "s", sleeper, segment_len=128, threads=1) as session:
        session.read(text)
    return str(tmp_path / "s")


def summary(folder: str) -> dict:
    return json.loads(Path(folder, "summary.json").read_text())


def spent(values: dict) -> int:
    return sum(values[f"{name}_flops"] for name in ("sleep", "gate", "wasted"))


def test_the_folder_may_stand_behind_the_keys(read, capsys):
    assert main(["sleep", "sleep.budget=10", read]) == 0
    assert "slept nothing: a sleep here takes" in capsys.readouterr().out


def test_a_session_at_rest_is_slept_over_and_says_what_came_of_it(read, capsys):
    assert main(["sleep", read, "sleep.budget=1e9", "sleep.tail_loss=9"]) == 0
    out, err = capsys.readouterr()
    assert "pairs written" in out and "places freed" in out and f"wakesleep ask {read}" in out
    assert "slept after" in err and "Ctrl-C keeps" in err
    told = summary(read)
    assert told["sleeps"] == len(told["sleep_log"]) >= 2
    assert 0 < spent(told) <= 1e9
    assert sum(row["released"] for row in told["sleep_log"]) > 0
    assert told["offline_ratio"] == 0  # it does not sleep while it reads
    assert told["granted_flops"] == spent(told)
    assert main(["ask", read, "What is the pass code of the amber gate?", "--json"]) == 0


def test_json_is_one_object_whose_sums_are_the_summarys(read, capsys):
    assert main(["sleep", read, "sleep.budget=1e9", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    told = summary(read)
    assert result["sleeps"] == told["sleep_log"]
    for name in ("sleep_flops", "gate_flops", "wasted_flops"):
        assert result[name] == told[name]


def test_a_second_call_goes_on_and_stays_within_its_own_budget(read, capsys):
    parts = []
    for _ in range(2):
        assert main(["sleep", read, "sleep.budget=26M", "sleep.tail_loss=9", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        parts.append(spent(result))
        assert 0 < parts[-1] <= 26_000_000
    assert sum(parts) == spent(summary(read))


def test_ctrl_c_keeps_what_was_finished_and_says_so_everywhere(read, capsys, monkeypatch):
    stop, slept = StopSignals(), Progress.slept

    def stopping(self, line):
        slept(self, line)
        stop.number = signal.SIGINT

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "StopSignals", lambda: stop)
        patch.setattr(Progress, "slept", stopping)
        words = ["sleep", read, "sleep.budget=1e9", "sleep.tail_loss=9"]
        assert main(words) == 130
    meters, told = json.loads(Path(read, "session.json").read_text())["meters"], summary(read)
    assert meters["sleeps"] == told["sleeps"] == len(told["sleep_log"]) == 1
    left = 1_000_000_000 - spent(told)
    again = f"wakesleep sleep {read} sleep.budget={left} sleep.tail_loss=9"
    assert capsys.readouterr().err.endswith(f"go on with: {again}\n")
    assert main(again.split()[1:]) == 0 and summary(read)["sleeps"] > 1


def test_a_summary_from_before_a_sleep_is_made_again(read, capsys):
    stale = Path(read, "summary.json").read_bytes()
    assert main(["sleep", read, "sleep.budget=1e9"]) == 0
    told = summary(read)
    Path(read, "summary.json").write_bytes(stale)
    capsys.readouterr()
    assert main(["stream", "--session", read, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["sleeps"] == told["sleeps"] > 0 and spent(shown) == spent(told)
    assert summary(read)["sleeps"] == told["sleeps"]


@pytest.mark.parametrize("budget", ["1e9", "10"])
def test_sizes_are_the_sessions_from_then_on_and_keys_of_sleep_are_not(read, budget, capsys):
    sizes, sleep = ["window=32", "store.capacity=16"], ["sleep.tolerance=0.3", "sleep.passes=2"]
    before = json.loads(Path(read, "session.json").read_text())["config"]
    assert main(["sleep", read, f"sleep.budget={budget}", *sizes, *sleep]) == 0
    after = json.loads(Path(read, "session.json").read_text())["config"]
    assert after == before | {"window": 32, "store": {"capacity": 16}}
    assert "window: 32" in Path(read, "config.yaml").read_text()
    assert main(["ask", read, "What is the pass code of the amber gate?"]) == 0
    assert main(["sleep", read, "sleep.budget=1e9"]) == 0


def test_keys_come_from_a_file_too(read, tmp_path, capsys):
    recipe = tmp_path / "best.yaml"
    recipe.write_text("window: 32\nsleep.rule: replay\nsleep.passes: 0\n")
    assert main(["sleep", read, "--config", str(recipe), "sleep.budget=1e9"]) == 0
    assert "sleep.passes=0" in capsys.readouterr().out
    assert json.loads(Path(read, "session.json").read_text())["config"]["window"] == 32


def test_a_budget_below_one_unit_sleeps_nothing_and_says_so(read, capsys):
    before = summary(read)
    assert main(["sleep", read, "sleep.budget=10"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("slept nothing: a sleep here takes ") and len(out.splitlines()) == 1
    assert (summary(read)["sleeps"], summary(read)["tokens"]) == (0, before["tokens"])


@pytest.mark.parametrize("spoil", [b"{", b"[", b"1 "])
def test_a_damaged_log_is_refused_before_anything_is_changed(read, capsys, spoil):
    assert main(["sleep", read, "sleep.budget=1e9"]) == 0
    log, folder = Path(read, "sleeps.jsonl"), Path(read)
    log.write_bytes(spoil + b"\n" + log.read_bytes()[len(spoil) + 1 :])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    for words in (["sleep", read, "sleep.budget=1e9"], ["stream", "--session", read]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "sleeps.jsonl" in error and len(error.splitlines()) == 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_of_very_many_sleeps_the_summary_shows_the_last(read, monkeypatch):
    assert main(["sleep", read, "sleep.budget=1e9", "sleep.tail_loss=9"]) == 0
    whole = summary(read)["sleep_log"]
    last = len(Path(read, "sleeps.jsonl").read_bytes().splitlines()[-1])
    monkeypatch.setattr(summaries, "MAX_LOG_BYTES", last + 20)
    manifest = json.loads(Path(read, "session.json").read_text())
    assert summaries.read_sleeps(Path(read), manifest["sleeps_bytes"]) == whole[-1:]
    assert len(whole) > 1 and main(["stream", "--session", read, "--quiet"]) == 0


def test_without_passes_nothing_happens_and_it_says_so(read, capsys):
    assert main(["sleep", read, "sleep.budget=26M", "sleep.tail_loss=9"]) == 0
    before, folder = summary(read), Path(read)
    meters = json.loads((folder / "session.json").read_text())["meters"]
    capsys.readouterr()
    assert main(["sleep", read, "sleep.budget=1e9", "sleep.passes=0"]) == 0
    assert len(before["sleep_log"]) == 1  # which left places to free
    assert capsys.readouterr().out == "slept nothing: sleep.passes=0 leaves nothing to do\n"
    assert json.loads((folder / "session.json").read_text())["meters"] == meters
    assert summary(read)["sleep_log"] == before["sleep_log"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "sleep needs the folder of a session"),
        (["{read}"], "sleep.budget: needed, in FLOPs"),
        (["{read}", "sleep.budget=-1"], "sleep.budget=-1: expected FLOPs, at least 0"),
        (["{read}", "sleep.budget=many"], "sleep.budget=many: expected a whole number"),
        (["{read}", "sleep.budget=1e9", "sleep.passes=-3"], "sleep.passes must be from 0"),
        (["{read}", "sleep.budget=1e9", "sleep.pases=3"], "did you mean sleep.passes"),
        (["nowhere", "sleep.budget=1e9"], "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(read, words, why, capsys, tmp_path):
    before = Path(read, "session.json").read_bytes()
    assert main(["sleep", *(word.replace("{read}", read) for word in words)]) == 2
    error = capsys.readouterr().err
    assert why in error and len(error.splitlines()) <= 3 and "sleeping over" not in error
    assert Path(read, "session.json").read_bytes() == before and not (tmp_path / "nowhere").exists()


def test_a_model_without_fast_weights_is_refused(tmp_path, model_folder, text, capsys):
    with Session.open(tmp_path / "s", model_folder, segment_len=128, threads=1) as session:
        session.read(text)
    assert main(["sleep", str(tmp_path / "s"), "sleep.budget=1e9"]) == 2
    assert "fast weights" in capsys.readouterr().err
