"""Stream a text with facts of the validation split, to choose when an answer counts as known.

    python scripts/validation_session.py valid.npy model=MODEL --session runs/valid
    python scripts/recall_table.py runs/valid --output runs/known --threshold MODEL/known.json

The keys are those of `wakesleep stream`. Families that are held out of training are left out here,
too: nothing may be chosen by them. The same command goes on where it stopped.
"""

import argparse
from pathlib import Path
from typing import Any

from wakesleep.streams.config import split_overrides
from wakesleep.streams.console import Console
from wakesleep.streams.errors import Refused
from wakesleep.streams.families import TRAINED_KINDS
from wakesleep.streams.planting import plant_facts
from wakesleep.streams.progress import Progress
from wakesleep.streams.reading import Watch
from wakesleep.streams.results import final_table
from wakesleep.streams.session import Session
from wakesleep.streams.stopping import Stopped

FACTS = {"facts.count": "256", "facts.kinds": ",".join(TRAINED_KINDS)}


def stream(
    folder: Path, document: Path, keys: dict[str, Any], watch: Watch | None = None
) -> dict[str, Any]:
    """Read `document` into a session, or go on with it; return the session's summary.

    Args:
        keys: of `wakesleep stream`, by dotted name.

    Raises:
        Refused, Stopped, OSError, RuntimeError: as `Session.read`.
    """
    with Session.open(folder, **(FACTS | keys)) as session:
        prepared = session.prepare(document)
        if session.manifest is None:
            config, tokenizer = prepared.config, session.language_model.tokenizer
            texts, limit = prepared.documents, config.limit_tokens
            facts = plant_facts(config.facts, texts, tokenizer, limit, "validation")
            prepared = prepared._replace(facts=facts)
        return session.read(prepared, watch=watch)


def main() -> None:
    """Read the command line, stream, and show what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path, help="a text, or a .npy of ids")
    parser.add_argument("keys", nargs="*", help="key=value of wakesleep stream")
    parser.add_argument("--session", required=True, type=Path, help="folder")
    args = parser.parse_intermixed_args()
    try:
        with Progress(Console(), float("inf")) as progress:
            keys = split_overrides(args.keys)
            summary = stream(args.session, args.document, keys, progress)
    except Refused as refusal:
        parser.exit(2, f"{refusal}\n")
    except Stopped as stopped:
        parser.exit(128 + stopped.number, f"{stopped}; the same command goes on\n")
    print(final_table(args.session, summary))


if __name__ == "__main__":
    main()
