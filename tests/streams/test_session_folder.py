"""A session's folder: who may write it, what may change, and what is not believed."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wakesleep.streams import language_model as language_models
from wakesleep.streams import session
from wakesleep.streams.errors import Refused
from wakesleep.streams.session import Session

OPTIONS = {"segment_len": 128, "save_every": 512, "threads": 1}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "session.json").read_text())


def stream(folder, model, document, **options) -> dict:
    with Session.open(folder, model, **{**OPTIONS, **options}) as opened:
        return opened.read(document)


def test_a_refused_call_makes_no_folder(tmp_path, language_model, text):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "nul.txt").write_bytes(b"hello \0\0 world")
    calls = [
        ("nothere.txt", {}),
        ("empty.txt", {}),
        ("nul.txt", {}),
        ("a.txt", {"window": -1}),
        ("a.txt", {"window": 100}),  # no multiple of the chunk
        ("a.txt", {"store": {"capacity": 10**18}}),
        ("a.txt", {"widnow": 3}),
        ("a.txt", {"facts": {"count": 4}, "limit_tokens": 100}),
    ]
    for name, options in calls:
        with pytest.raises(ValueError):
            stream(tmp_path / "s", language_model, tmp_path / name, **options)
        assert not (tmp_path / "s").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path, language_model, text, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(Refused, match="MB are free"):
        stream(tmp_path / "s", language_model, text)
    assert not (tmp_path / "s").exists()


def test_fixed_keys_that_are_left_open_are_the_sessions(tmp_path, language_model, text):
    """`--print-config` of a new session says keep_ids: null and facts.count: null."""
    facts = {"count": 2, "kinds": "pass_code"}
    stream(tmp_path / "s", language_model, text, facts=facts)
    first = manifest(tmp_path / "s")
    (tmp_path / "b.txt").write_text("And this is another text. " * 30)
    left_open = {"keep_ids": None, "facts": {"count": None}, "dtype": "auto"}
    stream(tmp_path / "s", language_model, tmp_path / "b.txt", **left_open)
    second = manifest(tmp_path / "s")
    assert second["ids_bytes"] > first["ids_bytes"] > 0
    for key in ("keep_ids", "facts", "dtype"):
        assert second["config"][key] == first["config"][key]


def test_a_cut_off_the_grid_is_told(tmp_path, language_model, text):
    notes = {}
    for limit in (300, 384):
        folder = tmp_path / str(limit)
        stream(folder, language_model, text, limit_tokens=limit)
        with Session.open(folder, language_model, **OPTIONS, limit_tokens=1000) as opened:
            notes[limit] = opened.notes
    assert notes[384] == [] and "limit_tokens was 300, no multiple" in notes[300][0]


def test_a_limit_may_not_fall_without_a_document_either(tmp_path, language_model, text):
    stream(tmp_path / "s", language_model, text, limit_tokens=300)
    with pytest.raises(Refused, match=r"limit_tokens=200 is given, the session has .*=300"):
        stream(tmp_path / "s", language_model, None, limit_tokens=200)


def test_a_finished_session_on_a_read_only_disk_is_shown_again(
    tmp_path, language_model, text, monkeypatch
):
    first = stream(tmp_path / "s", language_model, text)
    real = os.open

    def read_only(path, flags, *args, **kw):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *args, **kw)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert stream(tmp_path / "s", language_model, text) == first
    (tmp_path / "b.txt").write_text("And this is another text. " * 30)
    with pytest.raises(Refused, match="cannot be written"):
        stream(tmp_path / "s", language_model, tmp_path / "b.txt")


def test_files_of_others_are_not_overwritten(tmp_path, language_model, text):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "metrics.jsonl").write_text("mine")
    with pytest.raises(Refused, match=r"metrics\.jsonl"):
        stream(tmp_path / "s", language_model, text)
    assert (tmp_path / "s" / "metrics.jsonl").read_text() == "mine"


def test_a_second_writer_is_refused_and_readers_are_not(straight, language_model, model_folder):
    with Session.open(straight, language_model):
        files = {path: path.stat().st_mtime_ns for path in straight.iterdir()}
        with pytest.raises(Refused, match="another process"):
            Session.open(straight, language_model)
        code = "import sys; from wakesleep.streams.session import Session\n"
        code += "try: Session.open(*sys.argv[1:])\nexcept ValueError as e: print(e); sys.exit(2)"
        arguments = [str(straight), str(model_folder)]
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
        )
        assert run.returncode == 2 and "another process" in run.stdout
        reader = Session.load(straight, {"model": str(model_folder)})
        assert reader.ask("Where does Ann Reed live?").tokens == manifest(straight)["tokens"]
        assert {path: path.stat().st_mtime_ns for path in straight.iterdir()} == files
        with pytest.raises(Refused, match="loaded to ask"):
            reader.read()
    Session.open(straight, language_model).close()


def test_answers_do_not_need_the_ids(straight, language_model, text, tmp_path, model_folder):
    stream(tmp_path / "bare", language_model, text, keep_ids=False)
    assert not (tmp_path / "bare" / "ids.bin").exists()
    question = "What is the pass code of the amber gate?"
    keys = {"model": str(model_folder)}
    with_ids = Session.load(straight, keys).ask(question)
    (straight / "ids.bin").unlink()
    for folder in (tmp_path / "bare", straight):
        assert Session.load(folder, keys).ask(question) == with_ids


def test_a_reader_takes_the_new_snapshot_if_the_old_one_goes(
    straight, language_model, model_folder, monkeypatch
):
    old = straight.with_name("old")
    shutil.copytree(straight, old)
    stream(straight, language_model, None)
    with Session.open(straight, language_model, store={"capacity": 16}) as opened:
        opened.save()
        opened.save()
    before = session.read_manifest(old)
    answers = iter([before, *[session.read_manifest(straight)] * 9])
    (straight / before.state).unlink(missing_ok=True)
    monkeypatch.setattr(session, "read_manifest", lambda folder: next(answers))
    reader = Session.load(straight, {"model": str(model_folder)})
    assert reader.runner.state.blocks[1].store.position.shape[-1] == 16


def test_the_last_two_snapshots_stay(straight):
    states = sorted(path.name for path in straight.glob("state-*"))
    assert len(states) == 2 and states[-1] == manifest(straight)["state"]


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float64"}, {"seed": 5}, {"keep_ids": False}, {"facts": {"count": 3}}],
    ids=lambda options: next(iter(options)),
)
def test_another_value_of_a_fixed_key_is_refused_with_both(straight, language_model, options):
    with pytest.raises(Refused, match=r"(?s)is given, the session has"):
        Session.open(straight, language_model, **options)


@pytest.mark.parametrize("units", [set(), {"avx512_bf16"}], ids=["without units", "with units"])
def test_the_dtype_is_chosen_once_and_kept(tmp_path, monkeypatch, model_folder, text, units):
    monkeypatch.setattr(language_models, "BF16_UNITS", units)
    flags = tmp_path / "cpuinfo"
    flags.write_text("flags : fpu avx2 avx512_bf16")
    monkeypatch.setattr(language_models, "CPU_INFO", flags)
    with Session.open(tmp_path / "s", model_folder, threads=1) as opened:
        opened.read(text)
    chosen = "bfloat16" if units else "float32"
    assert manifest(tmp_path / "s")["config"]["dtype"] == chosen
    monkeypatch.setattr(language_models, "BF16_UNITS", {"fpu"} - units)
    for options in ({}, {"dtype": "auto"}):
        with Session.open(tmp_path / "s", **options) as opened:
            assert opened.config.dtype == chosen
            weight = opened.language_model.model.embedding.weight
            assert str(weight.dtype) == f"torch.{chosen}"


def test_keys_left_out_are_those_of_the_session(tmp_path, language_model, text):
    options = {"window": 32, "store": {"capacity": 8}, "segment_len": 64}
    stream(tmp_path / "s", language_model, text, limit_tokens=500, **options)
    with Session.open(tmp_path / "s", language_model) as opened:
        assert opened.config.window == 32 and opened.config.store.capacity == 8
        assert opened.config.segment_len == 64 and opened.notes == []


def test_window_and_capacity_may_change(tmp_path, language_model, text):
    stream(tmp_path / "s", language_model, text, limit_tokens=1000)
    sizes = {"window": 32, "store": {"capacity": 8}}
    stream(tmp_path / "s", language_model, text, limit_tokens=1500, **sizes)
    with Session.open(tmp_path / "s", language_model) as opened:
        assert opened.runner.state.blocks[1].store.position.shape[-1] == 8
        assert opened.language_model.model.window_of(opened.runner.state) == 32
        assert opened.config.window == 32
    with Session.open(tmp_path / "s", language_model, store={"capacity": 64}) as opened:
        opened.save()  # as many tokens as before, another state
    with Session.open(tmp_path / "s", language_model) as opened:
        assert opened.runner.state.blocks[1].store.position.shape[-1] == 64


def test_another_setting_is_said_in_one_line(straight, language_model):
    with Session.open(straight, language_model, segment_len=64, threads=2) as opened:
        (note,) = opened.notes
        assert "threads was 1, is 2" in note and "segment_len was 128, is 64" in note
    with Session.open(straight, language_model, threads=1) as opened:
        assert "threads" not in " ".join(opened.notes)


def test_another_model_is_refused(straight, language_model):
    other = language_model._replace(model_sha256="0" * 64)
    with pytest.raises(Refused, match="another model"):
        Session.open(straight, other)


def flip_a_bit(folder, found):
    path = folder / found["state"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_the_state(folder, found):
    os.truncate(folder / found["state"], 200)


def remove_the_state(folder, found):
    (folder / found["state"]).unlink()


def name_another_folder(folder, found):
    write(folder, {**found, "state": f"../straight/{found['state']}"})


def link_the_state(folder, found):
    path = folder / found["state"]
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")


def link_the_manifest(folder, found):
    (folder / "session.json").rename(folder / "elsewhere")
    (folder / "session.json").symlink_to(folder / "elsewhere")


def pipe_instead_of_the_state(folder, found):
    (folder / found["state"]).unlink()
    os.mkfifo(folder / found["state"])


def ask_for_a_huge_store(folder, found):
    found["config"]["store"]["capacity"] = 1 << 20
    write(folder, found)


def ask_for_an_impossible_window(folder, found):
    found["config"]["window"] = 10**15
    write(folder, found)


def claim_other_tokens(folder, found):
    write(folder, {**found, "tokens": 12})


def break_the_schema(folder, found):
    write(folder, {**found, "schema": 1})


def add_a_field(folder, found):
    write(folder, {**found, "class": "os.system"})


def put_text_for_a_number(folder, found):
    found["meters"]["total"]["nats"] = "1.0"
    write(folder, found)


def shorten_the_metrics(folder, found):
    os.truncate(folder / "metrics.jsonl", 3)


def link_the_ids(folder, found):
    (folder / "ids.bin").rename(folder / "elsewhere")
    (folder / "ids.bin").symlink_to(folder / "elsewhere")


def write(folder, found):
    (folder / "session.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    "spoil",
    [
        flip_a_bit,
        cut_the_state,
        remove_the_state,
        name_another_folder,
        link_the_state,
        link_the_manifest,
        pipe_instead_of_the_state,
        ask_for_a_huge_store,
        ask_for_an_impossible_window,
        claim_other_tokens,
        break_the_schema,
        add_a_field,
        put_text_for_a_number,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_folder_that_was_tampered_with_is_refused(
    straight, tmp_path, language_model, model_folder, text, spoil
):
    folder = tmp_path / "x"
    shutil.copytree(straight, folder)
    spoil(folder, manifest(folder))
    with pytest.raises(ValueError) as asked:
        Session.load(folder, {"model": str(model_folder)})
    with pytest.raises(ValueError) as read:
        stream(folder, language_model, text)
    assert all(len(str(e.value).splitlines()) <= 3 for e in (asked, read))


@pytest.mark.parametrize("spoil", [shorten_the_metrics, link_the_ids], ids=lambda f: f.__name__)
def test_what_cannot_be_appended_to_is_refused(straight, language_model, spoil):
    spoil(straight, manifest(straight))
    with pytest.raises(Refused, match="another --session"):
        Session.open(straight, language_model)
