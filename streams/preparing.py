"""Find out what a call of `stream` will do, before it does anything."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wakesleep.streams.documents import Document, open_documents
from wakesleep.streams.errors import Refused
from wakesleep.streams.lane_reading import plan_lanes
from wakesleep.streams.manifest import DocumentRecord, Manifest, PlantedFact
from wakesleep.streams.planting import BUNDLED, FACTS_IN_BUNDLED, estimate_tokens, plant_facts
from wakesleep.streams.reading_plan import ReadingPlan, plan_reading
from wakesleep.streams.stream_config import StreamConfig
from wakesleep.streams.tokenizer import Tokenizer


class Prepared(NamedTuple):
    """What a call of `Session.read` will do."""

    plan: ReadingPlan  # without tasks if everything was read before
    documents: list[Document]  # all that were asked for
    source: str | None  # the file or folder, None for standard input
    config: StreamConfig
    facts: tuple[PlantedFact, ...]  # to be planted, if the session is new
    total_tokens: float  # of the session when it is done: an estimate, inf if nobody knows
    notes: list[str]  # what people should know, a line each


def prepare_reading(
    config: StreamConfig,
    manifest: Manifest | None,
    tokenizer: Tokenizer,
    document: str | Path | None,
    *,
    again: bool = False,
) -> Prepared:
    """Open what is asked for, compare it with what was read, and look at its beginning.

    Args:
        manifest: of the session so far, None if it is new.
        document: a file, a folder or `-`; None: what is unfinished, or the bundled document.

    Raises:
        Refused: no such document, another one is unfinished, this one changed, a limit that
            cannot be, facts that do not fit.
    """
    records = manifest.documents if manifest else ()
    documents, source, notes = _open(document, records, config, again)
    limit, vocab_size = config.limit_tokens, tokenizer.vocab_size
    if config.lanes > 1:
        if again:
            raise Refused("several lanes read a folder once: --again needs another --session")
        plan = plan_lanes(config, records, documents, vocab_size)
    else:
        plan = plan_reading(records, documents, vocab_size=vocab_size, limit=limit, again=again)
    if manifest is not None and (plan.known or not documents):
        _check_limit(plan, manifest, limit)
    for task in plan.tasks:
        task.document.check(vocab_size)
    facts: tuple[PlantedFact, ...] = ()
    if manifest is None:
        bundled = document is None and config.lanes == 1
        config = with_fact_count(config, FACTS_IN_BUNDLED if bundled else 0)
        facts = plant_facts(config.facts, documents, tokenizer, limit)
    done = manifest.tokens if manifest else 0
    total = done + _left(plan, records, tokenizer, limit)
    return Prepared(plan, documents, source, config, facts, total, notes)


def with_fact_count(config: StreamConfig, default: int) -> StreamConfig:
    """The config with a number of facts: `default` if none is given."""
    if config.facts.count is not None:
        return config
    return dataclasses.replace(config, facts=dataclasses.replace(config.facts, count=default))


def _open(
    document: str | Path | None,
    records: Sequence[DocumentRecord],
    config: StreamConfig,
    again: bool,
) -> tuple[list[Document], str | None, list[str]]:
    """The documents to be read, where they are, and what was skipped there."""
    if document is None and records:
        last = records[-1]
        over = last.finished and (last.ended or last.tokens >= config.limit_tokens)
        if over and config.lanes == 1 and not again:
            return [], last.source, []
        if last.source is None:
            raise Refused(
                f"{last.name} cannot be read a second time; {last.tokens:,} tokens of it are read",
                "",
                "go on with another document, or with - and the rest of it",
            )
        # The bundled document may have moved with its installation.
        moved = not os.path.lexists(last.source) and Path(last.source).name == BUNDLED.name
        document = BUNDLED if moved else last.source
    source = None if str(document) == "-" else os.path.abspath(document or BUNDLED)
    keys = {name: getattr(config, name) for name in ("errors", "encoding", "max_ratio")}
    folder = open_documents("-" if source is None else Path(source), **keys)
    skipped = ", ".join(f"{count} {why}" for why, count in sorted(folder.skipped.items()))
    return folder.documents, source, [f"skipped in {document}: {skipped}"] if skipped else []


def _check_limit(plan: ReadingPlan, manifest: Manifest, new: float) -> None:
    """Hold a document that was begun to its limit, which may only grow."""
    old = manifest.config.limit_tokens
    planted = bool(manifest.facts) and 0 in plan.known
    if new < old or (planted and new != old):
        raise Refused(
            f"limit_tokens={new:,} is given, the session has limit_tokens={old:,}",
            "with planted facts it is fixed" if planted else "it can only be raised",
            "leave it out, or use another --session",
        )


def _left(
    plan: ReadingPlan, records: Sequence[DocumentRecord], tokenizer: Tokenizer, limit: float
) -> float:
    """About how many tokens the tasks will add."""
    done = [0 if task.index is None else records[task.index].tokens for task in plan.tasks]
    sizes = [estimate_tokens(task.document, tokenizer) for task in plan.tasks]
    left = sum(max(0, size - read) for size, read in zip(sizes, done, strict=True))
    return max(0, min(left, limit - plan.used - sum(done)))
