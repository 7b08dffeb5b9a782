"""Plant facts into a document, and ask for them later."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from wakesleep.streams.ask import reply_to
from wakesleep.streams.decompress import COMPRESSIONS
from wakesleep.streams.documents import Document
from wakesleep.streams.errors import Refused
from wakesleep.streams.facts import make_facts, parse_kinds, plan_plants
from wakesleep.streams.language_model import LanguageModel
from wakesleep.streams.manifest import PlantedFact
from wakesleep.streams.prompts import statement_ids
from wakesleep.streams.segments import Insert
from wakesleep.streams.stream_config import FactsOptions
from wakesleep.streams.token_reader import open_tokens
from wakesleep.streams.tokenizer import Tokenizer
from wakesleep.ttl.state import StreamState

BUNDLED = Path(__file__).parent / "data" / "document.txt.xz"
FACTS_IN_BUNDLED = 64  # of facts.count, where no document is named
STEP = 1 << 16  # tokens counted at a time
BYTES_PER_TOKEN = 3  # of ordinary text, a little too low: better too many tokens than too few
PACKED = 4  # bytes of ordinary text per compressed byte


def plant_facts(
    options: FactsOptions,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    limit: float,
    split: str = "test",
) -> tuple[PlantedFact, ...]:
    """Choose facts and where they go in all of `documents`, before the first token is read.

    Raises:
        Refused: the length of a document is not known, or they are too short for the facts.
    """
    if not options.count:
        return ()
    try:
        facts = make_facts(options.count, options.seed, parse_kinds(options.kinds), split)
        statements = [text for fact in facts for text in fact.statements]
        added = sum(len(statement_ids(tokenizer, text)) for text in statements)
        total = min(limit, _num_tokens(documents, tokenizer, limit) + added)
        plants = plan_plants(facts, int(total), options.seed)
    except ValueError as error:
        where = documents[0].name if len(documents) == 1 else f"{len(documents)} documents"
        why = str(error).splitlines()[0]
        raise Refused(f"facts cannot be planted in {where}: {why}") from error
    positions: list[list[int]] = [[] for _ in facts]
    for plant in plants:
        positions[plant.fact].append(plant.position)
    return tuple(
        PlantedFact(
            kind=fact.kind,
            statements=fact.statements,
            positions=tuple(places),
            question=fact.question,
            answer=fact.answer or "",
        )
        for fact, places in zip(facts, positions, strict=True)
    )


def inserts_of(facts: Iterable[PlantedFact], tokenizer: Tokenizer, before: int) -> list[Insert]:
    """The statements to come in a document that begins after `before` tokens, in their order."""
    inserts = [
        Insert(position - before, statement_ids(tokenizer, text))
        for fact in facts
        for position, text in zip(fact.positions, fact.statements, strict=True)
        if position >= before
    ]
    return sorted(inserts, key=lambda insert: insert.position)


def ask_facts(
    language_model: LanguageModel, state: StreamState, facts: Sequence[PlantedFact], tokens: int
) -> list[dict[str, Any]]:
    """Ask for facts after `tokens` tokens; the state stays as it is.

    `age_tokens` counts from the statement that answers, the last one of a fact that changed.
    """
    rows = []
    for fact in facts:
        reply = reply_to(language_model, state, fact.question)
        rows.append(
            {
                "kind": fact.kind,
                "question": fact.question,
                "answer": fact.answer,
                "predicted": reply.text,
                "correct": reply.text.strip() == fact.answer,
                "known": reply.known,
                "confidence": reply.confidence,
                "age_tokens": tokens - fact.positions[-1],
            }
        )
    return rows


def sample_of(facts: Sequence[PlantedFact], tokens: int, count: int) -> list[PlantedFact]:
    """At most `count` of the facts that were said in full by now, from the oldest to the newest."""
    said = sorted((f for f in facts if f.positions[-1] < tokens), key=lambda f: f.positions[-1])
    if len(said) <= count:
        return said
    return [said[round(i * (len(said) - 1) / (count - 1))] for i in range(count)]


def estimate_tokens(document: Document, tokenizer: Tokenizer) -> float:
    """About how many tokens a document has, without reading it; inf for standard input."""
    if (tokens := _bundled_tokens(document, tokenizer)) is not None:
        return tokens
    if document.size is None:
        return float("inf")
    if document.kind == "ids":
        return document.num_ids
    packed = document.path.suffix.lower() in COMPRESSIONS
    return document.size * (PACKED if packed else 1) // BYTES_PER_TOKEN


def _num_tokens(documents: Sequence[Document], tokenizer: Tokenizer, limit: float) -> float:
    """Tokens of documents and of the ends between them, or any number from `limit` on.

    Reads them, unless it is the bundled one.

    Raises:
        Refused: standard input without a limit.
    """
    total = len(documents) - 1
    for document in documents:
        if (tokens := _bundled_tokens(document, tokenizer)) is not None:
            total += tokens
            continue
        if not document.resumable:
            if limit == float("inf"):
                raise Refused("the length of standard input is not known; add limit_tokens=N")
            return limit
        reader = open_tokens(document, tokenizer)
        while total + reader.tokens < limit and not reader.finished:
            reader.read(STEP)
        total += reader.tokens
        if total >= limit:
            break
    return total


def _bundled_tokens(document: Document, tokenizer: Tokenizer) -> int | None:
    """The recorded length of the bundled document, None for others and other tokenizers."""
    if document.path != BUNDLED:
        return None
    record = json.loads(BUNDLED.with_name("document.json").read_text(encoding="utf-8"))
    return record["tokens"] if record["tokenizer_sha256"] == tokenizer.sha256 else None
