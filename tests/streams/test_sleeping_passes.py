"""Streams that sleep by passes, over the last tokens or over spans of the store."""

from __future__ import annotations

import json
import signal
import sys

import pytest
from safetensors.numpy import load_file

from wakesleep.streams import session as sessions
from wakesleep.streams.cli import main
from wakesleep.streams.errors import Refused
from wakesleep.streams.progress import dream
from wakesleep.streams.session import Session
from wakesleep.streams.stopping import Stopped, StopSignals

READ = {"segment_len": 128, "save_every": 512, "threads": 1}
SLEEP = {"offline_ratio": 4.0, "passes": 3, "tail_loss": 9, "tolerance": 0.2}
TIMES = {"seconds", "tokens_per_second", "peak_rss_bytes", "pause_p50", "pause_p95", "pause_max"}
rules = pytest.mark.parametrize("rule", ["recurrent", "cross"])


def stream(folder, model, document, rule, **options) -> dict:
    sleep = {**SLEEP, "rule": rule, **options}
    with Session.open(folder, model, **READ, sleep=sleep) as opened:
        return opened.read(document)


def tensors(folder) -> dict[str, bytes]:
    name = json.loads((folder / "session.json").read_text())["state"]
    return {name: t.tobytes() for name, t in load_file(folder / name).items()}


def repeated(values: dict) -> dict:
    """What is the same in every run."""
    kept = {k: v for k, v in values.items() if k not in TIMES and k != "resumed_at"}
    if "sleep_log" in kept:
        kept["sleep_log"] = [repeated(line) for line in kept["sleep_log"]]
    return kept


def spent(values: dict) -> int:
    return values["sleep_flops"] + values["gate_flops"] + values["wasted_flops"]


@rules
@pytest.mark.parametrize("evict", ["keep", "hard"])
def test_a_stream_sleeps_at_every_eviction_and_tells_of_it(tmp_path, dreamer, text, rule, evict):
    summary = stream(tmp_path / "s", dreamer, text, rule, evict=evict)
    awake = stream(tmp_path / "awake", dreamer, text, "none")
    log = summary["sleep_log"]
    # a segment is two windows long; the last one may end inside a chunk
    assert len(log) in (summary["tokens"] // 128, summary["tokens"] // 128 + 1)
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
    summary = stream(tmp_path / "a", dreamer, text, "none")
    for name, options in [("b", {"offline_ratio": 0.0}), ("c", {"passes": 1, "evict": "hard"})]:
        other = stream(tmp_path / name, dreamer, text, rule, **options)
        assert other["sleeps"] == spent(other) == 0
        assert other["bits_per_byte"] == summary["bits_per_byte"]
        assert tensors(tmp_path / name) == tensors(tmp_path / "a")


class StopInSleep(StopSignals):
    """Ctrl-C when a sleep asks for the n-th time whether it should go on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __bool__(self) -> bool:
        if sys._getframe(1).f_code.co_name == "<lambda>":
            self.left -= 1
            if not self.left:
                self.number = signal.SIGINT
        return self.number is not None


@rules
@pytest.mark.parametrize("at", [1, 4])
def test_ctrl_c_between_two_passes_changes_nothing_in_the_end(
    tmp_path, dreamer, text, rule, at, monkeypatch
):
    rested = stream(tmp_path / "rested", dreamer, text, rule, evict="hard")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(sessions, "StopSignals", lambda: StopInSleep(at))
        stream(tmp_path / "s", dreamer, text, rule, evict="hard")
    summary = stream(tmp_path / "s", dreamer, text, rule, evict="hard")
    assert summary["resumed_at"] and repeated(summary) == repeated(rested)
    assert tensors(tmp_path / "s") == tensors(tmp_path / "rested")


@rules
def test_a_session_at_rest_makes_its_passes_once(tmp_path, dreamer, text, rule, capsys):
    stream(tmp_path / "s", dreamer, text, "none")
    words = [f"sleep.{key}={value}" for key, value in {"rule": rule, **SLEEP}.items()]
    assert main(["sleep", str(tmp_path / "s"), "sleep.budget=1e12", *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 sleep in") and "2 more passes" in out
    assert main(["sleep", str(tmp_path / "s"), "sleep.budget=10", *words]) == 0
    assert capsys.readouterr().out.startswith("slept nothing")


@rules
def test_models_that_were_not_trained_for_it_are_refused(tmp_path, sleeper, text, rule):
    with pytest.raises(Refused, match=r"needs fast_layers, fast.write=always"):
        stream(tmp_path / "s", sleeper, text, rule)
    assert not (tmp_path / "s").exists()
