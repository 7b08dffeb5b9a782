"""session.json: what a session is, field by field, and nothing that is not said here."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from wakesleep.streams.config import as_dict, load_config
from wakesleep.streams.meters import Meters
from wakesleep.streams.stream_config import StreamConfig
from wakesleep.streams.token_reader import START, Cursor
from wakesleep.ttl.config_json import parse_json

SCHEMA = 2
STATE_NAME = re.compile(r"state-\d{12,16}(-2)?\.safetensors")  # a bare name: no folder in it
MAX_NUMBER = 2**53
MAX_TEXT = 4096  # characters of a name, a path, a question

Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class DocumentRecord:
    """One document of a session, known by the content that was read."""

    name: str
    source: str | None  # the file, or the folder it is in; None: standard input
    sha256: str = START["sha256"]  # of the content read so far
    bytes_done: int = 0  # of that content
    tokens: int = 0  # read, planted ones and the end-of-document token before it included
    finished: bool = False  # nothing left to do: it ended, or its limit was reached
    ended: bool = False  # its end was reached
    text_tokens: int = 0  # read, the document's own alone
    offset: int = 0  # content bytes before the last boundary between tokenizer units
    skip: int = 0  # tokens from there to the place
    inserted: int = 0  # tokens read of what is put between the document's own

    @property
    def cursor(self) -> Cursor:
        """Where the document's own tokens go on."""
        return {
            "tokens": self.text_tokens,
            "bytes": self.bytes_done,
            "sha256": self.sha256,
            "offset": self.offset,
            "skip": self.skip,
        }

    def at(self, cursor: Cursor, tokens: int, inserted: int) -> DocumentRecord:
        """The same document, read up to `cursor`."""
        return dataclasses.replace(
            self,
            sha256=cursor["sha256"],
            bytes_done=cursor["bytes"],
            tokens=tokens,
            text_tokens=cursor["tokens"],
            offset=cursor["offset"],
            skip=cursor["skip"],
            inserted=inserted,
        )


@dataclass(frozen=True, kw_only=True)
class PlantedFact:
    """A fact that is said in what the session reads and asked for at the end."""

    kind: str
    statements: tuple[str, ...]
    positions: tuple[int, ...]  # tokens of the session before each statement
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A session at one snapshot."""

    schema: int = SCHEMA
    state: str = ""  # bare name of the snapshot file
    state_sha256: str = ""
    state_bytes: int = 0
    tokens: int = 0
    config: StreamConfig
    model_sha256: str
    tokenizer_sha256: str
    threads: int
    environment: str  # torch and machine that the state was made with
    documents: tuple[DocumentRecord, ...] = ()
    lane_documents: tuple[int | None, ...] = ()  # with several lanes: whose document each one reads
    facts: tuple[PlantedFact, ...] = ()
    metrics_bytes: int = 0  # of metrics.jsonl that belong to this snapshot
    ids_bytes: int = 0  # of ids.bin
    sleeps_bytes: int = 0  # of sleeps.jsonl
    ids_dtype: str = "uint16"
    meters: Meters = field(default_factory=Meters)

    def to_json(self) -> bytes:
        """The text of session.json."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["config"] = as_dict(self.config)
        values["meters"] = self.meters.to_json()
        for name in ("documents", "facts"):
            values[name] = [dataclasses.asdict(record) for record in values[name]]
        return json.dumps(values, indent=1, allow_nan=False).encode() + b"\n"


def parse_manifest(data: bytes) -> Manifest:
    """Read session.json, which a stranger may have written.

    Raises:
        ValueError: another schema, an unknown or missing field, a value that cannot be.
    """
    values = parse_json(data, "session.json")
    schema = values.get("schema") if type(values) is dict else None
    if schema != SCHEMA:
        raise ValueError(f"session.json has schema {str(schema)[:40]}; this version reads {SCHEMA}")
    config, meters = values.pop("config", None), values.pop("meters", None)
    if type(config) is not dict or type(meters) is not dict:
        raise ValueError("session.json must hold config and meters")
    values["config"] = load_config(StreamConfig, session=config)[0]
    values["meters"] = Meters.from_json(meters)
    manifest = _build(Manifest, values, "session.json")
    if not STATE_NAME.fullmatch(manifest.state):
        raise ValueError(
            f"state must be a bare name such as state-000000123456.safetensors, "
            f"found {manifest.state[:80]!r}"
        )
    if manifest.config.lanes == 1 and not all(r.finished for r in manifest.documents[:-1]):
        raise ValueError("only the last document can be unfinished")
    if any(i is not None and i >= len(manifest.documents) for i in manifest.lane_documents):
        raise ValueError("lane_documents names a document that is not there")
    if any(not _in_order(fact) for fact in manifest.facts):
        raise ValueError("a fact must have one position for each statement, in order")
    if manifest.ids_dtype not in ("uint16", "uint32"):
        raise ValueError(f"ids_dtype must be uint16 or uint32, found {manifest.ids_dtype[:40]!r}")
    return manifest


def _in_order(fact: PlantedFact) -> bool:
    rising = all(a < b for a, b in zip(fact.positions, fact.positions[1:], strict=False))
    return rising and len(fact.positions) == len(fact.statements) > 0


def _build(kind: type[Record], values: Any, where: str) -> Record:
    hints = get_type_hints(kind)
    if type(values) is not dict or set(values) != set(hints):
        odd = sorted(set(values) ^ set(hints)) if type(values) is dict else ["not an object"]
        raise ValueError(f"{where}: missing or unknown: {str(odd[0])[:60]}")
    return kind(
        **{name: _parse(hints[name], raw, f"{where}: {name}") for name, raw in values.items()}
    )


def _parse(kind: Any, raw: Any, where: str) -> Any:
    if isinstance(kind, UnionType):  # X | None
        return None if raw is None else _parse(get_args(kind)[0], raw, where)
    if get_origin(kind) is tuple and type(raw) is list:
        return tuple(_parse(get_args(kind)[0], item, where) for item in raw)
    if kind in (StreamConfig, Meters):
        return raw
    if dataclasses.is_dataclass(kind):
        return _build(kind, raw, where)
    if kind is bool and type(raw) is bool:
        return raw
    if kind is int and type(raw) is int and 0 <= raw <= MAX_NUMBER:
        return raw
    if kind is str and type(raw) is str and len(raw) <= MAX_TEXT:
        return raw
    raise ValueError(f"{where}: found {str(raw)[:60]!r}")
