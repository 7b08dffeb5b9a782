"""Streams that sleep: what they spend and record, and that interruptions change no bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from wakesleep.streams import reading, sleeping
from wakesleep.streams import session as sessions
from wakesleep.streams.cli import main
from wakesleep.streams.errors import Refused
from wakesleep.streams.progress import dream
from wakesleep.streams.session import Session
from wakesleep.streams.stopping import Stopped, StopSignals

READ = {"segment_len": 128, "save_every": 512, "threads": 1}
SLEEP = {"rule": "replay", "offline_ratio": 4.0, "trigger": ["every"], "every": 256, "tail_loss": 9}
TIMES = {"seconds", "tokens_per_second", "peak_rss_bytes", "pause_p50", "pause_p95", "pause_max"}


def stream(folder, model, document, **options) -> dict:
    with Session.open(folder, model, **{**READ, "sleep": SLEEP, **options}) as opened:
        return opened.read(document)


def tensors(folder) -> dict[str, bytes]:
    name = json.loads((folder / "session.json").read_text())["state"]
    return {name: t.tobytes() for name, t in load_file(folder / name).items()}


def repeated(values: dict) -> dict:
    """What is the same in every run, however often it was interrupted."""
    breaks = {"resumed_at", "interrupted_flops"}
    kept = {k: v for k, v in values.items() if k not in TIMES | breaks}
    if "sleep_log" in kept:
        kept["sleep_log"] = [repeated(line) for line in kept["sleep_log"]]
    return kept


def spent(values: dict) -> int:
    return values["sleep_flops"] + values["gate_flops"] + values["wasted_flops"]


@pytest.fixture(autouse=True)
def _short_lines(monkeypatch):
    """A line of metrics for every segment, so that some stand before and some behind a sleep."""
    monkeypatch.setattr(reading, "METRICS_EVERY", 128)


def metrics(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [repeated(json.loads(line)) for line in lines]


@pytest.fixture
def rested(tmp_path, sleeper, text):
    """A folder that was read with sleep, without a break, and its summary."""
    return tmp_path / "rested", stream(tmp_path / "rested", sleeper, text)


def test_a_stream_sleeps_where_it_should_and_tells_all_of_it(rested):
    folder, summary = rested
    log = summary["sleep_log"]
    assert summary["sleeps"] == len(log) == len((folder / "sleeps.jsonl").read_text().splitlines())
    assert [line["tokens"] for line in log] == [256 * (n + 1) for n in range(len(log))]
    assert len(log) == summary["tokens"] // 256 and summary["offline_ratio"] == 4.0
    assert summary["granted_flops"] == 0
    assert sum(line["written"] for line in log) > 0 < sum(line["released"] for line in log)
    for name in ("sleep_flops", "gate_flops", "wasted_flops"):
        assert summary[name] == sum(line[name] for line in log)
    assert 0 < spent(summary) <= 4 * summary["wake_flops"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["sleep_flops"] == spent(summary)
    assert "pairs written" in dream(log[0]) and "256 tokens (every" in dream(log[0])


def test_without_ratio_or_rule_no_bit_changes(tmp_path, sleeper, text):
    results = []
    for name, sleep in [("a", {"rule": "none"}), ("b", SLEEP | {"offline_ratio": 0.0})]:
        summary = stream(tmp_path / name, sleeper, text, sleep=sleep)
        assert summary["sleeps"] == spent(summary) == 0 and summary["sleep_log"] == []
        results.append((tensors(tmp_path / name), repeated(summary)))
    assert results[0] == results[1]
    assert not (tmp_path / "a" / "sleeps.jsonl").exists()


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.0])
def test_at_every_moment_no_more_is_spent_than_the_ratio_allows(tmp_path, sleeper, text, ratio):
    sleep = SLEEP | {"offline_ratio": ratio, "every": 1}
    summary = stream(tmp_path / "s", sleeper, text, sleep=sleep)
    lines = (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["sleep_flops"] <= ratio * line["wake_flops"]
    awake = summary["wake_flops"] / summary["tokens"]
    total = 0
    for line in summary["sleep_log"]:
        total += spent(line)
        assert total <= ratio * awake * 1.2 * line["tokens"]
    assert summary["sleeps"] > 0


@pytest.mark.parametrize(("triggers", "slept"), [(["every"], []), (["every", "idle"], ["idle"])])
def test_inside_a_chunk_nothing_but_idle_asks(tmp_path, sleeper, text, triggers, slept):
    sleep = SLEEP | {"every": 500, "trigger": triggers}
    summary = stream(tmp_path / "s", sleeper, text, limit_tokens=505, segment_len=505, sleep=sleep)
    assert [line["trigger"] for line in summary["sleep_log"]] == slept


class StopInSleep(StopSignals):
    """Ctrl-C when a sleep asks for the n-th time whether it should go on."""

    asked = 0

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def __bool__(self) -> bool:
        if sys._getframe(1).f_code.co_name == "<lambda>":
            StopInSleep.asked += 1
            if StopInSleep.asked == self.at:
                self.number = signal.SIGINT
        return self.number is not None


def interrupted(folder, monkeypatch, at, *args, **options) -> None:
    """A stream that is stopped where a sleep asks for the `at`-th time."""
    StopInSleep.asked = 0
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(sessions, "StopSignals", lambda: StopInSleep(at))
        stream(folder, *args, **options)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_ctrl_c_in_the_middle_of_a_sleep_changes_nothing_in_the_end(
    tmp_path, sleeper, text, rested, at, times, monkeypatch
):
    """Nor does a second one, in the sleep that the next call begins with."""
    interrupted(tmp_path / "s", monkeypatch, at, sleeper, text)
    slept = json.loads((tmp_path / "s" / "session.json").read_text())["meters"]["sleeps"]
    if times == 2:
        interrupted(tmp_path / "s", monkeypatch, 1, sleeper, text)
    summary = stream(tmp_path / "s", sleeper, text)
    assert slept < summary["sleeps"] and summary["resumed_at"]
    assert summary["interrupted_flops"] > 0 == rested[1]["interrupted_flops"]
    assert tensors(tmp_path / "s") == tensors(rested[0])
    assert repeated(summary) == repeated(rested[1])
    assert metrics(tmp_path / "s") == metrics(rested[0])


KILLED = """
import os, signal, sys
from wakesleep.consolidation import replay_sleep as sleep
from wakesleep.streams.session import Session
left, change = int(sys.argv[4]), sleep.change
def killing(*given):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return change(*given)
sleep.change = killing
options = {options}
Session.open(sys.argv[1], sys.argv[2], **options).read(sys.argv[3])
"""


@pytest.mark.parametrize("units", [0, 9])
def test_kill_9_in_the_middle_of_a_sleep_changes_nothing_in_the_end(
    tmp_path, sleeper, text, rested, units
):
    code = KILLED.replace("{options}", repr({**READ, "sleep": SLEEP}))
    words = [sys.executable, "-c", code, tmp_path / "s", sleeper, text, str(units)]
    environment = {**os.environ, "WAKESLEEP_MALLOC": "default"}
    run = subprocess.run(list(map(str, words)), env=environment, timeout=120, check=False)
    assert run.returncode == -signal.SIGKILL
    summary = stream(tmp_path / "s", sleeper, text)
    assert tensors(tmp_path / "s") == tensors(rested[0])
    assert repeated(summary) == repeated(rested[1]) and summary["interrupted_flops"] == 0


def test_a_second_document_sleeps_at_boundaries_and_goes_on_after_ctrl_c(
    tmp_path, sleeper, text, monkeypatch
):
    """It begins inside a chunk, so no segment of its grid ends at a boundary."""
    more = tmp_path / "more.txt"
    more.write_text(text.read_text()[4000:])
    text.write_text(text.read_text()[:1000])
    first = stream(tmp_path / "s", sleeper, text)["tokens"]
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    summary = stream(tmp_path / "s", sleeper, more)
    slept = [line["tokens"] for line in summary["sleep_log"] if line["tokens"] > first]
    assert len(slept) > 1 and first % 16 and not any(tokens % 16 for tokens in slept)
    for at in (2, 1):
        interrupted(tmp_path / "t", monkeypatch, at, sleeper, more)
    assert repeated(stream(tmp_path / "t", sleeper, more)) == repeated(summary)
    assert tensors(tmp_path / "t") == tensors(tmp_path / "s")
    assert metrics(tmp_path / "t") == metrics(tmp_path / "s")


def test_sleep_can_begin_in_a_session_that_never_slept(tmp_path, sleeper, text):
    stream(tmp_path / "s", sleeper, text, sleep={"rule": "none"})
    more = tmp_path / "more.txt"
    more.write_text(text.read_text()[::-1])
    summary = stream(tmp_path / "s", sleeper, more)
    assert summary["sleeps"] > 0 and spent(summary) <= 4 * summary["wake_flops"]


def test_a_bucket_keeps_its_level_when_its_ratio_changes(tmp_path, sleeper, text):
    """A smaller ratio that would have earned what was saved up, too, takes nothing of it."""
    small = SLEEP | {"every": 1 << 20, "burst": 1e6, "offline_ratio": 0.25}
    before = stream(tmp_path / "s", sleeper, text, sleep=small)
    assert before["sleeps"] == 0 and before["wake_flops"] > 1e8
    more = tmp_path / "more.txt"
    more.write_text("amber gate")
    with Session.open(tmp_path / "s", sleeper, sleep={"offline_ratio": 0.1}) as opened:
        opened.read(more)
        ledger, bucket = opened.runner.meters.ledger, opened.config.sleep.bucket
    assert bucket.level(ledger) == 10**6


@pytest.mark.parametrize(
    ("key", "told", "why"),
    [("burst=1", 1, "sleep.burst is 1"), ("offline_ratio=1e-9", 0, "the budget is ")],
)
def test_a_budget_that_pays_for_no_sleep_is_told_of(
    tmp_path, sleeper, text, capsys, key, told, why
):
    words = ["stream", str(text), "--session", str(tmp_path / "s"), f"model={sleeper}"]
    words += ["segment_len=128", "threads=1", "sleep.rule=replay", f"sleep.{key}"]
    assert main([*words, "sleep.every=256", "limit_tokens=1k", "sleep.trigger=every"]) == 0
    out, err = capsys.readouterr()
    assert err.count("no sleep: a sleep takes ") == told == err.count(why)
    (row,) = (line for line in out.splitlines() if line.startswith("  sleep "))
    assert "none: a sleep takes " in row and why in row
    assert main(["stream", str(text), "--session", str(tmp_path / "s"), "sleep.burst=inf",
                 "sleep.offline_ratio=4", "limit_tokens=2k"]) == 0  # fmt: skip
    out, err = capsys.readouterr()
    assert "none: a sleep" not in out and "no sleep" not in err and "slept after" in err


def test_idle_sleeps_when_all_is_read(tmp_path, sleeper, text):
    summary = stream(tmp_path / "s", sleeper, text, sleep=SLEEP | {"trigger": ["idle"]})
    (line,) = summary["sleep_log"]
    assert line["tokens"] == summary["tokens"] and line["trigger"] == "idle" and line["accepted"]
    assert summary["tokens"] % 16  # it may be inside a chunk, and only then
    again = stream(tmp_path / "s", sleeper, text, sleep=SLEEP | {"trigger": ["idle"]})
    assert repeated(again) == repeated(summary)


def test_several_lanes_sleep_together_and_go_on_after_ctrl_c(tmp_path, sleeper, text, monkeypatch):
    folder, lanes = tmp_path / "texts", {"lanes": 2, "segment_len": 64}
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.txt").write_text(text.read_text()[n:])
    summary = stream(tmp_path / "s", sleeper, folder, **lanes)
    assert summary["sleeps"] > 0 and spent(summary) <= 4 * summary["wake_flops"]
    for at in (2, 1):
        interrupted(tmp_path / "t", monkeypatch, at, sleeper, folder, **lanes)
    again = stream(tmp_path / "t", sleeper, folder, **lanes)
    assert repeated(again) == repeated(summary)
    assert tensors(tmp_path / "t") == tensors(tmp_path / "s")


def cut(folder, text, *lines):
    """A folder of texts with so many lines each."""
    folder.mkdir()
    for n, count in enumerate(lines):
        (folder / f"{n}.txt").write_text("".join(text.read_text().splitlines(True)[n:][:count]))
    return folder


def test_a_lane_that_has_ended_inside_a_chunk_lets_the_others_sleep(tmp_path, sleeper, text):
    folder = cut(tmp_path / "texts", text, 20, 300)
    summary = stream(tmp_path / "s", sleeper, folder, lanes=2)
    alone = stream(tmp_path / "alone", sleeper, folder / "1.txt")
    short = summary["tokens"] - alone["tokens"]
    assert short % 16 and 0 < short < 256 < alone["tokens"]
    assert summary["sleeps"] == alone["sleeps"] > 2
    assert [line["tokens"] - short for line in summary["sleep_log"]] == [
        line["tokens"] for line in alone["sleep_log"]
    ]
    assert spent(summary) < 1.5 * spent(alone)  # one lane's; other pairs are set aside in it
    both, one = (tensors(tmp_path / name) for name in ("s", "alone"))
    fast = [name for name in one if "fast.s" in name]
    size = {name: len(one[name]) for name in fast}
    assert fast and all(both[name][: size[name]] == bytes(size[name]) for name in fast)
    assert any(both[name][size[name] :] != bytes(size[name]) for name in fast)


def test_lanes_that_are_never_at_a_boundary_together_are_brought_to_one(
    tmp_path, sleeper, text, monkeypatch
):
    folder = cut(tmp_path / "texts", text, 70, 200, 130)
    lanes, places, own = {"lanes": 2, "segment_len": 40}, [], sleeping.sleep

    def watched(model, state, *given):
        places.append(state.position.tolist())
        return own(model, state, *given)

    with monkeypatch.context() as patch:
        patch.setattr(sleeping, "sleep", watched)
        summary = stream(tmp_path / "s", sleeper, folder, **lanes)
    assert len(places) == summary["sleeps"] > 2
    assert not any(at % 16 for lanes_at in places for at in lanes_at)
    assert any(at % 40 for lanes_at in places for at in lanes_at)
    interrupted(tmp_path / "t", monkeypatch, 5, sleeper, folder, **lanes)
    again = stream(tmp_path / "t", sleeper, folder, **lanes)
    assert repeated(again) == repeated(summary)
    assert tensors(tmp_path / "t") == tensors(tmp_path / "s")


def test_a_model_that_cannot_sleep_is_refused_and_no_folder_made(tmp_path, model_folder, text):
    with pytest.raises(Refused, match=r"sleep.rule=replay needs a layer with fast weights"):
        stream(tmp_path / "s", model_folder, text)
    assert not (tmp_path / "s").exists()


def test_questions_are_answered_after_sleep(rested):
    session = Session.load(rested[0])
    assert isinstance(session.ask("What is the pass code of the amber gate?").answer, str)


PASSES = {"offline_ratio": 4.0, "passes": 3, "tail_loss": 9, "tolerance": 0.2}
rules = pytest.mark.parametrize("rule", ["recurrent", "cross"])


def pass_over(folder, model, document, rule, **options) -> dict:
    """A stream that sleeps by passes, over the last tokens or over spans of the store."""
    return stream(folder, model, document, sleep={**PASSES, "rule": rule, **options})


@rules
@pytest.mark.parametrize("evict", ["keep", "hard"])
def test_a_stream_sleeps_at_every_eviction_and_tells_of_it(tmp_path, dreamer, text, rule, evict):
    summary = pass_over(tmp_path / "s", dreamer, text, rule, evict=evict)
    awake = pass_over(tmp_path / "awake", dreamer, text, "none")
    log = summary["sleep_log"]
    # a segment is two windows long; the last one ends inside a chunk
    assert [line["tokens"] for line in log] == list(range(128, summary["tokens"] + 1, 128))
    assert summary["tokens"] % 16
    assert all(line["trigger"] == "eviction" and line["rule"] == rule for line in log)
    taken = [line for line in log if line["accepted"]]
    assert taken and all(line["units"] == 2 for line in taken)
    for name in ("sleep_flops", "gate_flops", "wasted_flops"):
        assert summary[name] == sum(line[name] for line in log)
    assert 0 < spent(summary) <= 4 * summary["wake_flops"]
    assert summary["bits_per_byte"] != awake["bits_per_byte"]
    assert "2 more passes; all passes were made" in dream(taken[0])


@rules
def test_without_ratio_or_with_one_pass_no_bit_changes(tmp_path, dreamer, text, rule):
    summary = pass_over(tmp_path / "a", dreamer, text, "none")
    for name, options in [("b", {"offline_ratio": 0.0}), ("c", {"passes": 1, "evict": "hard"})]:
        other = pass_over(tmp_path / name, dreamer, text, rule, **options)
        assert other["sleeps"] == spent(other) == 0
        assert other["bits_per_byte"] == summary["bits_per_byte"]
        assert tensors(tmp_path / name) == tensors(tmp_path / "a")


@rules
@pytest.mark.parametrize("at", [1, 4])
def test_ctrl_c_between_two_passes_changes_nothing_in_the_end(
    tmp_path, dreamer, text, rule, at, monkeypatch
):
    rested = pass_over(tmp_path / "rested", dreamer, text, rule, evict="hard")
    StopInSleep.asked = 0
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(sessions, "StopSignals", lambda: StopInSleep(at))
        pass_over(tmp_path / "s", dreamer, text, rule, evict="hard")
    summary = pass_over(tmp_path / "s", dreamer, text, rule, evict="hard")
    assert summary["resumed_at"] and repeated(summary) == repeated(rested)
    assert tensors(tmp_path / "s") == tensors(tmp_path / "rested")


@rules
def test_a_session_at_rest_makes_its_passes_once(tmp_path, dreamer, text, rule, capsys):
    pass_over(tmp_path / "s", dreamer, text, "none")
    words = [f"sleep.{key}={value}" for key, value in {"rule": rule, **PASSES}.items()]
    assert main(["sleep", str(tmp_path / "s"), "sleep.budget=1e12", *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 sleep in") and "2 more passes" in out
    for more, why in (["sleep.budget=10"], "takes"), (["sleep.budget=1M", "sleep.passes=1"], "=1"):
        assert main(["sleep", str(tmp_path / "s"), *words, *more]) == 0
        out = capsys.readouterr().out
        assert out.startswith("slept nothing") and why in out
    assert json.loads((tmp_path / "s" / "session.json").read_text())["meters"]["sleeps"] == 1


@rules
def test_models_that_were_not_trained_for_it_are_refused(tmp_path, sleeper, text, rule):
    with pytest.raises(Refused, match=r"needs fast_layers, fast.write=always") as refused:
        pass_over(tmp_path / "s", sleeper, text, rule, untrained=True)
    assert "use a model whose fast weights are written awake" in str(refused.value)
    assert not (tmp_path / "s").exists()
