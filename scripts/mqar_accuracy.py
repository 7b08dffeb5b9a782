"""Ask a model of `configs/mqar.yaml` or `configs/forgetting.yaml`: how much fits into its state.

    python scripts/mqar_accuracy.py runs/mqar/last
    python scripts/mqar_accuracy.py runs/forgetting/last --pairs 32 --overwritten 16

Sequences are of seeds that no training uses; weights and window are bfloat16, as the bytes are
counted. A guess among the values of a sequence is right in 1 of PAIRS.
"""

import argparse
from pathlib import Path

import torch
from recall_rows import wilson

from wakesleep.streams.mqar import MQAR, MQARConfig
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.model_io import load_model
from wakesleep.ttl.state import nbytes

SEED = (1 << 32) + 7_919  # training draws from seeds below, its validation from 1 << 32 on
LANES = 50


@torch.inference_mode()
def ask(model: TTLModel, task: MQAR, sequences: int) -> tuple[int, int, int, int]:
    """Right answers, answers, stale answers, and answers whose key was overwritten."""
    right = asked = stale = changed = 0
    for number in range(-(-sequences // LANES)):
        batch = task.batch(number, LANES)
        tokens = torch.from_numpy(batch["tokens"])
        logits, _, _ = model(tokens, model.init_state(LANES))
        lane, column = (torch.from_numpy(batch[f"answer_{x}"]) for x in ("lane", "start"))
        said, wanted = logits[lane, column - 1].argmax(-1), tokens[lane, column]
        before = torch.from_numpy(batch["answer_stale"])
        right, asked = right + int((said == wanted).sum()), asked + len(wanted)
        stale, changed = stale + int((said == before).sum()), changed + int((before >= 0).sum())
    return right, asked, stale, changed


def main() -> None:
    """Read the command line, ask, and print what is right and what it takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--overwritten", type=int, default=0)
    parser.add_argument("--length", type=int, default=256, help="tokens T of a sequence")
    parser.add_argument("--sequences", type=int, default=1000)
    args = parser.parse_args()
    model = load_model(args.model, torch.bfloat16)
    c = model.config
    config = MQARConfig(
        pairs=args.pairs,
        queries=args.pairs,
        overwritten=args.overwritten,
        vocab_size=c.vocab_size,
    )
    found = ask(model, MQAR(config, args.length, SEED), args.sequences)
    right, asked, stale, changed = found
    low, high = wilson(right, asked)
    places = c.store.capacity if c.store_layers else 0
    print(f"right   {right / asked:.4f} of {asked:,} answers ({low:.4f} to {high:.4f})")
    if changed:
        print(f"stale   {stale / changed:.4f} of {changed:,} answers whose key was overwritten")
    print(f"chance  {1 / args.pairs:.4f}")
    memory = c.memory.kind if c.memory_layers else "no memory"
    print(f"memory  {memory}, state of a lane {nbytes(model.init_state(1)) / 1024:.1f} KiB")
    print(
        f"exact   window {c.window} + store {places} = {c.window + places} tokens of {args.length}"
    )


if __name__ == "__main__":
    main()
