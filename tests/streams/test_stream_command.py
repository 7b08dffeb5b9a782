"""`wakesleep stream` and `wakesleep ask` from outside, in this process, with a tiny model."""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from wakesleep.streams import cli, documents, plots
from wakesleep.streams.progress import Progress
from wakesleep.streams.stream_command import default_folder, sort_items
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.model_io import save_model

TOKENIZER = Path(plots.__file__).parent / "data" / "default" / "tokenizer.json"
TEXT = "The old gate was painted twice, and nobody in the village knew why. " * 700
SIZES = {"dim": 16, "num_layers": 2, "num_heads": 1, "head_dim": 16, "mlp_dim": 16, "window": 32}
SUMMARY_FIELDS = (
    "tokens bytes seconds tokens_per_second bits_per_byte peak_rss_bytes state_bytes wake_flops "
    "sleep_flops gate_flops wasted_flops sleeps sleep_log offline_ratio pause_p50 pause_p95 "
    "pause_max nonfinite_rows resumed_at facts"
).split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = ModelConfig(**SIZES, chunk=32, memory_layers=(1,), store_layers=(1,))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, TTLModel(config), TOKENIZER.read_bytes(), "tiny")
    return f"model={folder}"


@pytest.fixture(autouse=True)
def _inside_a_folder_with_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gate.txt").write_text(TEXT)


@pytest.fixture(scope="module")
def session(model, tmp_path_factory) -> Path:
    """A finished session, for those who only look at it."""
    folder = tmp_path_factory.mktemp("sessions")
    (folder / "gate.txt").write_text(TEXT)
    words = [str(folder / "gate.txt"), model, "threads=1", "--session", str(folder / "gate")]
    assert cli.main(["stream", *words, "--quiet"]) == 0
    return folder / "gate"


def test_what_exists_is_a_document_whatever_it_looks_like():
    Path("window=256").write_text(TEXT)
    assert sort_items(["window=256", "window=512"]) == ("window=256", ["window=512"])
    assert sort_items(["seed=1", "-"]) == ("-", ["seed=1"])
    assert sort_items([]) == (None, [])


def test_the_folder_has_the_name_of_the_document():
    Path("notes.md").mkdir()
    names = {
        "a/book.txt": "book",
        "book.TXT.xz": "book",
        "v1.2.txt": "v1.2",
        "notes.md": "notes.md",
    }
    assert {name: default_folder(name).name for name in names} == names
    assert default_folder("-") == Path("runs/stdin")
    assert default_folder("...txt") == default_folder("..txt") == Path("runs/document")
    assert default_folder(None) == Path("runs/britannica")


def test_stream_prints_the_table_and_leaves_the_session_with_its_plots(model, capsys):
    call = ["stream", "gate.txt", model, "threads=1"]
    assert cli.main(call) == 0
    out, err = capsys.readouterr()
    assert "bits per byte" in out and out.rstrip().endswith("wakesleep ask runs/gate")
    assert "wakesleep stream --session runs/gate" in err and "tokens/s" in err
    made = {path.name for path in Path("runs/gate").iterdir()}
    assert {"session.json", "summary.json", "metrics.jsonl", "reading.png", "store.png"} <= made
    before = {path.name: path.stat().st_mtime_ns for path in Path("runs/gate").iterdir()}
    assert cli.main(call) == 0
    again, err = capsys.readouterr()
    assert again == out and "all of it was read before" in err
    assert {p.name: p.stat().st_mtime_ns for p in Path("runs/gate").iterdir()} == before


def test_ctrl_c_while_standard_input_is_silent_saves_what_was_read(model, capsys, monkeypatch):
    went_on = []

    def pieces():
        yield from [TEXT[:9000].encode()] * 8  # some are fetched before there is a folder
        os.kill(os.getpid(), signal.SIGINT)  # as if it came during the read
        went_on.append(True)  # to wait for more

    monkeypatch.setattr(documents, "_stdin_pieces", pieces)
    call = ["stream", "-", model, "threads=1", "segment_len=512", "--session", "s"]
    assert cli.main(call) == 130
    saved = json.loads(Path("s/session.json").read_text())["tokens"]
    assert saved > 0 and saved % 512 == 0 and not went_on
    assert f"{saved / 1000:.3g}k tokens are saved" in capsys.readouterr().err


