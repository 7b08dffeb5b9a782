"""The one template of questions and answers, for training, evaluation and `ask`.

    <|question|> What is the pass code of the amber gate?<|answer|> 4821<|stop|>

A question about something that was never said is answered <|unknown|><|stop|>. Questions, answers
and planted statements begin with a space, as words inside a text do, so that a name has the same
tokens in all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wakesleep.streams.tokenizer import SPECIAL_TOKENS

if TYPE_CHECKING:
    from wakesleep.streams.tokenizer import Tokenizer

QUESTION, ANSWER, STOP, UNKNOWN = (
    SPECIAL_TOKENS.index(f"<|{name}|>") for name in ("question", "answer", "stop", "unknown")
)


def encode_question(tokenizer: Tokenizer, question: str) -> list[int]:
    """Ids of a question, up to where the answer begins."""
    return wrap_question(tokenizer.encode(f" {question}"))


def encode_answer(tokenizer: Tokenizer, answer: str | None) -> list[int]:
    """Ids of an answer, the final stop included; None is the answer to nothing planted."""
    return wrap_answer(None if answer is None else tokenizer.encode(f" {answer}"))


def wrap_question(ids: Sequence[int]) -> list[int]:
    """The template around the ids of a question."""
    return [QUESTION, *ids, ANSWER]


def wrap_answer(ids: Sequence[int] | None) -> list[int]:
    """The template around the ids of an answer; None is the answer to nothing planted."""
    return [*([UNKNOWN] if ids is None else ids), STOP]


def decode_answer(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of a generated answer, up to <|stop|>."""
    ids = list(ids)
    return tokenizer.decode(ids[: ids.index(STOP)] if STOP in ids else ids).strip()


def statement_ids(tokenizer: Tokenizer, text: str, lead: str = " ") -> list[int]:
    """Ids of a planted statement, inside a paragraph or (`lead` a line break) as a line's start."""
    return tokenizer.encode(f"{lead}{text}")
