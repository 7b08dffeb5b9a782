"""Training data: a batch is a function of its number, so the cursor of a run is one integer."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Protocol

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wakesleep.streams.depo import Depo
from wakesleep.streams.errors import Refused
from wakesleep.streams.id_files import ids_sha256, map_ids
from wakesleep.streams.mixture import Mixture, MixtureConfig, load_tokenizer
from wakesleep.streams.mqar import MQAR
from wakesleep.streams.stopping import SIGNALS
from wakesleep.streams.tokenizer import Tokenizer
from wakesleep.streams.training_batch import Answers, Batch
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_text import TextLanes, check_apart, open_texts

ENDLESS = 1 << 40  # batches; Lightning needs a length, or it reads one batch ahead of the cursor
HELD_OUT = 1 << 32  # added to the seed of generated validation batches


class Source(Protocol):
    """What every kind of data offers."""

    fingerprint: str  # of the files that it reads

    def batch(self, number: int) -> Batch: ...


class Tasks:
    """Generated sequences, each one document of T tokens that starts with the batch."""

    def __init__(
        self, task: Mixture | MQAR | Depo, lanes: int, segments: int, fingerprint: str = ""
    ) -> None:
        self.task, self.lanes, self.segments = task, lanes, segments
        self.fingerprint = fingerprint

    def batch(self, number: int) -> Batch:
        """Batch `number` of the run."""
        rows = {k: torch.from_numpy(v) for k, v in self.task.batch(number, self.lanes).items()}
        B, T = rows["tokens"].shape
        # a column's prediction is judged by the token behind it
        weight = torch.zeros(B, T)
        weight[:, :-1] = rows["weight"][:, 1:]
        answers = Answers(
            lane=rows["answer_lane"],
            start=rows["answer_start"] - 1,
            stop=rows["answer_stop"] - 1,
            age=rows["answer_age"],
            kind=rows["answer_kind"],
        )
        stale = torch.full((B, T), -1)
        if "answer_stale" in rows:
            stale[answers.lane, answers.start] = rows["answer_stale"]
        reset = torch.zeros(B, self.segments, dtype=torch.bool)
        reset[:, 0] = True
        return Batch(
            tokens=rows["tokens"],
            targets=rows["tokens"].roll(-1, 1),
            weight=weight,
            asked=_inside(answers, B, T),
            recalled=_inside(Answers(*(part[answers.age >= 0] for part in answers)), B, T),
            fact=rows["fact"],
            value=rows["value"],
            stale=stale,
            repeat=torch.zeros(B, T, dtype=torch.int64),
            lengths=torch.full((B, self.segments), T // self.segments),
            reset=reset,
            answers=answers,
            cursor=number,
        )


class Numbered(Dataset):
    """A source as torch's DataLoader wants it."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, number: int) -> Batch:
        return self.source.batch(number)


class LaneLoader:
    """Batches from `start` on. The length is that of an endless epoch; `max_steps` ends a run.

    Processes that make them ahead change nothing: a batch follows from its number.
    """

    def __init__(self, source: Source, start: int, workers: int = 0) -> None:
        self.source, self.cursor, self.workers = source, start, workers

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Batch]:
        numbers = range(self.cursor, ENDLESS)
        batches = map(self.source.batch, numbers) if not self.workers else self._ahead(numbers)
        for number, batch in zip(numbers, batches, strict=True):
            self.cursor = number + 1
            yield batch

    def _ahead(self, numbers: range) -> DataLoader:
        given = {"batch_size": None, "num_workers": self.workers}
        return DataLoader(
            Numbered(self.source), sampler=numbers, worker_init_fn=_leave_signals, **given
        )

    def state_dict(self) -> dict[str, int]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.cursor = state["cursor"]


def _leave_signals(worker: int) -> None:
    """Go on at a signal to the whole group: the trainer saves first, and ends its workers then."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StreamDataModule(lightning.LightningDataModule):
    """Data of a run for Lightning, going on where the module's last step ended.

    Raises:
        ValueError: it does not fit the model or the lengths, or what is held out is trained on.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.source = open_source(config)
        held_out = config.train.validate_every > 0
        self.validation = open_source(config, validation=True) if held_out else None

    def train_dataloader(self) -> LaneLoader:
        first = self.trainer.lightning_module.cursor
        return LaneLoader(self.source, first, self.config.data.workers)

    def val_dataloader(self) -> DataLoader | list:
        """All of a validation as one batch: the module's step takes its batches from the source."""
        if self.validation is None:
            return []
        return DataLoader([self.validation], batch_size=None)


