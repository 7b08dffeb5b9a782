"""The files of a session that grow: token ids, lines of metrics and of sleeps.

They are written without buffers of our own, so that a failed write fails at once and a reader sees
whole lines. What stands behind the manifest's lengths is from a process that was killed; it is cut
off when the session is opened for writing.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wakesleep.streams.errors import Refused

IDS, METRICS, SLEEPS = "ids.bin", "metrics.jsonl", "sleeps.jsonl"
SPARE_BYTES = 64 << 20  # left free on the disk


class Recorder:
    """Append to the growing files of a folder, from known lengths on.

    Args:
        lengths: bytes of each file that count, by its name; a file without an entry is not kept.

    Raises:
        Refused: a file is shorter than it should be, a link, or not a regular file.
    """

    def __init__(self, folder: Path, lengths: Mapping[str, int], ids_dtype: str) -> None:
        self._dtype = np.dtype(ids_dtype).newbyteorder("<")
        self._files: dict[str, int] = {}
        try:
            for name, length in lengths.items():
                self._files[name] = _open_cut(folder / name, length)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ids(self, ids: np.ndarray) -> None:
        """Append token ids, if they are kept."""
        if IDS in self._files:
            self._append(IDS, ids.astype(self._dtype).tobytes())

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        self._line(METRICS, line)

    def slept(self, line: Mapping[str, Any]) -> None:
        """Append what a sleep came to."""
        self._line(SLEEPS, line)

    def sync(self) -> dict[str, int]:
        """Bring everything to the disk and return the files' lengths."""
        for descriptor in self._files.values():
            os.fsync(descriptor)
        return {name: os.fstat(d).st_size for name, d in self._files.items()}

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def _line(self, name: str, line: Mapping[str, Any]) -> None:
        self._append(name, json.dumps(line, allow_nan=False).encode() + b"\n")

    def _append(self, name: str, data: bytes) -> None:
        left = memoryview(data)
        while left:  # a nearly full disk takes a part, and refuses the rest
            left = left[os.write(self._files[name], left) :]


def check_length(path: Path, length: int) -> None:
    """Refuse a file that `Recorder` would refuse, without touching it."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        if length:
            raise _spoiled(path, "is missing") from None
        return
    if not stat.S_ISREG(status.st_mode):
        raise _spoiled(path, "is not a regular file")
    if status.st_size < length:
        raise _spoiled(path, f"has {status.st_size:,} bytes, session.json knows of {length:,}")


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what would fill the disk.

    Raises:
        Refused: fewer than `needed` bytes and a reserve are free where `folder` is, or will be.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + SPARE_BYTES:
        raise Refused(
            f"the session needs about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free",
            f"on the disk of {place}",
            "make room, or keep no token ids: keep_ids=false",
        )


def _open_cut(path: Path, length: int) -> int:
    """Descriptor of a file that was cut to `length` bytes, standing at its end."""
    check_length(path, length)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        os.ftruncate(descriptor, length)
        os.lseek(descriptor, 0, os.SEEK_END)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _spoiled(path: Path, what: str) -> Refused:
    return Refused(f"{path} {what}", "", "put it back as it was, or use another --session")
