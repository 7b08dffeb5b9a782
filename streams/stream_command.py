"""`wakesleep stream`: read a document into a session, or go on reading."""

from __future__ import annotations

SUMMARY = "read a document once and learn from it; goes on where it stopped"
FLAGS = (
    "--session",
    "--config",
    "--again",
    "--json",
    "--quiet",
    "--debug",
    "--print-config",
    "--dry-run",
)


def help_text() -> str:
    return """\
wakesleep stream [DOC] [--session DIR] [key=value ...]

  wakesleep stream                       the bundled document, 10M tokens
  wakesleep stream book.txt              into runs/book; again: goes on or shows
  wakesleep stream notes/ window=512     a folder, as one stream
  wakesleep stream two.txt --session runs/book      append another document
  wakesleep stream --session runs/book              finish what is unfinished

DOC: UTF-8 .txt .md .gz .xz .bz2, .npy of token ids, a folder, or - (stdin).

  --session DIR  where the session lives         --again    read DOC once more
  --config YAML  keys from a file                --dry-run  check, do nothing
  --json         summary as an object on stdout  --quiet    no progress
  --print-config keys, values and their origin   --debug    tracebacks

Keys (left out on a later call: as the session has them)
  limit_tokens=1M    stop there     window=256        tokens of exact short memory
  facts.count=64     plant facts    store.capacity=2k places of exact long memory
  facts.kinds=all    facts.seed=0   save_every=1M     tokens between snapshots
  model=DIR          device=auto    segment_len=2048  tokens per call of the model
  threads=2 seed=0   dtype=float32  keep_ids=true     errors=strict encoding=utf-8"""


def run(arguments):
    raise NotImplementedError
