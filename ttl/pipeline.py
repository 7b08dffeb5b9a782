"""Read one call on two workers: a layer begins with a piece while the next layer has the last one.

    layer 0   [piece 0][piece 1][piece 2]
    layer 1            [piece 0][piece 1][piece 2]
    layer 2                     [piece 0][piece 1][piece 2]

A layer waits for the layer below it on the same piece, and for itself on the piece before, for
nothing else. Most operations of a stream are those of a chunk, too small to be split between cores;
whole layers are not. The result is that of reading the pieces one by one, bit for bit, whoever is
faster.

Shapes: B lanes, T tokens of the call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from wakesleep.ttl.model import StepStats, TTLModel
from wakesleep.ttl.state import StreamState

WORKERS = 2  # the store's layer is half of all work: a third one would wait
PIECE = 512  # tokens, of the first and the last one half; smaller ones cost more for each token


class Pipeline:
    """A model on the CPU whose calls without gradients are read by two workers.

    Each worker has half of the process's threads. Where there are less than two of these, or the
    call is no longer than a piece, the model is called as it is.
    """

    def __init__(self, model: TTLModel) -> None:
        self.model = model
        self._workers: ThreadPoolExecutor | None = None

    def __call__(
        self, tokens: Tensor, state: StreamState, lengths: Tensor
    ) -> tuple[Tensor, StreamState, StepStats]:
        """Read tokens [B, T]; see `TTLModel.forward`. Gives logits [B, T, V], state, stats."""
        threads = torch.get_num_threads()
        if (
            threads < WORKERS
            or tokens.device.type != "cpu"
            or tokens.shape[-1] <= PIECE
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return self.model(tokens, state, lengths)
        self.model.check_call(tokens, state, lengths)
        reading = _Reading(self.model, tokens, state, lengths)
        if self._workers is None:
            self._workers = ThreadPoolExecutor(WORKERS, "wakesleep-layer")
        try:
            _finish(reading, self._workers, threads // WORKERS)
        finally:
            torch.set_num_threads(threads)  # what a worker has set holds for threads to come, too
        return reading.joined()


def cuts(length: int) -> list[int]:
    """Where pieces of a call of so many tokens begin, and the end of the last one.

    The first layer begins alone and the last one ends alone: both with half a piece.
    """
    return [0, *range(PIECE // 2, length, PIECE), length]


def _finish(reading: _Reading, workers: ThreadPoolExecutor, threads: int) -> None:
    """Let the workers do all that is to be done, each with so many threads."""
    running: dict[Future, int] = {}
    inference = torch.is_inference_mode_enabled()
    try:
        while True:
            busy = set(running.values())
            for piece in reading.startable(busy):
                work = partial(_alone, reading.task(piece), threads, inference)
                running[workers.submit(work)] = piece
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                reading.note(running.pop(future), future.result())
    finally:
        for future in running:
            future.cancel()
        wait(running)


def _alone(work: Callable[[], Any], threads: int, inference: bool) -> Any:
    """Do it in a worker, whose modes are its own."""
    torch.set_num_threads(threads)
    with torch.inference_mode(inference), torch.no_grad():
        return work()


class _Reading:
    """How far the pieces of a call have come."""

    def __init__(self, model: TTLModel, tokens: Tensor, state: StreamState, lengths: Tensor):
        self.model, self.state, self.calls = model, state, []
        self.cuts = cuts(tokens.shape[1])
        for start, stop in pairwise(self.cuts):
            inside = (lengths - start).clamp(0, stop - start)
            call = model.open_call(tokens[:, start:stop], state, inside)
            state = state._replace(position=call.position, ids=call.ids)
            self.calls.append(call)
        self.parts = list(self.state.blocks)  # of every layer, behind the pieces it has read
        self.x = [call.x for call in self.calls]  # of every piece, from the last layer it passed
        self.stats: list[list] = [[] for _ in self.calls]
        self.ready: list = [None] * len(self.parts)  # what its last piece left for the next
        self.passed = [0] * len(self.parts)  # pieces that a layer has read
        self.told = [False] * len(self.calls)  # pieces whose logits are there
        like, vocab = self.x[0], model.config.vocab_size
        self.logits = like.new_empty(*tokens.shape, vocab)

    def startable(self, busy: set[int]) -> list[int]:
        """Pieces that wait for nothing, the earliest first."""
        return [p for p in range(len(self.calls)) if p not in busy and self._free(p)]

    def _free(self, piece: int) -> bool:
        layer = len(self.stats[piece])
        if layer == len(self.parts):
            return not self.told[piece]
        return self.passed[layer] == piece

    def task(self, piece: int) -> Callable[[], Any]:
        """What is to be done next with a piece."""
        layer, call, x = len(self.stats[piece]), self.calls[piece], self.x[piece]
        if layer == len(self.parts):
            rows = self.logits[:, self.cuts[piece] : self.cuts[piece + 1]]
            return lambda: rows.copy_(self.model.finish(x))
        more = piece + 1 < len(self.calls) and not self.calls[piece + 1].grid.alone
        given = call.given._replace(ready=self.ready[layer], hands_over=more)
        return partial(self.model.blocks[layer], x, self.parts[layer], call.grid, given)

    def note(self, piece: int, result: Any) -> None:
        """Take what came of a piece's task."""
        layer = len(self.stats[piece])
        if layer == len(self.parts):
            self.told[piece] = True
            return
        self.x[piece], self.parts[layer], seen = result
        self.ready[layer] = seen.ready
        self.stats[piece].append(seen)
        self.passed[layer] += 1

    def joined(self) -> tuple[Tensor, StreamState, StepStats]:
        """Logits, state and stats of the whole call."""
        state, found = self.state, []
        for call, x, seen in zip(self.calls, self.x, self.stats, strict=True):
            state, stats = self.model.close_call(call, state, self.parts, x, seen)
            found.append(stats)
        surprise, written = (torch.cat([s[i] for s in found], 1) for i in range(2))
        nonfinite = sum(stats.nonfinite for stats in found)
        return self.logits, state, StepStats(surprise, written, nonfinite, None)
