"""The promises of a session: it goes on where it stopped, to the last bit, whatever happened."""

import errno
import io
import json
import lzma
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from wakesleep.streams import decompress, documents, planting, reading, session
from wakesleep.streams import tokenizer as tokenizers
from wakesleep.streams.errors import Refused
from wakesleep.streams.session import Session
from wakesleep.streams.stopping import Stopped, StopSignals
from wakesleep.streams.tokenizer import END

OPTIONS = {"segment_len": 128, "save_every": 512, "threads": 1}
TIMES = {"seconds", "tokens_per_second"}
NOT_REPEATED = {*TIMES, "peak_rss_bytes", "pause_p50", "pause_p95", "pause_max", "resumed_at"}


@pytest.fixture(autouse=True, scope="module")
def _short_lines():
    """As in the session `straight`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "METRICS_EVERY", 300)
        yield


def manifest(folder: Path) -> dict:
    return json.loads((folder / "session.json").read_text())


def tensors(folder: Path) -> dict[str, bytes]:
    file = load_file(folder / manifest(folder)["state"])
    return {name: tensor.tobytes() for name, tensor in file.items()}


def lines(folder: Path) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in text.splitlines()]


def results(folder: Path) -> dict:
    """Everything of a session that must be the same in every run."""
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "state": tensors(folder),
        "ids": (folder / "ids.bin").read_bytes(),
        "metrics": lines(folder),
        "summary": {k: v for k, v in summary.items() if k not in NOT_REPEATED},
        "documents": [{**d, "source": None} for d in manifest(folder)["documents"]],
    }


def stream(folder, model, document, again=False, **options) -> dict:
    with Session.open(folder, model, **{**OPTIONS, **options}) as opened:
        return opened.read(document, again=again)


class StopAfter(StopSignals):
    """Ctrl-C after some segments."""

    def __init__(self, segments: int) -> None:
        super().__init__()
        self.left = segments

    def __bool__(self) -> bool:
        self.left -= 1
        if self.left < 0:
            self.number = signal.SIGINT
        return self.number is not None


def test_the_files_of_a_session_hold_what_was_read(straight, language_model, text):
    ids = np.frombuffer((straight / "ids.bin").read_bytes(), "<u2")
    assert language_model.tokenizer.decode(ids) == text.read_text()
    found = manifest(straight)
    assert found["tokens"] == len(ids) == found["documents"][0]["tokens"]
    assert found["documents"][0]["bytes_done"] == text.stat().st_size
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["tokens"] == len(ids) and summary["bytes"] == text.stat().st_size
    assert summary["resumed_at"] == [] and summary["sleep_flops"] == 0
    assert [line["tokens"] for line in lines(straight)][-1] == len(ids)


@pytest.mark.parametrize("stops", [[1], [3, 2, 9]], ids=str)
def test_ctrl_c_and_resume_equal_one_run(
    straight, tmp_path, language_model, text, monkeypatch, stops
):
    for segments in stops:
        with monkeypatch.context() as patch:
            patch.setattr(session, "StopSignals", lambda n=segments: StopAfter(n))
            with pytest.raises(Stopped, match="2"):
                stream(tmp_path / "s", language_model, text)
        assert manifest(tmp_path / "s")["tokens"] % 128 == 0
    summary = stream(tmp_path / "s", language_model, text)
    assert results(tmp_path / "s") == results(straight)
    assert len(summary["resumed_at"]) == len(stops)


KILLED = """
import os, signal, sys
from wakesleep.streams import reading
from wakesleep.streams.session import Session
reading.METRICS_EVERY = 300
folder, model, text, snapshots, lines = sys.argv[1:]
left = {"snapshots": int(snapshots), "lines": int(lines)}
def killing(name, function):
    def call(*given):
        result = function(*given)
        left[name] -= 1
        if left[name] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
