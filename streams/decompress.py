"""Read a file in pieces of at most 1 MiB, decompressed if its name says so.

A small file can decompress to a hundred gigabytes; the caller therefore gives the highest ratio
of output to input that it takes, and memory stays bounded whatever the file holds.
"""

import bz2
import lzma
import zlib
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path

from wakesleep.streams.errors import Refused

PIECE = 1 << 20  # bytes, the most that is decompressed at a time
FEED = 4096  # compressed bytes at a time: the resolution of the ratio
XZ_MEMORY = 128 << 20  # bytes; the strongest preset needs 65 MiB

COMPRESSIONS = (".gz", ".xz", ".bz2")


def read_pieces(path: Path, max_ratio: float) -> Iterator[bytes]:
    """Yield the content of a regular file, decompressed for .gz, .xz and .bz2.

    Raises:
        Refused: more than max_ratio bytes of output per byte of input, or a damaged file.
    """
    with open(path, "rb", buffering=0) as file:
        if path.suffix.lower() in COMPRESSIONS:
            yield from _decompressed(file, path, max_ratio)
        else:
            while piece := file.read(PIECE):
                yield piece


def _decompressed(file: RawIOBase, path: Path, max_ratio: float) -> Iterator[bytes]:
    fed = made = 0
    data, stream = b"", None
    while True:
        if not data and (stream is None or stream.needs_input):
            data = file.read(FEED)
            fed += len(data)
            if not data:
                break
        if stream is None:
            # Files may be joined; zeros are allowed as padding behind a part.
            data = data.lstrip(b"\0") if fed > len(data) else data
            if not data:
                continue
            stream = _new_stream(path.suffix.lower())
        try:
            piece = stream.decompress(data, PIECE)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise _damaged(path, f"{error}, at or before compressed byte {fed}") from error
        data = b""
        if stream.eof:
            data, stream = stream.unused_data, None
        made += len(piece)
        if made > max_ratio * fed:
            raise Refused(
                f"{path.name} decompresses to more than {max_ratio:,g} times its size",
                f"after {fed:,} compressed and {made:,} decompressed bytes",
                "if you trust the file, allow more: max_ratio=inf",
            )
        if piece:
            yield piece
    if stream is not None:
        raise _damaged(path, f"it ends in the middle, after {fed:,} compressed bytes")


def _new_stream(suffix: str):
    match suffix:
        case ".gz":
            return _GzipStream()
        case ".bz2":
            return bz2.BZ2Decompressor()
        case _:
            return lzma.LZMADecompressor(memlimit=XZ_MEMORY)


class _GzipStream:
    """One gzip member with the interface of the other two decompressors."""

    def __init__(self):
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


def _damaged(path: Path, why: str) -> Refused:
    kind = path.suffix.lower()[1:]
    if "memory" in why.lower():
        remedy = f"decompress it yourself: more than {XZ_MEMORY >> 20} MiB are not lent to a file"
    else:
        remedy = f"copy or download it again, or rename it if it is not {kind}"
    return Refused(f"{path.name} cannot be read as {kind}", why, remedy)
