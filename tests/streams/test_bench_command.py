"""What `wakesleep bench` prints and leaves behind, refuses, and does not measure twice."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from wakesleep.streams import bench_cases, bench_models, bench_study, cli
from wakesleep.streams.bench_measure import Unequal
from wakesleep.streams.bench_process import Failed
from wakesleep.streams.bench_study import Study

PROMISED = {"operation", "implementation", "equal", "tokens_per_second", "low", "high"}
PROMISED |= {"peak_bytes", "ratio_to"}
SIZES = (
    "repeats=2 warmup=1 shapes=[2x6] chunk=6 tokens=32 lanes=1 train_len=32 positions=[16,40,1k]"
)
SIZES += " longest=40 attention_len=40 one_shot_len=64 prefill_len=20 decode_len=3 threads=1"
ALL = {
    "memory-streaming",
    "memory-training",
    "model-streaming",
    "model-training",
    "mac-prefill",
    "mac-decode",
    "decode",
    "one-shot",
    "growth",
}


class Here:
    """Runs everything in this process."""

    def __init__(self, modules):
        pass

    def run(self, function, *arguments, told):
        try:
            return function(*arguments, told)
        except Unequal as error:
            raise Failed(f"Unequal: {error}") from error


@pytest.fixture(autouse=True)
def _alone(tmp_path, shared_text, monkeypatch):
    """An empty folder, our process, a short document, and no peer, whatever is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_study, "Processes", Here)
    monkeypatch.setattr(bench_models, "BUNDLED", shared_text)
    found = importlib.util.find_spec
    peers = bench_cases.PACKAGES.values()
    monkeypatch.setattr(
        bench_cases.importlib.util, "find_spec", lambda n: None if n in peers else found(n)
    )
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench(model_folder, capsys):
    """Run the command with small sizes; returns the exit code and both outlets."""

    def call(*words):
        keys = [f"model={model_folder}", *SIZES.split()]
        code = cli.main(["bench", "--output", "b", *keys, *words])
        return code, *capsys.readouterr()

    return call


def test_every_operation_has_rows_with_the_promised_keys_in_one_object(bench):
    code, out, err = bench("--json")
    assert code == 0, err
    data = json.loads(out)
    assert {row["operation"] for row in data["rows"]} == ALL
    assert all(row.keys() >= PROMISED for row in data["rows"])
    for row in data["rows"]:
        name = row["implementation"]
        if name.startswith("titans-pytorch"):
            assert row["skipped"] == "not installed: pip install wakesleep[bench]"
        elif name.startswith("flash"):
            assert row["skipped"].startswith("needs a GPU")
        elif row.get("extrapolated"):
            assert row["operation"] == "growth" and row["position"] == 1000
        else:
            assert row["equal"] is True and row["finite"] is True and row["check"]
            assert 0 < row["low"] <= row["tokens_per_second"] <= row["high"]
            assert row["peak_bytes"] >= 0 and row["minor_faults"] >= row["major_faults"] >= 0
            assert row["ratio_to"] is None or row["ratio_to"]["ratio"] > 0
        if "skipped" in row:
            assert row["equal"] is row["tokens_per_second"] is row["ratio_to"] is None
    saved = json.loads(Path("b/bench.json").read_text())
    assert saved == data and data["commit"] and data["machine"]["threads"] == 1
    assert sorted(os.listdir("b")) == [".lock", "bench.json", "bench.md", "bench.png"]
    assert "go on with: wakesleep bench --output b" in err and "into b" in err
    page = Path("b/bench.md").read_text()
    assert all(f"## {operation}" in page for operation in ALL) and "page faults" in page


def test_what_was_measured_is_not_measured_again(bench, monkeypatch):
    first = bench("--json", "operations=[decode]")
    monkeypatch.setattr(bench_study, "measure", None)
    second = bench("--json", "operations=[decode]")
    assert first[:2] == second[:2] and "0 of 1 comparisons" in second[2]
    assert bench("operations=[decode]", "--again")[0] == 1  # it is measured: None cannot be called