reading.write_snapshot = killing("snapshots", reading.write_snapshot)
reading.Reading._write_metrics = killing("lines", reading.Reading._write_metrics)
Session.open(folder, model, segment_len=128, save_every=512, threads=1, dtype="float32").read(text)
"""


@pytest.mark.parametrize(
    ("snapshots", "metrics"), [(2, 0), (0, 5)], ids=["after a snapshot", "between two"]
)
def test_kill_9_and_resume_equal_one_run(
    straight, tmp_path, language_model, model_folder, text, snapshots, metrics
):
    arguments = [tmp_path / "s", model_folder, text, snapshots, metrics]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    tokens = manifest(tmp_path / "s")["tokens"]
    assert 0 < tokens < manifest(straight)["tokens"]
    summary = stream(tmp_path / "s", language_model, text)
    assert results(tmp_path / "s") == results(straight)
    assert summary["resumed_at"] == [tokens]
    assert [path.name for path in (tmp_path / "s").glob(".*.new")] == []


@pytest.mark.parametrize(
    ("call", "count"),
    [("fsync", 1), ("fsync", 4), ("replace", 1), ("replace", 2), ("write", 7), ("ftruncate", 1)],
)
def test_a_write_that_fails_loses_nothing(
    straight, tmp_path, language_model, text, monkeypatch, call, count
):
    folder = tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr(session, "StopSignals", lambda: StopAfter(5))
        with pytest.raises(Stopped):
            stream(folder, language_model, text)
    before = (folder / "session.json").read_bytes()
    calls, replaced = [], []
    original = getattr(os, call)

    def failing(*given, **options):
        calls.append(given)
        if len(calls) == count:
            raise OSError(errno.ENOSPC, "No space left on device")
        if call == "replace" and str(given[1]).endswith("session.json"):
            replaced.append(given)
        return original(*given, **options)

    failed = False
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        try:
            stream(folder, language_model, text)
        except OSError as error:
            failed = error.errno == errno.ENOSPC
    assert failed
    if failed and call == "replace" and not replaced:
        assert (folder / "session.json").read_bytes() == before
    stream(folder, language_model, text)
    assert results(folder) == results(straight)


def test_a_file_size_limit_leaves_the_session_as_it_was(
    tmp_path, language_model, model_folder, text
):
    import resource

    folder = tmp_path / "s"
    stream(folder, language_model, text, limit_tokens=1000)
    before = (folder / "session.json").read_bytes()
    code = "import sys; from wakesleep.streams.session import Session\n"
    code += "Session.open(sys.argv[1], sys.argv[2], limit_tokens=2000).read(sys.argv[3])"
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(model_folder), str(text)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1 and "File too large" in run.stderr  # not killed by SIGXFSZ
    assert (folder / "session.json").read_bytes() == before
    assert stream(folder, language_model, text, limit_tokens=2000)["tokens"] == 2000


def test_after_a_failed_write_only_the_folder_counts(tmp_path, language_model, text, monkeypatch):
    opened = Session.open(tmp_path / "s", language_model, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "write_snapshot", lambda *_: os.write(-1, b""))
        with pytest.raises(OSError):
            opened.read(text)
    for call in (opened.read, opened.save):
        with pytest.raises(Refused, match="open it again"):
            call()
    opened.close()
    assert stream(tmp_path / "s", language_model, text)["resumed_at"] == []


def test_the_same_command_again_reads_nothing(straight, language_model, text, monkeypatch):
    files = {path.name: path.read_bytes() for path in straight.iterdir()}
    summary = json.loads(files["summary.json"])
    monkeypatch.setattr(session.Session, "_reading", None)
    renamed = text.rename(text.with_name("other_name.txt"))
    for document in (renamed, None):
        assert stream(straight, language_model, document) == summary
    assert {path.name: path.read_bytes() for path in straight.iterdir()} == files


def test_a_summary_that_is_gone_or_old_is_made_again(straight, language_model, text):
    right = json.loads((straight / "summary.json").read_text())
    for spoilt in (None, "{", json.dumps({**right, "tokens": 7}), json.dumps({"tokens": 1})):
        (straight / "summary.json").unlink()
        if spoilt is not None:
            (straight / "summary.json").write_text(spoilt)
        again = stream(straight, language_model, text)
        assert {k: again[k] for k in again if k not in NOT_REPEATED} == {
            k: right[k] for k in right if k not in NOT_REPEATED
        }


def test_again_reads_once_more(straight, language_model, text):
    before = manifest(straight)["tokens"]
    summary = stream(straight, language_model, text, again=True)
    assert summary["tokens"] == 2 * before + 1  # and the end of the first document
    assert len(manifest(straight)["documents"]) == 2


def test_another_document_is_appended_after_one_end_token(straight, language_model, tmp_path):
    before = manifest(straight)["tokens"]
    (tmp_path / "b.txt").write_text("A second text about the amber gate.")
    stream(straight, language_model, tmp_path / "b.txt")
    ids = np.frombuffer((straight / "ids.bin").read_bytes(), "<u2")[before:]
    assert ids[0] == END and not (ids[1:] == END).any()
    assert language_model.tokenizer.decode(ids) == "A second text about the amber gate."
    names = [(d["name"], d["finished"]) for d in manifest(straight)["documents"]]
    assert names == [("a.txt", True), ("b.txt", True)]


def test_a_second_document_has_a_grid_of_its_own(tmp_path, language_model, text, monkeypatch):
    """Segments end at multiples since the document's start, after a resume in it too."""
    (tmp_path / "b.txt").write_text("Other. " + text.read_text())
    for name, stops in (("x", []), ("y", [4, 1])):
        stream(tmp_path / name, language_model, text, limit_tokens=1001)
        for segments in stops:
            with monkeypatch.context() as patch:
                patch.setattr(session, "StopSignals", lambda n=segments: StopAfter(n))
                with pytest.raises(Stopped):
                    stream(tmp_path / name, language_model, tmp_path / "b.txt")
            assert manifest(tmp_path / name)["documents"][1]["tokens"] % 128 == 0
        stream(tmp_path / name, language_model, tmp_path / "b.txt")
    assert results(tmp_path / "x") == results(tmp_path / "y")


