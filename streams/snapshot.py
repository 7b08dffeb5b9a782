"""A session's folder: what is written, in which order, and what is believed when it is read.

    session.json            the manifest, written last: what it does not name does not count
    state-000000123456.safetensors   state after 123,456 tokens; the last two are kept
    metrics.jsonl, ids.bin  only ever appended to; cut back to the manifest's lengths on resume

A folder may come from a stranger, and a process may die between any two writes. So every file is
opened without following links, its size and hash are compared with the manifest, and a file that is
replaced is written beside the old one first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

from wakesleep.streams.errors import Refused
from wakesleep.streams.manifest import STATE_NAME, Manifest, parse_manifest
from wakesleep.ttl.files import open_regular, sha256_of, write_atomically
from wakesleep.ttl.state import Tree
from wakesleep.ttl.state_io import MAX_STATE_BYTES, read_state, write_state

MANIFEST, LOCK = "session.json", ".lock"
MAX_MANIFEST_BYTES = 1 << 26


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only writer of a folder; the system ends the lock with the process.

    On a disk that nobody can write to, a session may still be shown again.

    Raises:
        Refused: another process writes to it, or the lock cannot be made.
    """
    import fcntl

    try:
        descriptor = _open_lock(folder / LOCK)
    except OSError as error:
        raise Refused(f"{folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Refused(
            f"{folder} is being written by another process",
            "",
            "wait until it is done, or stop it (Ctrl-C saves); ask works meanwhile",
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return os.open(path, flags | os.O_RDONLY)


def holds_session(folder: Path) -> bool:
    """Tell whether there is a manifest, or something in its place."""
    return os.path.lexists(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Read and check session.json.

    Raises:
        Refused: it is missing, a link, broken, of another schema, or holds impossible values.
    """
    if not holds_session(folder):
        raise Refused(
            f"{folder} holds no session", "", "make one: wakesleep stream DOC --session DIR"
        )
    try:
        with open_regular(folder / MANIFEST, MAX_MANIFEST_BYTES) as file:
            return parse_manifest(file.read())
    except ValueError as error:
        raise _damaged(folder, error) from error


def read_snapshot(folder: Path, like: Tree, manifest: Manifest) -> Tree:
    """Read the state that a manifest names into the form of `like`, once size and hash agree.

    Raises:
        Refused: the file is missing, a link, changed, or has other shapes than `like`.
    """
    try:
        with open_regular(folder / manifest.state, MAX_STATE_BYTES) as file:
            if os.fstat(file.fileno()).st_size != manifest.state_bytes:
                raise ValueError(
                    f"{manifest.state} has not the {manifest.state_bytes:,} bytes it had"
                )
            if sha256_of(file) != manifest.state_sha256:
                raise ValueError(
                    f"{manifest.state} was changed: its SHA-256 is not the recorded one"
                )
            state, header = read_state(file, like, manifest.state)
        if header.get("model_sha256") != manifest.model_sha256:
            raise ValueError(f"{manifest.state} belongs to another model than session.json says")
        return state
    except ValueError as error:
        raise _damaged(folder, error) from error


def write_snapshot(folder: Path, manifest: Manifest, state: Tree) -> Manifest:
    """Write a state and then the manifest that names it; return that manifest.

    The state named before stays, older ones go. If anything fails, session.json is as it was.

    Args:
        manifest: `state` as it was named before, "" if never; name, hash and size are set here.
    """
    data = io.BytesIO()
    write_state(
        data, state, {"model_sha256": manifest.model_sha256, "tokens": str(manifest.tokens)}
    )
    previous, name = manifest.state, f"state-{manifest.tokens:012d}.safetensors"
    if name == previous:  # another window, say: the old manifest needs its state until the new one
        name = f"state-{manifest.tokens:012d}-2.safetensors"
    write_atomically(folder / name, data.getbuffer())
    manifest = dataclasses.replace(
        manifest, state=name, state_sha256=sha256_of(data), state_bytes=len(data.getbuffer())
    )
    write_manifest(folder, manifest)
    for path in folder.glob("state-*"):
        if STATE_NAME.fullmatch(path.name) and path.name not in (name, previous):
            path.unlink()
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace session.json; after a crash it is the old one or the new one."""
    write_atomically(folder / MANIFEST, manifest.to_json())


def remove_leftovers(folder: Path) -> None:
    """Delete half-written files of a process that was killed; the caller holds the lock."""
    for path in folder.glob(".*.new"):
        if not path.is_dir():
            path.unlink()


def _damaged(folder: Path, error: Exception) -> Refused:
    what = str(error).splitlines()[0]
    return Refused(
        f"the session in {folder} cannot be used",
        what,
        "nothing was changed; take a copy of the session that is whole, or start another one",
    )
