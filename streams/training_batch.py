"""What one step is given.

Shapes: B lanes, T tokens per lane and step, K segments of T / K tokens, N answers.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Answers(NamedTuple):
    """Where the answers of a batch are; exact match is counted over all tokens of one."""

    lane: Tensor  # [N] int64
    start: Tensor  # [N] int64 column whose prediction is the answer's first token
    stop: Tensor  # [N] int64 column behind the last
    age: Tensor  # [N] int64 tokens since the fact; -1 = there is none
    kind: Tensor  # [N] int64 index into the source's kinds


class Batch(NamedTuple):
    tokens: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64, the token after each
    weight: Tensor  # [B, T] float32 of each prediction in the loss
    asked: Tensor  # [B, T] float32, 1 where an answer token is predicted
    recalled: Tensor  # [B, T] float32, 1 where that answer was said before
    fact: Tensor  # [B, T] bool: a token that the store should keep, for the metrics
    value: Tensor  # [B, T] bool: these, and values that no longer count or nobody asks for
    lengths: Tensor  # [B, K] int64 tokens of each segment
    reset: Tensor  # [B, K] bool: a document starts with this segment
    stale: Tensor  # [B, T] int64 where an answer begins: the value that was overwritten, or -1
    repeat: Tensor  # [B, T] int64 tokens since the target was read behind the same two; 0 = never
    answers: Answers
    cursor: int  # number of this batch

    def part(self, lanes: slice) -> Batch:
        """Some lanes of the batch, numbered from 0."""
        lane = self.answers.lane
        inside = (lane >= lanes.start) & (lane < lanes.stop)
        answers = Answers(*(x[inside] for x in self.answers))
        rows = {name: x[lanes] for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**rows, answers=answers._replace(lane=answers.lane - lanes.start))
