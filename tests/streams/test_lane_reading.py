"""Several documents side by side give what each gives alone, and go on where they stopped."""

import json
import math
import random
import signal

import pytest

from wakesleep.streams import session
from wakesleep.streams.errors import Refused
from wakesleep.streams.session import Session
from wakesleep.streams.stopping import Stopped, StopSignals

OPTIONS = {"lanes": 2, "keep_ids": False, "segment_len": 64, "save_every": 256, "threads": 1}
LENGTHS = (90, 30, 150, 10, 60)  # lines


@pytest.fixture
def folder(tmp_path):
    draw = random.Random(1)
    (tmp_path / "f").mkdir()
    for index, length in enumerate(LENGTHS):
        lines = [f"{draw.choice('abcd')} {draw.randint(0, 99)} gates." for _ in range(length)]
        (tmp_path / "f" / f"{index}.txt").write_text("\n".join(lines))
    return tmp_path / "f"


def stream(path, model, document, **options):
    with Session.open(path, model, **{**OPTIONS, **options}) as opened:
        return opened.read(document)


def manifest(path):
    return json.loads((path / "session.json").read_text())


def test_lanes_score_every_document_as_if_it_were_alone(folder, tmp_path, language_model):
    together = stream(tmp_path / "s", language_model, folder)
    alone = []
    for index in range(len(LENGTHS)):
        one = stream(tmp_path / str(index), language_model, folder / f"{index}.txt", lanes=1)
        alone.append(one)
    for name in ("tokens", "bytes", "wake_flops", "nonfinite_rows"):
        assert together[name] == sum(one[name] for one in alone), name
    bits = sum(one["bits_per_byte"] * one["bytes"] for one in alone) / together["bytes"]
    assert math.isclose(together["bits_per_byte"], bits, rel_tol=1e-5)
    documents = manifest(tmp_path / "s")["documents"]
    assert [d["tokens"] for d in documents] == [one["tokens"] for one in alone]
    assert all(d["finished"] and d["ended"] for d in documents)


def test_lanes_that_were_stopped_equal_one_run(folder, tmp_path, language_model, monkeypatch):
    straight = stream(tmp_path / "x", language_model, folder)

    class StopAt(StopSignals):
        left = 9

        def __bool__(self):
            self.left -= 1
            self.number = signal.SIGINT if self.left < 0 else None
            return self.left < 0

    with monkeypatch.context() as patch:
        patch.setattr(session, "StopSignals", StopAt)
        with pytest.raises(Stopped):
            stream(tmp_path / "y", language_model, folder)
    begun = manifest(tmp_path / "y")
    assert sum(not d["finished"] for d in begun["documents"]) == 2
    resumed = stream(tmp_path / "y", language_model, None)
    assert resumed["resumed_at"] == [begun["tokens"]]
    assert resumed["bits_per_byte"] == straight["bits_per_byte"]
    states = [(tmp_path / n / manifest(tmp_path / n)["state"]).read_bytes() for n in "xy"]
    assert states[0] == states[1]
    assert manifest(tmp_path / "x")["documents"] == manifest(tmp_path / "y")["documents"]
    assert stream(tmp_path / "y", language_model, folder) == resumed


def test_other_documents_than_those_begun_are_refused(folder, tmp_path, language_model):
    stream(tmp_path / "s", language_model, folder)
    (folder / "0a.txt").write_text("A file between the others.")
    with pytest.raises(Refused, match=r"1\.txt.*number 2"):
        stream(tmp_path / "s", language_model, folder)


def test_lanes_keep_no_ids_and_plant_no_facts_unless_they_are_asked_to(tmp_path, language_model):
    with Session.open(tmp_path / "s", language_model, lanes=2, threads=1) as opened:
        prepared = opened.prepare()  # the bundled document
        assert (
            not opened.config.keep_ids and prepared.facts == () and prepared.config.facts.count == 0
        )


@pytest.mark.parametrize("options", [{"keep_ids": True}, {"limit_tokens": 9}, {"facts.count": 2}])
def test_keys_that_lanes_do_not_go_with_are_refused(folder, tmp_path, language_model, options):
    with pytest.raises(Refused, match=next(iter(options))):
        stream(tmp_path / "s", language_model, folder, **options)
    assert not (tmp_path / "s").exists()


def test_lanes_are_not_asked(folder, tmp_path, language_model):
    with Session.open(tmp_path / "s", language_model, **OPTIONS) as opened:
        opened.read(folder)
        with pytest.raises(Refused, match="several lanes"):
            opened.ask("Who?")
