"""What a session's folder believes, and what a crash between two writes leaves."""

import dataclasses
import errno
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from wakesleep.consolidation.budget import Cost, Ledger
from wakesleep.streams import snapshot
from wakesleep.streams.errors import Refused
from wakesleep.streams.manifest import DocumentRecord, Manifest, PlantedFact, parse_manifest
from wakesleep.streams.meters import Meters
from wakesleep.streams.recorder import IDS, METRICS, Recorder
from wakesleep.streams.runner import fresh, on_meta
from wakesleep.streams.snapshot import locked, read_manifest, read_snapshot, write_snapshot
from wakesleep.streams.stream_config import FactsOptions, StoreOptions, StreamConfig
from wakesleep.ttl.state import flatten, map_state


@pytest.fixture
def manifest(language_model) -> Manifest:
    return Manifest(
        config=StreamConfig(window=64, facts=FactsOptions(count=2), save_every=float("inf")),
        model_sha256=language_model.model_sha256,
        tokenizer_sha256=language_model.tokenizer.sha256,
        threads=1,
        environment="torch",
        tokens=12,
        documents=(
            DocumentRecord(name="ünï\ud800\n.txt", source="/x", finished=True, tokens=5),
            DocumentRecord(name="stdin", source=None, bytes_done=7, offset=4, skip=2),
        ),
        facts=(
            PlantedFact(
                kind="k", statements=("a", "b"), positions=(1, 2), question="?", answer="!"
            ),
        ),
        meters=Meters(seconds=1 / 3, ledger=Ledger(wake=Cost(2**70))),
    )


@pytest.fixture
def carried(language_model):
    return fresh(language_model)


def test_a_manifest_comes_back_as_it_was(manifest):
    manifest = dataclasses.replace(manifest, state="state-000000000012.safetensors")
    assert parse_manifest(manifest.to_json()) == manifest


NAMES = [
    "",
    "state.safetensors",
    "../state-000000000012.safetensors",
    "/tmp/state-000000000012.safetensors",
    "state-000000000012.safetensors\n",
    "state-000000000012.safetensors/x",
    "state-12.safetensors",
    "STATE-000000000012.safetensors",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_state_has_a_bare_name(manifest, name):
    with pytest.raises(ValueError, match="bare name"):
        parse_manifest(dataclasses.replace(manifest, state=name).to_json())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tokens",), -1),
        (("tokens",), True),
        (("tokens",), 1.0),
        (("tokens",), 1e400),
        (("threads",), "1"),
        (("documents",), {}),
        (("documents", 0, "finished"), False),  # two unfinished ones
        (("documents", 0, "name"), "n" * 5000),
        (("documents", 0, "more"), 1),
        (("facts", 0, "positions"), [-1]),
        (("facts", 0, "positions"), []),
        (("facts", 0, "positions"), [5, 5, 5]),
        (("config", "window"), 1 << 40),
        (("config", "class"), "os.system"),
        (("config",), []),
        (("meters",), None),
        (("ids_dtype",), "object"),
        (("schema",), 0),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_manifest_that_nobody_wrote_is_refused(manifest, path, value):
    manifest = dataclasses.replace(manifest, state="state-000000000012.safetensors")
    values = json.loads(manifest.to_json())
    place = values
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValueError):
        parse_manifest(json.dumps(values).encode())
    for text in (b"", b"[]", b"{", b'{"schema": 1}', b"[" * 100_000):
        with pytest.raises(ValueError):
            parse_manifest(text)


def test_a_snapshot_comes_back_bit_for_bit(manifest, carried, language_model, tmp_path):
    carried = map_state(lambda t: t + 1 if t.is_floating_point() else t, carried)
    written = write_snapshot(tmp_path, manifest, carried)
    assert read_manifest(tmp_path) == written
    again = read_snapshot(tmp_path, on_meta(language_model, StreamConfig()), written)
    for name, tensor in flatten(again).items():
        assert tensor.numpy().tobytes() == flatten(carried)[name].numpy().tobytes(), name


