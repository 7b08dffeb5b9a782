"""Bytes into text, piece by piece, with the byte offset of whatever is wrong."""

import codecs
from collections.abc import Iterable, Iterator

from wakesleep.streams.errors import Refused

_WAY_OUT = "if it is text: errors=replace, or name its encoding, for example encoding=latin-1"
# Longest first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def check_encoding(encoding: str) -> None:
    """Refuse a name that Python does not know as a text encoding."""
    try:
        b"text".decode(encoding, errors="replace")
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError) as error:
        raise Refused(
            f"encoding={encoding} is not a known text encoding", "", "for example encoding=latin-1"
        ) from error


def decode(chunks: Iterable[bytes], name: str, errors: str, encoding: str) -> Iterator[str]:
    """Yield the text of a byte stream; a byte-order mark is dropped, line ends stay.

    With errors="replace", broken bytes and NUL become U+FFFD.

    Raises:
        Refused: bytes that are not in the encoding, NUL, or UTF-16 that was not announced.
    """
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    offset, first = 0, True
    for chunk, final in _with_end(_joined_start(chunks)):
        if is_utf8 and offset == 0:
            _refuse_other_unicode(chunk, name)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final)
        except UnicodeError as error:
            raise _invalid(error, offset - pending, name, encoding) from None
        if errors == "replace":
            text = text.replace("\0", "\ufffd")
        elif "\0" in text:
            before = text[: text.index("\0")].encode(encoding, errors="replace")
            mark = len("".encode(encoding)) if offset else 0  # it stands at the start only
            raise Refused(
                f"{name} is not plain text: it holds a NUL byte",
                f"at byte offset {offset - pending + len(before) - mark:,}",
                f"{_WAY_OUT} or utf-16",
            )
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        offset += len(chunk)
        if text:
            yield _without_surrogates(text, name, encoding)


def _joined_start(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Join the first chunks to at least 4 bytes, so that a mark is seen whole."""
    start = b""
    chunks = iter(chunks)
    for chunk in chunks:
        start += chunk
        if len(start) >= 4:
            break
    yield start
    yield from chunks


def _with_end(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for chunk in chunks:
        yield chunk, False
    yield b"", True


def _refuse_other_unicode(chunk: bytes, name: str) -> None:
    for mark, encoding in _MARKS:
        if chunk.startswith(mark):
            raise Refused(
                f"{name} is {encoding.upper()}, not UTF-8",
                f"byte-order mark {mark.hex(' ')} at byte offset 0",
                f"read it with encoding={encoding}",
            )


def _invalid(error: UnicodeError, base: int, name: str, encoding: str) -> Refused:
    what = f"{name} is not {encoding}"
    if not isinstance(error, UnicodeDecodeError):
        return Refused(f"{what}: {error}", f"after byte offset {base:,}", _WAY_OUT)
    byte = f"byte 0x{error.object[error.start]:02x}" if error.object else "input"
    return Refused(
        f"{what}: {byte} is not valid here ({error.reason})",
        f"at byte offset {base + error.start:,}",
        _WAY_OUT,
    )


def _without_surrogates(text: str, name: str, encoding: str) -> str:
    """Refuse the half characters that some encodings let through; no UTF-8 could hold them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(f"{name}: {encoding} yields half characters", "", _WAY_OUT) from None
    return text
