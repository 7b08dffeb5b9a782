"""Answer the published test questions of bAbI tasks 1 to 5, with text between the sentences or not.

    python scripts/babi_accuracy.py runs/babi/last babi_en.tar.xz
    python scripts/babi_accuracy.py runs/babi/last babi_en.tar.xz --noise valid.npy \\
        --lengths 0,2000,8000 --samples 200

Every question is a sample of its own: all sentences of its story before it, no earlier question,
then the question (as in BABILong, arXiv 2406.10149). With a length, the sentences lie in their
order at random places of a passage, so that passage and sentences have that many tokens. Right
means that the likeliest answer is the published one in all its tokens, the end included.
"""

import argparse
import random
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from recall_rows import wilson

from wakesleep.streams.language_model import LanguageModel, load_language_model
from wakesleep.streams.prompts import encode_answer, encode_question, statement_ids
from wakesleep.streams.sequences import BABI

SEGMENT = 512  # tokens of a call
LANES = 16


class Sample(NamedTuple):
    story: list[str]  # its sentences
    question: str
    answer: str


def samples_of(lines: Sequence[str]) -> Iterator[Sample]:
    """One sample per question of a published file."""
    story: list[str] = []
    for line in lines:
        number, _, text = line.rstrip("\n").partition(" ")
        if number == "1":
            story = []
        if "\t" in text:
            question, answer = text.split("\t")[:2]
            yield Sample(list(story), question.strip(), answer)
        else:
            story.append(text)


def read_archive(path: Path) -> dict[str, list[Sample]]:
    """The test questions of each task, of the larger edition where both are there.

    Raises:
        SystemExit: a task is missing.
    """
    found: dict[str, list[Sample]] = {}
    with tarfile.open(path) as archive:
        names = sorted(name for name in archive.getnames() if name.endswith("_test.txt"))
        for task in BABI:
            mine = [name for name in names if Path(name).name.startswith(f"{task}_")]
            if not mine:
                raise SystemExit(f"{path} has no {task}_*_test.txt")
            best = next((name for name in mine if "en-10k" in name), mine[0])
            text = archive.extractfile(best).read().decode("utf-8")
            found[task] = list(samples_of(text.splitlines()))
    return found


def lay(
    model: LanguageModel, sample: Sample, noise: np.ndarray | None, length: int, draw: random.Random
) -> tuple[list[int], int]:
    """Ids of a sample up to the end of its answer, and how many of them are the answer."""
    said = [statement_ids(model.tokenizer, sentence) for sentence in sample.story]
    spare = max(0, length - sum(map(len, said)))
    start = draw.randrange(len(noise) - spare) if spare else 0
    text = noise[start : start + spare].tolist() if spare else []
    places = sorted(draw.randint(0, spare) for _ in said)
    ids, done = [], 0
    for place, sentence in zip(places, said, strict=True):
        ids += text[done:place] + sentence
        done = place
    answer = encode_answer(model.tokenizer, sample.answer)
    question = encode_question(model.tokenizer, sample.question)
    return [*ids, *text[done:], *question, *answer], len(answer)


@torch.inference_mode()
def count_right(model: LanguageModel, rows: Sequence[tuple[list[int], int]]) -> list[bool]:
    """Whether each answer is the likeliest one; all rows are read side by side."""
    net = model.model
    state = net.init_state(len(rows))
    length = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    for lane, (ids, _) in enumerate(rows):
        tokens[lane, : len(ids)] = torch.tensor(ids)
    whole = torch.tensor([len(ids) for ids, _ in rows])
    first = whole - torch.tensor([count for _, count in rows])
    right = torch.ones(len(rows), dtype=torch.bool)
    for begin in range(0, length, SEGMENT):
        here = tokens[:, begin : begin + SEGMENT]
        lengths = (whole - begin).clamp(0, here.shape[1])
        hidden, state, _ = net(here, state, lengths, head=False)
        column = begin + torch.arange(here.shape[1])
        answers = (column >= first[:, None] - 1) & (column < whole[:, None] - 1)
        lane, place = answers.nonzero(as_tuple=True)
        if len(lane):
            said = (hidden[lane, place] @ net.embedding.weight.T).argmax(-1)
            wrong = said != tokens[lane, begin + place + 1]
            right[lane[wrong]] = False
    return right.tolist()


def main() -> None:
    """Read the command line, ask, and print a row per task and length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("archive", type=Path, help="tar with the published files")
    parser.add_argument("--noise", type=Path, help=".npy of ids: text to lay sentences into")
    parser.add_argument("--lengths", default="0", help="tokens of a passage; 0: sentences alone")
    parser.add_argument("--samples", type=int, default=1000, help="of each task")
    parser.add_argument("--seed", type=int, default=0, help="of places and passages")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    if any(lengths) and args.noise is None:
        parser.error("lengths above 0 need --noise")
    noise = None if args.noise is None else np.load(args.noise, mmap_mode="r")
    model = load_language_model(args.model, device="cpu")
    archive = read_archive(args.archive)
    print("| task | tokens | right | of | 95 % interval | most frequent answer |")
    print("|---|--:|--:|--:|---|--:|")
    for length in lengths:
        for task, samples in archive.items():
            draw = random.Random(f"{args.seed} {task} {length}")
            chosen = samples[: args.samples]
            rows = [lay(model, sample, noise, length, draw) for sample in chosen]
            rows.sort(key=lambda row: len(row[0]))  # lanes of about the same length
            right = 0
            for start in range(0, len(rows), LANES):
                right += sum(count_right(model, rows[start : start + LANES]))
                done = min(start + LANES, len(rows))
                print(f"\r{task}, {done:,} of {len(rows):,} ", end="", file=sys.stderr)
            print("\r", end="", file=sys.stderr)
            low, high = wilson(right, len(rows))
            often = Counter(sample.answer for sample in chosen).most_common(1)[0][1]
            print(
                f"| {task} | {length:,} | {right / len(rows):.1%} | {len(rows):,} "
                f"| {low:.1%} to {high:.1%} | {often / len(rows):.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