@pytest.fixture
def unfinished(tmp_path, language_model, text, monkeypatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(session, "StopSignals", lambda: StopAfter(5))
        with pytest.raises(Stopped):
            stream(tmp_path / "u", language_model, text)
    return tmp_path / "u"


def test_another_document_is_refused_while_one_is_unfinished(unfinished, language_model, tmp_path):
    (tmp_path / "b.txt").write_text("Another text.")
    before = (unfinished / "session.json").read_bytes()
    with pytest.raises(Refused, match=r"a\.txt"):
        stream(unfinished, language_model, tmp_path / "b.txt")
    assert (unfinished / "session.json").read_bytes() == before


def test_a_document_that_changed_is_refused(unfinished, straight, language_model, text):
    old = text.read_text()
    text.write_text("X" + old[1:])
    with pytest.raises(Refused, match="changed"):
        stream(unfinished, language_model, text)
    text.write_text(old[:-5] + "XXXXX")  # not yet read: another end is no change
    assert stream(unfinished, language_model, text)["tokens"] > 0
    text.write_text(old)


def test_a_stop_at_the_very_limit_is_finished_by_the_next_call(
    tmp_path, language_model, text, monkeypatch
):
    stream(tmp_path / "x", language_model, text, limit_tokens=1024)
    with monkeypatch.context() as patch:
        patch.setattr(session, "StopSignals", lambda: StopAfter(7))
        with pytest.raises(Stopped):
            stream(tmp_path / "y", language_model, text, limit_tokens=1024)
    assert manifest(tmp_path / "y")["tokens"] == 1024
    stream(tmp_path / "y", language_model, text)
    assert results(tmp_path / "y") == results(tmp_path / "x")


def test_no_document_finishes_the_unfinished_one(unfinished, straight, language_model):
    stream(unfinished, language_model, None)
    assert results(unfinished) == results(straight)


def test_a_document_is_known_under_another_name_and_compression(
    unfinished, straight, language_model, text
):
    packed = text.with_name("packed.txt.xz")
    packed.write_bytes(lzma.compress(text.read_bytes()))
    text.unlink()
    stream(unfinished, language_model, packed)
    assert tensors(unfinished) == tensors(straight)


def test_a_document_that_has_grown_is_gone_on_with(straight, language_model, text, tmp_path):
    whole = text.read_text() + "A new line of the har"
    text.write_text(whole)
    stream(straight, language_model, text)
    ids = np.frombuffer((straight / "ids.bin").read_bytes(), "<u2")
    assert language_model.tokenizer.decode(ids) == whole
    assert len(manifest(straight)["documents"]) == 1
    text.write_text(whole + "bour")  # the last token read would have been another one
    with pytest.raises(Refused, match="--again"):
        stream(straight, language_model, text)


def test_the_limit_counts_tokens_over_all_calls_and_can_be_raised(tmp_path, language_model, text):
    folder = tmp_path / "s"
    assert stream(folder, language_model, text, limit_tokens=1000)["tokens"] == 1000
    assert stream(folder, language_model, text)["tokens"] == 1000  # the session's limit
    with pytest.raises(Refused, match=r"limit_tokens=900.*limit_tokens=1,000"):
        stream(folder, language_model, text, limit_tokens=900)
    summary = stream(folder, language_model, text, limit_tokens="1.5k")
    assert summary["tokens"] == 1500 and summary["resumed_at"] == [1000]


@pytest.mark.parametrize("num_files", [1, 6])
def test_a_session_holds_with_planted_facts(tmp_path, language_model, text, monkeypatch, num_files):
    """Facts are where the manifest says, count as no text, and are the same after a resume."""
    options = {"facts": {"count": 5, "seed": 3}}
    whole, size = text.read_text(), text.stat().st_size
    if num_files > 1:
        text = tmp_path / "folder"
        text.mkdir()
        for index in range(num_files):
            part = whole[index * len(whole) // num_files : (index + 1) * len(whole) // num_files]
            (text / f"{index}.txt").write_text(part)
    plain = stream(tmp_path / "plain", language_model, text)
    plan, totals = planting.plan_plants, []
    monkeypatch.setattr(planting, "plan_plants", lambda *a: totals.append(a[1]) or plan(*a))
    summary = stream(tmp_path / "x", language_model, text, **options)
    assert totals == [summary["tokens"]]  # places are drawn from all that will be read
    ids = np.frombuffer((tmp_path / "x" / "ids.bin").read_bytes(), "<u2")
    assert (ids == END).sum() == num_files - 1
    facts = manifest(tmp_path / "x")["facts"]
    assert len(facts) == len(summary["facts"]) == 5
    for fact, row in zip(facts, summary["facts"], strict=True):
        for position, statement in zip(fact["positions"], fact["statements"], strict=True):
            here = language_model.tokenizer.decode(ids[position : position + 60])
            assert here.startswith(f" {statement}")
        assert row["age_tokens"] == len(ids) - fact["positions"][-1]
        assert row["correct"] == (row["predicted"].strip() == fact["answer"])
    assert summary["bytes"] == plain["bytes"] == size
    assert summary["tokens"] > plain["tokens"]
    inserted = [record["inserted"] > 1 for record in manifest(tmp_path / "x")["documents"]]
    assert sum(inserted) > num_files // 3  # several of them hold facts
    monkeypatch.setattr(session, "StopSignals", lambda: StopAfter(7))
    with pytest.raises(Stopped):
        stream(tmp_path / "y", language_model, text, **options)
    monkeypatch.undo()
    stream(tmp_path / "y", language_model, text)
    assert results(tmp_path / "x") == results(tmp_path / "y")
    with pytest.raises(Refused, match="planted"):
        stream(tmp_path / "x", language_model, text, limit_tokens=2000)


def test_facts_asked_on_the_way_leave_no_trace(tmp_path, language_model, text, monkeypatch):
    monkeypatch.setattr(reading, "ASKED_AT", (1500, 2000))
    options = {**OPTIONS, "facts": {"count": 5}}

    class Seen:
        def __init__(self):
            self.asked = []

        def metrics(self, line):
            pass

        def answers(self, tokens, facts):
            self.asked.append((tokens, [fact["age_tokens"] for fact in facts]))

    seen = Seen()
    for name, watch in (("x", seen), ("y", None)):
        with Session.open(tmp_path / name, language_model, **options) as opened:
            opened.read(text, watch=watch)
    assert [tokens for tokens, _ in seen.asked] == [1536, 2048]
    assert all(0 < age < tokens for tokens, ages in seen.asked for age in ages)
    assert results(tmp_path / "x") == results(tmp_path / "y")


def test_a_folder_of_files_is_one_stream(tmp_path, language_model, text, monkeypatch):
    (tmp_path / "f").mkdir()
    for index in range(3):
        (tmp_path / "f" / f"{index}.txt").write_text(f"{index} " + text.read_text()[:3000])
    stream(tmp_path / "x", language_model, tmp_path / "f")
    documents = manifest(tmp_path / "x")["documents"]
    assert [d["name"] for d in documents] == ["0.txt", "1.txt", "2.txt"]
    ids = np.frombuffer((tmp_path / "x" / "ids.bin").read_bytes(), "<u2")
    assert (ids == END).sum() == 2
    monkeypatch.setattr(session, "StopSignals", lambda: StopAfter(20))
    with pytest.raises(Stopped):
        stream(tmp_path / "y", language_model, tmp_path / "f")
    monkeypatch.undo()
    assert [d["finished"] for d in manifest(tmp_path / "y")["documents"]] == [True, False]
    stream(tmp_path / "y", language_model, None)
    assert results(tmp_path / "y") == results(tmp_path / "x")
    limited = stream(tmp_path / "z", language_model, tmp_path / "f", limit_tokens=1500)
    assert limited["tokens"] == 1500
    assert stream(tmp_path / "z", language_model, tmp_path / "f")["tokens"] == 1500


def test_a_fault_in_the_middle_keeps_what_came_before(tmp_path, language_model, text, monkeypatch):
    monkeypatch.setattr(documents, "CHECKED", 1000)  # only the beginning is looked at
    monkeypatch.setattr(decompress, "PIECE", 1000)
    monkeypatch.setattr(tokenizers, "BLOCK", 1000)
    whole = text.read_text()
    text.write_bytes(whole.encode() + b"\xff\xfe")
    with pytest.raises(RuntimeError, match="saved") as fault:
        stream(tmp_path / "s", language_model, text)
    _, where, remedy = str(fault.value).splitlines()
    assert str(len(whole.encode())) in where.replace(",", "") and "errors=replace" in remedy
    found = manifest(tmp_path / "s")
    assert found["tokens"] > 0 and not found["documents"][0]["finished"]
    text.write_text(whole)
    stream(tmp_path / "s", language_model, text)
    stream(tmp_path / "t", language_model, text)
    assert tensors(tmp_path / "s") == tensors(tmp_path / "t")


def pipe_in(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input_is_always_appended(tmp_path, language_model, monkeypatch):
    for _ in range(2):
        pipe_in(monkeypatch, b"A text that comes through a pipe.")
        stream(tmp_path / "s", language_model, "-")
    documents = manifest(tmp_path / "s")["documents"]
    assert [(d["name"], d["finished"], d["source"]) for d in documents] == [
        ("stdin", True, None)
    ] * 2


def test_standard_input_that_was_cut_short_ends_there(tmp_path, language_model, text, monkeypatch):
    content = text.read_bytes()
    with monkeypatch.context() as patch:
        pipe_in(patch, content)
        patch.setattr(session, "StopSignals", lambda: StopAfter(3))
        with pytest.raises(Stopped):
            stream(tmp_path / "s", language_model, "-")
    with pytest.raises(Refused, match="second time"):
        stream(tmp_path / "s", language_model, None)
    text.write_text("Another text.")
    stream(tmp_path / "s", language_model, text)
    assert [d["finished"] for d in manifest(tmp_path / "s")["documents"]] == [True, True]


def test_bad_standard_input_makes_no_folder(tmp_path, language_model, monkeypatch):
    for content, options in (
        (b"", {}),
        (b"hello \0\0 world", {}),
        (b"A text.", {"facts": {"count": 4}}),  # its length is not known
    ):
        pipe_in(monkeypatch, content)
        with pytest.raises(Refused):
            stream(tmp_path / "s", language_model, "-", **options)
        assert not (tmp_path / "s").exists()
