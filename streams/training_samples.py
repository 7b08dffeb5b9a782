"""One question of a validation with what was answered: what a number does not show."""

from __future__ import annotations

from wakesleep.streams.prompts import QUESTION, decode_answer
from wakesleep.streams.tokenizer import Tokenizer
from wakesleep.streams.training_batch import Batch
from wakesleep.streams.unroll import TokenLoss


def sample_answer(batch: Batch, tokens: TokenLoss, tokenizer: Tokenizer | None) -> str | None:
    """The question whose fact is the longest ago, its answer, and what the model told instead.

    Args:
        tokenizer: None where ids stand for no text.
    """
    answers = batch.answers
    if not len(answers.age) or int(answers.age.max()) < 0:
        return None
    oldest = int(answers.age.argmax())
    lane, start, stop, age = (int(part[oldest]) for part in answers[:4])
    row = batch.tokens[lane, : start + 1].tolist()
    wanted, told = (x[lane, start:stop].tolist() for x in (batch.targets, tokens.said))
    if tokenizer is None:
        question, wanted, told = f"token {row[-1]}", str(wanted), str(told)
    else:
        begin = len(row) - 1 - row[::-1].index(QUESTION)
        question = tokenizer.decode(row[begin:]).strip()
        wanted, told = (decode_answer(tokenizer, ids) for ids in (wanted, told))
    verdict = "right" if wanted == told else f"told {told!r}" if told else "told nothing"
    return f"{question} {wanted!r}, {age:,} tokens ago: {verdict}"