def test_nothing_is_allocated_for_a_file_of_other_shapes(
    manifest, carried, language_model, tmp_path, monkeypatch
):
    written = write_snapshot(tmp_path, manifest, carried)
    like = on_meta(
        language_model, StreamConfig(store=StoreOptions(capacity=1 << 20))
    )  # what a stranger's config asks for
    assert all(tensor.is_meta for tensor in flatten(like).values())
    monkeypatch.setattr("safetensors.torch.load", None)
    with pytest.raises(Refused, match=r"the config says \[1, 2, 1048576"):
        read_snapshot(tmp_path, like, written)


@pytest.mark.parametrize("crash", ["before the manifest", "before old states go"])
def test_a_crash_leaves_a_whole_session(manifest, carried, tmp_path, monkeypatch, crash):
    first = write_snapshot(tmp_path, manifest, carried)
    second = write_snapshot(tmp_path, dataclasses.replace(first, tokens=50), carried)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        target = (snapshot, "write_manifest") if "manifest" in crash else (pathlib.Path, "unlink")
        patch.setattr(*target, stop)
        with pytest.raises(KeyboardInterrupt):
            write_snapshot(tmp_path, dataclasses.replace(second, tokens=99), carried)
    found = read_manifest(tmp_path)
    assert found.tokens == (50 if crash == "before the manifest" else 99)
    assert (tmp_path / found.state).stat().st_size == found.state_bytes
    assert write_snapshot(tmp_path, dataclasses.replace(found, tokens=120), carried).tokens == 120
    assert len(list(tmp_path.glob("state-*"))) == 2


def test_the_same_tokens_twice_never_replace_the_state_that_counts(manifest, carried, tmp_path):
    written = manifest
    names = []
    for _ in range(3):
        before = written.state
        written = write_snapshot(tmp_path, written, carried)
        assert written.state != before and (tmp_path / before).exists()
        names.append(written.state)
    assert len(set(names)) == 2 and len(list(tmp_path.glob("state-*"))) == 2


def test_the_lock_ends_with_its_process(tmp_path):
    code = (
        "import os, pathlib, signal, sys\n"
        "from wakesleep.streams.snapshot import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(Refused, match="another process"), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):
        pass
    assert (tmp_path / snapshot.LOCK).exists()  # a file of nothing: there is no stale lock


def test_a_lock_file_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / snapshot.LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="cannot be written"), locked(tmp_path):
        pass


def test_growing_files_are_cut_back_to_what_counts(tmp_path):
    with Recorder(tmp_path, {METRICS: 0, IDS: 0}, "uint16") as recorder:
        recorder.ids(np.array([1, 2, 4095]))
        recorder.metrics({"tokens": 3})
        lengths = recorder.sync()
        recorder.ids(np.array([7, 7]))
        recorder.metrics({"tokens": 5})
    with Recorder(tmp_path, lengths, "uint16") as recorder:
        recorder.ids(np.array([8]))
        recorder.metrics({"tokens": 4})
    assert np.fromfile(tmp_path / IDS, "<u2").tolist() == [1, 2, 4095, 8]
    assert (tmp_path / METRICS).read_text() == '{"tokens": 3}\n{"tokens": 4}\n'


def test_a_write_that_takes_a_part_is_gone_on_with(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
    with Recorder(tmp_path, {METRICS: 0}, "uint16") as recorder:
        recorder.metrics({"tokens": 3})
    assert (tmp_path / METRICS).read_text() == '{"tokens": 3}\n'


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "short", "missing"])
def test_a_growing_file_of_another_kind_is_refused(tmp_path, kind):
    path = tmp_path / METRICS
    (tmp_path / "elsewhere").write_text("mine" * 9)
    match kind:
        case "link":
            path.symlink_to(tmp_path / "elsewhere")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "short":
            path.write_text("{}")
    with pytest.raises(Refused, match=METRICS):
        Recorder(tmp_path, {METRICS: 7}, "uint16")
    assert (tmp_path / "elsewhere").read_text() == "mine" * 9


def test_a_failed_write_is_an_error_of_the_system(tmp_path, manifest, carried, monkeypatch):
    first = write_snapshot(tmp_path, manifest, carried)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_snapshot(tmp_path, dataclasses.replace(first, tokens=50), carried)
    assert read_manifest(tmp_path) == first and len(list(tmp_path.iterdir())) == 2
