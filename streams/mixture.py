"""Endless training sequences: pairs to copy, dense facts, recall in text, stories, language.

Every sequence is a function of (seed, step, lane), so a run resumes from the number of its step.
B lanes, T tokens each, N answers.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np

from wakesleep.streams.babi import spread_babi, write_babi
from wakesleep.streams.errors import Refused
from wakesleep.streams.facts import FactMaker
from wakesleep.streams.id_files import fingerprint, ids_sha256, map_ids
from wakesleep.streams.random_pairs import write_latest_pairs, write_pairs
from wakesleep.streams.reversed_facts import write_reversed
from wakesleep.streams.sequences import (
    ANSWER_KINDS,
    BABI,
    Page,
    RecallConfig,
    Sequence,
    write_dense,
    write_recall,
)
from wakesleep.streams.stories import write_story
from wakesleep.streams.tokenizer import Tokenizer
from wakesleep.ttl.config_json import parse_json

EXCERPT = 128  # tokens around a hard place
SORTS = (
    *(
        "pairs",
        "pairs_reversed",
        "pairs_latest",
        "dense",
        "reversed",
        "recall",
        "changes",
        "stories",
    ),
    *("babi", "babi_in_text", "language"),
)
STAGED = ("facts_min", "facts_max", "far")  # keys of RecallConfig


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Which sequences a run reads, in stages.

    Each share is one number for the whole run, or one for each stage; the shares of a stage are
    taken relative to their sum. So are the three keys of `facts` that may change on the way.
    """

    corpus: str = ""  # .npy of scripts/build_corpus.py: noise and language
    validation_corpus: str = ""
    hard: str | None = None  # .npy of scripts/mine_negatives.py: places that look like facts
    hard_share: float = 0.5  # of sequences with facts whose text is made of such places
    tokenizer: str | None = None  # tokenizer.json; none: the one that is shipped
    stage_tokens: tuple[float, ...] = ()  # tokens read when stage 2, 3, ... begins
    pairs: tuple[float, ...] = (
        0.05,
    )  # random tokens to be copied, close together, no text between
    pairs_reversed: tuple[float, ...] = (0.0,)  # the same, with the value before its name
    pairs_latest: tuple[float, ...] = (0.0,)  # the same, values change, the last one counts
    dense: tuple[float, ...] = (0.1,)  # many facts close together, no text between
    reversed: tuple[float, ...] = (0.0,)  # the same, with the value before what it is asked by
    recall: tuple[float, ...] = (0.45,)  # facts in text
    changes: tuple[float, ...] = (0.15,)  # facts in text, half of which change; the latest counts
    stories: tuple[float, ...] = (0.15,)  # who went where, in text
    babi: tuple[float, ...] = (0.0,)  # stories of bAbI tasks, no text between
    babi_in_text: tuple[float, ...] = (0.0,)  # one such story, in text
    babi_tasks: tuple[str, ...] = BABI
    babi_open: float = 0.0  # share of these stories with people, places and things of our own lists
    language: tuple[float, ...] = (0.15,)  # text alone
    facts: RecallConfig = field(default_factory=RecallConfig)
    facts_min: tuple[int, ...] = ()  # in the place of facts.facts_min; () leaves it
    facts_max: tuple[int, ...] = ()
    far: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if list(self.stage_tokens) != sorted(self.stage_tokens):
            raise ValueError(f"stage_tokens must increase, not {self.stage_tokens}")
        for name in ("hard_share", "babi_open"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if not self.babi_tasks or not set(self.babi_tasks) <= set(BABI):
            raise ValueError(f"babi_tasks must be some of {', '.join(BABI)}, not {self.babi_tasks}")
        stages = len(self.stage_tokens) + 1
        for name in SORTS:
            shares = getattr(self, name)
            if len(shares) not in (1, stages) or min(shares) < 0:
                raise ValueError(
                    f"{name} must be one share or one for each of the {stages} stages, "
                    f"0 or more, not {shares}"
                )
        for name in STAGED:
            if len(getattr(self, name)) not in (0, 1, stages):
                raise ValueError(f"{name} must be one number or one for each of {stages} stages")
        for stage in range(stages):
            self.facts_at(stage)  # checks them
            if not sum(self.shares(stage)) > 0:
                raise ValueError(f"a share must be above 0 in every stage; stage {stage + 1}: none")

    def shares(self, stage: int) -> list[float]:
        """Shares of `SORTS` in a stage, counted from 0."""
        rows = [getattr(self, name) for name in SORTS]
        return [row[stage] if len(row) > 1 else row[0] for row in rows]

    def facts_at(self, stage: int) -> RecallConfig:
        """How facts are spread in a stage, counted from 0."""
        given = {name: row for name in STAGED if (row := getattr(self, name))}
        return replace(self.facts, **{name: row[stage % len(row)] for name, row in given.items()})


class Mixture:
    """Batches of a run; number of the batch, seed and config decide everything.

    For validation the words, names, numbers and dates and the text are others, and the shares are
    those of the last stage.

    Raises:
        ValueError: no corpus, one of another tokenizer, or one shorter than a sequence.
    """

    kinds = ANSWER_KINDS

    def __init__(
        self, config: MixtureConfig, sequence_len: int, seed: int, *, validation: bool = False
    ) -> None:
        self.config, self.sequence_len, self.seed = config, sequence_len, seed
        self.split = "validation" if validation else "train"
        self.tokenizer = load_tokenizer(config.tokenizer)
        name = "validation_corpus" if validation else "corpus"
        path, name = getattr(config, name), f"data.mixture.{name}"
        self.corpus = _open_corpus(path, name, self.tokenizer)
        if len(self.corpus) <= sequence_len:
            raise ValueError(
                f"train.sequence_len must be below the {len(self.corpus):,} tokens of {name}, "
                f"not {sequence_len:,}"
            )
        self.hard = None
        if config.hard is not None and not validation:
            self.hard = map_ids(config.hard, "data.mixture.hard")
            if not len(self.hard) or self.hard.max() >= len(self.corpus):
                raise ValueError(
                    f"data.mixture.hard={config.hard} has no places, or not those of {name}"
                )

    @property
    def fingerprint(self) -> str:
        """One for all files that the sequences are made of."""
        parts = (self.tokenizer.sha256, ids_sha256(self.corpus))
        return fingerprint([*parts, *([] if self.hard is None else [ids_sha256(self.hard)])])

    def batch(self, step: int, lanes: int) -> dict[str, np.ndarray]:
        """One sequence per lane.

        Returns:
            tokens [B, T] int64; weight [B, T] float32 of predicting each token from those before
            it; value [B, T] bool, the values inside their statements, each with the token that ends
            it; fact [B, T] bool, those of them that still count; and of each answer int64 [N]:
            answer_lane, answer_start, answer_stop (the columns of its tokens), answer_age (tokens
            since the value was said; -1: nothing was) and answer_kind (index into `kinds`).
        """
        read = math.inf if self.split == "validation" else step * lanes * self.sequence_len
        stage = bisect_right(self.config.stage_tokens, read)
        rows = [self.sequence(step, lane, stage) for lane in range(lanes)]
        answers = [(lane, *answer) for lane, row in enumerate(rows) for answer in row.answers]
        columns = np.array(answers, np.int64).reshape(-1, 5).T
        names = ("answer_lane", "answer_start", "answer_stop", "answer_age", "answer_kind")
        return {
            "tokens": np.stack([row.tokens for row in rows]),
            "weight": np.stack([row.weight for row in rows]),
            "fact": np.stack([row.fact for row in rows]),
            "value": np.stack([row.value for row in rows]),
            **dict(zip(names, columns, strict=True)),
        }

    def sequence(self, step: int, lane: int, stage: int) -> Sequence:
        """The sequence of one lane in a stage (counted from 0)."""
        draw = random.Random(f"{self.split} {self.seed} {step} {lane}")
        facts = self.config.facts_at(stage)
        (sort,) = draw.choices(SORTS, self.config.shares(stage))
        page = Page(self.tokenizer, draw, self.sequence_len, facts)
        shares = {name: getattr(facts, name) for name in ("similar", "shared", "restated")}
        maker = FactMaker(self.split, draw, **shares)
        match sort:
            case "pairs":
                write_pairs(page)
            case "pairs_reversed":
                write_pairs(page, turned=True)
            case "pairs_latest":
                write_latest_pairs(page)
            case "dense":
                write_dense(page, maker)
            case "reversed":
                write_reversed(page, maker.words)
            case "recall":
                write_recall(page, maker, changed_share=0.0)
            case "changes":
                write_recall(page, maker, facts.changed_share)
            case "stories":
                write_story(page, maker.words)
            case "babi":
                write_babi(page, self.config.babi_tasks, maker.words, self.config.babi_open)
            case "babi_in_text":
                spread_babi(page, self.config.babi_tasks, maker.words, self.config.babi_open)
        return page.finish(self._text(draw, hard=sort != "language"))

    def _text(self, draw: random.Random, *, hard: bool) -> np.ndarray:
        """[T] ids: one passage, or excerpts around places that are easily taken for facts."""
        length, last = self.sequence_len, len(self.corpus) - self.sequence_len
        if not hard or self.hard is None or draw.random() >= self.config.hard_share:
            start = draw.randrange(last)
            return self.corpus[start : start + length]
        places = [int(self.hard[draw.randrange(len(self.hard))]) for _ in range(0, length, EXCERPT)]
        starts = [min(max(0, place - draw.randrange(EXCERPT)), last) for place in places]
        return np.concatenate([self.corpus[s : s + EXCERPT] for s in starts])[:length]


def load_tokenizer(path: str | None) -> Tokenizer:
    """The tokenizer of that file, or the one that is shipped."""
    if path is not None:
        return Tokenizer.load(path)
    shipped = resources.files("wakesleep.streams") / "data" / "default" / "tokenizer.json"
    return Tokenizer(shipped.read_bytes())


def _open_corpus(path: str, name: str, tokenizer: Tokenizer) -> np.ndarray:
    """Map the ids of scripts/build_corpus.py, after a look at whose they are."""
    if not path:
        raise ValueError(f"{name} must name a .npy of scripts/build_corpus.py; it is empty")
    ids, beside = map_ids(path, name), Path(path).with_suffix(".json")
    if not beside.is_file():
        raise Refused(f"{name}: {beside} is missing", "", "scripts/build_corpus.py writes both")
    index = parse_json(beside.read_bytes(), str(beside))
    if type(index) is not dict or index.get("tokenizer_sha256") != tokenizer.sha256:
        raise ValueError(f"{name}={path} is of another tokenizer; build it again with this one")
    return ids
