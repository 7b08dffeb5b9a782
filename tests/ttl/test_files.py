"""Files from strangers are opened as regular files or not at all; a failed write loses nothing."""

import os

import pytest

from wakesleep.ttl.files import open_regular, sha256_of, write_atomically


def test_a_regular_file_is_read_and_hashed_from_its_start(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    with open_regular(path, max_bytes=3) as file:
        for _ in range(2):
            assert sha256_of(file).startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B.1
            assert file.read() == b"abc"


def make_link(path):
    path.with_name("target").write_bytes(b"abc")
    path.symlink_to("target")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "No such file"),
        (make_link, "a link"),
        (os.mkdir, "not a regular file"),
        (os.mkfifo, "not a regular file"),  # and does not wait for a writer
        (lambda path: path.write_bytes(b"abcd"), "4 bytes; at most 3"),
    ],
)
def test_anything_else_is_refused(make, words, tmp_path):
    path = tmp_path / "a"
    make(path)
    with pytest.raises(ValueError, match=words), open_regular(path, max_bytes=3):
        pass


def test_a_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a"
    for data in (b"first", b"2"):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["a", ".a.new"])
@pytest.mark.parametrize("make", [make_link, os.mkfifo])
def test_a_link_or_a_pipe_of_a_stranger_is_replaced_and_never_followed(make, name, tmp_path):
    make(tmp_path / name)
    write_atomically(tmp_path / "a", b"data")
    assert (tmp_path / "a").read_bytes() == b"data" and not (tmp_path / "a").is_symlink()
    assert not os.path.lexists(tmp_path / ".a.new")
    if (tmp_path / "target").exists():
        assert (tmp_path / "target").read_bytes() == b"abc"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(step, tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomically(path, b"first")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]