def test_it_goes_on_with_the_group_that_is_missing(bench, monkeypatch):
    real, groups = bench_study.measure, []

    def measure(config, group, run, told):
        if len(groups) == 2:
            raise OSError(28, "No space left on device")
        groups.append(group.name)
        return real(config, group, run, told)

    monkeypatch.setattr(bench_study, "measure", measure)
    words = ("operations=[one-shot,growth]", "--json")
    assert bench(*words)[0] == 1
    rows = json.loads(Path("b/bench.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["32 tokens"] * 3 + ["64 tokens"] * 3
    groups.clear()
    code, out, _ = bench(*words)
    assert code == 0 and groups == ["read", "full attention"]
    assert json.loads(out)["rows"][:6] == rows


def test_other_operations_are_added_and_a_new_package_is_measured(bench, monkeypatch):
    bench("operations=[mac-prefill]")
    _, out, err = bench("operations=[memory-training]", "--json")
    rows = json.loads(out)["rows"]
    assert [row["operation"] for row in rows] == ["memory-training"] * 2 + ["mac-prefill"] * 2
    assert "1 of 1 comparisons" in err
    assert "0 of 1 comparisons" in bench("operations=[mac-prefill]")[2]
    monkeypatch.setattr(bench_study, "skipped", lambda entry: None)  # as if it were there
    monkeypatch.setattr(bench_study, "measure", lambda *_: [])
    assert "1 of 1 comparisons" in bench("operations=[mac-prefill]")[2]


def test_rows_of_another_setting_commit_or_machine_are_refused(bench, monkeypatch):
    bench("operations=[mac-prefill]")
    code, out, err = bench("operations=[mac-prefill]", "repeats=3")
    assert code == 2 and out == "" and "config.repeats=2, now it is 3" in err
    assert "--again measures anew" in err and len(err.splitlines()) <= 3
    monkeypatch.setattr(bench_study, "commit_of", lambda: "abc")
    code, _, err = bench("operations=[mac-prefill]")
    assert code == 2 and "now it is abc" in err
    assert bench("operations=[mac-prefill]", "--again")[0] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["repeat=3"], "did you mean repeats?"),
        (["operations=[decod]"], "expected a list, each one of"),
        (["positions=[10,5]"], "must rise"),
        (["shapes=[4]"], "HEADSxWIDTH"),
        (["train_len=34"], "multiple of model.chunk"),
        (["model=nothere"], "holds no model"),
        (["book.txt"], "neither a file that exists nor key=value"),
    ],
)
def test_what_cannot_be_is_refused_and_makes_no_folder(bench, words, told):
    code, out, err = bench(*words)
    assert code == 2 and out == "" and told in err and len(err.splitlines()) <= 3
    assert os.listdir() == []


def test_a_folder_that_holds_something_else_is_left_alone(bench, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    assert bench()[0] == bench("--again")[0] == 2 and os.listdir("b") == ["mine.txt"]
    (tmp_path / "b" / "mine.txt").rename(tmp_path / "b" / "bench.json")
    assert "not plain JSON" in bench()[2]
    (tmp_path / "b" / "bench.json").write_text('{"rows": [{}]}')
    assert "is no benchmark" in bench()[2]


def test_quick_changes_keys_that_are_not_given(capsys):
    assert cli.main(["bench", "--quick", "--print-config", "--json", "repeats=5"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["repeats"], config["warmup"], config["longest"]) == (5, 1, 4000)
    assert os.listdir() == []


def test_what_is_not_equal_or_crashes_ends_with_1_and_is_tried_again(bench, monkeypatch):
    original = bench_study.measure

    def broken(config, group, run, told):
        def crash(*_, **__):
            raise Failed("its process was killed: more memory than is free?")

        return original(config, group, crash, told)

    monkeypatch.setattr(bench_study, "measure", broken)
    code, out, err = bench("operations=[one-shot]", "--json")
    row = json.loads(out)["rows"][0]
    assert code == 1 and "was killed" in err and "was killed" in row["failed"]
    assert row.keys() >= PROMISED and row["equal"] is None is row["tokens_per_second"]
    monkeypatch.setattr(bench_study, "measure", original)
    assert bench("operations=[one-shot]", "--json")[0] == 0


def test_a_signal_stops_it_with_the_next_command(bench, monkeypatch):
    from wakesleep.streams.stopping import Stopped

    def stop(*_):
        raise Stopped(2)

    monkeypatch.setattr(Study, "carry_out", stop)
    code, out, err = bench()
    assert code == 130 and out == "" and "go on with: wakesleep bench --output b" in err
