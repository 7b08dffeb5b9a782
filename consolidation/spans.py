"""Spans of the store: the text around what was kept, for passes of sleep over it.

Shapes: B lanes, H heads, S store places, L tokens of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wakesleep.ttl.state import SPAN, SPAN_AFTER, StreamState

BEFORE = SPAN - 1 - SPAN_AFTER  # ids of a span in front of the pair's own token


def stored_spans(state: StreamState, limit: int, chunk: int) -> tuple[list[Tensor], list[Tensor]]:
    """Ids and positions [B, L] of rows of text, about `limit` tokens per lane.

    Tokens that heads of any layer keep are ranked by their scores, summed up; the best come first,
    each with the text around it. Pieces that touch are one row. Rows come in the order of the
    stream, and lanes with fewer rows get empty ones (-1); L is a multiple of the chunk and differs
    from row to row.
    """
    lanes = [_pieces(*_kept(state, lane), limit) for lane in range(len(state.position))]
    ids, positions = [], []
    for row in range(max(map(len, lanes), default=0)):
        pieces = [lane[row] if row < len(lane) else {} for lane in lanes]
        length = -(-max(map(len, pieces)) // chunk) * chunk
        table = np.full((2, len(lanes), length), -1, np.int64)
        for lane, piece in enumerate(pieces):
            if piece:
                table[0, lane, -len(piece) :] = list(piece.values())
                table[1, lane, -len(piece) :] = list(piece)
        first, second = torch.from_numpy(table).to(state.position.device)
        ids.append(first)
        positions.append(second)
    return ids, positions


def _kept(state: StreamState, lane: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions [n], scores above a head's lowest [n] and spans [n, SPAN], of all heads."""
    found = []
    for block in state.blocks:
        if block.store is None:
            continue
        parts = (block.store.position, block.store.score, block.store.span)
        position, score, span = (t[lane].cpu() for t in parts)
        score = score.float()
        low = torch.where(score.isfinite(), score, torch.inf).amin(-1, keepdim=True)
        held = (position >= 0) & score.isfinite()
        found.append([position[held], (score - low)[held], span[held]])
    if not found:
        return np.empty(0, np.int64), np.empty(0), np.empty((0, SPAN), np.int64)
    position, score, span = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return position, score.astype(np.float64), span


def _pieces(
    position: np.ndarray, score: np.ndarray, span: np.ndarray, limit: int
) -> list[dict[int, int]]:
    """Pieces of text, each {position: id} in order, around the best positions."""
    tokens, first, which = np.unique(position, return_index=True, return_inverse=True)
    sums = np.bincount(which, weights=score, minlength=len(tokens))
    text: dict[int, int] = {}
    for at in np.lexsort((-tokens, -sums)):  # of equal ones the later
        if len(text) >= limit:
            break
        begin = int(tokens[at]) - BEFORE
        around = enumerate(span[first[at]].tolist())
        text.update({begin + i: token for i, token in around if token >= 0})
    pieces: list[dict[int, int]] = []
    for at in sorted(text):
        if not pieces or at - 1 not in pieces[-1]:
            pieces.append({})
        pieces[-1][at] = text[at]
    return pieces
