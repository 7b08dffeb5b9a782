"""Studies on a tiny model: what is measured, killed and gone on with, shared, and refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files

import pytest

from wakesleep.streams import tune_trial
from wakesleep.streams.cli import main
from wakesleep.streams.config import as_dict, load_config, to_yaml
from wakesleep.streams.console import Console
from wakesleep.streams.errors import Refused
from wakesleep.streams.families import HELD_OUT_KINDS
from wakesleep.streams.session import Session
from wakesleep.streams.snapshot import locked
from wakesleep.streams.stopping import Stopped, StopSignals
from wakesleep.streams.tune_config import TuneConfig
from wakesleep.streams.tune_progress import Trials
from wakesleep.streams.tune_report import settings_yaml
from wakesleep.streams.tune_study import Study, _help
from wakesleep.streams.tuning import Tuning, check_record

SEARCH = {"window": [64, 32], "store.capacity": [32, 8]}


@pytest.fixture(scope="module")
def config(model_folder, shared_text) -> TuneConfig:
    return TuneConfig(
        document=str(shared_text),
        tokens=1280,
        questions=3,
        goal="bits_per_byte",
        seeds=(0, 5),
        trials=4,
        search=SEARCH,
        stream={"model": str(model_folder), "threads": 1, "segment_len": 64},
    )


def test_keys_that_all_commands_have_are_those_of_the_stream(model_folder):
    config = load_config(
        TuneConfig,
        None,
        ["search.window=[64,32]", f"model={model_folder}", "threads=1", "dtype=float32"],
    )[0]
    found = config.stream_config({"window": 32}, 0)
    assert (found.model, found.threads, found.dtype) == (str(model_folder), 1, "float32")
    settings = settings_yaml(config, {"values": {"window": 32}}).splitlines()
    assert settings == [f'model: "{model_folder}"', 'dtype: "float32"', "threads: 1", "window: 32"]
    with pytest.raises(Refused, match=r"threads and stream\.threads"):
        load_config(TuneConfig, None, ["search.window=[64,32]", "threads=1", "stream.threads=2"])


def study(folder, config, workers=1):
    made = Study(folder, config, workers)
    made.begin()
    assert made.carry_out(Trials(Console(quiet=True), 1280), quiet=True) == 0
    return made.report()[0]


def same(report) -> list:
    """What does not depend on the clock."""
    timed = ("seconds", "pause_p95")
    return [{k: v for k, v in row.items() if k not in timed} for row in report.results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studies") / "whole"


@pytest.fixture(scope="module")
def whole(folder, config):
    return study(folder, config)


def test_searched_keys_of_a_file_are_said_to_be_from_it():
    recipe = files("wakesleep.configs") / "tune_sleep.yaml"
    _, origins = load_config(TuneConfig, recipe, ["search.window=[64,32]"])
    assert origins["search.sleep.offline_ratio"] == origins["stream.sleep.rule"] == "file"
    assert origins["search.window"] == "command line" and origins["goal"] == "default"


@pytest.mark.parametrize("text", ["{}", "[1]", "no JSON"])
def test_a_result_that_is_none_of_ours_is_refused_by_name(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(Refused, match=r"result\.json cannot be used"):
        tune_trial.read_result(tmp_path)


def test_a_signal_at_the_end_of_a_stream_stops_the_study(tmp_path, config, monkeypatch):
    read = Session.read

    def read_and_be_told(session, *args, **options):
        with StopSignals():  # as a stream that is just finishing
            summary = read(session, *args, **options)
            signal.raise_signal(signal.SIGTERM)
        return summary

    monkeypatch.setattr(Session, "read", read_and_be_told)
    made = Study(tmp_path / "s", config, 1)
    made.begin()
    with pytest.raises(Stopped) as stopped:
        made.carry_out(Trials(Console(quiet=True), 1280), quiet=True)
    assert stopped.value.number == signal.SIGTERM
    monkeypatch.undo()
    assert made.carry_out(Trials(Console(quiet=True), 1280), quiet=True) == 0


def test_a_helper_whose_first_process_was_killed_leaves_after_its_setting(tmp_path, config):
    made = Study(tmp_path / "s", config, 1)
    made.begin()
    arguments = (made.folder, config, made.allowed, True, 0)  # nobody's number
    helper = multiprocessing.get_context("spawn").Process(target=_help, args=arguments)
    helper.start()
    helper.join()
    assert helper.exitcode == 128 + signal.SIGTERM
    assert len(Tuning(made.folder, config, made.allowed).results()) == 1


def test_an_infinite_value_is_one_to_choose(tmp_path, config):
    search = {"sleep.burst": [float("inf"), 1e9]}
    report = study(tmp_path / "s", replace(config, search=search, trials=2, seeds=(0,)))
    assert [row["values"]["sleep.burst"] for row in report.results].count("inf") == 1


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_no_sampler_takes_are_refused(config, seed):
    with pytest.raises(ValueError, match="seed must be from 0"):
        replace(config, seed=seed)


def test_every_setting_is_measured_once_and_compared_with_the_first(folder, config, whole):
    values = [tuple(row["values"].values()) for row in whole.results]
    assert sorted(values) == sorted((w, s) for w in (64, 32) for s in (32, 8))
    assert whole.first["values"] == {"window": 64, "store.capacity": 32}
    for row in whole.results:
        assert row["tokens"] == 2 * 1280 and row["recall"][1] <= 6
        assert len(row["bits_by_seed"]) == 2 and row["sleep_flops"] == 0.0
    sizes = {v: row["state_bytes"] for v, row in zip(values, whole.results, strict=True)}
    assert sizes[64, 32] > sizes[64, 8] > sizes[32, 8]
    cost = {v: row["wake_flops"] for v, row in zip(values, whole.results, strict=True)}
    assert cost[64, 32] > cost[32, 32] and cost[64, 32] > cost[64, 8]
    assert not list((folder / "trials").glob("*/seed-*"))  # sessions are gone
    assert study(folder, config) == whole  # nothing is measured again


def test_fewer_trials_than_settings_begin_with_the_first_and_can_go_on(tmp_path, config, whole):
    few = study(tmp_path / "few", replace(config, trials=2))
    assert len(few.results) == 2 and few.first in few.results
    more = study(tmp_path / "few", config)
    assert same(more) == same(whole)


@pytest.mark.parametrize("at", [0, 5])
def test_killed_in_the_middle_it_goes_on_and_comes_to_the_same(tmp_path, config, whole, at):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from wakesleep.streams import reading\n"
        "from wakesleep.streams.console import Console\n"
        "from wakesleep.streams.tune_progress import Trials\n"
        "from wakesleep.streams.tune_config import TuneConfig\n"
        "from wakesleep.streams.tune_study import Study\n"
        f"left, save = {at}, reading.Reading.save\n"
        "def killing(self):\n"
        "    global left\n"
        "    save(self)\n"
        "    left -= 1\n"
        "    if left < 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "reading.Reading.save = killing\n"
        f"study = Study(Path(sys.argv[1]), {config!r}, 1)\n"
        "study.begin()\n"
        "study.carry_out(Trials(Console(quiet=True), 1280))\n"
    )
    environment = {**os.environ, "WAKESLEEP_MALLOC": "default"}
    words = [sys.executable, "-c", code, str(tmp_path / "s")]
    run = subprocess.run(words, env=environment, timeout=120, check=False)
    assert run.returncode == -signal.SIGKILL
    assert list((tmp_path / "s" / "trials").glob("*/seed-*"))
    assert same(study(tmp_path / "s", config)) == same(whole)


def test_two_processes_share_the_work(tmp_path, config, whole):
    assert same(study(tmp_path / "s", config, workers=2)) == same(whole)


def test_what_another_process_is_at_is_left_to_it(tmp_path, config):
    made = Study(tmp_path / "s", replace(config, trials=2), 1)
    made.begin()
    tuning, told = Tuning(tmp_path / "s", made.config, made.allowed), []
    first = tuning._place(made.allowed[0])
    first.mkdir(parents=True)
    with locked(first):
        tuning.work(told.append, StopSignals())
    assert len(told) == 1 and told[0]["values"] != made.allowed[0]
    tuning.work(told.append, StopSignals())  # the other one is no more
    assert len(tuning.results()) == 2 and told[1]["values"] == made.allowed[0]


@pytest.mark.parametrize("at", [0, 1])
def test_while_others_are_at_the_last_settings_no_report_is_made(tmp_path, config, capsys, at):
    config = replace(config, trials=2, seeds=(0,), search={"window": [64, 32]})
    recipe, folder = tmp_path / "t.yaml", tmp_path / "s"
    recipe.write_text(to_yaml(config))
    made = Study(folder, config, 1)
    made.begin()
    tuning = Tuning(folder, config, made.allowed)
    places = [tuning._place(tuning._values(tuning._ask().params)) for _ in range(at + 1)]
    for place in places:
        place.mkdir(parents=True)
    words = ["tune", str(recipe), "--output", str(folder), "--quiet"]
    with locked(places[-1]):
        assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("others are still at 1 of 2 settings") and str(recipe) in out
    assert not (folder / "table.md").exists()
    assert main(words) == 0 and (folder / "table.md").exists()
    assert "best.yaml" in capsys.readouterr().out


def test_a_signal_stops_between_segments_and_nothing_is_lost(tmp_path, config, whole, monkeypatch):
    read, calls = tune_trial.Session.read, []

    def stopping(self, *given, **named):
        calls.append(1)
        if len(calls) == 3:
            raise Stopped(signal.SIGINT)
        return read(self, *given, **named)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(tune_trial.Session, "read", stopping)
        study(tmp_path / "s", config)
    assert same(study(tmp_path / "s", config)) == same(whole)


def test_states_that_are_too_large_are_left_out(tmp_path, config, whole):
    sizes = sorted(row["state_bytes"] for row in whole.results)
    limit = whole.first["state_bytes"]
    assert sizes[-1] == limit  # the first is the largest here
    search = {"window": [32, 64], "store.capacity": [8, 32]}
    small = replace(config, search=search, most_state_bytes=sizes[1], trials=9)
    report = study(tmp_path / "s", small)
    assert sorted(row["state_bytes"] for row in report.results) == sizes[:2]
    with pytest.raises(Refused, match="the first setting has a larger state"):
        Study(tmp_path / "t", replace(config, most_state_bytes=sizes[1]), 1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tokens": 1300}, "tokens=1280, now it is 1300"),
        ({"search": {"window": [64]}}, "search.store.capacity"),
        ({"seeds": (0,)}, "seeds"),
    ],
)
def test_a_folder_is_one_study(tmp_path, config, change, why):
    Study(tmp_path / "s", config, 1).begin()
    before = (tmp_path / "s" / "tune.json").read_bytes()
    with pytest.raises(Refused, match=why):
        Study(tmp_path / "s", replace(config, **change), 1)
    assert (tmp_path / "s" / "tune.json").read_bytes() == before


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"config": 3}', "\0"])
def test_a_record_that_is_none_is_refused(tmp_path, config, text):
    (tmp_path / "tune.json").write_text(text)
    with pytest.raises(Refused, match="is no record of a study"):
        check_record(tmp_path, config, "0")
    assert (tmp_path / "tune.json").read_text() == text


def test_of_two_tuners_that_begin_at_once_the_second_finds_the_firsts_study(
    tmp_path, config, monkeypatch
):
    link = os.link

    def beaten(scratch, path):
        path.write_text(json.dumps({"model_sha256": "0", "config": as_dict(config)}))
        link(scratch, path)

    monkeypatch.setattr(os, "link", beaten)
    with pytest.raises(Refused, match="tokens=1280, now it is 99"):
        check_record(tmp_path / "s", replace(config, tokens=99), "0")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["tune.json"]


def test_a_study_of_another_model_is_refused(tmp_path, config, sleeper):
    Study(tmp_path / "s", config, 1).begin()
    other = replace(config, stream=config.stream | {"model": str(sleeper)})
    with pytest.raises(Refused, match="another model"):
        Study(tmp_path / "s", other, 1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"search": {"windw": [64]}}, "did you mean window"),
        ({"search": {"window": [64, 63]}}, "window"),
        ({"search": {"facts.count": [1, 2]}}, "facts.count is no key to tune"),
        ({"stream": {"limit_tokens": 5}}, "limit_tokens is no key to tune"),
        ({"search": {"sleep.rule": ["none", "replay"]}}, "fast weights"),
        ({"document": "nowhere.txt"}, "nowhere.txt"),
        ({"tokens": 300}, "facts cannot be planted"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_folder_is_made(tmp_path, config, change, why):
    change = change | {"stream": config.stream | change.get("stream", {})}
    with pytest.raises(ValueError, match=why):  # Refused is one
        Study(tmp_path / "s", replace(config, **change), 1)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "search names the keys"),
        ({"search": {"window": 64}}, "search.window must be a list"),
        ({"search": {"window": []}}, "search.window must be a list"),
        ({"search": {"window": [64, 32, 64.0]}}, "search.window must be a list of different"),
        ({"search": SEARCH, "tokens": 0}, "tokens must be from 1"),
        ({"search": SEARCH, "seeds": (1, 1)}, "seeds must be different"),
        ({"search": SEARCH, "questions": 0}, "questions must be from 1"),
    ],
)
def test_configs_that_cannot_be_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        TuneConfig(**options)


def test_a_rule_can_be_compared_with_none():
    words = ["search.sleep.rule=[none,replay]", "stream.sleep.trigger=idle"]
    study, _ = load_config(TuneConfig, None, words)
    rules = [study.stream_config(values, seed=0).sleep.rule for values in study.settings()]
    assert rules == ["none", "replay"]


@pytest.mark.parametrize("name", ["tune.yaml", "tune_sleep.yaml"])
def test_the_studies_that_come_with_it_name_settings_that_exist(name):
    study, _ = load_config(TuneConfig, files("wakesleep.configs") / name, [])
    settings = study.settings()
    assert len(settings) == study.grid == study.trials
    configs = [study.stream_config(values, seed=0) for values in settings]
    assert len(set(map(repr, configs))) == study.grid


def test_the_command_ends_with_settings_that_stream_takes(tmp_path, config, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = [f"stream.{key}={value}" for key, value in config.stream.items()]
    words = ["tune", "configs/tune.yaml", "--output", "t", f"document={config.document}"]
    words += ["tokens=1280", "questions=3", "seeds=0", "goal=bits_per_byte", *keys]
    words += ["search.window=64,32", "search.store.capacity=32", "trials=2"]
    assert main([*words, "--dry-run"]) == 0
    assert "2 of 2 settings" in capsys.readouterr().out and not (tmp_path / "t").exists()
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "best.yaml: " in out and "next: wakesleep stream DOC --config t/cheaper.yaml" in out
    assert err.count("MFLOP/token") == 2 and "Ctrl-C saves" in err
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["results"]) == 2
    document = ["stream", config.document, "--session", "s", "--config", "t/best.yaml"]
    assert main([*document, "limit_tokens=200"]) == 0
    capsys.readouterr()
    assert main([*words, "--workers", "none"]) == 2
    assert "--workers none" in capsys.readouterr().err
    assert main(["tune", "configs/tune.yaml"]) == 2
    assert main(["tune"]) == 2


def one_result(config, tmp_path, monkeypatch, **changed):
    """What a trial comes to when its summaries have these fields changed."""
    read = Session.read

    def changing(session, document, watch=None):
        return read(session, document, watch=watch) | changed

    monkeypatch.setattr(Session, "read", changing)
    return tune_trial.measure(tmp_path, config, {"window": 64, "store.capacity": 32}, StopSignals())


def test_facts_of_kinds_that_training_held_out_count_where_there_are_no_others(
    tmp_path, config, monkeypatch
):
    def fact(kind: str, correct: bool) -> dict:
        return {"kind": kind, "correct": correct, "age_tokens": 9}

    held_out = [fact(HELD_OUT_KINDS[0], True), fact(HELD_OUT_KINDS[0], False)]
    alone = one_result(config, tmp_path / "a", monkeypatch, facts=held_out)
    assert alone["recall"] == [2, 4]  # two seeds
    both = [*held_out, fact("trained", True)]
    assert one_result(config, tmp_path / "b", monkeypatch, facts=both)["recall"] == [2, 2]


def test_a_document_without_text_has_no_bits_per_byte(tmp_path, config, monkeypatch):
    found = one_result(config, tmp_path, monkeypatch, bits_per_byte=None, facts=[])
    assert found["bits_per_byte"] is None and found["bits_by_seed"] == []
    assert found["recall_by_seed"] == [None, None]


def test_killed_while_its_sessions_are_deleted_a_trial_leaves_none_behind(
    tmp_path, config, monkeypatch
):
    def killed(*args):
        raise KeyboardInterrupt

    values = {"window": 64, "store.capacity": 32}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tune_trial, "write_atomically", killed)
        tune_trial.measure(tmp_path, config, values, StopSignals())
    assert tune_trial.read_result(tmp_path) is None
    assert tune_trial.measure(tmp_path, config, values, StopSignals())["tokens"] == 2 * 1280
    assert [path.name for path in tmp_path.iterdir()] == [tune_trial.RESULT]
