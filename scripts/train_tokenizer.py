"""Train the tokenizer of the default model and write it as one JSON file.

    python scripts/train_tokenizer.py data/eb4/*_v09* ... data/novels/train/*.xz \\
        --names data/names/bio_fields.tar.xz --output streams/data/default/tokenizer.json

The same inputs in the same order give the same file, byte for byte.
"""

import argparse
import json
import lzma
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import pre_tokenizers, trainers

from wakesleep.streams.tokenizer import SPECIAL_TOKENS, Tokenizer, new_engine

VOCAB_SIZE = 4096
BLOCK = 65_536  # characters; every `keep`-th block of a file is read
LINES = 4_000  # generated sentences
REPEATS = 20  # how often each counts: enough for its words to become single tokens

ADJECTIVES = (
    "amber black blue brown golden green grey iron ivory northern old red scarlet silver "
    "southern stone violet western white wooden yellow"
).split()
NOUNS = (
    "archive barn bridge cabin castle cellar chapel dock door fort garden gate hall harbour "
    "house library mill office palace room ship station store tower vault wall workshop"
).split()
SENTENCES = (
    "The pass code of the {adjective} {noun} is {number}.",
    "What is the pass code of the {adjective} {noun}?",
    "{first} {last} lives in {city}.",
    "Where does {first} {last} live?",
    "{first} {last} has moved to {city}.",
    "Who is {first} {last}? Nobody knows; ask {first} again.",
    "When was {first} {last} born? In {number}, in {city}.",
    "Which {noun} is {adjective}? How many are there? Why? Whose is it?",
)


def blocks(path: Path, keep: int) -> Iterator[str]:
    """Yield every `keep`-th block of a UTF-8 text, xz or plain."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        index = 0
        while block := file.read(BLOCK):
            if index % keep == 0:
                yield block
            index += 1


def names(archive: Path, field: str, count: int) -> list[str]:
    """Read `count` evenly spaced entries of one list; what follows a comma is dropped."""
    with tarfile.open(archive) as tar:
        lines = tar.extractfile(f"names/{field}.txt").read().decode().splitlines()
    return [line.split(",")[0] for line in lines[:: max(1, len(lines) // count)][:count]]


def sentences(archive: Path) -> Iterator[str]:
    """Yield generated facts and questions, so that their words become single tokens."""
    draw = random.Random(0)
    first, last = names(archive, "first_name", 64), names(archive, "last_name", 64)
    city = names(archive, "city", 32)
    for index in range(LINES):
        yield " " + SENTENCES[index % len(SENTENCES)].format(
            adjective=draw.choice(ADJECTIVES),
            noun=draw.choice(NOUNS),
            number=draw.randint(1000, 999_999),
            first=draw.choice(first),
            last=draw.choice(last),
            city=draw.choice(city),
        )


def train(files: list[Path], archive: Path, keep: int) -> str:
    """Train a byte-level BPE and return its JSON."""
    engine = new_engine()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def corpus() -> Iterator[str]:
        for path in files:
            yield from blocks(path, keep)
        generated = "".join(sentences(archive))
        for _ in range(REPEATS):
            yield generated

    engine.train_from_iterator(corpus(), trainer)
    content = json.loads(engine.to_str())
    # Listed there, they would be found inside a text; in the vocabulary alone they never are.
    content["added_tokens"] = []
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"


def main() -> None:
    """Read the command line, train and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="UTF-8 texts, plain or .xz")
    parser.add_argument("--names", required=True, type=Path, help="tar of lists of names")
    parser.add_argument("--keep", type=int, default=4, help="read every n-th block of a file")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    content = train(args.files, args.names, args.keep).encode("utf-8")
    tokenizer = Tokenizer(content)
    args.output.write_bytes(content)
    print(f"{args.output}: {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256}")


if __name__ == "__main__":
    main()
