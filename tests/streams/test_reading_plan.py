"""Which document is gone on with: known by its content, whatever else was read, and how."""

import json

import pytest

from wakesleep.streams.errors import Refused
from wakesleep.streams.runner import StreamRunner
from wakesleep.streams.session import Session

OPTIONS = {"segment_len": 64, "save_every": 10_000, "threads": 1}


class Killed(BaseException):
    pass


def stream(folder, model, document, again=False, **options):
    with Session.open(folder, model, **{**OPTIONS, **options}) as opened:
        return opened.read(document, again=again)


def records(folder):
    return json.loads((folder / "session.json").read_text())["documents"]


def kill_in(monkeypatch, segments):
    """As a kill does it: nothing is saved any more after some segments."""
    left = [segments]
    read = StreamRunner.read

    def reading(self, segment):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        read(self, segment)

    monkeypatch.setattr(StreamRunner, "read", reading)


def other(tmp_path, name="other.txt"):
    path = tmp_path / name
    path.write_text("Another text about other gates and other keys. " * 40)
    return path


@pytest.mark.parametrize("and_then", [False, True])
def test_a_finished_document_that_was_edited_is_refused(tmp_path, language_model, text, and_then):
    folder, before = tmp_path / "s", text.read_text()
    stream(folder, language_model, text)
    if and_then:
        stream(folder, language_model, other(tmp_path))
    text.write_text("X" + before[1:])
    with pytest.raises(Refused, match=f"{text.name} has changed since it was read"):
        stream(folder, language_model, text)
    assert len(records(folder)) == 1 + and_then
    stream(folder, language_model, text, again=True)
    assert len(records(folder)) == 2 + and_then
    assert stream(folder, language_model, text)["tokens"] > 0  # the new one is known now
    assert len(records(folder)) == 2 + and_then


@pytest.mark.parametrize("segments", [0, 2])
@pytest.mark.parametrize("second", [False, True])
def test_a_kill_before_any_snapshot_forgets_no_document(
    tmp_path, language_model, text, monkeypatch, segments, second
):
    folder = tmp_path / "s"
    if second:
        stream(folder, language_model, other(tmp_path, "first.txt"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, segments)
        stream(folder, language_model, text)
    *_, last = records(folder)
    assert (last["name"], last["finished"], last["tokens"]) == (text.name, False, 0)
    with pytest.raises(Refused, match=f"not finished {text.name}"):
        stream(folder, language_model, other(tmp_path))
    stream(folder, language_model, None)
    *_, last = records(folder)
    assert last["name"] == text.name and last["ended"] and len(records(folder)) == 1 + second


@pytest.mark.parametrize("same", ["equal", "a beginning"])
def test_files_that_begin_alike_are_told_apart_by_their_order(
    tmp_path, language_model, text, monkeypatch, same
):
    (tmp_path / "f").mkdir()
    whole = text.read_text()
    (tmp_path / "f" / "a.txt").write_text(whole if same == "equal" else whole[: len(whole) // 2])
    (tmp_path / "f" / "b.txt").write_text(whole)
    straight = stream(tmp_path / "x", language_model, tmp_path / "f")
    first = records(tmp_path / "x")[0]["tokens"]
    for limit in (first - 100, first + 150, float("inf")):  # in the first file, in the second
        got = stream(tmp_path / "y", language_model, tmp_path / "f", limit_tokens=limit)
        assert got["tokens"] == min(limit, straight["tokens"])
        assert stream(tmp_path / "y", language_model, tmp_path / "f")["tokens"] == got["tokens"]
    assert got["bits_per_byte"] == pytest.approx(straight["bits_per_byte"], rel=1e-6)
    assert [r["name"] for r in records(tmp_path / "y")] == ["a.txt", "b.txt"]
    assert [r["tokens"] for r in records(tmp_path / "y")] == [
        r["tokens"] for r in records(tmp_path / "x")
    ]


def test_a_document_that_is_read_once_more_is_gone_on_with(tmp_path, language_model, text):
    folder = tmp_path / "s"
    once = stream(folder, language_model, text)["tokens"]
    stream(folder, language_model, text, again=True, limit_tokens=float("inf"))
    assert [r["tokens"] for r in records(folder)] == [once, once + 1]
    assert stream(folder, language_model, text)["tokens"] == 2 * once + 1
    thrice = stream(folder, language_model, None, again=True)  # without naming it, too
    assert thrice["tokens"] == 3 * once + 2


def test_a_document_that_changed_behind_a_limit_is_refused(tmp_path, language_model, text):
    folder = tmp_path / "s"
    stream(folder, language_model, text, limit_tokens=200)
    changed = "X" + text.read_text()[1:]
    text.write_text(changed)
    with pytest.raises(Refused, match=f"{text.name} has changed since it was read"):
        stream(folder, language_model, text, limit_tokens=300)
    (tmp_path / "elsewhere").mkdir()
    namesake = tmp_path / "elsewhere" / text.name
    namesake.write_text(changed)
    stream(folder, language_model, namesake)
    assert [r["name"] for r in records(folder)] == [text.name] * 2
