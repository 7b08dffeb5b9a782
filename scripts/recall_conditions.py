"""The conditions in which `recall_table.py` asks a session.

They differ while asking alone: the stream was read once, with every part on. So a window-only or
store-only row here is a trained model without a part that it was trained with, not a twin.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from bm25 import PASSAGE, search

from wakesleep.streams.language_model import LanguageModel
from wakesleep.streams.quantities import count
from wakesleep.streams.recorder import IDS
from wakesleep.streams.runner import StreamRunner, capacity_of
from wakesleep.streams.segments import Segment
from wakesleep.streams.session import Session
from wakesleep.streams.tokenizer import END, NUM_SPECIAL
from wakesleep.ttl.state import StreamState

PASSAGES = 4  # that are read for a question in the condition bm25
AS_READ = "as read"
MEANING = {
    AS_READ: "the state of the session",
    "store off": (
        "parts switched off in a trained model, while asking: its stores are neither read nor "
        "written"
    ),
    "memory off": (
        "parts switched off in a trained model, while asking: its memories go on learning, but "
        "their outputs are zero"
    ),
    "both off": "parts switched off in a trained model, while asking: both; the window is left",
    "reset": "a state that has read nothing; it must be at chance",
    "bm25": (
        f"unbounded storage: a fresh state reads the {PASSAGES} passages of {PASSAGE} tokens that "
        "BM25 finds among all ids of the stream, the best one last, and then the question"
    ),
}


class Given(NamedTuple):
    """What answers one question."""

    language_model: LanguageModel
    state: StreamState
    starts: Sequence[int] | None = None  # first tokens of the passages that were found


def conditions_of(session: Session) -> list[str]:
    """The conditions that a session can be asked in: a part that is missing cannot be off."""
    blocks = session.runner.state.blocks
    store = any(block.store is not None for block in blocks)
    memory = any(block.memory is not None for block in blocks)
    possible = {
        "store off": store,
        "memory off": memory,
        "both off": store and memory,
        "bm25": session.config.keep_ids,
    }
    return [name for name in MEANING if possible.get(name, True)]


def given_for(condition: str, session: Session, questions: Sequence[str]) -> Iterator[Given]:
    """What answers each of `questions` in a condition."""
    language_model, state = session.language_model, session.runner.state
    match condition:
        case "as read":
            given = Given(language_model, state)
        case "store off":
            given = switched_off(language_model, state, store=True)
        case "memory off":
            given = switched_off(language_model, state, memory=True)
        case "both off":
            given = switched_off(language_model, state, store=True, memory=True)
        case "reset":
            lanes = torch.ones_like(state.position, dtype=torch.bool)
            given = Given(language_model, language_model.model.reset(state, lanes))
        case "bm25":
            yield from _with_passages(session, questions)
            return
    for _ in questions:
        yield given


def switched_off(
    language_model: LanguageModel,
    state: StreamState,
    *,
    store: bool = False,
    memory: bool = False,
) -> Given:
    """Model and state without some parts; those given are not changed.

    A store that is off is gone from the state: an empty one would begin to fill. A memory that is
    off stays and learns, because the scores of a store may come from it, but in a copy of the model
    its output projection is zero and its page (MAC) is hidden from the attention: the layer adds
    nothing to what it reads. Fresh fast weights would be something else; they still speak, as the
    initial weights do.
    """
    if store:
        blocks = tuple(block._replace(store=None) for block in state.blocks)
        state = state._replace(blocks=blocks)
    if memory:
        model = copy.deepcopy(language_model.model)
        for layer in model.blocks:
            if layer.memory is not None:
                torch.nn.init.zeros_(layer.memory.out.weight)
                if layer.attention.page_bias is not None:
                    torch.nn.init.constant_(layer.attention.page_bias, -torch.inf)
        language_model = language_model._replace(model=model)
    return Given(language_model, state)


def _with_passages(session: Session, questions: Sequence[str]) -> Iterator[Given]:
    """A fresh state for each question that has read the best passages for it, the best one last.

    They are apart as documents of a session are: by one end-of-document token.
    """
    language_model, state = session.language_model, session.runner.state
    window, capacity = language_model.model.window_of(state), capacity_of(state)
    ids = np.memmap(session.folder / IDS, np.dtype(session.manifest.ids_dtype), "r")
    ids = ids[: session.tokens]
    text = f"searching {count(len(ids))} tokens for {len(questions)} questions"
    print(text, file=sys.stderr, flush=True)
    queries = [language_model.tokenizer.encode(f" {question}") for question in questions]
    for starts in search(ids, queries, PASSAGES).start:
        parts = [part for s in starts[::-1] for part in (ids[s : s + PASSAGE], [END])][:-1]
        read = np.concatenate(parts).astype(np.int64)
        runner = StreamRunner(language_model, window=window, capacity=capacity)
        runner.read(Segment(read, read >= NUM_SPECIAL))
        yield Given(language_model, runner.state, starts.tolist())
