"""Build the bundled document: an encyclopaedia, cut to just over ten million tokens.

    python scripts/build_document.py data/eb4/*_v0[1-8]* --output streams/data

Writes document.txt.xz and document.json. The same inputs give the same text; it is joined in the
order of the arguments, with a blank line between files.
"""

import argparse
import hashlib
import json
import lzma
import re
from pathlib import Path

from wakesleep.streams.tokenizer import WHITE_SPACE, Tokenizer

TOKENS = 10_000_000
# A larger dictionary would save 4 % on disk and make the reader's memory grow with the document.
DICTIONARY = 4 << 20  # bytes
DESCRIPTION = {
    "name": "britannica",
    "title": "Encyclopaedia Britannica, fourth edition (1801-1810), from A to Electricity",
    "source": (
        "https://github.com/jburnford/Encyclopedia_Britannica_1771-1860 "
        "commit 27b268cb9491570b276e06abe7fcf1c14dbfc886, html/EB.9_ed4_*.html; machine "
        "transcription of scans by the National Library of Scotland, running text only"
    ),
    "licence": "public domain",
}


def cut(text: str, tokenizer: Tokenizer, tokens: int) -> tuple[str, int]:
    """Return the shortest start of a text, in whole words, of more than `tokens` tokens.

    Raises:
        ValueError: the text has too few.
    """
    count = size = 0
    for ids in tokenizer.encode_stream([text]):
        if count + len(ids) > tokens:
            start = tokenizer.decode(ids[: tokens + 1 - count])
            break
        count += len(ids)
        size += len(tokenizer.decode(ids))
    else:
        raise ValueError(f"the files hold {count:,} tokens, more than {tokens:,} are needed")
    end = re.compile(f"[{WHITE_SPACE}]|$").search(text, size + len(start)).start()
    return text[:end], count + len(tokenizer.encode(text[size:end]))


def main() -> None:
    """Read the command line, join, cut, compress and describe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="texts as .xz, in order")
    parser.add_argument("--tokenizer", type=Path, help="default: OUTPUT/default/tokenizer.json")
    parser.add_argument("--output", required=True, type=Path, help="folder")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer or args.output / "default" / "tokenizer.json")
    parts = [lzma.decompress(path.read_bytes()).decode("utf-8") for path in args.files]
    text, tokens = cut("\n\n".join(part.strip() for part in parts), tokenizer, TOKENS)
    content = text.encode("utf-8")
    filters = [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9 | lzma.PRESET_EXTREME,
            "dict_size": DICTIONARY,
        }
    ]
    compressed = lzma.compress(content, check=lzma.CHECK_CRC64, filters=filters)
    description = DESCRIPTION | {
        "tokens": tokens,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "tokenizer_sha256": tokenizer.sha256,
    }
    (args.output / "document.txt.xz").write_bytes(compressed)
    (args.output / "document.json").write_text(json.dumps(description, indent=2) + "\n")
    print(f"{tokens:,} tokens, {len(content):,} bytes, {len(compressed):,} compressed")


if __name__ == "__main__":
    main()
