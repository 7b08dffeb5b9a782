"""Reading files that may come from a stranger, and writing files that a crash cannot spoil."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def open_regular(path: Path, max_bytes: int) -> Iterator[BinaryIO]:
    """Open a regular file of at most `max_bytes`, never through a link and never waiting.

    Raises:
        ValueError: it is missing, not readable, a link, not a regular file, or larger.
    """
    try:
        # O_NONBLOCK: a pipe in the place of the file must not hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = "a link" if error.errno == errno.ELOOP else os.strerror(error.errno)
        raise ValueError(f"{path} cannot be read: {reason}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} cannot be read: not a regular file")
    with open(descriptor, "rb") as file:
        if status.st_size > max_bytes:
            raise ValueError(f"{path} has {status.st_size:,} bytes; at most {max_bytes:,} are read")
        yield file


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256 of a whole open file, which is left at its start."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path` so that after a crash it holds either what it held before or all of `data`.

    A link or a pipe that a stranger has put in the place of `path` or of the scratch file is
    replaced, never followed.
    """
    scratch = path.with_name(f".{path.name}.new")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(scratch, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