def test_json_has_every_promised_field_and_stands_alone_on_stdout(model, capsys):
    assert cli.main(["stream", "gate.txt", model, "facts.count=2", "threads=1", "--json"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert set(SUMMARY_FIELDS) <= set(summary) and len(summary["facts"]) == 2
    assert "planted facts" in err and Path("runs/gate/recall.png").exists()


def test_ctrl_c_saves_says_how_to_go_on_and_the_same_command_does(model, capsys, monkeypatch):
    metrics = Progress.metrics

    def interrupt(self, line):
        metrics(self, line)
        os.kill(os.getpid(), signal.SIGINT)

    call = ["stream", "gate.txt", model, "threads=1", "--session", "s"]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "metrics", interrupt)
        assert cli.main(call) == 130
    assert "go on with: wakesleep stream --session s" in capsys.readouterr().err
    saved = json.loads(Path("s/session.json").read_text())["tokens"]
    assert cli.main([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_at"] == [saved] and saved > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothere.txt"], "nothere.txt: no such file"),
        (["gate.tx"], "did you mean gate.txt?"),
        (["gate.txt", "widnow=3"], "did you mean window?"),
        (["gate.txt", "window=-1"], "window must be"),
        (["gate.txt", "store.capacity=1e18"], "store.capacity must be"),
        (["gate.txt", "window=33"], "window"),
        (["gate.txt", "model=/nothere"], "/nothere holds no model"),
        (["gate.txt", "empty.txt"], "2 documents"),
        (["empty.txt"], "empty"),
        (["gate.txt", "--config", "no.yaml"], "no.yaml: no such file"),
    ],
)
def test_a_refused_call_creates_no_folder(model, capsys, words, message):
    Path("empty.txt").touch()
    before = sorted(os.listdir())
    words = words if any("model=" in word for word in words) else [*words, model]
    assert cli.main(["stream", *words, "--session", "new"]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and len(err.splitlines()) <= 3
    assert sorted(os.listdir()) == before


def test_a_dry_run_tells_the_plan_and_changes_nothing(model, capsys):
    before = sorted(os.listdir())
    assert cli.main(["stream", "gate.txt", model, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["documents"] == ["gate.txt"] and plan["tokens"] == 0 < plan["total_tokens"]
    assert sorted(os.listdir()) == before


def test_print_config_tells_where_each_value_comes_from(session, capsys):
    Path("mine.yaml").write_text("save_every: 5k\n")
    words = ["gate.txt", "window=64", "--config", "mine.yaml", "--print-config"]
    assert cli.main(["stream", *words, "--json", "--session", str(session)]) == 0
    shown = json.loads(capsys.readouterr().out)
    origins = {key: shown["origins"][key] for key in ("window", "save_every", "threads")}
    assert origins == {"window": "command line", "save_every": "file", "threads": "session"}
    assert (shown["config"]["window"], shown["config"]["save_every"]) == (64, 5000)
    assert cli.main(["stream", *words]) == 0  # of a new session in runs/gate
    assert not Path("runs").exists()
    assert "save_every: 5000" in capsys.readouterr().out


def test_plots_that_cannot_be_written_do_not_fail_the_stream(model, capsys, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "draw_plots", full)
    assert cli.main(["stream", "gate.txt", model, "threads=1", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "No space left" in err and "bits per byte" in out


def test_plots_that_a_call_did_not_come_to_are_made_by_the_next(model, capsys):
    call = ["stream", "gate.txt", model, "threads=1", "--session", "s"]
    assert cli.main(call) == 0
    Path("s/reading.png").unlink()
    assert cli.main(call) == 0 and Path("s/reading.png").exists()
    lines = Path("s/metrics.jsonl").read_text()
    Path("s/metrics.jsonl").write_text("x" * len(lines))
    Path("s/reading.png").unlink()
    capsys.readouterr()
    assert cli.main(call) == 0
    assert "plots could not be made" in capsys.readouterr().err


def test_ask_gives_one_object_and_changes_nothing(session, capsys):
    before = {path.name: path.read_bytes() for path in session.iterdir()}
    assert cli.main(["ask", str(session), "Where is the gate?", "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert list(answer) == ["question", "answer", "confidence", "known", "tokens", "passages"]
    assert answer["question"] == "Where is the gate?" and "confidence" in err
    assert all(set(passage) == {"position", "text", "mass"} for passage in answer["passages"])
    assert {path.name: path.read_bytes() for path in session.iterdir()} == before


def test_the_answer_does_not_need_the_archive_of_ids(session, capsys):
    shutil.copytree(session, "copy")
    Path("copy/ids.bin").unlink()
    answers = []
    for folder in (str(session), "copy"):
        assert cli.main(["ask", folder, "Where is the gate?", "--json"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_the_prompt_answers_many_questions_with_one_load(session, capsys, monkeypatch):
    from wakesleep.streams.session import Session

    loads = []
    load = Session.load
    monkeypatch.setattr(Session, "load", lambda *words: loads.append(1) or load(*words))
    questions = f"Where is the gate?\n\n{'too long ' * 99}\nWho painted it?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
    assert cli.main(["ask", str(session)]) == 0
    out, err = capsys.readouterr()
    assert out.count("confidence") == 2 and len(loads) == 1 and "the window holds" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs the folder"),
        (["none", "Where?"], "none"),
        (["SESSION", "Where", "is", "it?"], "Put the question in quotes"),
        (["SESSION", "Where?", "device=tpu"], "expected one of auto, cpu, cuda, mps"),
        (["SESSION", "--json"], "--json needs a question"),
    ],
)
def test_ask_refuses_in_words(session, capsys, words, message):
    words = [str(session) if word == "SESSION" else word for word in words]
    assert cli.main(["ask", *words]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and len(err.splitlines()) <= 3


def test_an_answer_shows_passages_without_what_a_terminal_would_obey(session, capsys):
    from wakesleep.streams.ask_command import answer_text

    passage = {"position": 12_345, "text": "red \x1b[31m text\nnext", "mass": 0.5}
    answer = {"answer": "Ro\x07me", "known": True, "confidence": 0.912, "passages": [passage]}
    assert answer_text(answer).splitlines() == [
        r"Ro\x07me   (confidence 0.91)",
        r"  at  12.3k  red \x1b[31m text\nnext",
    ]
    assert answer_text(answer | {"known": False}, with_passages=False) == (
        r"not known   (confidence 0.91; a guess: Ro\x07me)"
    )