def open_source(config: TrainConfig, *, validation: bool = False) -> Source:
    """The data of `config.data.kind`; for validation, data that training never sees.

    Raises:
        ValueError: the data does not fit the model or the lengths.
    """
    step, data = config.train, config.data
    seed = config.seed + (HELD_OUT if validation else 0)
    match data.kind:
        case "mqar":
            task = MQAR(data.mqar, step.sequence_len, seed)
            _check_vocabulary(config, data.mqar.vocab_size)
            return Tasks(task, step.lanes, step.segments_per_step)
        case "depo":
            task = Depo(data.depo, step.sequence_len, seed, longest=validation)
            _check_vocabulary(config, data.depo.vocab_size)
            return Tasks(task, step.lanes, step.segments_per_step)
        case "mixture":
            if validation:
                _check_corpora(data.mixture)
            task = Mixture(data.mixture, step.sequence_len, seed, validation=validation)
            _check_vocabulary(config, task.tokenizer.vocab_size)
            return Tasks(task, step.lanes, step.segments_per_step, task.fingerprint)
        case "text":
            sizes = (step.lanes, step.segment, step.segments_per_step)
            lanes = TextLanes(_texts(config, validation), *sizes, seed, held_out=validation)
            _check_vocabulary(config, lanes.highest_id + 1)
            return lanes


def data_key(config: TrainConfig, *, validation: bool = False) -> str:
    """The setting that names the files of the data."""
    if config.data.kind == "mixture":
        return f"data.mixture.{'validation_corpus' if validation else 'corpus'}"
    apart = validation and config.data.validation_paths
    return "data.validation_paths" if apart else "data.paths"


def answer_kinds(config: TrainConfig) -> tuple[str, ...]:
    """Names of the kinds of answers that the data has."""
    match config.data.kind:
        case "mqar":
            return MQAR.kinds
        case "depo":
            return Depo.kinds
        case "mixture":
            return Mixture.kinds
        case "text":
            return TextLanes.kinds


def open_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of the ids; the shipped one where they stand for no text.

    Raises:
        Refused: there is none, or it is another program's.
    """
    data = config.data
    path = {"mixture": data.mixture.tokenizer, "text": data.tokenizer}.get(data.kind)
    return load_tokenizer(path)


def text_tokenizer(config: TrainConfig) -> Tokenizer | None:
    """The tokenizer of the ids, None where they stand for no text or for one of another size."""
    if config.data.kind in ("mqar", "depo"):
        return None
    tokenizer = open_tokenizer(config)
    return tokenizer if tokenizer.vocab_size == config.model.vocab_size else None


def _inside(answers: Answers, lanes: int, columns: int) -> Tensor:
    """1 in the columns of answers, 0 elsewhere: [B, T] float32."""
    steps = torch.zeros(lanes, columns + 1)
    one = torch.ones(len(answers.lane))
    steps.index_put_((answers.lane, answers.start), one, accumulate=True)
    steps.index_put_((answers.lane, answers.stop), -one, accumulate=True)
    return steps.cumsum(1)[:, :-1].clamp(0, 1)


def _texts(config: TrainConfig, validation: bool) -> list[np.ndarray]:
    """The documents of data.paths, or those that are held out of training.

    Raises:
        ValueError: a document is in both, or nothing is left of either.
    """
    data, held = config.data, config.data.validation_documents
    if not data.paths:
        raise ValueError("data.kind=text needs data.paths=[FILE or FOLDER, ...]")
    if validation and not held and not data.validation_paths:
        raise ValueError(
            f"train.validate_every={config.train.validate_every} needs documents that are held "
            "out: data.validation_documents=1, or data.validation_paths=[FILE or FOLDER, ...]"
        )
    sha256 = open_tokenizer(config).sha256
    training = open_texts(data.paths, "data.paths", sha256)
    if held >= len(training):
        raise ValueError(
            f"data.validation_documents={held} leaves nothing to train on: data.paths hold "
            f"{len(training)}"
        )
    if held:
        training, held_out = training[:-held], training[-held:]
    else:
        key, paths = "data.validation_paths", data.validation_paths
        held_out = open_texts(paths, key, sha256) if validation else []
    check_apart(training, held_out)
    return [text.ids for text in (held_out if validation else training)]


def _check_corpora(mixture: MixtureConfig) -> None:
    named = {"corpus": mixture.corpus, "validation_corpus": mixture.validation_corpus}
    if not all(named.values()):
        return  # `Mixture` says which one is missing
    training, held_out = (map_ids(path, f"data.mixture.{key}") for key, path in named.items())
    same = len(training) == len(held_out)  # only then they are compared
    if same and ids_sha256(training) == ids_sha256(held_out):
        raise Refused(
            "data.mixture.validation_corpus is the text of data.mixture.corpus",
            f"{mixture.validation_corpus} and {mixture.corpus}",
            "Hold other text out.",
        )


def _check_vocabulary(config: TrainConfig, needed: int) -> None:
    if needed > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is less than the data's {needed}; "
            "set both to the same number"
        )
