"""Tokenise texts into one array of ids, for the noise and the language of training sequences.

    python scripts/build_corpus.py data/novels/train/*.xz data/eb4/*_v09* ... \\
        --output corpus/train.npy

Writes a uint16 .npy and beside it a .json with the tokenizer's sha256 and each document's place.
"""

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wakesleep.streams.tokenizer import END, Tokenizer

PIECE = 1 << 20  # characters that are read at a time


def pieces(path: Path) -> Iterator[str]:
    """Yield a UTF-8 text, xz or plain, in pieces."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        while piece := file.read(PIECE):
            yield piece


def build(
    files: list[Path], tokenizer: Tokenizer, limit: int | None = None
) -> tuple[np.ndarray, list[dict]]:
    """Tokenise the first `limit` tokens of each of `files`, an end-of-document id after each.

    Returns:
        The ids (uint16), and name, first token and count of tokens of every document.

    Raises:
        ValueError: the vocabulary does not fit into 16 bits.
    """
    if tokenizer.vocab_size > 1 << 16:
        raise ValueError(f"vocab_size must be at most 65536, not {tokenizer.vocab_size}")
    parts: list[np.ndarray] = []
    documents: list[dict] = []
    start = 0
    for path in files:
        ids = np.concatenate([*tokenizer.encode_stream(pieces(path))])[:limit]
        parts += [ids.astype(np.uint16), np.array([END], dtype=np.uint16)]
        documents.append({"name": path.name, "start": start, "tokens": len(ids)})
        start += len(ids) + 1
    return np.concatenate(parts), documents


def main() -> None:
    """Read the command line, tokenise and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="UTF-8 texts, plain or .xz")
    parser.add_argument("--tokenizer", type=Path, default="streams/data/default/tokenizer.json")
    parser.add_argument("--limit", type=int, help="tokens kept of each file")
    parser.add_argument("--output", required=True, type=Path, help="a .npy file")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    ids, documents = build(args.files, tokenizer, args.limit)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.save(args.output, ids)
    index = {"tokenizer_sha256": tokenizer.sha256, "tokens": len(ids), "documents": documents}
    args.output.with_suffix(".json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")
    print(f"{args.output}: {len(ids):,} tokens of {len(documents)} documents")


if __name__ == "__main__":
    main()
